"""A component with its TLS key on a token: asks IAM for its certificate, then calls the protected port with it.

Arguments: public address, protected address, root file, certificate type, number of calls, number of bare connections
that are made all at once beside the calls, as the cloud link makes them. Prints JSON: key URL, number of answers and of
greetings on bare connections, the first error.
"""

import asyncio
import json
import ssl
import sys
from pathlib import Path

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common.connect import open_connection
from aoscore.common.errors import AosError
from aoscore.common.iamclient import IamPublicClient
from aoscore.common.rpc import LazyChannel, split_address
from aoscore.common.tls import TlsIdentity

# RFC 9113 §3.4, with an empty SETTINGS frame; the server begins with a SETTINGS frame too.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


async def greet(protected: str, context: ssl.SSLContext) -> bool:
    """Whether the server takes part in HTTP/2, so that it has accepted our certificate."""
    async with open_connection(*split_address(protected), context, timeout_s=20) as (reader, writer):
        writer.write(_PREFACE)
        return (await reader.readexactly(9))[3] == _SETTINGS


async def main(public: str, protected: str, ca_file: str, cert_type: str, calls: str, bare: str) -> None:
    """See above."""
    async with IamPublicClient(public, Path(ca_file)) as iam:
        identity = TlsIdentity.of(Path(ca_file), await iam.get_cert(cert_type))
    context = await asyncio.to_thread(identity.ssl_client_context, check_hostname=False)
    context.set_alpn_protocols(["h2"])
    greetings = asyncio.gather(*(greet(protected, context) for _ in range(int(bare))))
    answers, failure = 0, ""
    async with LazyChannel(protected, lambda: identity) as channel:
        try:
            for _ in range(int(calls)):
                request = pb.GetCertRequest(type=cert_type)
                await channel.call("GetCert", stubs.IAMPublicCertServiceStub, "GetCert", request, timeout_s=20)
                answers += 1
        except AosError as error:
            failure = str(error)
    greeted = sum(await greetings)
    print(json.dumps({"url": identity.key_url, "answers": answers, "greeted": greeted, "error": failure}), flush=True)


asyncio.run(main(*sys.argv[1:]))
