"""How nodes of a graph overlap on Hopper and later (programmatic dependent launch): the programs of a node start while the node before still runs,
and wait for its end. Every kernel that is launched so has to wait, on every path, before it reads what another node writes, or writes anything;
what follows it then knows that all nodes before have ended too. One kernel waits last instead: attention's launch of short requests, where that of
tall ones goes before. That one has waited before it lets it start, and shares nothing with it but what both read.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from . import _check


def overlaps() -> bool:
    """Whether nodes of a graph may overlap on the device that kernels are compiled for."""
    return _check.capability() >= 90


def overlap() -> dict[str, bool]:
    """Launch options of a kernel that begins with `wait_for_node_before`."""
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps() else {"OVERLAPS": False}


@triton.jit
def wait_for_node_before(OVERLAPS: tl.constexpr):
    """Waits, and lets the next node start: not sooner, or nodes further on take the places of this one's programs, which then pile up on some
    multiprocessors."""
    if OVERLAPS:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
