# Nothing of this recipe changes where the distribution does not ask for it: its signatures stay.
require ${@bb.utils.contains('DISTRO_FEATURES', 'aoscore selinux', '${BPN}-aoscore.inc', '', d)}
