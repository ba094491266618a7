"""A token, worked on by a helper process per call: the library may crash or hang and takes nobody along."""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.errors import AosError, DeadlineError, FailedError, NotFoundError, RuntimeFailure, WrongStateError
from aoscore.common.pkcs11.turns import turn
from aoscore.common.pkcs11.url import TokenUrl

CALL_LIMIT_S = 10.0
# Generating an RSA key takes seconds on a small device.
SLOW_CALL_LIMIT_S = 60.0

_CODE = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r}); "
    "from aoscore.common.pkcs11.helper import main; main()"
)
# Those that an operator may meet (PKCS#11 2.40 §5.1); all others are told by number.
_MEANINGS = {
    0x02: "out of host memory",
    0x03: "wrong slot",
    0x30: "device error",
    0x31: "the token is full",
    0x32: "the token was removed",
    0xA0: "wrong PIN",
    0xA4: "the PIN is locked",
    0xE0: "there is no token in the slot",
    0xE1: "the token is not recognized",
    0x102: "no user PIN is set",
}


class TokenPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Which token: by slot id, by index of slot, or by label; `label` is also the name it gets (iam.md §5.2)."""

    label: str
    slot_id: int | None = None
    slot_index: int | None = None
    pin_file: Path | None = None


class Token:
    """Calls may block for as long as their time limit. May be called from any thread.

    Raises RuntimeFailure with the number of the library's answer, DeadlineError for a library that hangs, FailedError
    for one that can't be loaded or crashes, NotFoundError for what is not there, WrongStateError for a token that is
    not initialized.
    """

    def __init__(self, library: Path, place: TokenPlace, *, login: bool = True) -> None:
        """`login` is needed for all that concerns private keys and for every change."""
        self.library = library
        self.place = place
        self._login = login

    @classmethod
    def of(cls, url: TokenUrl, *, login: bool) -> "Token":
        """The token of an address."""
        return cls(url.library, TokenPlace(label=url.token, pin_file=url.pin_source), login=login)

    def run(self, *commands: Mapping[str, Any], limit_s: float = CALL_LIMIT_S) -> list[Any]:
        """Do commands of the helper, in one process; their answers in order. The first that fails ends all."""
        place = {
            "label": self.place.label,
            "slot_id": self.place.slot_id,
            "slot_index": self.place.slot_index,
            "pin_file": str(self.place.pin_file) if self.place.pin_file else None,
        }
        request = {
            "parent": os.getpid(),
            "library": str(self.library),
            "token": place,
            "login": self._login,
            "commands": commands,
        }
        with turn(self.place.pin_file):
            return self._answers(self._ask(msgspec.json.encode(request), limit_s))

    def _ask(self, request: bytes, limit_s: float) -> bytes:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _CODE],
                input=request,
                stdout=subprocess.PIPE,
                timeout=limit_s,
                check=False,
                # A library that uses OpenSSL itself, as SoftHSM does, must not be led to the provider that uses it.
                env={**os.environ, "OPENSSL_CONF": os.devnull},
            )
        except subprocess.TimeoutExpired:
            raise DeadlineError(f"{self._name}: library {self.library} did not answer within {limit_s:g} s") from None
        if done.returncode != 0 or not done.stdout:
            how = f"by signal {-done.returncode}" if done.returncode < 0 else f"with code {done.returncode}"
            raise FailedError(f"{self._name}: library {self.library} crashed, its process ended {how}")
        return done.stdout

    def _answers(self, text: bytes) -> list[Any]:
        answer: dict[str, Any] = msgspec.json.decode(text)
        if "error" in answer:
            raise self._error(answer)
        answers: list[Any] = answer["answers"]
        return answers

    def _error(self, answer: Mapping[str, Any]) -> AosError:
        text = answer["text"]
        match answer["error"]:
            case "cryptoki":
                code = int(answer["code"])
                meaning = _MEANINGS.get(code)
                return RuntimeFailure(f"{self._name}: {meaning} ({text})" if meaning else f"{self._name}: {text}", code)
            case "not_found" | "pin":
                return NotFoundError(f"{self._name}: {text}")
            case "no_owner":
                return WrongStateError(f"{self._name} has no owner: start provisioning first")
            case _:
                return FailedError(f"{self._name}: can't use library {self.library}: {text}")

    @property
    def _name(self) -> str:
        return f"token {self.place.label!r}"


def command(do: str, **arguments: Any) -> Mapping[str, Any]:
    """A command of the helper; its name and arguments are those of a method of helper.Commands."""
    return {"do": do, **arguments}


@functools.lru_cache(maxsize=8)
def read_chain(url: TokenUrl) -> Sequence[bytes]:
    """DER of a certificate and its issuers, leaf first. Certificates are public: no PIN is needed.

    Remembered, as what is at an address never changes: each key has an id of its own.
    """
    (chain,) = Token.of(url, login=False).run(command("chain", label=url.object, key_id=url.id))
    return [bytes.fromhex(value) for value in chain]
