# For series with a setuptools older than 80.
require python3-msgspec.inc

SRC_URI[sha256sum] = "604037e7cd475345848116e89c553aa9a233259733ab51986ac924ab1b976f8e"
