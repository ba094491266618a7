"""A Unit in Xen guests, in one guest of QEMU. See README.md."""
