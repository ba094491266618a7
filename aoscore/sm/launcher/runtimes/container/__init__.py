"""Container runtime: OCI containers by crun, each watched over by a conmon of its own."""
