# Only for scarthgap: newer series have a newer one in meta-python.
SUMMARY = "Zstandard compression"
DESCRIPTION = "Reads and writes Zstandard streams, with the library it brings along."
HOMEPAGE = "https://github.com/indygreg/python-zstandard"
SECTION = "devel/python"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "\
    file://LICENSE;md5=3ae87c50fd64b6f0942823686871e758 \
    file://zstd/LICENSE;md5=0822a32f7acdbe013606746641746ee8 \
"

PYPI_PACKAGE = "zstandard"
inherit pypi setuptools3

# The C back end alone serves: no CFFI, neither here nor on the target.
SETUPTOOLS_BUILD_ARGS += "--no-cffi-backend"
SETUPTOOLS_INSTALL_ARGS += "--no-cffi-backend"

SRC_URI[sha256sum] = "8226a33c542bcb54cd6bd0a366067b610b41713b64c9abec1bc4533d69f51e70"

RDEPENDS:${PN} = "python3-core python3-io"
