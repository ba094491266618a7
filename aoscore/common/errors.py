"""The one exception tree of aoscore.

    AosError
    ├── FailedError             1  it did not work, nothing more precise is known
    │   └── UnreachableError       the other side is not there, or went away
    ├── RuntimeFailure          2  the operating system refused; `errno` says why
    ├── OutOfMemoryError        3
    │   └── NoSpaceError           a disk is full
    ├── OutOfRangeError         4
    ├── NotFoundError           5
    ├── InvalidArgumentError    6
    │   └── ConfigError            a configuration file is wrong
    ├── DeadlineError           7  it took too long
    ├── AlreadyExistsError      8
    ├── WrongStateError         9
    ├── ChecksumError          10
    │   └── SignatureError         signature, chain or required signature
    ├── AlreadyLoggedInError   11
    ├── NotSupportedError      12
    ├── EndOfFileError         13
    └── CanceledError          14

The numbers are the `aos_code` values that peers and the cloud see (grpc.md, "aos_code values"). A message says what
was tried, on what, and, where it helps, what to do.
"""

import asyncio
from typing import ClassVar

from aoscore.common.types import ErrorInfo


class AosError(Exception):
    """Base of every error that aoscore raises on purpose."""

    aos_code: ClassVar[int] = 1


class FailedError(AosError):
    """Something did not work and no class below fits."""


class UnreachableError(FailedError):
    """The other side of a call is not there, or went away during it."""


class RuntimeFailure(AosError):
    """The operating system refused. `errno` is its positive error number, 0 when unknown."""

    aos_code = 2

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class OutOfMemoryError(AosError):
    """Memory, disk or another bounded resource is exhausted."""

    aos_code = 3


class NoSpaceError(OutOfMemoryError):
    """A disk has not enough free space."""


class OutOfRangeError(AosError):
    """A value is outside its limits."""

    aos_code = 4


class NotFoundError(AosError):
    """The named thing does not exist."""

    aos_code = 5


class InvalidArgumentError(AosError):
    """Input is malformed."""

    aos_code = 6


class ConfigError(InvalidArgumentError):
    """A configuration file cannot be used; the message names file and key."""


class DeadlineError(AosError):
    """A time limit ran out."""

    aos_code = 7


class AlreadyExistsError(AosError):
    """The named thing is already there."""

    aos_code = 8


class WrongStateError(AosError):
    """Not possible in the present state."""

    aos_code = 9


class ChecksumError(AosError):
    """Content does not have the digest that it must have."""

    aos_code = 10


class SignatureError(ChecksumError):
    """A signature is missing, wrong, or its chain is not trusted."""


class AlreadyLoggedInError(AosError):
    """A PKCS#11 session is already logged in."""

    aos_code = 11


class NotSupportedError(AosError):
    """Valid input that this build or node cannot do."""

    aos_code = 12


class EndOfFileError(AosError):
    """Input ended too early."""

    aos_code = 13


class CanceledError(AosError):
    """Stopped because somebody asked for it."""

    aos_code = 14


_BY_CODE: dict[int, type[AosError]] = {
    cls.aos_code: cls
    for cls in (
        FailedError,
        RuntimeFailure,
        OutOfMemoryError,
        OutOfRangeError,
        NotFoundError,
        InvalidArgumentError,
        DeadlineError,
        AlreadyExistsError,
        WrongStateError,
        ChecksumError,
        AlreadyLoggedInError,
        NotSupportedError,
        EndOfFileError,
        CanceledError,
    )
}


def first_cause(error: BaseException) -> BaseException:
    """The error that says most: the first leaf of an exception group, else the error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def to_error_info(error: BaseException) -> ErrorInfo:
    """Describe any exception in the wire's terms.

    `exit_code` is set beside `aos_code` because the C++ IAM clients look at nothing else (grpc.md, "Errno").
    """
    error = first_cause(error)
    message = str(error) or type(error).__name__
    match error:
        case RuntimeFailure(errno=errno):
            return ErrorInfo(RuntimeFailure.aos_code, errno or 1, message)
        case AosError():
            return ErrorInfo(error.aos_code, error.aos_code, message)
        case TimeoutError():
            return ErrorInfo(DeadlineError.aos_code, DeadlineError.aos_code, message)
        case OSError(errno=int(errno)):
            return ErrorInfo(RuntimeFailure.aos_code, errno, message)
        case asyncio.CancelledError():
            return ErrorInfo(CanceledError.aos_code, CanceledError.aos_code, "canceled")
        case _:
            return ErrorInfo(FailedError.aos_code, FailedError.aos_code, f"{type(error).__name__}: {message}")


def from_error_info(info: ErrorInfo | None) -> AosError | None:
    """The exception for a received error, or None when it says "fine" (absent, or both codes zero)."""
    if info is None or (info.aos_code == 0 and info.exit_code == 0):
        return None
    if info.aos_code in (0, RuntimeFailure.aos_code):
        return RuntimeFailure(info.message, info.exit_code)
    return _BY_CODE.get(info.aos_code, FailedError)(info.message)
