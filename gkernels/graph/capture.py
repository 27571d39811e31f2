"""GraphRunner: one callable captured once a bucket, all graphs in one memory pool, the largest first.

The callable takes a bucket (a token capacity), reads static tensors, and returns the tensors that hold its results. It must make no host
decision from tensor contents, so a replay computes whatever batch its static tensors hold. On a machine without CUDA the runner calls it
directly: same code, same results, no graph.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import progress as bars
from .buckets import Buckets


@dataclass(frozen=True)
class Captured:
    """One bucket's graph and what it cost."""

    bucket: int
    graph: torch.cuda.CUDAGraph
    outputs: object
    seconds: float
    mib: float
    nodes: int


class GraphRunner:
    """Captures `step(bucket)` for every bucket at `capture()`; `replay(n)` then runs the least bucket that covers n tokens.

    `covers(n)` tells whether a graph exists; `run(n)` replays where it does and calls `step` eagerly, at the capacity n, where it does not.
    `checks` are callables that raise if a static address has changed; they are called before every replay.
    The runner stores no input buffers and frees none."""

    WARM_UPS = 2   # the first call compiles and loads kernels, the second runs as the capture will

    def __init__(self, step: Callable[[int], object], buckets: Buckets, device: torch.device | str, checks: tuple[Callable[[], None], ...] = ()):
        self.step, self.buckets, self.device, self.checks = step, buckets, torch.device(device), checks
        self.graphs: dict[int, Captured] = {}
        self.replays = self.eager_steps = 0

    @property
    def path(self) -> str:
        """How steps run here, in words."""
        if self.graphs:
            return f"captured graphs ({len(self.graphs)} buckets)"
        return "eager on CUDA" if self.device.type == "cuda" else "eager on the CPU interpreter"

    def covers(self, n: int) -> bool:
        return bool(self.graphs) and self.buckets.covers(n)

    def capture(self, progress: bool = True) -> None:
        """Captures every bucket. An exception leaves the runner without graphs, eager steps usable and garbage collection as it was."""
        if self.device.type != "cuda":
            return
        was_enabled, stream, pool = gc.isenabled(), torch.cuda.Stream(self.device), None
        try:
            for bucket in bars.progress(sorted(self.buckets, reverse=True), progress, desc="Capturing CUDA graphs", unit="bucket"):
                captured = self._capture_one(bucket, stream, pool)
                self.graphs[bucket], pool = captured, captured.graph.pool()
        except BaseException:
            self.graphs.clear()
            raise
        finally:
            if was_enabled:
                gc.enable()

    def _capture_one(self, bucket, stream, pool):
        start = time.perf_counter()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                self.step(bucket)
        stream.synchronize()
        gc.collect()
        gc.disable()                                    # a graph or kernel freed during capture would invalidate it
        free = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            outputs = self.step(bucket)
        nodes = count_nodes(graph)
        graph.instantiate()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        mib = (torch.cuda.memory_reserved(self.device) - free) / 2**20
        return Captured(bucket, graph, outputs, time.perf_counter() - start, mib, nodes)

    def replay(self, n: int) -> object:
        """Replays the graph of the least bucket that covers n tokens and returns that bucket's output tensors, to be read before the next step."""
        for check in self.checks:
            check()
        captured = self.graphs[self.buckets.pad(n)]
        captured.graph.replay()
        self.replays += 1
        return captured.outputs

    def run(self, n: int) -> object:
        """Replays where a graph covers n tokens; elsewhere runs the step eagerly."""
        if self.covers(n):
            return self.replay(n)
        self.eager_steps += 1
        return self.step(self.buckets.pad(n) if self.buckets.covers(n) else n)

    def report(self) -> str:
        """A table of seconds, MiB and nodes a bucket."""
        rows = [f"{'tokens':>8} {'seconds':>9} {'MiB':>8} {'nodes':>7}"]
        rows += [f"{c.bucket:>8} {c.seconds:>9.3f} {c.mib:>8.1f} {c.nodes:>7}" for c in self.graphs.values()]
        total = [sum(getattr(c, f) for c in self.graphs.values()) for f in ("seconds", "mib")]
        return "\n".join(rows + [f"{'all':>8} {total[0]:>9.3f} {total[1]:>8.1f}"]) if self.graphs else f"no graphs: {self.path}"


def count_nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Nodes of a captured graph; -1 where cuda.bindings is not installed."""
    try:
        import cuda.bindings.runtime as cudart
    except ImportError:
        return -1
    raw = cudart.cudaGraph_t(init_value=int(graph.raw_cuda_graph()))
    error, _, count = cudart.cudaGraphGetNodes(raw, 0)
    if int(error):
        raise RuntimeError(f"gkernels.graph: cudaGraphGetNodes answered {error}")
    return count
