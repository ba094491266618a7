"""The one way to be a daemon: arguments, logging, configuration, start order, readiness, watchdog, stop, exit code.

A component's `app` module gives a Program; everything else is the same for CM, SM, IAM and MP (iam.md §1, sm.md §1.2,
cm-cloud.md §1.1).
"""

import argparse
import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import msgspec

import aoscore
from aoscore.common import log, memory
from aoscore.common.aio import Service, run_services
from aoscore.common.errors import AosError, ConfigError, NotFoundError, first_cause

_log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 70
EXIT_USAGE = 78

C = TypeVar("C")


class Option(msgspec.Struct, frozen=True):
    """An on/off argument that only one program has."""

    name: str
    short: str
    help: str


class Program(msgspec.Struct, Generic[C], frozen=True):
    """What distinguishes one daemon from the others.

    `build` is the composition root: it makes every object, inside the running loop, and returns the services in
    start order; the exit stack takes what must be closed after all of them have stopped. `before` may do a one-off
    job instead of running (CM's --reset): a code ends the program.
    """

    name: str
    title: str
    default_config: str
    load: Callable[[Path], C]
    build: Callable[[C, argparse.Namespace, contextlib.AsyncExitStack], Awaitable[Sequence[Service]]]
    options: tuple[Option, ...] = ()
    before: Callable[[C, argparse.Namespace], int | None] | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def _parse(program: Program[C], argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=program.name, description=f"AosCore {program.title}")
    parser.add_argument("-c", "--config", type=Path, default=Path(program.default_config), help="configuration file")
    parser.add_argument("-v", "--verbose", choices=sorted(log.LEVELS), default="info", help="log level")
    parser.add_argument("-j", "--journal", action="store_true", help="log to the systemd journal instead of stdout")
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    for option in program.options:
        parser.add_argument(f"-{option.short}", f"--{option.name}", action="store_true", help=option.help)
    # The unit files of AosCore 9.1 write long options with one dash ("-provisioning", iam.md §1.1).
    long_names = {f"-{action.option_strings[-1].lstrip('-')}" for action in parser._actions}
    return parser.parse_args([f"-{word}" if word.split("=")[0] in long_names else word for word in argv])


def run_daemon(program: Program[C], argv: Sequence[str] | None = None) -> int:
    """Run a program to its end and return its exit code.

    0: orderly stop; 78: wrong command line or configuration; 70: anything else.
    """
    faulthandler.enable()
    memory.use_one_arena()
    options = _parse(program, sys.argv[1:] if argv is None else argv)
    if options.version:
        print(f"AosCore {program.title} version: {aoscore.__version__}")
        print(f"aoscore version: {aoscore.__version__}")
        return EXIT_OK
    log.setup(options.verbose, journal=options.journal, identifier=program.name)
    _log.info(log.kv(f"Init {program.title}", version=aoscore.__version__))
    try:
        config = program.load(options.config)
        if program.before is not None and (code := program.before(config, options)) is not None:
            return code
        return asyncio.run(_main(program, config, options))
    except (ConfigError, NotFoundError) as error:
        _log.error("Can't start: %s", error)
        return EXIT_USAGE
    except Exception as error:
        cause = first_cause(error)
        if isinstance(cause, (AosError, OSError)):
            _log.error("Stopped by an error: %s", cause)
            _log.debug("Where it came from", exc_info=cause)
        else:
            _log.error("Stopped by an unexpected error", exc_info=cause)
        return EXIT_FAILED


def leave(code: int) -> NoReturn:
    """End the process with an exit code, at once: all is closed and saved when `run_daemon` returns.

    The libraries of keys on tokens (OpenSSL, its provider, SoftHSM) take themselves down in an order that crashes now
    and then, which looks to systemd and to the cloud as if the daemon had died.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _main(program: Program[C], config: C, options: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None  # noqa: S101 - we run in one
    stopping = False

    def stop(number: signal.Signals) -> None:
        nonlocal stopping
        if stopping:
            return
        stopping = True
        _log.info(log.kv(f"Stop {program.title}", signal=number.name))
        notify("STOPPING=1")
        this.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, stop, number)

    def ready() -> None:
        memory.keep_what_start_made()
        memory.give_back()
        notify("READY=1")
        _log.info("%s is ready", program.title)

    watchdog = asyncio.create_task(_feed_watchdog(), name="watchdog")
    tidying = asyncio.create_task(memory.tidy_after_work(), name="tidying")
    try:
        async with contextlib.AsyncExitStack() as stack:
            services = await program.build(config, options, stack)
            await run_services(services, ready)
    except asyncio.CancelledError:
        if not stopping:
            raise
    finally:
        watchdog.cancel()
        tidying.cancel()
    return EXIT_OK


async def _feed_watchdog() -> None:
    """Tell systemd that the loop turns, twice per interval (sd_watchdog_enabled(3))."""
    interval_us = os.environ.get("WATCHDOG_USEC")
    owner = os.environ.get("WATCHDOG_PID")
    if not interval_us or (owner and int(owner) != os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(interval_us) / 2e6)


def notify(state: str) -> None:
    """Tell systemd about our state (sd_notify(3)); nothing happens without a service manager."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            _log.warning("Can't tell the service manager: state=%s, error=%s", state, error)
