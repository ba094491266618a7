# The first that knows Python 3.14.
require python3-msgspec.inc

DEPENDS += "python3-setuptools-scm-native"

SRC_URI[sha256sum] = "692349e588fde322875f8d3025ac01689fead5901e7fb18d6870a44519d62a29"
