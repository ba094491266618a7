"""Where the cloud is reached: host name and the ports its listeners really have."""

from dataclasses import asdict, dataclass

LOGS_PATH = "/logs/"


@dataclass
class Endpoints:
    """URLs that the cloud hands out. Ports are 0 until the listeners are bound."""

    domain: str
    rest_port: int = 0
    discovery_port: int = 0
    ws_port: int = 0
    blob_port: int = 0
    blob_scheme: str = "http"

    @property
    def _host(self) -> str:
        return f"[{self.domain}]" if ":" in self.domain else self.domain

    @property
    def discovery_url(self) -> str:
        """Base URL of service discovery; the Unit takes the path from its own config (§1.2)."""
        return f"https://{self._host}:{self.discovery_port}"

    @property
    def websocket_url(self) -> str:
        """URL of the Unit link."""
        return f"wss://{self._host}:{self.ws_port}/ws"

    def blob_url(self, digest: str) -> str:
        """URL of an encrypted blob."""
        return f"{self.blob_scheme}://{self._host}:{self.blob_port}/blobs/{digest.replace(':', '/')}"

    @property
    def log_url(self) -> str:
        """Where Units upload logs."""
        return f"https://{self._host}:{self.rest_port}{LOGS_PATH}"

    def ports(self) -> dict[str, str | int]:
        """Content of ports.json."""
        return asdict(self)
