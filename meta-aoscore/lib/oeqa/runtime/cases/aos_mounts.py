"""Root, /var and the data disk are mounted as the layout says; control groups are of version 2."""

from oeqa.core.decorator.depends import OETestDepends
from oeqa.runtime.case import OERuntimeTestCase

CONTROLLERS = {"cpu", "io", "memory", "pids"}


class AosMountsTest(OERuntimeTestCase):
    """Looks at a booted node."""

    def mount(self, path):
        """File system type and options of a mount point, empty when it is none."""
        status, output = self.target.run(f"findmnt -n -o FSTYPE,OPTIONS --mountpoint {path}")
        return output.split() if status == 0 else []

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_root_is_read_only(self):
        _, options = self.mount("/")
        self.assertIn("ro", options.split(","))

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_var_is_a_partition_of_its_own(self):
        kind, options = self.mount("/var")
        self.assertEqual(kind, "ext4")
        self.assertIn("rw", options.split(","))

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_the_machine_id_stays(self):
        _, bound = self.target.run("cat /etc/machine-id")
        _, kept = self.target.run("cat /var/machine-id")
        self.assertRegex(bound.strip(), "^[0-9a-f]{32}$")
        self.assertEqual(bound, kept)

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_control_groups_have_what_limits_need(self):
        kind, _ = self.mount("/sys/fs/cgroup")
        self.assertEqual(kind, "cgroup2")
        _, output = self.target.run("cat /sys/fs/cgroup/cgroup.controllers")
        self.assertEqual(CONTROLLERS - set(output.split()), set())

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_data_volumes_of_a_provisioned_node(self):
        if self.target.run("test -e /var/aos/.provisionstate")[0] != 0:
            self.skipTest("the node is not provisioned: it has no data disk yet")
        names = ["workdirs"]
        if "cm" in (self.td.get("AOS_COMPONENTS") or "").split():
            names += ["downloads", "storages", "states"]
        for name in names:
            self.assertTrue(self.mount(f"/var/aos/{name}"), f"/var/aos/{name} is not mounted")
