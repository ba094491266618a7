"""Sampling of node and instance metrics: the public face of the native module and its plain twin."""

from typing import TYPE_CHECKING

from aoscore._speedups._choice import native_wanted
from aoscore._speedups.sampler_types import (
    MAX_INSTANCES,
    Filesystem,
    InstanceSample,
    NodeSample,
    Sample,
    SampleError,
)

if TYPE_CHECKING or native_wanted("_sampler"):
    from aoscore._speedups._sampler import Sampler, take_counters
else:
    from aoscore._speedups._plain.sampler import Sampler, take_counters

__all__ = [
    "MAX_INSTANCES",
    "Filesystem",
    "InstanceSample",
    "NodeSample",
    "Sample",
    "SampleError",
    "Sampler",
    "take_counters",
]
