"""What is noted of certificates."""

from pathlib import Path

from aoscore.cm import database
from aoscore.cm.certnotes import MAX_NOTES, CertificateNotes
from aoscore.common.db import Database, Schema


async def test_notes_outlive_the_process_and_are_bounded(tmp_path: Path) -> None:
    async with Database(tmp_path / "cm.db", Schema(create=database.OWN_TABLES)) as db:
        notes = CertificateNotes(db)
        await notes.load()
        await notes.add(b"first", "node", "n1")
        await notes.add(b"first", "node", "n1")
        await notes.add(b"first", "node", "n2")
        await notes.add(b"first", "cloud", "url")
        for number in range(MAX_NOTES - 2):
            await notes.add(b"%d" % number, "node", "n")
        again = CertificateNotes(db)
        await again.load()
        for one in (notes, again):
            assert (one.find(b"first", "node"), one.find(b"first", "cloud")) == (["n2"], ["url"])
            assert one.find(b"other", "node") == []
        assert (await db.select("SELECT COUNT(*) FROM aoscore_certificate_notes"))[0][0] == MAX_NOTES
