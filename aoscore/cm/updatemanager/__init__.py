"""From the desired status of the cloud to a Unit that is like it, and what the cloud is told (cm-cloud.md §3, §4)."""
