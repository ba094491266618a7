"""Which key belongs to which Node (observed.md, defect 8).

Nothing in an Aos certificate names the Node: its common name is the system id, the same for all Nodes of a Unit. But
the Main Node hands every request for a certificate on (iam.md §9.2), and the private key never leaves the Node that
made it. So the Main Node remembers the public key of each request under the Node that answered with it, and a
certificate is that Node's when it holds such a key. Renewals come the same way, and the Node needs to know nothing of
it: an IAM of AosCore 9.1 on a Secondary Node works as before.
"""

import logging

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv
from aoscore.iam.database import IamDatabase

_log = logging.getLogger(__name__)


def request_digest(csr_pem: str) -> bytes:
    """The digest of the key in a request. Raises InvalidArgumentError unless the request proves that it has the key."""
    # Import on use: certificates are asked for once in a long time.
    from cryptography import x509

    from aoscore.common.certs import key_digest

    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        proven = request.is_signature_valid
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"not a certificate request: {error}") from error
    if not proven:
        raise InvalidArgumentError("the certificate request has a wrong signature")
    return key_digest(request)


class NodeKeys:
    """Nodes by the digests of their keys. A call that returns is on disk already."""

    def __init__(self, database: IamDatabase) -> None:
        self._database = database
        self._owners: dict[bytes, str] = {}

    async def load(self) -> None:
        """Read what is stored, before anything else is called."""
        self._owners = await self._database.node_keys()

    def owner(self, digest: bytes) -> str | None:
        """The Node that has this key; None when it is of nobody we know."""
        return self._owners.get(digest)

    def knows(self, node_id: str) -> bool:
        """Whether any key of the Node is known."""
        return node_id in self._owners.values()

    async def bind(self, node_id: str, digest: bytes) -> None:
        """The Node has this key."""
        if self._owners.get(digest) == node_id:
            return
        given_up = await self._database.save_node_key(digest, node_id)
        self._owners[digest] = node_id
        for old in given_up:
            self._owners.pop(old, None)
        _log.info(kv("Key of Node noted", nodeID=node_id, sha256=digest.hex()))

    async def forget(self, node_id: str) -> None:
        """The Node has none of its keys any more."""
        if self.knows(node_id):
            await self._database.remove_node_keys(node_id)
            self._owners = {digest: owner for digest, owner in self._owners.items() if owner != node_id}
