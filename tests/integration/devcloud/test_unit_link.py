"""A Unit on the link: discovery, statuses, blobs, renewal, logs, and every fault the cloud can commit."""

import base64
import gzip
import http.client
import io
import json
import signal
import ssl
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from aoscore.common.errors import FailedError
from tests.support.devcloud import DevcloudProcess, MiniUnit, client_context, die_with_parent, write_service


def manifest_of(unit: MiniUnit, desired: dict[str, Any]) -> dict[str, Any]:
    """Index and manifest of the one desired item."""
    index = json.loads(unit.fetch(desired["items"][0]["indexDigest"], desired))
    manifest: dict[str, Any] = json.loads(unit.fetch(index["manifests"][0]["digest"], desired))
    return manifest


def violations(cloud: DevcloudProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cloud.client.call("violations", unit="unit-1")
    return found


def test_from_discovery_to_a_verified_layer(cloud: DevcloudProcess, unit: MiniUnit, service: Path) -> None:
    found = unit.discover()
    assert {name: found[name] for name in ("version", "systemId", "errorCode")} == {
        "version": 7,
        "systemId": "unit-1",
        "errorCode": 0,
    }
    with unit:
        first = unit.report()
        assert (first["items"], first["instances"]) == ([], [])
        cloud.run("assign", "hello", "unit-1", "--instances", "3")
        desired = unit.receive("desiredStatus")["data"]
        assert desired["items"][0]["version"] == "1.0.0"
        assert desired["instances"][0]["numInstances"] == 3
        manifest = manifest_of(unit, desired)
        image = json.loads(unit.fetch(manifest["config"]["digest"], desired))
        assert image["config"]["Cmd"] == ["/bin/app"]
        assert json.loads(unit.fetch(manifest["aosItemConfig"]["digest"], desired))["balancingPolicy"] == "enabled"
        layer = gzip.decompress(unit.fetch(manifest["layers"][0]["digest"], desired))
        with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
            content = archive.extractfile("bin/app")
            assert content is not None
            assert content.read() == (service / "hello/rootfs/bin/app").read_bytes()
        cloud.run("unassign", "hello", "unit-1")
        assert unit.receive("desiredStatus")["data"]["items"] == []
    assert violations(cloud) == []


def test_the_desired_status_comes_once_a_connection_and_at_every_change(
    cloud: DevcloudProcess, unit: MiniUnit, service: Path
) -> None:
    cloud.run("assign", "hello", "unit-1")
    for _ in range(2):
        with unit:
            assert unit.report()["items"][0]["version"] == "1.0.0"
            unit.acked(unit.status())
            with pytest.raises(TimeoutError):
                unit.receive("desiredStatus", timeout_s=0.5)
    with unit:
        unit.report()
        cloud.run("upload", str(write_service(service, "1.1.0")))
        assert unit.receive("desiredStatus")["data"]["items"][0]["version"] == "1.1.0"


def test_blobs_are_served_in_ranges(cloud: DevcloudProcess, unit: MiniUnit, service: Path) -> None:
    cloud.run("assign", "hello", "unit-1")
    with unit:
        desired = unit.report()
        info = unit.blob_info(desired["items"][0]["indexDigest"])

    def resumed(url: str) -> bytes:
        return unit.download(url, Range="bytes=0-99") + unit.download(url, Range="bytes=100-")

    assert json.loads(unit.open_blob(info, resumed, desired))["schemaVersion"] == 2
    request = urllib.request.Request(info["urls"][0], method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.headers["Accept-Ranges"] == "bytes"
        assert int(response.headers["Content-Length"]) == info["size"]
    for url in (info["urls"][0][:-1] + "x", info["urls"][0][:-64] + "0" * 64):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            unit.download(url)


# Who may connect


def test_only_an_online_certificate_gets_in(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    base = f"https://localhost:{cloud.ports['discovery_port']}"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        unit.discover_at(base, "cm")
    request = urllib.request.Request(f"{base}/sd/v7/", b"{}", method="POST")
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        urllib.request.urlopen(request, context=client_context(cloud.root_file), timeout=10)
    user = cloud.user_context("oem")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, context=user, timeout=10)


def test_a_unit_cannot_speak_for_another(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    unit.system_id = "unit-2"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        unit.discover()


def test_a_wrong_or_revoked_token_is_refused(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with pytest.raises(InvalidStatus, match="401"):
        unit.connect(token="wrong")
    token = unit.discover()["authToken"]
    unit.connect(token=token)
    unit.disconnect()
    cloud.client.call("revoke_tokens")
    with pytest.raises(InvalidStatus, match="401"):
        unit.connect(token=token)


def test_a_forgotten_unit_is_out_and_may_come_back(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with pytest.raises(urllib.error.HTTPError, match="409"):
        MiniUnit(cloud).provision()
    with unit:
        unit.report()
        cloud.client.call("forget_unit", unit="unit-1")
        with pytest.raises(ConnectionClosed):
            unit.receive_raw()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        unit.discover()
    again = MiniUnit(cloud)
    again.provision()
    with again:
        again.report()


def test_a_second_connection_replaces_the_first(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    unit.connect()
    unit.report()
    other = MiniUnit(cloud)
    other.identities = unit.identities
    with other:
        other.report()
        with pytest.raises(ConnectionClosed):
            unit.receive_raw()
        assert cloud.client.call("unit", unit="unit-1")["online"]
        other.acked(other.status())
    assert wait_offline(cloud)


# What goes wrong with a spoilt blob: a check fails by its name, or the connection ends early.
_SPOILT = {"wrong_digest": "SHA3-256", "corrupt_blob": "SHA3-256", "truncated_blob": "IncompleteRead|reset"}


def wait_offline(cloud: DevcloudProcess) -> bool:
    for event in iter(lambda: cloud.client.call("unit", unit="unit-1")["online"], False):
        assert event
    return True


# Delivery


def test_what_is_not_acked_comes_again_after_a_reconnect(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with unit:
        unit.report()
        cloud.client.call("override_env", unit="unit-1", items=[])
        first = unit.receive("overrideEnvVars", ack=False)
    with unit:
        assert unit.receive("overrideEnvVars") == first
        assert cloud.client.call("unit", unit="unit-1")["unacked"] == []


def test_messages_for_a_unit_that_is_away_wait_for_it(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    cloud.client.call("override_env", unit="unit-1", items=[{"variables": [{"name": "A", "value": "1"}]}])
    with unit:
        assert unit.receive("overrideEnvVars")["data"]["items"][0]["variables"] == [{"name": "A", "value": "1"}]


def test_a_message_that_breaks_the_contract_is_nacked_and_reported(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with unit:
        unit.report()
        txn = unit.send({"messageType": "unitStatus", "isDeltaInfo": False})
        answer = unit.receive("nack")
        assert answer["header"]["txn"] == txn
        assert answer["data"]["retryAfter"] > 0
        unit.send_raw(b"{")
        unit.send_raw("text")
        unit.acked(unit.status())
        (bad_status, bad_json, text) = violations(cloud)
        assert bad_status["type"] == "unitStatus"
        assert "nodes" in str(bad_status["problems"])
        assert "JSON" in str(bad_json["problems"])
        assert "text" in str(text["problems"])


def test_the_cloud_refuses_to_send_what_breaks_the_contract(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with pytest.raises(FailedError, match="password"):
        message = {"messageType": "deprovisioningRequest", "correlationId": "c", "node": {"codename": "main"}}
        cloud.client.call("send", unit="unit-1", data=message)


# Faults


def add_fault(cloud: DevcloudProcess, kind: str, **values: Any) -> None:
    cloud.client.call("add_fault", fault={"kind": kind, **values})


def test_faults_silence_nack_and_delay(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with unit:
        unit.report()
        add_fault(cloud, "silence", on="unitStatus")
        txn = unit.send(unit.status())
        with pytest.raises(TimeoutError):
            unit.receive("ack", timeout_s=0.5)
        add_fault(cloud, "nack", on="unitStatus", retry_after_ms=123)
        unit.send(unit.status(), txn)
        assert unit.receive("nack")["data"]["retryAfter"] == 123
        add_fault(cloud, "delay", on="unitStatus", seconds=0.6)
        unit.send(unit.status(), txn)
        with pytest.raises(TimeoutError):
            unit.receive("ack", timeout_s=0.3)
        assert unit.receive("ack")["header"]["txn"] == txn
        unit.acked(unit.status())
        assert cloud.client.call("faults") == []


def test_fault_drop_connection(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with unit:
        unit.report()
        add_fault(cloud, "drop_connection", on="unitStatus")
        unit.send(unit.status())
        with pytest.raises(ConnectionClosed):
            unit.receive_raw()
    with unit:
        unit.report()
        cloud.client.call("disconnect", unit="unit-1")
        with pytest.raises(ConnectionClosed):
            unit.receive_raw()


def test_faults_malformed_json_text_frame_and_duplicate(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with unit:
        unit.report()
        add_fault(cloud, "malformed_json", on="desiredStatus")
        cloud.client.call("resend_desired", unit="unit-1")
        with pytest.raises(ValueError, match="line 1"):
            json.loads(unit.receive_raw())
        add_fault(cloud, "text_frame", on="desiredStatus")
        cloud.client.call("resend_desired", unit="unit-1")
        assert isinstance(unit.receive_raw(), str)
        add_fault(cloud, "duplicate", on="desiredStatus")
        cloud.client.call("resend_desired", unit="unit-1")
        assert unit.receive_raw() == unit.receive_raw()


def test_faults_of_blobs(cloud: DevcloudProcess, unit: MiniUnit, service: Path) -> None:
    cloud.run("assign", "hello", "unit-1")
    with unit:
        desired = unit.report()
        digest = desired["items"][0]["indexDigest"]
        for kind in ("wrong_digest", "corrupt_blob", "truncated_blob"):
            add_fault(cloud, kind, on="blobUrls" if kind == "wrong_digest" else "blob", digest=digest, size_bytes=10)
            with pytest.raises((AssertionError, http.client.IncompleteRead, ConnectionError), match=_SPOILT[kind]):
                unit.fetch(digest, desired)
        add_fault(cloud, "http_status", on="blob", status=404)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            unit.fetch(digest, desired)
        add_fault(cloud, "drop_connection", on="blob")
        with pytest.raises((ConnectionError, http.client.HTTPException, urllib.error.URLError)):
            unit.fetch(digest, desired)
        add_fault(cloud, "unsigned", on="blobUrls")
        assert "signInfo" not in unit.blob_info(digest)
        unit.fetch(digest, desired)


def test_faults_of_discovery(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    add_fault(cloud, "http_status", on="discovery", status=503)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        unit.discover()
    add_fault(cloud, "http_status", on="websocket", status=401)
    with pytest.raises(InvalidStatus, match="401"):
        unit.connect()
    add_fault(cloud, "drop_connection", on="discovery", times=0)
    for _ in range(2):
        with pytest.raises((ConnectionError, http.client.HTTPException, urllib.error.URLError)):
            unit.discover()
    cloud.client.call("clear_faults")
    unit.discover()
    with pytest.raises(FailedError, match="meltdown"):
        add_fault(cloud, "meltdown")


# Whole conversations


def test_certificates_are_renewed_over_the_link(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    oem = cloud.user_context("oem")
    (known,) = cloud.rest("GET", "/units/?system_uid=unit-1", oem)["items"]
    with unit:
        unit.report()
        assert cloud.rest("GET", "/units/unit-1/", oem)["online_status"] == "Online"
        cloud.rest("POST", f"/units/{known['id']}/renew-certificates/", oem)
        asked = unit.receive("renewCertificatesNotification")["data"]
        assert asked["unitSecrets"]["nodes"] == [{"node": {"codename": "main"}, "secret": "password"}]
        node = {"codename": "main"}
        requests = [{"type": one["type"], "node": node, "csr": unit.csr(one["type"])} for one in asked["certificates"]]
        assert len(requests) == 5
        unit.acked({"messageType": "issueUnitCertificates", "requests": requests})
        issued = unit.receive("issuedUnitCertificates")["data"]
        serials = [
            {"type": one["type"], "node": one["node"], "serial": unit.apply(one["type"], one["certificateChain"])}
            for one in issued["certificates"]
        ]
        unit.acked({"messageType": "installUnitCertificatesConfirmation", "certificates": serials})
    listed = cloud.rest("GET", f"/units/{known['id']}/certificates/", oem)
    assert listed["total"] == 5
    assert {one["status"] for one in listed["items"]} == {"renew_done"}
    assert {one["serial"] for one in listed["items"]} == {one["serial"] for one in serials}
    with unit:
        unit.report()
    assert violations(cloud) == []


def test_a_renewal_asked_for_while_the_unit_is_away_survives_a_restart(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    cloud.client.call("renew", unit="unit-1")
    assert cloud.stop() == 0
    cloud.start()
    with unit:
        unit.report()
        assert len(unit.receive("renewCertificatesNotification")["data"]["certificates"]) == 5


def test_everything_is_there_after_a_restart(cloud: DevcloudProcess, unit: MiniUnit, service: Path) -> None:
    cloud.run("assign", "hello", "unit-1")
    with unit:
        before = unit.report()
    assert cloud.stop() == 0
    assert not (cloud.directory / "ports.json").exists()
    assert not (cloud.directory / "admin.sock").exists()
    left = cloud.directory / "uploads" / "half-an-upload"
    left.write_bytes(b"x")
    cloud.start()
    assert not left.exists()
    with unit:
        assert unit.report() == before
        assert manifest_of(unit, before)["schemaVersion"] == 2
    (listed,) = cloud.client.call("units")
    assert (listed["systemId"], listed["nodes"]) == ("unit-1", 1)


def test_a_log_is_asked_for_and_put_together(cloud: DevcloudProcess, unit: MiniUnit, service: Path) -> None:
    with unit, ThreadPoolExecutor(1) as pool:
        unit.report()
        output = pool.submit(cloud.run, "logs", "unit-1", "--item", "hello", "--timeout-s", "20")
        request = unit.receive("requestLog")["data"]
        assert request["logType"] == "instanceLog"
        assert request["filter"]["nodeIds"] == [{"codename": "main"}]
        packed = gzip.compress(b"first line\nsecond line\n")
        for part in (1, 2):
            content = packed[:9] if part == 1 else packed[9:]
            unit.acked(
                {
                    "messageType": "pushLog",
                    "correlationId": request["correlationId"],
                    "node": {"codename": "main"},
                    "part": part,
                    "partsCount": 2,
                    "content": base64.b64encode(content).decode(),
                    "status": "ok",
                }
            )
        assert output.result() == "--- main: ok\nfirst line\nsecond line\n"


def test_a_log_is_uploaded(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    with unit, ThreadPoolExecutor(1) as pool:
        unit.report()
        output = pool.submit(cloud.run, "logs", "unit-1", "--https", "--timeout-s", "20")
        request = unit.receive("requestLog")["data"]
        options = request["uploadOptions"]
        assert options["type"] == "https" and options["bearerTokenTtl"] > datetime.now(UTC).isoformat()

        def upload(content: bytes, token: str = options["bearerToken"], **changes: str) -> int:
            part = {
                "messageType": "pushLog",
                "correlationId": request["correlationId"],
                "node": {"codename": "main"},
                "part": 1,
                "partsCount": 1,
                "content": base64.b64encode(content).decode(),
                "status": "ok",
            }
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            post = urllib.request.Request(options["url"], json.dumps(part | changes).encode(), headers, method="POST")
            context = client_context(cloud.root_file)
            with urllib.request.urlopen(post, context=context, timeout=20) as response:
                return int(response.status)

        for token, changes, status in (
            ("wrong", {}, "401"),
            (options["bearerToken"], {"correlationId": "of another request"}, "400"),
            (options["bearerToken"], {"messageType": "newState"}, "400"),
        ):
            with pytest.raises(urllib.error.HTTPError, match=status):
                upload(b"forged", token, **changes)
        add_fault(cloud, "http_status", on="log", status=503)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            upload(b"line\n")
        assert upload(b"line\n") == 204
        assert output.result() == "--- main: ok\nline\n"
    assert len(violations(cloud)) == 2
    journal = cloud.client.call("messages", unit="unit-1", message_type="requestLog")
    assert options["bearerToken"] not in str(journal)


def test_states_are_kept(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    instance = {"item": {"id": "i"}, "subject": {"id": "s"}, "instance": 0}
    checksum = "60609f67d6b00a90b85b820af24a9b464803afdc29216bb651c5351d"
    with unit:
        unit.report()
        unit.acked({"messageType": "newState", **instance, "stateChecksum": checksum, "state": "counter=7"})
        answer = unit.receive("stateAcceptance")["data"]
        assert (answer["result"], answer["checksum"]) == ("accepted", checksum)
        unit.acked({"messageType": "stateRequest", **instance, "default": False})
        update = unit.receive("updateState")["data"]
        assert (update["stateChecksum"], update["state"]) == (checksum, "counter=7")


def test_a_unit_config_is_wanted_until_it_is_reported(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    config = {"formatVersion": "7", "version": "1.0.0", "nodes": []}
    with unit:
        unit.report()
        cloud.client.call("unit_config", unit="unit-1", config=config)
        assert unit.receive("desiredStatus")["data"]["unitConfig"] == config
        unit.acked(unit.status(unitConfig=[{"version": "1.0.0", "state": "installed"}]))
    with unit:
        assert "unitConfig" not in unit.report(unitConfig=[{"version": "1.0.0", "state": "installed"}])


def test_watch_shows_what_happens(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    args = [sys.executable, "-m", "aoscore.devcloud.app", "watch", "--dir", str(cloud.directory), "unit-1"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "unit-1: offline\n"
        with unit:
            unit.report()
        seen = [process.stdout.readline().strip() for _ in range(5)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    lines = ["online", "from unitStatus", "node main provisioned connected", "to desiredStatus", "offline"]
    assert seen == lines


# The directory


def test_the_admin_socket_is_private_and_the_directory_has_one_cloud(cloud: DevcloudProcess) -> None:
    assert (cloud.directory / "admin.sock").stat().st_mode & 0o777 == 0o600
    assert cloud.directory.stat().st_mode & 0o777 == 0o700
    second = [sys.executable, "-m", "aoscore.devcloud.app", "serve", "--dir", str(cloud.directory)]
    done = subprocess.run(second, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert cloud.client.call("units") == []


def test_a_long_directory_name_is_no_trouble(tmp_path: Path) -> None:
    cloud = DevcloudProcess(tmp_path / ("x" * 100) / ("y" * 100))
    cloud.start()
    try:
        assert cloud.client.call("units") == []
    finally:
        assert cloud.stop() == 0
    with pytest.raises(FailedError, match="no cloud answers"):
        cloud.client.call("units")


def test_the_link_may_have_a_port_of_its_own(cloud: DevcloudProcess, unit: MiniUnit) -> None:
    cloud.stop()
    cloud.start("--ws-port", "0")
    assert cloud.ports["ws_port"] != cloud.ports["discovery_port"]
    with unit:
        unit.report()
