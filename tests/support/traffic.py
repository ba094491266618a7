"""Real traffic between instances whose namespaces a network manager made: who answers whom, and how fast."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from tests.support.networks import name

# Listens on TCP ports and sends back what comes to the same UDP ports.
SERVE = """
import select, socket, sys
tcp = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
udp = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for port in sys.argv[1:]]
for one, port in zip(udp, sys.argv[1:]):
    one.bind(("", int(port)))
print("up", flush=True)
while True:
    for one in select.select(udp, [], [])[0]:
        one.sendto(*one.recvfrom(100))
"""
# Tries "proto:address:port" for each argument, all at once, and prints those that answer.
ASK = """
import concurrent.futures, socket, sys
def answers(what):
    proto, address, port = what.split(":")
    try:
        if proto == "tcp":
            socket.create_connection((address, int(port)), 1.5)
            return True
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.settimeout(0.5)
            for _ in range(3):
                one.sendto(b"?", (address, int(port)))
                try:
                    return one.recv(100) == b"?"
                except TimeoutError:
                    pass
    except OSError:
        pass
    return False
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    for what, answered in zip(sys.argv[1:], pool.map(answers, sys.argv[1:])):
        if answered:
            print(what)
"""
# Takes one connection, and prints bytes and seconds from the first byte on until the sender ends.
SINK = """
import socket, time
server = socket.create_server(("", 7000)); print("up", flush=True)
connection, _ = server.accept()
total = len(connection.recv(1)); begin = time.monotonic()
while chunk := connection.recv(65536):
    total += len(chunk)
print(total, time.monotonic() - begin)
"""
SOURCE = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000)) as one:
    one.sendall(bytes(int(sys.argv[2])))
"""
UDP_SINK = """
import socket, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.bind(("", 7000)); print("up", flush=True)
total = len(one.recv(2000)); begin = last = time.monotonic()
one.settimeout(3)
try:
    while True:
        total += len(one.recv(2000)); last = time.monotonic()
except TimeoutError:
    print(total, last - begin)
"""
UDP_SOURCE = """
import socket, sys, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        one.sendto(bytes(1000), (sys.argv[1], 7000))
    except BlockingIOError:
        pass
"""


def inside(instance: int | str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the namespace of an instance, given by its id or its number among those of `networks`."""
    namespace = instance if isinstance(instance, str) else name(instance)
    return subprocess.run(
        ["ip", "netns", "exec", namespace, *command], capture_output=True, text=True, check=False, timeout=60
    )


def answering(instance: int | str, *what: str) -> set[str]:
    """Which of "proto:address:port" answer to an instance."""
    return set(inside(instance, sys.executable, "-c", ASK, *what).stdout.split())


@contextlib.contextmanager
def _started(*command: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stdout.readline() == b"up\n"
        try:
            yield program
        finally:
            program.kill()


@contextlib.contextmanager
def started_inside(number: int, script: str, *args: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python program in an instance's namespace that prints "up" when it is."""
    with _started("ip", "netns", "exec", name(number), sys.executable, "-c", script, *args) as program:
        yield program


@contextlib.contextmanager
def serving_here(*ports: int) -> Iterator[None]:
    """Listen on ports of the node itself, TCP and UDP."""
    with _started(sys.executable, "-c", SERVE, *map(str, ports)):
        yield


@contextlib.contextmanager
def serving(number: int, *ports: int) -> Iterator[None]:
    """Listen on ports inside an instance, TCP and UDP."""
    with started_inside(number, SERVE, *map(str, ports)):
        yield


def link_names() -> set[str]:
    """Links of the node."""
    listing = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    return {link["ifname"] for link in listing} - {"lo"}


def measured(sink: int, sink_script: str, source: int, source_script: str, *args: str) -> tuple[int, float]:
    """Bytes and seconds of a transfer from one instance to another."""
    with started_inside(sink, sink_script) as program:
        assert inside(source, sys.executable, "-c", source_script, f"172.31.1.{sink + 2}", *args).returncode == 0
        assert program.stdout is not None
        total, duration_s = program.stdout.readline().split()
    return int(total), float(duration_s)
