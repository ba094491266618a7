"""Units of the selected components run, and units of the others are not there."""

from oeqa.core.decorator.depends import OETestDepends
from oeqa.runtime.case import OERuntimeTestCase

UNITS = {"iam": "aos-iam", "cm": "aos-cm", "sm": "aos-sm", "mp": "aos-mp"}


class AosUnitsTest(OERuntimeTestCase):
    """Needs AOS_COMPONENTS of the build."""

    def setUp(self):
        self.components = (self.td.get("AOS_COMPONENTS") or "").split()
        self.provisioned = self.target.run("test -e /var/aos/.provisionstate")[0] == 0

    def state(self, unit):
        """Words of systemd for a unit: load state and active state."""
        status, output = self.target.run(f"systemctl show -p LoadState -p ActiveState --value {unit}.service")
        self.assertEqual(status, 0, output)
        return output.split()

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_selected_components_run(self):
        for name in self.components:
            unit = UNITS[name]
            if not self.provisioned:
                unit = {"iam": "aos-iam-prov", "mp": "aos-mp-provisioning"}.get(name)
            if unit is not None:
                self.assertEqual(self.state(unit), ["loaded", "active"], unit)

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_others_are_not_installed(self):
        for name in UNITS.keys() - self.components:
            self.assertEqual(self.state(UNITS[name])[0], "not-found", name)

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_no_unit_has_failed(self):
        status, output = self.target.run("systemctl list-units --state=failed --plain --no-legend 'aos*'")
        self.assertEqual((status, output.strip()), (0, ""), output)

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_daemons_answer_to_their_upstream_names(self):
        for name in self.components:
            status, output = self.target.run(f"aos_{name}_app --version")
            self.assertEqual(status, 0, f"aos_{name}_app: {output}")
