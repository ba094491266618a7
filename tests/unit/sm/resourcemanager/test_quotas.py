"""Which quota an instance gets for its storage and state, by what the file system has."""

import errno
from pathlib import Path

import pytest

from aoscore.common import quota
from aoscore.common.errors import RuntimeFailure
from aoscore.sm.resourcemanager.quotas import STATES, STORAGES, Claim, DiskQuotas, project_id
from tests.support.kernelquota import KernelQuotas

UID = 5000


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Claim]:
    """A storage and a state on one file system, whose project ids are kept in memory."""
    projects: dict[Path, int] = {}
    monkeypatch.setattr(quota, "set_project", projects.__setitem__)
    monkeypatch.setattr(quota, "project_of", lambda path: projects.get(path, 0))
    storage, state = tmp_path / "storage", tmp_path / "state.dat"
    storage.mkdir()
    state.touch()
    return [Claim(STORAGES, storage, 2048), Claim(STATES, state, 1024)]


def kernel(monkeypatch: pytest.MonkeyPatch, *kinds: int, refuse: int = 0) -> KernelQuotas:
    """What answers from now on."""
    made = KernelQuotas(*kinds, refuse=refuse)
    monkeypatch.setattr(quota, "_libc", made)
    return made


def test_storage_and_state_are_projects_of_their_own(claims: list[Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    quotas, answers = DiskQuotas(), kernel(monkeypatch, 0, 2)
    storage, state = project_id(UID, STORAGES), project_id(UID, STATES)
    assert len({storage, state, project_id(UID + 1, STORAGES), 0}) == 4
    assert quotas.used_bytes(UID, STORAGES, claims[0].path) is None, "not limited yet, so in no project"
    quotas.limit(UID, claims)
    assert answers.limits == {(2, storage): 2048, (2, state): 1024}
    answers.used[2, storage] = 500
    assert quotas.used_bytes(UID, STORAGES, claims[0].path) == 500
    answers.refuse = errno.EIO
    assert quotas.used_bytes(UID, STORAGES, claims[0].path) is None


def test_otherwise_the_user_is_limited_unless_cm_has_done_it(
    claims: list[Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas, answers = DiskQuotas(), kernel(monkeypatch, 0)
    quotas.limit(UID, claims)
    assert answers.limits == {(0, UID): 3072}
    assert quotas.used_bytes(UID, STORAGES, claims[0].path) is None, "it would be both together"
    answers.limits[0, UID] = 8192
    quotas.limit(UID, claims)
    assert answers.limits == {(0, UID): 8192}
    quotas.limit(UID + 1, [claims[0], Claim(STATES, claims[1].path, 0)])
    assert (0, UID + 1) not in answers.limits, "a limit for one of two would be one for both"


def test_without_quotas_that_is_said_once(
    claims: list[Claim], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quotas = DiskQuotas()
    kernel(monkeypatch)
    quotas.limit(UID, claims)
    quotas.limit(UID, claims)
    assert caplog.text.count("No disk quotas") == 1


def test_root_is_nobodys_user(claims: list[Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    """Project 0 is that of everything on the node, and root is never limited."""
    answers = kernel(monkeypatch, 0, 2)
    DiskQuotas().limit(0, claims)
    assert answers.limits == {}


def test_a_quota_that_can_not_be_set_is_an_error(claims: list[Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    quotas, answers = DiskQuotas(), kernel(monkeypatch, 2)
    quotas.limit(UID, claims)
    answers.refuse = errno.EPERM
    with pytest.raises(RuntimeFailure, match="can't limit project 10000 to 2048 bytes"):
        quotas.limit(UID, claims)
