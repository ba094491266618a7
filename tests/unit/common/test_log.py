"""Logging set-up, in a process of its own since it is global."""

import subprocess
import sys

PROGRAM = """
import logging
from aoscore.common import log
log.setup("debug", journal=False, identifier="test")
logging.getLogger("chatty").setLevel(0)
logging.getLogger("chatty.core").debug("story of a library")
logging.getLogger("chatty.core").warning("trouble of a library")
logging.getLogger("aoscore.sm.app").debug("our story")
"""


def test_debug_level_is_for_our_own_modules() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "our story" in done.stdout
    assert "trouble of a library" in done.stdout
    assert "story of a library" not in done.stdout
