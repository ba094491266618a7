"""A component with its TLS key on a token: asks IAM for its certificate, then calls the protected port with it.

Arguments: public address, protected address, root file, certificate type, number of calls. Prints JSON: key URL, number
of answers, the first error.
"""

import asyncio
import json
import sys
from pathlib import Path

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common.errors import AosError
from aoscore.common.iamclient import IamPublicClient
from aoscore.common.rpc import LazyChannel
from aoscore.common.tls import TlsIdentity


async def main(public: str, protected: str, ca_file: str, cert_type: str, calls: str) -> None:
    """See above."""
    async with IamPublicClient(public, Path(ca_file)) as iam:
        identity = TlsIdentity.of(Path(ca_file), await iam.get_cert(cert_type))
    answers, failure = 0, ""
    async with LazyChannel(protected, lambda: identity) as channel:
        try:
            for _ in range(int(calls)):
                request = pb.GetCertRequest(type=cert_type)
                await channel.call("GetCert", stubs.IAMPublicCertServiceStub, "GetCert", request, timeout_s=20)
                answers += 1
        except AosError as error:
            failure = str(error)
    print(json.dumps({"url": identity.key_url, "answers": answers, "error": failure}), flush=True)


asyncio.run(main(*sys.argv[1:]))
