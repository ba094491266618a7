"""Memory that this process can do without: the public face of the native module and its plain twin."""

from typing import TYPE_CHECKING

from aoscore._speedups._choice import native_wanted

if TYPE_CHECKING or native_wanted("_memory"):
    from aoscore._speedups._memory import release_code
else:
    from aoscore._speedups._plain.memory import release_code

__all__ = ["release_code"]
