"""Component runtime: root file system images, tried and applied in the initramfs."""
