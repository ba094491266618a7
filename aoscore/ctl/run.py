"""Runs the programs that commands for a node consist of: to their ends, one after the other."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol

from aoscore.common.errors import NotFoundError, RuntimeFailure


class Run(Protocol):
    """Runs a program to its end and returns what it printed. Raises RuntimeFailure with what it said."""

    def __call__(
        self, args: Sequence[str], *, stdin: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> bytes: ...


def run_program(args: Sequence[str], *, stdin: bytes | None = None, env: Mapping[str, str] | None = None) -> bytes:
    """The real Run. `stdin` is all that the program reads, `env` is added to the environment.

    Raises NotFoundError when the program is missing.
    """
    environment = {**os.environ, **(env or {})}
    try:
        done = subprocess.run(args, input=stdin or b"", capture_output=True, check=False, env=environment)
    except FileNotFoundError:
        raise NotFoundError(f"program {args[0]} is not installed") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise RuntimeFailure(f"{args[0]}: code {done.returncode}: {said}", done.returncode)
    return done.stdout
