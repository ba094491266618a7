"""The real aos-prov from PyPI provisions the Unit; only the cloud behind it is played by the test."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty

from tests.support.iam import Iam

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def aos_prov(repository: Path) -> Path:
    """Python of an environment with the real cloud tools: AOSCORE_AOS_PROV_PYTHON, else the one of `make`."""
    python = Path(os.environ.get("AOSCORE_AOS_PROV_PYTHON", repository / ".venv-tools/bin/python"))
    if not python.exists():
        pytest.skip(f"{python} is not here: `make integration` sets it up, or set AOSCORE_AOS_PROV_PYTHON")
    return python


@pytest.fixture
def running(aos_prov: Path, iam: Iam) -> Iterator["subprocess.Popen[str]"]:
    iam.start(provisioning=True)
    driver = Path(__file__).with_name("aos_prov_driver.py")
    command = [aos_prov, driver, iam.protected, iam.root]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=iam.root
    )
    yield process
    process.kill()
    process.communicate()


def test_aos_prov_provisions_the_unit(running: "subprocess.Popen[str]", iam: Iam) -> None:
    request_file = iam.root / "request.json"
    end = time.monotonic() + 60
    while not request_file.exists():
        assert running.poll() is None and time.monotonic() < end, running.communicate()[0]
        time.sleep(0.05)
    request: dict[str, Any] = json.loads(request_file.read_text())
    assert (iam.root / "checked").read_text() == "unit-1"
    assert request["system_uid"] == request["hardware_id"] == "unit-1"
    assert (request["model_name"], request["model_version"]) == ("model", "1.2.3")
    (node,) = request["nodes"]
    assert (node["id"], node["type"], node["name"]) == ("node-1", "main-type", "main")
    assert node["attrs"]["MainNode"] == "" and node["cpus"] and node["totalRam"] > 0
    assert node["status"] == "unprovisioned" and node["errorInfo"]["message"] == ""
    assert {csr["cert_type"] for csr in request["additional_csrs"]} == {"iam", "sm", "cm"}
    answer = {
        "system_uid": request["system_uid"],
        "online_certificate": iam.authority.sign_request(request["online_public_csr"]),
        "offline_certificate": iam.authority.sign_request(request["offline_public_csr"]),
        "additional_certs": [
            {"cert_type": csr["cert_type"], "node_id": csr["node_id"], "cert": iam.authority.sign_request(csr["csr"])}
            for csr in request["additional_csrs"]
        ],
    }
    partial = iam.root / "answer.partial"
    partial.write_text(json.dumps(answer))
    partial.rename(iam.root / "answer.json")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    assert "Finished successfully" in output
    assert iam.state_file.read_text() == "provisioned"
    assert iam.stop() == 0
    iam.start()
    with iam.secure() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"
