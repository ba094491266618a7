"""What provisioning needs is in place."""

from oeqa.core.decorator.depends import OETestDepends
from oeqa.runtime.case import OERuntimeTestCase


class AosProvisioningTest(OERuntimeTestCase):
    """Looks at a booted node."""

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_hooks_can_be_run(self):
        for name in ("provfinish", "deprovision"):
            status, output = self.target.run(f"test -x /opt/aos/{name}.sh")
            self.assertEqual(status, 0, f"{name}: {output}")

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_the_root_of_the_cloud_is_there(self):
        path = "/usr/share/ca-certificates/aos/AosRootCA.crt"
        status, output = self.target.run(f"openssl x509 -in {path} -noout -subject")
        self.assertEqual(status, 0, output)

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_the_key_library_is_there(self):
        if (self.td.get("AOS_KEYS") or "softhsm") != "softhsm":
            self.skipTest("keys are not in SoftHSM")
        status, output = self.target.run("test -r /usr/lib/softhsm/libsofthsm2.so")
        self.assertEqual(status, 0, output)

    @OETestDepends(["ssh.SSHTest.test_ssh"])
    def test_versions_are_written(self):
        status, output = self.target.run("cat /etc/aos/version")
        self.assertEqual(status, 0, output)
        self.assertRegex(output, r'^VERSION="\d+\.\d+\.\d+')
