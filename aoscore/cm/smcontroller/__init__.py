"""The SMs of all nodes: their streams, requests to them, and their network calls (cm-orchestration §2)."""
