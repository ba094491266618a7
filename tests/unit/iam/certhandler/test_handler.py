import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from aoscore.common.aio import Worker
from aoscore.common.errors import FailedError, InvalidArgumentError, NotFoundError
from aoscore.common.types import CertInfo
from aoscore.iam.certhandler import module as module_under_test
from aoscore.iam.certhandler.filestore import FileKeyStore, FileStoreParams
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.certhandler.module import MAX_PENDING_KEYS, CertModule
from aoscore.iam.certhandler.pending import PendingKeys
from aoscore.iam.config import CertModuleConfig, KeyUsage
from aoscore.iam.database import IamDatabase
from tests.support.pki import TestCa, pem

Make = Callable[..., CertModule]


@pytest.fixture
def make(tmp_path: Path, database: IamDatabase, worker: Worker, authority: TestCa) -> Make:
    def make(cert_type: str = "iam", **config: Any) -> CertModule:
        settings = CertModuleConfig(id=cert_type, **{"max_items": 2, **config})
        store = FileKeyStore(FileStoreParams(tmp_path / "keys"), cert_type)
        pending = PendingKeys(tmp_path / "work")
        pending.load()
        return CertModule(settings, store, database, worker, pending, lambda: [authority.root.cert])

    return make


@pytest.fixture
async def handler(make: Make) -> CertHandler:
    handler = CertHandler([make("online"), make("iam"), make("disk", self_signed=True, max_items=1)])
    await handler.load()
    await handler.set_owner("secret")
    return handler


async def renew(handler: CertHandler, authority: TestCa, cert_type: str, days: float) -> CertInfo:
    return await handler.apply_cert(
        cert_type, authority.sign_request(await handler.create_key(cert_type, "u"), days=days)
    )


def files(tmp_path: Path, cert_type: str = "iam") -> int:
    return len(list((tmp_path / "keys" / cert_type).iterdir()))


async def test_types_in_order_without_self_signed(handler: CertHandler) -> None:
    assert handler.cert_types() == ["online", "iam"]


async def test_unknown_type(handler: CertHandler) -> None:
    with pytest.raises(NotFoundError, match="'bogus' is not configured"):
        handler.get_cert("bogus")
    with pytest.raises(NotFoundError, match="'bogus' is not configured"):
        await handler.create_key("bogus", "u")
    with pytest.raises(NotFoundError, match="no certificate of type 'iam'"):
        handler.get_cert("iam")


async def test_the_one_valid_longest_is_used(handler: CertHandler, authority: TestCa) -> None:
    first = await renew(handler, authority, "iam", 100)
    assert handler.get_cert("iam") == first
    assert await renew(handler, authority, "iam", 50) != first
    assert handler.get_cert("iam") == first
    third = await renew(handler, authority, "iam", 200)
    assert handler.get_cert("iam") == third


async def test_oldest_goes_when_the_new_one_is_in_use(
    handler: CertHandler, authority: TestCa, tmp_path: Path, database: IamDatabase
) -> None:
    infos = [await renew(handler, authority, "iam", days) for days in (30, 10, 20)]
    assert {record.info.serial for record in await database.certificates("iam")} == {
        infos[0].serial,
        infos[2].serial,
    }
    assert files(tmp_path) == 4
    # Even when the new one is the first to end.
    last = await renew(handler, authority, "iam", 5)
    assert handler.get_cert("iam", last.issuer, last.serial) == last


async def test_the_one_in_use_stays_until_a_new_one_was_asked_for(handler: CertHandler, authority: TestCa) -> None:
    """Two renewals in a row that nobody has tried yet must not cost the certificate that works."""
    working = await renew(handler, authority, "iam", 10)
    assert handler.get_cert("iam") == working
    untried = await renew(handler, authority, "iam", 20)
    newest = await renew(handler, authority, "iam", 30)
    assert handler.get_cert("iam", working.issuer, working.serial) == working
    with pytest.raises(NotFoundError):
        handler.get_cert("iam", untried.issuer, untried.serial)
    assert handler.get_cert("iam") == newest
    last = await renew(handler, authority, "iam", 40)
    with pytest.raises(NotFoundError):
        handler.get_cert("iam", working.issuer, working.serial)
    assert handler.get_cert("iam") == last


