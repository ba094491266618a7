"""CM as it is installed on a device: no more than its own extra, and a lean start."""

import subprocess
import sys

# Modules of other components, of tests and of the local cloud: not there where only the extra `cm` is installed.
NOT_INSTALLED = (
    "psutil pyroute2 pyudev zstandard dbus_fast aiohttp jsonschema jwt yaml pytest hypothesis Cython grpc_tools"
)

PROGRAM = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_INSTALLED.split()!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed with the extra cm")

sys.meta_path.insert(0, Refuse())
import aoscore.cm.app
foreign = [name for name in sys.modules if name.split(".")[:2] in [["aoscore", part] for part in
           ("sm", "iam", "mp", "devcloud", "ctl")]]
assert not foreign, foreign
print("ok")
"""


def test_the_program_needs_no_more_than_its_own_extra() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
