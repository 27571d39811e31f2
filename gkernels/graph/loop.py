"""Many steps a launch, for steps that advance their own state on the device: unrolled in a graph, or in a WHILE node of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from .buckets import Buckets
from .capture import GraphRunner
from .conditional import WHILE, WhileLoop, capture_while, unavailable, without_bindings
from .nodes import Node


class Burst(GraphRunner):
    """`steps` calls of one callable unrolled in one graph a bucket. Each call must leave on the device all that the next one reads: tokens, lengths,
    stop tests. Rows that end on the way must cost the others nothing but time. On a machine without CUDA the calls follow each other."""

    def __init__(self, step: Callable[[int], object], steps: int, buckets: Buckets, device: torch.device | str,
                 checks: tuple[Callable[[], None], ...] = ()):
        if steps < 1:
            raise ValueError(f"gkernels.graph.Burst: steps: got {steps}, expected at least 1")
        self.steps = steps

        def unrolled(bucket):
            for _ in range(steps):
                outputs = step(bucket)
            return outputs
        super().__init__(unrolled, buckets, device, checks)


class Loop(GraphRunner):
    """One callable in a WHILE node, one a bucket: a launch calls it while calls are left and rows run, and asks nothing of the host.

    `left` and `running` are int32 [1] on the device. Before `run` the host sets `left` on the stream: the calls that the launch may make, of which
    each takes one. The step keeps in `running` how many rows go on. As in a Burst, a call must leave on the device all that the next one reads,
    and rows that end on the way must cost the others nothing but time. A launch that finds 0 in either leaves everything as it is.

    A turn of the node costs time of its own, which `steps` calls share; `left` is kept to nevertheless. But `running` is read between turns alone: up
    to `steps` - 1 calls come after the last row has ended, must change nothing that matters, and are taken from `left` as the others.

    Where `why` says that no graph can hold a loop, and on a machine without CUDA, Python turns it: same results, but on CUDA it waits for the device
    before every turn."""

    def __init__(self, step: Callable[[int], object], left: torch.Tensor, running: torch.Tensor, buckets: Buckets, device: torch.device | str,
                 checks: tuple[Callable[[], None], ...] = (), steps: int = 1):
        super().__init__(step, buckets, device, checks)
        for name, t in (("left", left), ("running", running)):
            if t.dtype != torch.int32 or t.shape != (1,):
                raise ValueError(f"gkernels.graph.Loop: {name}: got {t.dtype} {list(t.shape)}, expected torch.int32 [1]")
        if steps < 1:
            raise ValueError(f"gkernels.graph.Loop: steps: got {steps}, expected at least 1")
        self.left, self.running, self.steps = left, running, steps

    @property
    def why(self) -> str:
        """Why no graph can hold a loop here, and the mend; "" where one can, and without CUDA."""
        return unavailable() if self.device.type == "cuda" else ""

    @property
    def path(self) -> str:
        return f"WHILE loops on the device ({len(self.graphs)} buckets)" if self.graphs else super().path

    def capture(self, progress: bool = True) -> None:
        """As GraphRunner.capture; RuntimeError, and nothing touched, where `why` speaks against it."""
        if self.why:
            raise RuntimeError(f"gkernels.graph.Loop: capture: {self.why}, or capture a Burst")
        super().capture(progress)

    @property
    def by_torch(self) -> bool:
        """Whether torch's own methods make the nodes, for want of cuda.bindings."""
        return without_bindings(WHILE) != "" == self.why

    def recorded(self, bucket: int) -> object:
        return capture_while(lambda: self.step(bucket), self.left, self.running, self.steps) if self.by_torch else super().recorded(bucket)

    def playable(self, graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
        return super().playable(graph) if self.by_torch else WhileLoop(graph, self.left, self.running, self.steps)

    def nodes(self) -> dict[str, list[Node]]:
        made = {c.bucket: c.parts[0] for c in self.graphs.values()}
        return super().nodes() if self.by_torch else {f"bucket {bucket}": cast(WhileLoop, loop).nodes() for bucket, loop in made.items()}

    def call(self, bucket: int) -> object:
        outputs = None
        for n in dict.fromkeys((self.steps, 1)):
            while int(self.left) >= n and int(self.running) > 0:
                for _ in range(n):
                    outputs = self.step(bucket)
                self.left -= n
        return outputs
