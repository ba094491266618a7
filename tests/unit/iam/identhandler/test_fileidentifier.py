import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aoscore.common.aio import Worker, run_services
from aoscore.common.errors import AosError, InvalidArgumentError, NotFoundError
from aoscore.common.types import SystemInfo
from aoscore.iam.identhandler.fileidentifier import (
    FileIdentifier,
    FileIdentifierParams,
    parse_subjects,
    parse_unit_model,
)


@pytest.mark.parametrize(
    ("text", "parts"), [("aos-core;1.0.0\n", ("aos-core", "1.0.0")), (" a ; b ", ("a", "b")), ("a;", ("a", ""))]
)
def test_unit_model(text: str, parts: tuple[str, str]) -> None:
    assert parse_unit_model(text) == parts


@pytest.mark.parametrize("text", ["", "a", ";1", "a;b;c"])
def test_no_unit_model(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="model;version"):
        parse_unit_model(text)


def test_subjects() -> None:
    assert parse_subjects(" a\n\nb \r\na\n") == ("a", "b")
    assert parse_subjects("") == ()


@pytest.fixture
def params(tmp_path: Path) -> FileIdentifierParams:
    params = FileIdentifierParams(tmp_path / "id", tmp_path / "model", tmp_path / "subjects")
    params.system_id_path.write_text("\tunit \n")
    params.unit_model_path.write_text("m;1\n")
    return params


@asynccontextmanager
async def running(identifier: FileIdentifier) -> AsyncIterator[None]:
    started = asyncio.Event()
    task = asyncio.create_task(run_services([identifier], started.set))
    task.add_done_callback(lambda _: started.set())
    await started.wait()
    if task.done():
        task.result()
    yield
    task.cancel()
    await asyncio.wait({task})


async def test_identity_and_missing_subjects(
    params: FileIdentifierParams, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    identifier = FileIdentifier(params, worker, period_s=0.01)
    with pytest.raises(NotFoundError):
        await identifier.system_info()
    async with running(identifier):
        assert await identifier.system_info() == SystemInfo("unit", "m", "1")
        assert await identifier.subjects() == ()
        await asyncio.sleep(0.05)
    assert caplog.text.count("Can't read subjects") == 1


async def test_subjects_are_watched(params: FileIdentifierParams, worker: Worker) -> None:
    params.subjects_path.write_text("a\n")
    identifier = FileIdentifier(params, worker, period_s=0.01)
    async with running(identifier):
        changes = identifier.subjects_changes.values()
        temporary = params.subjects_path.with_name("new")
        temporary.write_text("a\nb\n")
        temporary.rename(params.subjects_path)
        assert await asyncio.wait_for(anext(changes), 5) == ("a", "b")
        os.utime(params.subjects_path)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(changes), 0.1)
        params.subjects_path.unlink()
        changes = identifier.subjects_changes.values()
        assert await anext(changes) == ("a", "b")
        assert await asyncio.wait_for(anext(changes), 5) == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda params: params.system_id_path.unlink(),
        lambda params: params.system_id_path.write_text(" \n"),
        lambda params: params.unit_model_path.unlink(),
        lambda params: params.unit_model_path.write_text("m"),
    ],
)
async def test_start_fails_without_identity(
    params: FileIdentifierParams, worker: Worker, damage: Callable[[FileIdentifierParams], None]
) -> None:
    damage(params)
    with pytest.raises(AosError):
        async with running(FileIdentifier(params, worker)):
            pass
