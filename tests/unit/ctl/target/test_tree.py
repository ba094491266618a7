"""Units, firewall, disks and the rest of a Node's files."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aoscore.ctl.target import COMPONENTS, PARTS, Entry, Node, tree, write
from aoscore.ctl.target.disks import Volume, read_volumes, volumes
from aoscore.ctl.target.units import mount_unit, unit_names

ROOT = Path(__file__).resolve().parents[4]
NODES = [
    Node(kind=kind, components=chosen, keys=keys, data_disk=keys != "file")  # type: ignore[arg-type]
    for kind in ("main", "secondary")
    for count in range(1, 5)
    for chosen in itertools.combinations(COMPONENTS, count)
    for keys in ("softhsm", "file")
    if kind == "main" or "cm" not in chosen
]


def files(node: Node) -> dict[str, str]:
    return {entry.path: entry.content for entry in tree(node)}


def unit(node: Node, name: str) -> list[str]:
    return files(node)[f"/usr/lib/systemd/system/{name}"].splitlines()


@pytest.mark.parametrize("node", NODES, ids=lambda node: f"{node.kind}-{'+'.join(node.components)}-{node.keys}")
def test_a_component_left_out_leaves_no_file(node: Node) -> None:
    entries = tree(node)
    assert len({entry.path for entry in entries}) == len(entries), "a path is there twice"
    absent = set(COMPONENTS) - set(node.components)
    assert not [entry for entry in entries if entry.part in absent]
    for name in absent:
        assert not [entry.path for entry in entries if Path(entry.path).name.startswith((f"{name}.cfg", f"aos-{name}"))]
        for entry in entries:
            if entry.path.endswith((".service", ".conf")):
                assert f"aos-{name}.service" not in entry.content, entry.path


def test_only_the_standard_library_is_needed() -> None:
    code = "import sys; from aoscore.ctl import target; target.tree(target.Node()); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded <= {*sys.stdlib_module_names, "aoscore", "__main__", "sitecustomize"}


def test_units_follow_the_provisioning_state() -> None:
    node = Node(components=COMPONENTS)
    for name in unit_names(node):
        provisioning = "prov" in name
        condition = f"ConditionPathExists={'!' if provisioning else ''}/var/aos/.provisionstate"
        assert condition in unit(node, name), name
        assert ("--provisioning" in "".join(unit(node, name))) == provisioning
        for line in ("Type=notify", "Restart=always", "RestartSec=10", "PartOf=aos.target", "Slice=aos.slice"):
            assert line in unit(node, name), (name, line)


def test_order_of_units() -> None:
    main, secondary = Node(components=COMPONENTS), Node(kind="secondary")
    after = {
        name: " ".join(line for line in unit(main, f"{name}.service") if line.startswith("After="))
        for name in ("aos-cm", "aos-sm", "aos-mp")
    }
    assert "aos-iam.service" in after["aos-cm"] and "aos-cm.service" in after["aos-sm"]
    assert "aos-cm.service" in after["aos-mp"] and "aos-mp.service" not in after["aos-mp"]
    assert "aos-cm" not in "".join(unit(secondary, "aos-sm.service"))
    assert "KillMode=process" in unit(main, "aos-sm.service"), "containers outlive SM"


def test_mounts_are_required_where_there_are_any() -> None:
    mounts = "Requires=var-aos-workdirs.mount var-aos-storages.mount var-aos-states.mount"
    assert mounts in unit(Node(), "aos-cm.service")
    secondary = unit(Node(kind="secondary"), "aos-sm.service")
    assert "Requires=var-aos-workdirs.mount" in secondary
    # The Main Node may come up later: then it is tried again.
    assert "Wants=var-aos-storages.mount var-aos-states.mount" in secondary
    assert 'ExecStartPre=/bin/grep -q " /var/aos/states " /proc/self/mounts' in secondary
    plain = Node(data_disk=False, keys="file")
    assert not [line for line in unit(plain, "aos-cm.service") if line.startswith("Requires=")]
    assert mount_unit("/var/a-b/c") == "var-a\\x2db-c.mount"


def test_sm_bequeaths_no_bans_and_no_oom_score() -> None:
    names = [line.partition("=")[0] for line in unit(Node(), "aos-sm.service")]
    assert not {"NoNewPrivileges", "ProtectSystem", "RestrictNamespaces", "OOMScoreAdjust"} & set(names)
    names = [line.partition("=")[0] for line in unit(Node(), "aos-cm.service")]
    assert {"NoNewPrivileges", "ProtectSystem", "OOMScoreAdjust"} <= set(names)


def test_keys_in_tokens_need_the_provider() -> None:
    assert '"OPENSSL_CONF=/etc/ssl/openssl-aos.cnf"' in "".join(unit(Node(), "aos-cm.service"))
    assert "CKTEEC_LOGIN_TYPE=user" in "".join(unit(Node(keys="optee"), "aos-iam.service"))
    plain = Node(keys="file", data_disk=False)
    assert "OPENSSL_CONF" not in "".join(unit(plain, "aos-cm.service"))
    assert "/etc/ssl/openssl-aos.cnf" not in files(plain)


def test_xen_guest_asks_the_control_domain_for_a_reboot() -> None:
    assert "ExecStart=/usr/bin/xenstore-write data/user-reboot 2" in unit(Node(xen=True), "aos-reboot.service")
    assert "ExecStart=/bin/systemctl reboot" in unit(Node(), "aos-reboot.service")


def test_disk_layout() -> None:
    assert volumes(Node()) == (
        Volume("downloads", 40, False),
        Volume("workdirs", 30, False),
        Volume("storages", 20, True),
        Volume("states", 10, True),
    )
    for node in (Node(), Node(kind="secondary")):
        assert read_volumes(files(node)["/opt/aos/aosdisk.cfg"]) == volumes(node)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no volume"),
        ("a 10", "line 1"),
        ("a 10 2", "line 1"),
        ("a 10 0\na 10 0", "line 2: volume a is there twice"),
        ("../a 10 0", "line 1"),
        ("a 0 0", "line 1"),
        ("a 60 0\nb 60 0", "add up to 120 percent"),
    ],
)
def test_wrong_disk_layouts_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_volumes(text)


def test_mounts_and_exports() -> None:
    main, secondary = files(Node()), files(Node(kind="secondary"))
    assert "/dev/aosvg/states /var/aos/states ext4 nofail,noatime,usrquota,grpquota" in main["/etc/fstab"]
    assert "main:/states /var/aos/states nfs4" in secondary["/etc/fstab"] and "softerr" in secondary["/etc/fstab"]
    assert "*(" not in main["/etc/exports.d/aos.exports"], "only to the Unit's nodes"
    assert "/etc/exports.d/aos.exports" not in secondary
    assert "/etc/fstab" not in files(Node(kind="secondary", data_disk=False, keys="file", nfs=False))


def test_write_replaces_and_adds(tmp_path: Path) -> None:
    entries = [
        Entry("/d", "", "data", 0o711, kind="directory"),
        Entry("/etc/a", "new\n", "base", 0o600),
        Entry("/etc/link", "a", "base", kind="link"),
        Entry("/etc/fstab", "two\nthree\n", "image", kind="lines"),
    ]
    (tmp_path / "etc").mkdir()
    (tmp_path / "secret").write_text("untouched")
    (tmp_path / "etc" / "a").symlink_to(tmp_path / "secret")
    (tmp_path / "etc" / "fstab").write_text("one\ntwo")
    for _ in range(2):
        write(entries, tmp_path)
    assert (tmp_path / "secret").read_text() == "untouched"
    assert (tmp_path / "etc" / "a").stat().st_mode & 0o7777 == 0o600
    assert (tmp_path / "d").stat().st_mode & 0o7777 == 0o711
    assert (tmp_path / "etc" / "link").readlink() == Path("a")
    assert (tmp_path / "etc" / "fstab").read_text() == "one\ntwo\nthree\n"


def test_base_is_the_same_on_all_nodes() -> None:
    """One package of it serves the images of both kinds."""
    assert {tuple(tree(node, ("base",))) for node in NODES} == {tuple(tree(Node(), ("base",)))}


def test_every_entry_has_a_known_part() -> None:
    assert {entry.part for node in NODES for entry in tree(node)} == set(PARTS)


@pytest.mark.skipif(shutil.which("nft") is None or os.geteuid() != 0, reason="needs nft and root")
@pytest.mark.parametrize("node", [Node(), Node(kind="secondary"), Node(trusted_peers=("fd00::/8", "10.1.0.0/16"))])
def test_nft_takes_the_rules(node: Node, tmp_path: Path) -> None:
    write(tree(node, ("firewall",)), tmp_path)
    for name in ("aos", "aos-unprovisioned", "aos-provisioned"):
        rules = tmp_path / "etc" / "nftables" / f"{name}.nft"
        done = subprocess.run(
            ["unshare", "--net", "nft", "--check", "-f", str(rules)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("dnsmasq", path="/usr/sbin:/usr/bin") is None, reason="needs dnsmasq")
def test_dnsmasq_takes_its_file(tmp_path: Path) -> None:
    write(tree(Node(hosts=(("10.0.0.7", ("wwwivi",)),)), ("network",)), tmp_path)
    command = ["/usr/sbin/dnsmasq", "--test", f"--conf-file={tmp_path}/etc/aos/dnsmasq.conf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "etc/aos/addnhosts").read_text() == "10.0.0.100 main\n10.0.0.7 wwwivi\n"
