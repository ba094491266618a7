"""Names of digests, shared by the native chunker and its plain twin."""

# Name as in "sha256:<hex>" -> number of hexadecimal digits. The sha3 names are the cloud's, the others are those of
# OCI.
DIGEST_DIGITS = {"sha256": 64, "sha384": 96, "sha512": 128, "sha3-256": 64, "sha3-384": 96, "sha3-512": 128}

READ_BYTES = 1 << 18  # one read of a whole-file pass: fits the cache, far above the cost of a system call


class UnknownDigestError(ValueError):
    """A digest algorithm that is not in DIGEST_DIGITS."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        super().__init__(f"unknown digest algorithm {algorithm!r}, known are {', '.join(DIGEST_DIGITS)}")
