"""Component runtime: two EFI boot partitions, of which one is in use and the other takes the next version."""
