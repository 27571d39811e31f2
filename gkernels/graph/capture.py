"""GraphRunner: one callable captured once a bucket, all graphs in one memory pool, the largest first.

The callable takes a bucket (a token capacity), reads static tensors, and returns the tensors that hold its results. It must make no host
decision from tensor contents, so a replay computes whatever batch its static tensors hold. On a machine without CUDA the runner calls it
directly: same code, same results, no graph.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch

from .. import progress as bars
from .buckets import Buckets
from .executable import Turns, raw, shared
from .nodes import Node, read_nodes
from .segments import Segments, borrowed


@dataclass(frozen=True)
class Captured:
    """One bucket's graphs and what they cost."""

    bucket: int
    parts: tuple[Callable[[], None], ...]      # graph replays and, piecewise, the eager calls between them
    graphs: tuple[torch.cuda.CUDAGraph, ...]
    outputs: object                            # on the pool's memory, which the next step of any bucket may overwrite
    seconds: float
    mib: float
    nodes: int                                 # of all graphs; -1 where cuda.bindings is not installed


class GraphRunner:
    """Captures `step(bucket)` for every bucket at `capture()`; `replay(n)` then runs the least bucket that covers n tokens.

    `covers(n)` tells whether a graph exists; `run(n)` replays where it does and calls `step` eagerly, at the capacity n, where it does not.
    `checks` are callables that raise if a static address has changed; they are called before every replay.
    The runner stores no input buffers and frees none. A step that calls an op marked `eager` needs a PiecewiseRunner.

    With `share`, buckets whose graphs have the same nodes and edges take turns in one executable, which a replay updates where another bucket's came
    before it: less memory, more of the host's time. That needs cuda.bindings, and a step that draws no numbers from torch's generators, whose state
    torch's own replay alone advances."""

    WARM_UPS = 2   # the first call compiles and loads kernels, the second runs as the capture will
    BREAKABLE = False

    def __init__(self, step: Callable[[int], object], buckets: Buckets, device: torch.device | str, checks: tuple[Callable[[], None], ...] = (),
                 share: bool = False):
        self.step, self.buckets, self.device, self.checks, self.share = step, buckets, torch.device(device), checks, share
        self.graphs: dict[int, Captured] = {}
        self.executables: list[Turns] = []             # those that buckets share
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
        """Captures every bucket. Call it while no other thread uses the device. An exception leaves the runner without graphs, eager steps
        usable, another capture possible, the pool's memory free and garbage collection as it was."""
        if self.device.type != "cuda":
            return
        self.release()
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()                                    # a graph or kernel freed during capture would invalidate it
        try:
            stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
            with self.marked():
                for bucket in bars.progress(sorted(self.buckets, reverse=True), progress, desc="Capturing CUDA graphs", unit="bucket"):
                    self.graphs[bucket] = self._capture_one(bucket, stream, pool)
            self.finish()
            torch.cuda.current_stream(self.device).wait_stream(stream)
        except BaseException:
            self.release()
            raise
        finally:
            if was_enabled:
                gc.enable()

    def release(self) -> None:
        """Drops all graphs and gives their memory back to the device; steps run eagerly from now on."""
        self.executables.clear()
        for captured in self.graphs.values():
            for graph in captured.graphs:
                graph.reset()
        self.graphs.clear()
        torch.cuda.empty_cache()

    def detach(self) -> GraphRunner:
        """Hands the graphs, and what they need, to another runner, which is returned; this one has none then."""
        other = copy(self)
        self.graphs, self.executables = {}, []
        return other

    def nodes(self) -> dict[str, list[Node]]:
        """By launch, "bucket 8" or, cut into many graphs, "bucket 8, graph 0": its nodes, those of conditional bodies among them. Raises as
        `gkernels.graph.nodes.read_nodes`."""
        found = {}
        for c in self.graphs.values():
            for i, graph in enumerate(c.graphs):
                found[f"bucket {c.bucket}" + (f", graph {i}" if len(c.graphs) > 1 else "")] = read_nodes(raw(graph))
        return found

    @contextmanager
    def marked(self) -> Iterator[None]:
        """While it lasts, the ops that are to run eagerly are marked."""
        yield

    def verify(self, segments: Segments) -> None:
        """Raises where a capture is not what was asked for."""

    def playable(self, graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
        """What plays a captured graph on the current stream."""
        if self.share:
            return shared(graph, self.device, self.executables)
        graph.instantiate()
        return graph.replay

    def finish(self) -> None:
        """Once every bucket is captured."""

    def recorded(self, bucket: int) -> object:
        """What a capture records."""
        return self.step(bucket)

    def call(self, bucket: int) -> object:
        """What a replay of the bucket does, without a graph."""
        return self.step(bucket)

    def _capture_one(self, bucket, stream, pool):
        start = time.perf_counter()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                self.step(bucket)
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()                    # the pool cannot take what the warm-up leaves cached
            before = torch.cuda.memory_reserved(self.device)
            with Segments(pool, self.BREAKABLE, self.playable) as segments:
                outputs = self.recorded(bucket)
                self.verify(segments)
        mib = (torch.cuda.memory_reserved(self.device) - before) / 2**20
        seconds = time.perf_counter() - start
        return Captured(bucket, tuple(segments.parts), tuple(segments.graphs), borrowed(outputs), seconds, mib, segments.nodes)

    def replay(self, n: int) -> object:
        """Replays the graph of the least bucket that covers n tokens and returns that bucket's output tensors, to be read before the next step:
        all buckets share their memory."""
        for check in self.checks:
            check()
        captured = self.graphs[self.buckets.pad(n)]
        for part in captured.parts:
            part()
        self.replays += 1
        return captured.outputs

    def run(self, n: int) -> object:
        """Replays where a graph covers n tokens; elsewhere runs the step eagerly."""
        if self.covers(n):
            return self.replay(n)
        self.eager_steps += 1
        return self.call(self.capacity(n))

    def capacity(self, n: int) -> int:
        """The bucket that `run(n)` takes."""
        return self.buckets.pad(n) if self.buckets.covers(n) else n

    def report(self) -> str:
        """A table of seconds, MiB, nodes and graphs a bucket."""
        rows = [f"{'tokens':>8} {'seconds':>9} {'MiB':>8} {'nodes':>7} {'graphs':>7}"]
        rows += [f"{c.bucket:>8} {c.seconds:>9.3f} {c.mib:>8.1f} {c.nodes:>7} {len(c.graphs):>7}" for c in self.graphs.values()]
        total = [sum(getattr(c, f) for c in self.graphs.values()) for f in ("seconds", "mib")]
        executables = f", which share {len(self.executables)} executables" if self.executables else ""
        return "\n".join(rows + [f"{'all':>8} {total[0]:>9.3f} {total[1]:>8.1f}{executables}"]) if self.graphs else f"no graphs: {self.path}"
