"""Images of update items: download, verify, decrypt, install, keep, remove (cm-cloud.md §5 to §8)."""
