"""Storage directories and state files of instances, and their exchange with the cloud (cm-orchestration §5)."""
