"""The node listens where the system expects it and nowhere else."""

from oeqa.core.decorator.depends import OETestDepends
from oeqa.runtime.case import OERuntimeTestCase

PORTS = {"iam": {8089, 8090}, "cm": {8093, 8094}}


class AosPortsTest(OERuntimeTestCase):
    """Looks at a booted node."""

    def listening(self):
        """TCP ports that something other than loopback can reach."""
        status, output = self.target.run("ss -H -t -l -n")
        self.assertEqual(status, 0, output)
        addresses = [line.split()[3] for line in output.splitlines()]
        return {int(address.rpartition(":")[2]) for address in addresses if not address.startswith(("127.", "[::1]"))}

    @OETestDepends(["aos_units.AosUnitsTest.test_selected_components_run"])
    def test_servers_listen(self):
        components = (self.td.get("AOS_COMPONENTS") or "").split()
        provisioned = self.target.run("test -e /var/aos/.provisionstate")[0] == 0
        expected = set()
        for name in components:
            if name == "iam" or provisioned:
                expected |= PORTS.get(name, set())
        self.assertEqual(expected - self.listening(), set())

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_firewall_tables_are_loaded(self):
        status, output = self.target.run("nft list tables")
        self.assertEqual(status, 0, output)
        self.assertIn("table inet aos", output.splitlines())
