"""Channel numbers and who of them goes first (mp-wire §4, §9). Pure."""

from collections.abc import Iterable

import msgspec

CONTROL = 16
PROXY = 17
RPC = 18


class Ports(msgspec.Struct, frozen=True):
    """Numbers of the channels; those of upstream are configuration."""

    iam_open: int = 1
    iam_secure: int = 2
    cm_open: int = 3
    cm_secure: int = 4

    @property
    def order(self) -> tuple[int, ...]:
        """All channels, most urgent first: a download must delay nothing else."""
        return (CONTROL, self.iam_open, self.iam_secure, self.cm_open, self.cm_secure, RPC, PROXY)

    @property
    def secure(self) -> tuple[int, ...]:
        """Channels with TLS."""
        return (self.iam_secure, self.cm_secure, RPC, PROXY)

    def served(self, *, provisioning: bool) -> tuple[int, ...]:
        """What a link carries: without certificates there is no secure channel."""
        return (CONTROL, self.cm_open, self.iam_open) if provisioning else self.order

    def certificates(self, *, iam: str, sm: str) -> dict[int, str]:
        """Certificate type of each secure channel, by the two types that are used."""
        return {self.iam_secure: iam, self.cm_secure: sm, PROXY: sm, RPC: sm}

    def taken(self) -> Iterable[int]:
        """Numbers that a configuration must not give to one of its own channels."""
        return (CONTROL, PROXY, RPC)
