"""Runs in the environment of the real aos-prov: its provisioning code against a Unit, with a cloud made of files.

Arguments: address of the Unit, directory of the exchange. The request for registration goes to request.json; its
answer is awaited in answer.json.
"""

import json
import sys
import time
from pathlib import Path

from aos_prov.commands.command_provision import run_provision


class FileCloud:
    """The calls of aos-prov's cloud interface that provisioning makes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check_unit_is_not_provisioned(self, system_uid: str) -> None:
        (self._directory / "checked").write_text(system_uid)

    def register_device(self, payload: dict[str, object]) -> object:
        partial = self._directory / "request.partial"
        partial.write_text(json.dumps(payload))
        partial.rename(self._directory / "request.json")
        answer = self._directory / "answer.json"
        while not answer.exists():
            time.sleep(0.05)
        return json.loads(answer.read_text())

    def get_unit_link_by_system_uid(self, system_uid: str) -> None:
        return None


run_provision(sys.argv[1], FileCloud(Path(sys.argv[2])), reconnect_times=1, nodes_count=1)