async def test_look_up_by_serial_over_all_types(handler: CertHandler, authority: TestCa) -> None:
    info = await renew(handler, authority, "iam", 100)
    found = handler.get_cert("online", info.issuer, info.serial)
    assert (found.type, found.cert_url, found.serial) == ("online", info.cert_url, info.serial)
    with pytest.raises(NotFoundError):
        handler.get_cert("iam", b"other", info.serial)
    with pytest.raises(NotFoundError):
        handler.get_cert("iam", info.issuer, "01")
    with pytest.raises(InvalidArgumentError, match="no hexadecimal"):
        handler.get_cert("iam", info.issuer, "xyz")


async def test_apply_again_is_fine(handler: CertHandler, authority: TestCa, tmp_path: Path) -> None:
    text = authority.sign_request(await handler.create_key("iam", "u"))
    info = await handler.apply_cert("iam", text)
    assert await handler.apply_cert("iam", text) == info
    assert files(tmp_path) == 2


async def test_failed_apply_leaves_all_as_it_was(
    handler: CertHandler, authority: TestCa, tmp_path: Path, make: Make
) -> None:
    infos = [await renew(handler, authority, "iam", days) for days in (30, 10)]
    foreign = authority.sign_request(await handler.create_key("online", "u"))
    with pytest.raises(NotFoundError, match="create a key first"):
        await handler.apply_cert("iam", foreign)
    with pytest.raises(InvalidArgumentError):
        await handler.apply_cert("iam", "text")
    for info in infos:
        assert handler.get_cert("iam", info.issuer, info.serial) == info
    assert files(tmp_path) == 4


async def test_pending_keys_survive_a_restart(
    handler: CertHandler, authority: TestCa, make: Make, tmp_path: Path
) -> None:
    requests = [await handler.create_key("iam", "u") for _ in range(MAX_PENDING_KEYS + 2)]
    assert files(tmp_path) == MAX_PENDING_KEYS
    again = make("iam")
    await again.load()
    with pytest.raises(NotFoundError):
        await again.apply(authority.sign_request(requests[1]))
    info = await again.apply(authority.sign_request(requests[2]))
    assert again.newest is not None and again.newest.info == info


async def test_impossible_subject_leaves_no_key(handler: CertHandler, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError):
        await handler.create_key("iam", "x" * 65)
    assert files(tmp_path) == 0


async def test_names_and_usages_are_asked_for_and_missing_names_are_told(
    make: Make, authority: TestCa, caplog: pytest.LogCaptureFixture
) -> None:
    module = make("iam", alternative_names=("a", "b"), extended_key_usage=(KeyUsage.SERVER_AUTH,))
    await module.set_owner("x")
    request = await module.create_key("u")
    assert len(list(x509.load_pem_x509_csr(request.encode()).extensions)) == 2
    await module.apply(authority.sign_request(request))
    assert "lacks names" not in caplog.text
    await module.apply(authority.sign_request(await module.create_key("u"), with_extensions=False))
    assert "lacks names" in caplog.text and "['a', 'b']" in caplog.text


async def test_root_of_the_unit_ends_a_chain(handler: CertHandler, authority: TestCa) -> None:
    text = authority.sign_request(await handler.create_key("iam", "u")).removesuffix(pem(authority.root.cert))
    assert text.count("BEGIN") == 2
    assert (await handler.apply_cert("iam", text)).type == "iam"


