"""Image manager: update items of this Node, fetched, checked, unpacked, kept and removed."""
