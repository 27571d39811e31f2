"""Launches for tests/test_frozen.py on a GPU that is not there:  python -m tests.frozen_kernels  prints what frozen() said, as JSON by case.

Triton compiles, caches and launches as ever; the driver below loads no binary and starts no kernel, but counts both.
Run it without TRITON_INTERPRET.
"""

import json
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from gkernels import precompile
from gkernels.graph import CompiledAfterWarmUp, frozen


class Driver(precompile.Driver):
    """Launches nowhere."""

    launched, loaded = [], []

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda x, y, z, stream, function, *rest: self.launched.append(function)

    @property
    def utils(self):
        return SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 << 10}, load_binary=self.load)

    def load(self, name, binary, shared, device):
        self.loaded.append(name)
        return "module", f"function {name}", 32, 0, 1024


@dataclass(frozen=True)
class Plan:
    RUNS: int
    SPAN: int = 16


@triton.jit
def _fill_kernel(out_ptr, n, value, C: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, value + C.RUNS, offs < n)


@triton.jit
def _other_kernel(out_ptr):
    tl.store(out_ptr, 1)


def fill(out, n=32, value=2.0, plan=Plan(3), **options):
    _fill_kernel[(1,)](out, n, value, C=plan, **{"BLOCK": 64, "num_warps": 4} | options)


def said(call, *args, **options):
    """The error of a call, "" without one. An error launches and loads nothing."""
    before = len(Driver.launched), len(Driver.loaded)
    try:
        call(*args, **options)
    except CompiledAfterWarmUp as error:
        assert (len(Driver.launched), len(Driver.loaded)) == before
        return str(error)
    assert len(Driver.launched) == before[0] + 1 and Driver.launched[-1] is not None
    return ""


def main():
    triton.runtime.driver.set_active(Driver(precompile.target_of("90")))
    out = torch.zeros(80)
    fill(out)
    fill(out, plan=Plan(5), num_warps=8)
    freeze = frozen()
    seen = {
        "warm": said(fill, out), "warm too": said(fill, out, n=64, plan=Plan(5), num_warps=8),
        "one": said(fill, out, n=1), "odd": said(fill, out, n=33), "wide": said(fill, out, n=2**40), "dtype": said(fill, out.int()),
        "address": said(fill, out[1:]), "constant": said(fill, out, BLOCK=128), "field": said(fill, out, plan=Plan(4)),
        "option": said(fill, out, num_stages=5), "two": said(fill, out, n=33, plan=Plan(5, 8), num_warps=8), "none": said(fill, out, value=None),
        "new": said(_other_kernel[(1,)], out),
    }
    thread = threading.Thread(target=lambda: seen.update(thread=said(fill, out, n=1)))
    thread.start()
    thread.join()
    freeze.thaw()
    freeze.thaw()
    seen["thawed"] = said(fill, out, n=33)                               # the kernel that was refused compiles
    _fill_kernel.warmup(out, 1, 2.0, C=Plan(3), BLOCK=64, num_warps=4, grid=(1,))
    with frozen():
        with frozen():
            seen["nested"] = said(fill, out, BLOCK=32)
        seen["still"] = said(fill, out, BLOCK=32)
        seen["unloaded"] = said(fill, out, n=1)
    seen["loaded at last"] = said(fill, out, n=1)
    with suppress(KeyError), frozen():
        raise KeyError
    seen["after an error"] = said(fill, out, BLOCK=32)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
