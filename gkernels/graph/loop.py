"""Many steps a launch, for steps that advance their own state on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .buckets import Buckets
from .capture import GraphRunner


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

    def capacity(self, n: int) -> int:
        """The bucket that `run(n)` takes."""
        return self.buckets.pad(n) if self.buckets.covers(n) else n
