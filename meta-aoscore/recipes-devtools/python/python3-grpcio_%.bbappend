# Nothing of this recipe changes where the distribution does not ask for it: its signatures stay.
require ${@bb.utils.contains('DISTRO_FEATURES', 'aoscore', '${BPN}-aoscore.inc', '', d)}