async def test_storage_tells_and_the_database_follows(
    handler: CertHandler, authority: TestCa, database: IamDatabase, make: Make, tmp_path: Path
) -> None:
    kept, lost = [await renew(handler, authority, "iam", days) for days in (10, 20)]
    Path(lost.cert_url.removeprefix("file://")).unlink()
    await database.replace_certificates("iam", [])
    again = make("iam")
    await again.load()
    assert [record.info for record in again.records] == [kept]
    assert [record.info for record in await database.certificates("iam")] == [kept]
    await database.replace_certificates("iam", [])
    unchecked = make("iam", skip_validation=True)
    await unchecked.load()
    assert unchecked.records == []


async def test_broken_storage_does_not_stop_the_others(
    make: Make, authority: TestCa, monkeypatch: pytest.MonkeyPatch, handler: CertHandler
) -> None:
    info = await renew(handler, authority, "iam", 10)
    broken = make("iam")

    def fail() -> None:
        raise FailedError("token is gone")

    with monkeypatch.context() as patch:
        patch.setattr(broken._store, "certificates", fail)
        both = CertHandler([broken, make("online")])
        await both.load()
        for _ in range(2):
            with pytest.raises(FailedError, match="iam can't be used: token is gone"):
                await both.create_key("iam", "u")
        assert both.get_cert("iam") == info, "what the database knows may still work for peers"
        await both.create_key("online", "u")
    # It is back, and nobody had to restart us.
    await both.create_key("iam", "u")


async def test_subscribers_hear_of_their_type_only(handler: CertHandler, authority: TestCa) -> None:
    with pytest.raises(NotFoundError):
        await anext(handler.changes_of("iam"))
    await renew(handler, authority, "iam", 10)
    changes = handler.changes_of("iam")
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    await renew(handler, authority, "online", 10)
    await renew(handler, authority, "iam", 5)
    assert not waiting.done(), "one that ends earlier is not the newest"
    info = await renew(handler, authority, "iam", 20)
    assert await asyncio.wait_for(waiting, 1) == info
    await changes.aclose()  # type: ignore[attr-defined]


async def test_self_signed_is_made_at_ownership(handler: CertHandler, tmp_path: Path) -> None:
    info = handler.get_cert("disk")
    certificate = x509.load_pem_x509_certificate(Path(info.cert_url.removeprefix("file://")).read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=Aos Core"
    await handler.clear()
    with pytest.raises(NotFoundError):
        handler.get_cert("disk")
    await handler.set_owner("again")
    assert handler.get_cert("disk").serial != info.serial
    assert files(tmp_path, "disk") == 2


WRITES = ["create_key", "store_certificate", "remove_certificate", "replace_certificates"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("broken", WRITES)
async def test_crash_at_any_write_can_be_gone_on_from(
    broken: str, after: bool, make: Make, authority: TestCa, database: IamDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut just before or just after each write; after a restart the same step must succeed."""

    class PowerCut(BaseException):
        pass

    module = make("iam")
    await module.set_owner("x")
    for days in (10, 20):
        await module.apply(authority.sign_request(await module.create_key("u"), days=days))
    request = await module.create_key("u")
    text = authority.sign_request(request, days=30)

    owner = database if broken == "replace_certificates" else module._store
    original = getattr(owner, broken)

    def cut(*args: Any) -> Any:
        if after:
            original(*args)
        raise PowerCut

    async def cut_async(*args: Any) -> Any:
        if after:
            await original(*args)
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, cut_async if broken == "replace_certificates" else cut)
        with pytest.raises(PowerCut):
            await module.create_key("u")
            await module.apply(text)

    again = make("iam")
    await again.load()
    info = await again.apply(text)
    assert again.newest is not None and again.newest.info == info
    assert len(again.records) <= 3
    final = await again.apply(authority.sign_request(await again.create_key("u"), days=40))
    assert len(again.records) == 2 and again.newest is not None and again.newest.info == final
    assert [record.info for record in await database.certificates("iam")] == [record.info for record in again.records]
    assert len(again._store.pending_keys()) <= module_under_test.MAX_PENDING_KEYS
