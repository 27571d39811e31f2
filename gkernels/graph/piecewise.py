"""PiecewiseRunner: the step cut at the ops that no graph may hold, graphs between them in one pool.

For engines whose attention decides on the host, and the baseline that a monolithic graph has to beat: each cut costs a launch of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from .buckets import Buckets
from .capture import GraphRunner
from .segments import Segments, eager


def attention_ops() -> tuple[tuple[object, str], ...]:
    """This library's attention. Found, not imported: who takes the runners alone has none."""
    ops = sys.modules.get("gkernels.ops")
    return ((ops, "attention"), (ops, "attention_out")) if ops else ()


class PiecewiseRunner(GraphRunner):
    """A GraphRunner whose graphs end and begin again around ops that run eagerly: those marked `eager`, and those named in `unsafe`.

    `unsafe` are (owner, name): the module or object through which the step looks an op up, as in [(engine, "attend")]. They are marked only
    while a capture runs. One that the step does not call there is an error at capture: it would lie in a graph. What such an op may take and
    return, `eager` says. None: `attention_ops`, those that the step calls."""

    BREAKABLE = True

    def __init__(self, step: Callable[[int], object], buckets: Buckets, device: torch.device | str, checks: tuple[Callable[[], None], ...] = (),
                 unsafe: tuple[tuple[object, str], ...] | None = None, share: bool = False):
        super().__init__(step, buckets, device, checks, share)
        self.unsafe, self.is_told = tuple(unsafe or ()), unsafe is not None
        for owner, name in self.unsafe:
            if not callable(getattr(owner, name, None)):
                raise ValueError(f"gkernels.graph.PiecewiseRunner: unsafe: got {name!r} of {getattr(owner, '__name__', owner)}, expected a callable "
                                 "there; name the module through which the step calls it")

    @property
    def path(self) -> str:
        if self.graphs:
            return f"piecewise graphs ({len(self.graphs)} buckets, {sum(len(c.graphs) for c in self.graphs.values())} graphs)"
        return super().path

    @contextmanager
    def marked(self) -> Iterator[None]:
        with ExitStack() as patches:
            for owner, name in self.unsafe if self.is_told else attention_ops():
                patches.enter_context(patch.object(owner, name, eager(getattr(owner, name))))
            yield

    def verify(self, segments: Segments) -> None:
        for owner, name in self.unsafe:
            if getattr(owner, name).__wrapped__ not in segments.called:
                raise RuntimeError(f"gkernels.graph.PiecewiseRunner: unsafe: {name} was not called through {getattr(owner, '__name__', owner)}, so "
                                   "it may lie in a graph; name the module through which the step calls it")
