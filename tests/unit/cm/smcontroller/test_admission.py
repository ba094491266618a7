"""Which certificate may speak for which node."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore.cm import database
from aoscore.cm.certnotes import CertificateNotes
from aoscore.cm.smcontroller.admission import MAX_KEYS_PER_NODE, SmAdmission, Verdict, judge
from aoscore.common.certs import key_digest, to_der
from aoscore.common.db import Database, Schema
from aoscore.common.errors import SignatureError
from tests.support.pki import TestCa

UNIT = "unit-1"


@pytest.mark.parametrize(
    ("is_main", "owner", "is_of_unit", "verdict"),
    [
        (True, None, False, Verdict.ACCEPT),
        (True, "other", True, Verdict.ACCEPT),
        (False, "n", False, Verdict.ACCEPT),
        (False, "other", True, Verdict.REFUSE),
        (False, None, False, Verdict.REFUSE),
        (False, None, True, Verdict.LEARN),
    ],
)
def test_verdicts(is_main: bool, owner: str | None, is_of_unit: bool, verdict: Verdict) -> None:
    assert judge("n", is_main=is_main, owner=owner, is_of_unit=is_of_unit) is verdict


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "cm.db", Schema(create=database.OWN_TABLES)) as opened:
        yield opened


class Bed:
    def __init__(self, db: Database) -> None:
        self.ca = TestCa()
        self.main = self.ca.issue(UNIT)
        self.alerts: list[str] = []
        self._db = db

    async def admission(self) -> SmAdmission:
        """That of a new process."""

        async def main_keys() -> set[bytes]:
            return {key_digest(self.main.cert)}

        notes = CertificateNotes(self._db)
        await notes.load()
        admission = SmAdmission(self._db, notes, UNIT, main_keys=main_keys, alert=self.alerts.append)
        await admission.load()
        return admission


async def test_defect_8_a_key_belongs_to_the_first_node_that_shows_it_over_restarts(db: Database) -> None:
    """Any certificate of the Unit's CA may register any node in AosCore 9.1 (observed.md, defect 8)."""
    bed = Bed(db)
    first, second = bed.ca.issue(UNIT), bed.ca.issue(UNIT)
    admission = await bed.admission()
    await asyncio.gather(*(admission.admit_certificate("n1", to_der(first.cert)) for _ in range(3)))
    await admission.admit_certificate("n2", to_der(second.cert))
    for again in (admission, await bed.admission()):
        await again.admit_certificate("n1", to_der(first.cert))
        with pytest.raises(SignatureError, match="claims to be node 'n1': its certificate is that of node 'n2'"):
            await again.admit_certificate("n1", to_der(second.cert))
    assert len(bed.alerts) == 2


async def test_a_certificate_of_another_unit_is_refused(db: Database) -> None:
    bed = Bed(db)
    with pytest.raises(SignatureError, match="of another Unit"):
        await (await bed.admission()).admit_certificate("n1", to_der(bed.ca.issue("unit-2").cert))


async def test_the_main_node_speaks_for_the_nodes_behind_its_gateway(db: Database) -> None:
    bed = Bed(db)
    admission = await bed.admission()
    for node_id in ("main", "n1", "n2"):
        await admission.admit_certificate(node_id, to_der(bed.main.cert))
    bed.main = bed.ca.issue(UNIT)  # renewed
    await admission.admit_certificate("n1", to_der(bed.main.cert))
    assert await db.select("SELECT * FROM aoscore_sm_keys") == [] and bed.alerts == []


async def test_a_renewed_node_is_let_in_and_told(db: Database) -> None:
    bed = Bed(db)
    admission = await bed.admission()
    certificates = [bed.ca.issue(UNIT).cert for _ in range(MAX_KEYS_PER_NODE + 1)]
    for certificate in certificates:
        await admission.admit_certificate("n1", to_der(certificate))
    assert bed.alerts == ["node n1 shows a certificate with a new key"] * MAX_KEYS_PER_NODE
    rows = [row[0] for row in await db.select("SELECT key FROM aoscore_sm_keys ORDER BY rowid")]
    assert rows == [key_digest(certificate) for certificate in certificates[1:]]
