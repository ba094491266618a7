require python3-apsw.inc

LIC_FILES_CHKSUM = "file://LICENSE;md5=d139280cfce0149326a5adfcb1ef4c71"
SRC_URI[sha256sum] = "821966a66ed5fd539e863a8f60d9a53497e0a47ffdabde4ec7714fae9ed00261"
