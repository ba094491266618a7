"""The cloud's public tools, unchanged from PyPI, against the devcloud: aos-keys, aos-prov and aos-signer.

Each test runs in namespaces of its own (tests.support.cloudtools).
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cloudtools import Tools, new_user
from tests.support.devcloud import DevcloudProcess, MiniUnit
from tests.support.iam import Iam
from tests.support.pki import TestCa

pytestmark = [pytest.mark.net, pytest.mark.timeout(110)]


@pytest.fixture
def cloud(tools_cloud: DevcloudProcess) -> DevcloudProcess:
    return tools_cloud


@pytest.mark.parametrize("role", ["sp", "oem"])
def test_aos_keys_gets_a_certificate_for_a_token(cloud: DevcloudProcess, tools: Tools, role: str) -> None:
    assert new_user(cloud, tools, role).stat().st_size > 0
    information = tools.succeed("aos-keys", "info", f"--{role}", "--skip-check-version")
    assert f"{role}-user" in information
    assert "localhost" in information


# The service that aos-signer packs

CONFIG: dict[str, Any] = {
    "schemaVersion": 2,
    "publisher": {"author": "Alice", "company": "Example"},
    "publish": {"tlsKey": "aos-user-sp.p12"},
    "items": [
        {
            "identity": {"type": "service", "codename": "hello", "title": "Hello"},
            "version": "1.0.0",
            "sourceFolder": "hello",
            "images": [
                {
                    "sourceFolder": "rootfs",
                    "archInfo": {"architecture": "amd64"},
                    "workingDir": "/",
                    "cmd": "/bin/busybox echo hello",
                    "env": ["GREETING=hello"],
                }
            ],
            "configuration": {
                "instances": {"minInstances": 2, "priority": 5},
                "hostname": "hello-host",
                "exposedPorts": [8080, "53/udp"],
                "quotas": {"cpuLimit": 5000, "ramLimit": "64MiB", "pidsLimit": 10},
                "state": {"required": True},
            },
        }
    ],
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of aos-signer: busybox with links, and a state."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    folder = tmp_path / "project"
    bin_folder = folder / "hello" / "rootfs" / "bin"
    bin_folder.mkdir(parents=True)
    shutil.copy(busybox, bin_folder / "busybox")
    (bin_folder / "sh").symlink_to("busybox")
    os.link(bin_folder / "busybox", bin_folder / "ash")
    (folder / "hello" / "state.dat").write_text("counter=0")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def oci_layout(cloud: DevcloudProcess, index_digest: str, target: Path) -> Path:
    """An OCI layout of one item, for tools that know nothing of Aos: blobs as the cloud stores them."""
    shutil.copytree(cloud.directory / "blobs", target / "blobs")
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    index = json.loads((target / "blobs" / index_digest.replace(":", "/")).read_text())
    index["manifests"][0]["annotations"] = {"org.opencontainers.image.ref.name": "hello"}
    (target / "index.json").write_text(json.dumps(index))
    return target


def test_aos_signer_uploads_a_service_that_other_tools_can_open(
    cloud: DevcloudProcess, tools: Tools, project: Path, tmp_path: Path
) -> None:
    new_user(cloud, tools, "sp")
    output = tools.succeed("aos-signer", "--skip-check-version", "go", cwd=project)
    assert "successfully uploaded" in output
    assert "system CAs" not in output, "the cloud's root was trusted at the first try"
    (item,) = cloud.client.call("items")
    assert (item["codename"], item["version"]) == ("hello", "1.0.0")
    for path in (cloud.directory / "blobs" / "sha256").iterdir():
        assert subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True).stdout.startswith(
            path.name
        )

    layout = oci_layout(cloud, item["indexDigest"], tmp_path / "layout")
    inspected = json.loads(
        subprocess.run(
            ["skopeo", "inspect", "--config", f"oci:{layout}:hello"], check=True, capture_output=True, text=True
        ).stdout
    )
    assert inspected["config"]["Cmd"] == ["/bin/busybox", "echo", "hello"]
    assert inspected["config"]["Env"] == ["GREETING=hello"]
    assert set(inspected["config"]["ExposedPorts"]) == {"8080", "53/udp"}
    # skopeo checks every digest and the diff id of the layer on the way.
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:hello", f"docker-archive:{tmp_path}/a.tar"], check=True)
    unpacked = tmp_path / "unpacked"
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:hello", unpacked], check=True, stdout=subprocess.DEVNULL)
    source = project / "hello" / "rootfs" / "bin"
    made = unpacked / "rootfs" / "bin"
    assert {path.name for path in made.iterdir()} == {"busybox", "sh", "ash"}
    assert (
        hashlib.sha256((made / "ash").read_bytes()).digest()
        == hashlib.sha256((source / "busybox").read_bytes()).digest()
    )
    assert (made / "sh").readlink() == Path("busybox")
    assert subprocess.run([made / "sh", "-c", "echo runs"], check=True, capture_output=True).stdout == b"runs\n"

    # The state that the bundle brought is the one a new instance gets.
    unit = MiniUnit(cloud)
    unit.provision()
    cloud.run("assign", "hello", "unit-1")
    with unit:
        desired = unit.report()
        assert desired["instances"][0]["numInstances"] == 2
        assert desired["instances"][0]["priority"] == 5
        subject = desired["instances"][0]["subject"]["id"]
        instance = {"item": {"id": item["id"]}, "subject": {"id": subject}, "instance": 0}
        unit.acked({"messageType": "stateRequest", **instance, "default": True})
        assert unit.receive("updateState")["data"]["state"] == "counter=0"


def test_aos_signer_says_why_an_upload_is_refused(cloud: DevcloudProcess, tools: Tools, project: Path) -> None:
    new_user(cloud, tools, "sp")
    tools.succeed("aos-signer", "--skip-check-version", "go", cwd=project)
    again = tools.run("aos-signer", "--skip-check-version", "go", cwd=project)
    assert again.returncode != 0
    assert "exists already" in " ".join(again.stdout.split())
    with (project / "batch.tar.gz").open("r+b") as bundle:
        bundle.truncate(1000)
    assert tools.run("aos-signer", "--skip-check-version", "upload", cwd=project).returncode != 0


def test_aos_signer_of_an_oem_may_not_upload(cloud: DevcloudProcess, tools: Tools, project: Path) -> None:
    user = new_user(cloud, tools, "oem")
    config = {**CONFIG, "publish": {"tlsKey": user.name}}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    done = tools.run("aos-signer", "--skip-check-version", "go", cwd=project)
    assert done.returncode != 0
    assert "deployment_bundles_create" in done.stdout
    assert cloud.client.call("items") == []


def test_an_image_encrypted_by_aos_signer_is_opened_with_the_clouds_key(
    cloud: DevcloudProcess, tools: Tools, project: Path, tmp_path: Path
) -> None:
    new_user(cloud, tools, "sp")
    key = tmp_path / "image.key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    sign = ("aos-signer", "--skip-check-version", "sign", "-k", str(key))
    tools.succeed(*sign, cwd=project)
    refused = tools.run("aos-signer", "--skip-check-version", "upload", cwd=project)
    assert "image keys" in " ".join(refused.stdout.split())
    cloud.run("image-key", str(key))
    tools.succeed("aos-signer", "--skip-check-version", "upload", cwd=project)
    (item,) = cloud.client.call("items")
    layout = oci_layout(cloud, item["indexDigest"], tmp_path / "layout")
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:hello", f"docker-archive:{tmp_path}/a.tar"], check=True)


def test_aos_prov_provisions_a_unit_that_then_connects(cloud: DevcloudProcess, tools: Tools, tmp_path: Path) -> None:
    user = new_user(cloud, tools, "oem")
    root = tmp_path / "unit"
    root.mkdir()
    iam = Iam(root, TestCa("not used"))
    iam.ca_file.write_bytes(cloud.root_file.read_bytes())
    iam.start(provisioning=True)
    provision = ["provision", "-u", iam.protected, "-p", str(user), "--nodes", "1"]
    quiet = ["--skip-check-version", "--retry-count", "1", "--check-software"]
    try:
        output = tools.succeed("aos-prov", *provision, *quiet)
        assert "Finished successfully" in output
        assert iam.state_file.read_text() == "provisioned"
        (listed,) = cloud.client.call("units")
        assert (listed["systemId"], listed["model"]) == ("unit-1", "model 1.2.3")
        issued = {(one["node_id"], one["type"]) for one in cloud.client.call("certificates", unit="unit-1")}
        assert issued == {("node-1", cert_type) for cert_type in ("online", "offline", "iam", "sm", "cm")}
        again = tools.run("aos-prov", *provision, *quiet)
        assert again.returncode != 0
        assert 'status "provisioned"' in " ".join(again.stdout.split())
        iam.stop()
    finally:
        iam.kill()
    # What IAM stored opens the link: the Unit of the test goes on with its keys and certificates.
    unit = MiniUnit(cloud)
    stored = [path.read_bytes() for path in (root / "keys" / "online").rglob("*") if path.is_file()]
    (chain,) = [content for content in stored if b"BEGIN CERTIFICATE" in content]
    (private,) = [content for content in stored if b"PRIVATE KEY" in content]
    identity = tmp_path / "online.pem"
    identity.write_bytes(private + chain)
    unit.identities["online"] = identity
    with unit:
        unit.report()
    assert cloud.client.call("violations", unit="unit-1") == []
