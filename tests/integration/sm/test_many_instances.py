"""64 instances on the whole SM: how they are started, and what a round of monitoring takes."""

import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from aoscore.common.types import MonitoringParameters
from tests.support.smbed import Child, SmBed
from tests.support.smunit import SmUnit

pytestmark = [pytest.mark.container, pytest.mark.net, pytest.mark.timeout(300)]

COUNT = 64
_AT_ONCE = 8
_FIRST_USER = 200_000
# Notes when a start begins and when it is over, and takes its time; appended lines never mix.
_CRUN = """#!/bin/sh
case " $* " in *" create "*)
    echo begin >> {notes}
    sleep 0.5
    /usr/bin/crun "$@"
    code=$?
    echo end >> {notes}
    exit $code
esac
exec /usr/bin/crun "$@"
"""
_ROUNDS = 8
# A few times what it takes on a machine with nothing else to do.
_ROUND_CPU_S = 0.06


@pytest.fixture
async def unit(tmp_path: Path) -> AsyncIterator[SmUnit]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    async with SmBed(tmp_path).running() as bed:
        yield SmUnit(bed)


def noting_crun(directory: Path) -> tuple[Path, Path]:
    """A crun that writes down its starts, and where."""
    notes, program = directory / "starts", directory / "crun"
    program.write_text(_CRUN.format(notes=notes))
    program.chmod(stat.S_IRWXU)
    return program, notes


def cpu_s(sm: Child) -> float:
    """CPU time of SM and of the programs that it ran and has seen the end of."""
    fields = Path(f"/proc/{sm.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


async def test_64_containers_start_in_bounded_parallel_and_a_round_is_cheap(unit: SmUnit, tmp_path: Path) -> None:
    program, notes = noting_crun(tmp_path)
    # The kernel counts a user's processes on the whole machine: users of their own.
    services = [
        msgspec.structs.replace(
            unit.service(f"svc{number}", monitoring_parameters=MonitoringParameters()),
            uid=_FIRST_USER + number,
            gid=_FIRST_USER + number,
        )
        for number in range(COUNT)
    ]
    async with unit.sm(verbosity="info", container={"crunExecutable": str(program)}) as sm:
        await unit.cm.connected(1)
        unit.cm.update(*services)
        wanted = {info.ident.item_id: ("1.0.0", "active") for info in services}
        await unit.cm.wait(lambda cm: cm.states() == wanted, 120)

        at_once, most = 0, 0
        for line in notes.read_text().splitlines():
            at_once += 1 if line == "begin" else -1
            most = max(most, at_once)
        print(f"\nstarts at once: {most}")
        assert 1 < most <= _AT_ONCE
        assert notes.read_text().splitlines().count("begin") == COUNT, "each was started once"

        def rounds() -> list[int]:
            frames = unit.cm.connections[-1].frames
            return [
                len(one.instant_monitoring.instances_monitoring) for one in frames if one.HasField("instant_monitoring")
            ]

        await unit.cm.wait(lambda _: rounds()[-1:] == [COUNT], 60)
        done, before = len(rounds()), cpu_s(sm)
        await unit.cm.wait(lambda _: len(rounds()) >= done + _ROUNDS, 120)
        cost_s = (cpu_s(sm) - before) / _ROUNDS
        print(f"CPU time of a round over {COUNT} instances: {cost_s:.3f} s")
        assert cost_s < _ROUND_CPU_S
