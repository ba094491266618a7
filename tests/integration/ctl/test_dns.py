"""The Unit's name server with its generated file, on a machine that knows no other server."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aoscore.ctl.target import Node, tree, write

# The other kind of address is asked for too: the answer must be "none", not a refusal that some resolvers give up at.
_ASK = """set -e
ip link set lo up
ip address add 10.0.0.100/32 dev lo
mount -t tmpfs -o mode=0755 none /run
mkdir -p /run/systemd/resolve
cp -r {source} /run/node
dnsmasq --conf-file={etc}/dnsmasq.conf
for name in main wwwivi web; do
    n=0
    until busybox nslookup $name 10.0.0.100; do
        n=$((n + 1)); [ $n -lt 50 ]
        sleep 0.2
    done
done
"""


@pytest.mark.net
def test_names_without_any_other_server(tmp_path: Path) -> None:
    missing = [
        name
        for name in ("dnsmasq", "busybox", "ip")
        if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None
    ]
    if os.geteuid() != 0 or missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs root and {missing or 'nothing else'}")
    # In the test's own /run: dnsmasq, which gives up its privileges, must be able to read it.
    node = Node(etc="/run/node/etc", var="/run/node/var", hosts=(("10.0.0.7", ("wwwivi",)),))
    write(tree(node, ("network", "data")), tmp_path)
    (tmp_path / "run/node/var/dns/addnhosts").write_text("172.17.0.2 web\n")
    script = _ASK.format(etc=node.etc, source=tmp_path / "run/node")
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, address in (("main", "10.0.0.100"), ("wwwivi", "10.0.0.7"), ("web", "172.17.0.2")):
        assert f"Name:\t{name}\nAddress: {address}\n" in done.stdout, done.stdout
