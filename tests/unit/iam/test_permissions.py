from pathlib import Path

import msgspec
import pytest

from aoscore.common.aio import Worker
from aoscore.common.errors import NotFoundError
from aoscore.common.types import InstanceIdent, ItemType
from aoscore.iam.permissions import FILE_NAME, Permissions

ONE = InstanceIdent("item", "subject", 0)


@pytest.fixture
def permissions(tmp_path: Path, worker: Worker) -> Permissions:
    return Permissions(tmp_path / "run", worker)


async def test_register_find_unregister(permissions: Permissions) -> None:
    secret = await permissions.register(ONE, {"vis": {"door": "rw"}, "other": {}})
    assert permissions.find(secret, "vis") == (ONE, {"door": "rw"})
    assert permissions.find(secret, "other") == (ONE, {})
    for wrong, server in ((secret, "third"), (secret[:-1], "vis"), ("", "vis"), ("ü", "vis")):
        with pytest.raises(NotFoundError) as caught:
            permissions.find(wrong, server)
        assert secret not in str(caught.value)
    await permissions.unregister(ONE)
    with pytest.raises(NotFoundError):
        permissions.find(secret, "vis")
    with pytest.raises(NotFoundError, match="item:subject:0"):
        await permissions.unregister(ONE)


async def test_known_instance_keeps_its_secret_and_gets_new_permissions(permissions: Permissions) -> None:
    secret = await permissions.register(ONE, {"vis": {"door": "rw"}})
    assert await permissions.register(ONE, {"vis": {"door": "r"}}) == secret
    assert permissions.find(secret, "vis")[1] == {"door": "r"}


async def test_all_five_members_make_an_instance(permissions: Permissions) -> None:
    others = [
        msgspec.structs.replace(ONE, item_id="x"),
        msgspec.structs.replace(ONE, subject_id="x"),
        msgspec.structs.replace(ONE, instance=1),
        msgspec.structs.replace(ONE, type=ItemType.COMPONENT),
        msgspec.structs.replace(ONE, preinstalled=True),
    ]
    secrets = {await permissions.register(ident, {"vis": {}}) for ident in [ONE, *others]}
    assert len(secrets) == 6


async def test_table_survives_a_restart_for_root_only(permissions: Permissions, tmp_path: Path, worker: Worker) -> None:
    secrets = [await permissions.register(InstanceIdent("i", "s", n), {"vis": {"a": "r"}}) for n in range(300)]
    path = tmp_path / "run" / FILE_NAME
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    again = Permissions(tmp_path / "run", worker)
    await again.load()
    assert [again.find(secret, "vis")[0].instance for secret in secrets] == list(range(300))
    assert await again.register(InstanceIdent("i", "s", 7), {"vis": {"a": "r"}}) == secrets[7]


async def test_broken_table_is_begun_anew_and_leaks_nothing(
    permissions: Permissions, tmp_path: Path, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    secret = await permissions.register(ONE, {"vis": {}})
    path = tmp_path / "run" / FILE_NAME
    path.write_bytes(path.read_bytes()[:-20])
    again = Permissions(tmp_path / "run", worker)
    await again.load()
    assert "is damaged" in caplog.text and secret not in caplog.text
    assert await again.register(ONE, {"vis": {}}) != secret


async def test_failed_write_changes_nothing(permissions: Permissions, tmp_path: Path) -> None:
    secret = await permissions.register(ONE, {"vis": {"door": "r"}})
    path = tmp_path / "run" / FILE_NAME
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        await permissions.register(ONE, {"vis": {"door": "rw"}})
    with pytest.raises(OSError):
        await permissions.unregister(ONE)
    assert permissions.find(secret, "vis")[1] == {"door": "r"}
