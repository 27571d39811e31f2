"""How requests that decode go many steps a launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..graph import Buckets, Burst, Loop
from .step import Step


@dataclass(frozen=True)
class Ahead:
    """`most` bounds the turns of a launch, `width` the tokens that one brings a request. `why` says why it is a Burst where a Loop was asked for."""

    mode: str
    runner: Loop | Burst
    most: int
    width: int = 1
    why: str = ""

    @classmethod
    def build(cls, call: Callable[[int], object], step: Step, loop: int, burst: int, width: int = 1) -> Ahead:
        """A Loop of `call`, which advances the state of `step`, over up to `loop` tokens; where that is one or there can be none, a Burst over
        `burst`."""
        b, places, checks = step.buffers, Buckets.up_to(step.max_requests), (step.buffers.check_addresses,)
        turned, what = Loop(call, b["turns"], b["running"], places, step.device, checks), "speculative " if width > 1 else ""
        why = turned.why if loop > 1 else ""
        if loop > 1 and not why:
            return cls(f"{what}loop", turned, -(-loop // width), width)
        steps = -(-burst // width)
        return cls(f"{what}burst", Burst(call, steps, places, step.device, checks), steps, width, why)

    def choices(self, needed: int) -> range:
        """How many turns a launch may take where `needed` are left: of a Burst all or none, and one only where it is more than a single step."""
        least = self.most if isinstance(self.runner, Burst) else 1
        return range(max(least, 2 if self.width == 1 else 1), min(self.most, needed) + 1)
