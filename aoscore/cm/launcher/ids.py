"""User and group ids of instances (cm-orchestration §4.4). Pure."""

from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

from aoscore.common.errors import OutOfRangeError

K = TypeVar("K", bound=Hashable)

FIRST_ID, END_ID = 5000, 10000


class IdPool(Generic[K]):
    """One number per key, the lowest that is free: neither given out nor used by an account of the system."""

    def __init__(self, name: str, used_by_system: Callable[[int], bool]) -> None:
        self._name = name
        self._used_by_system = used_by_system
        self._ids: dict[K, int] = {}

    def get(self, key: K) -> int:
        """The number of key, a new one if it has none. Raises OutOfRangeError when all are given out."""
        if key in self._ids:
            return self._ids[key]
        taken = set(self._ids.values())
        for number in range(FIRST_ID, END_ID):
            if number not in taken and not self._used_by_system(number):
                self._ids[key] = number
                return number
        raise OutOfRangeError(f"no free {self._name} between {FIRST_ID} and {END_ID - 1}")

    def restore(self, key: K, number: int) -> bool:
        """Give key the number it had before; False when that cannot be: out of range, or another key has it."""
        if key in self._ids:
            return self._ids[key] == number
        if not FIRST_ID <= number < END_ID or number in self._ids.values():
            return False
        self._ids[key] = number
        return True

    def keep(self, keys: Collection[K]) -> None:
        """Take back the numbers of all other keys."""
        self._ids = {key: number for key, number in self._ids.items() if key in keys}
