#!/usr/bin/python3
"""Runs in a guest: does what the host asks for through a virtio serial port. Nothing but the standard library.

One JSON object a line, both ways. The host sends `{"id", "args", "input", "timeout_s"}`; the answer is
`{"id", "code", "stdout", "stderr"}`, with the streams and `input` in base64, or `{"id", "error"}` when the program
could not be run to its end. Requests run at the same time, each in its own thread.

A line that makes no sense is dropped: after a resume the port may hold the rest of one.
"""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

PORT = "/dev/virtio-ports/aos.agent"
# Reads come back empty while the host is away.
PAUSE_S = 0.1


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one program."""
    try:
        done = subprocess.run(
            request["args"],
            input=base64.b64decode(request.get("input") or ""),
            capture_output=True,
            timeout=request.get("timeout_s"),
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"id": request["id"], "error": str(error)}
    streams = {name: base64.b64encode(getattr(done, name)).decode() for name in ("stdout", "stderr")}
    return {"id": request["id"], "code": done.returncode, **streams}


def main(port: str) -> None:
    """Serve until the guest ends."""
    descriptor = os.open(port, os.O_RDWR)
    writing = threading.Lock()

    def serve(request: dict[str, Any]) -> None:
        data = json.dumps(answer(request)).encode() + b"\n"
        with writing:
            while data:
                data = data[os.write(descriptor, data) :]

    buffer = b""
    while True:
        read = os.read(descriptor, 65536)
        if not read:
            buffer = b""
            time.sleep(PAUSE_S)
            continue
        *lines, buffer = (buffer + read).split(b"\n")
        for line in lines:
            try:
                request = json.loads(line)
                request["id"], request["args"]
            except (ValueError, KeyError, TypeError):
                continue
            threading.Thread(target=serve, args=(request,), daemon=True).start()


if __name__ == "__main__":
    main(*(sys.argv[1:] or [PORT]))
