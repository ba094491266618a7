"""What a Unit in namespaces could leave on the machine."""

import subprocess
from pathlib import Path

from aoscore.ctl.machine import find_cgroups


def traces(directory: Path, *cgroups: str) -> set[str]:
    """Processes, mounts, links, control groups, firewall tables, files, as far as they are there now.

    `directory` is where the Unit lives, `cgroups` are names of its control groups.
    """
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(directory).encode() in (entry / "cmdline").read_bytes():
                found.add(f"process {(entry / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    mounts = Path("/proc/self/mountinfo").read_text()
    found |= {f"mount {line}" for line in mounts.splitlines() if str(directory) in line}
    found |= {f"link {path.name}" for path in Path("/sys/class/net").iterdir()}
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    found |= {f"nft {line}" for line in tables.splitlines()}
    found |= {f"cgroup {path}" for group in cgroups for path in find_cgroups(group)}
    found |= {f"netns {path}" for path in Path("/run/netns").glob("*")}
    if directory.exists():
        found.add(f"files {directory}")
    return found
