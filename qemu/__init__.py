"""A Unit of QEMU guests: disk images, launchers, saved states; `make qemu` shows it at work."""
