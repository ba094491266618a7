"""Limits of MP's link, shared by the native module of frames and its plain twin (mp-wire §3)."""

HEADER_BYTES = 40
"""Port and size, u32 little-endian each, and the SHA-256 of the payload."""
MAX_PAYLOAD_BYTES = 65_536
"""Largest payload of a frame, in either direction."""
MOST_TOGETHER = 64
"""Most frames that are made to be sent in one go."""
