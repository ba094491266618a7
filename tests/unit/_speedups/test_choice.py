"""Which implementation callers get, and that both offer the same."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aoscore._speedups import chunker, frames, memory, sampler, unpack

PUBLIC = {
    "chunker": ["Digest", "copy_file", "hash_file", "hash_file_all", "read_chunks", "send_file"],
    "frames": ["FrameCutter", "encode_pieces", "encode_records", "join_pieces", "new_buffer"],
    "memory": ["release_code"],
    "sampler": ["Sampler"],
    "unpack": ["unpack_layer"],
}
MEMBERS = [(module, name) for module, names in PUBLIC.items() for name in names]


def test_the_native_modules_are_used() -> None:
    assert sampler.Sampler.__module__ == "aoscore._speedups._sampler"
    assert memory.release_code.__module__ == "aoscore._speedups._memory"
    assert chunker.Digest.__module__ == "aoscore._speedups._chunker"
    assert frames.FrameCutter.__module__ == "aoscore._speedups._frames"
    assert unpack.unpack_layer.__module__ == "aoscore._speedups._unpack"


@pytest.mark.parametrize(("value", "module"), [("1", "_plain.sampler"), ("0", "_sampler"), ("", "_sampler")])
def test_the_environment_can_force_the_twins(repository: Path, value: str, module: str) -> None:
    code = "from aoscore._speedups import chunker, sampler, unpack; print(sampler.Sampler.__module__)"
    environment = {**os.environ, "AOSCORE_PLAIN": value, "PYTHONPATH": str(repository)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"aoscore._speedups.{module}"


@pytest.mark.parametrize(("module", "name"), MEMBERS)
def test_same_arguments_and_a_docstring(module: str, name: str) -> None:
    native = getattr(importlib.import_module(f"aoscore._speedups._{module}"), name)
    plain = getattr(importlib.import_module(f"aoscore._speedups._plain.{module}"), name)
    assert native.__doc__
    assert plain.__doc__
    if inspect.isclass(plain):
        for member, function in vars(plain).items():
            if inspect.isfunction(function) and not member.startswith("_"):
                assert _arguments(getattr(native, member)) == _arguments(function), member
    else:
        assert _arguments(native) == _arguments(plain)


def _arguments(function: object) -> list[tuple[str, object, object]]:
    assert callable(function)
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]
