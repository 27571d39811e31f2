"""A step whose bucket the device chooses: all buckets' graphs in one launch, of which it runs one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .buckets import Buckets
from .capture import GraphRunner
from .conditional import SWITCH, Switch, unavailable
from .nodes import Node


class ChoosingRunner(GraphRunner):
    """A GraphRunner for a number of live tokens that the device knows and the host may not: a launch reads it and runs the least bucket for it.

    `live` is that number, int32 [1] on the device. `taken`, int32 [1], is the bucket of the last launch; 0 where none covers `live`: nothing runs
    then. The step may draw no numbers from torch's generators, whose state no such launch advances.

    Where `why` says that no graph can choose, and on a machine without CUDA, Python does: same results, but on CUDA it waits for the device."""

    def __init__(self, step: Callable[[int], object], live: torch.Tensor, buckets: Buckets, device: torch.device | str,
                 checks: tuple[Callable[[], None], ...] = ()):
        super().__init__(step, buckets, device, checks)
        if live.dtype != torch.int32 or live.shape != (1,):
            raise ValueError(f"gkernels.graph.ChoosingRunner: live: got {live.dtype} {list(live.shape)}, expected torch.int32 [1]")
        self.live, self.taken = live, torch.zeros_like(live)
        self.switch: Switch | None = None

    @property
    def why(self) -> str:
        """Why no graph can choose here, and the mend; "" where one can, and without CUDA."""
        return unavailable(SWITCH) if self.device.type == "cuda" else ""

    @property
    def path(self) -> str:
        return f"one graph that chooses on the device ({len(self.graphs)} buckets)" if self.graphs else super().path

    def capture(self, progress: bool = True) -> None:
        """As GraphRunner.capture; RuntimeError, and nothing touched, where `why` speaks against it."""
        if self.why:
            raise RuntimeError(f"gkernels.graph.ChoosingRunner: capture: {self.why}, or capture a GraphRunner, whose bucket the host chooses")
        super().capture(progress)

    def playable(self, graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
        return graph.replay                             # alone it is never made executable

    def finish(self) -> None:
        captured = [self.graphs[bucket] for bucket in self.buckets]
        sizes = torch.tensor(self.buckets.sizes, dtype=torch.int32, device=self.live.device)
        self.switch = Switch([c.graphs[0] for c in captured], self.live, sizes, self.taken)

    def release(self) -> None:
        self.switch = None
        super().release()

    def detach(self) -> GraphRunner:
        other = super().detach()
        self.switch = None
        return other

    def nodes(self) -> dict[str, list[Node]]:
        """As GraphRunner.nodes, of the one launch that all buckets share, "all buckets"."""
        return {"all buckets": self.switch.nodes()} if self.switch else {}

    def replay(self, n: int | None = None) -> object:
        """Launches the graph that chooses. Returns the outputs of n's bucket where the host knows n to be what `live` holds; else None: what the step
        returned lies in `graphs[bucket].outputs`, by the bucket in `taken`."""
        for check in self.checks:
            check()
        if self.switch is None:
            raise RuntimeError("gkernels.graph.ChoosingRunner: replay: got no graphs, expected capture() before it; run() needs none")
        self.switch()
        self.replays += 1
        return None if n is None else self.graphs[self.buckets.pad(n)].outputs

    def run(self, n: int | None = None) -> object:
        """Replays where there are graphs; elsewhere calls the step for the bucket of `live`, and returns its outputs. An n that no bucket covers runs
        eagerly, at the capacity n."""
        if n is not None and not self.buckets.covers(n):
            return super().run(n)
        if self.graphs:
            return self.replay(n)
        self.eager_steps += 1
        live = int(self.live)
        bucket = self.buckets.pad(live) if self.buckets.covers(live) else 0
        self.taken.fill_(bucket)
        return self.step(bucket) if bucket else None
