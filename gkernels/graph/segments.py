"""One pass of a step as CUDA graphs: what the monolithic and the piecewise runner share.

`Segments` captures what its block launches. Where an op marked by `eager` is met, the graph ends, the op runs on the real values, and the
next graph begins in the same memory pool. Played in order, graphs and eager calls read and write the addresses of the capture.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .memory import tensors_in

_capturing: ContextVar[Segments | None] = ContextVar("capturing", default=None)      # of this thread: others call their ops as ever


def eager(fn: Callable) -> Callable:
    """Marks an op that no graph may hold, because the host decides something in it. Outside of a capture this is a plain call.

    Inside one it splits the graph (`PiecewiseRunner`) or raises RuntimeError (`GraphRunner`). A replay calls the op with the arguments of the
    capture: the same tensors, and the same numbers and lists, so what changes from step to step it reads from a tensor or from an object.
    It writes to tensors that it is given; of a tensor that it makes and returns, a replay copies the values to where the next graph reads them.
    Any other value that it returns is part of the next graph: where it changes, the replay raises RuntimeError."""
    @functools.wraps(fn)
    def op(*args, **kwargs):
        segments = _capturing.get()
        return fn(*args, **kwargs) if segments is None else segments.call(fn, args, kwargs)
    return op


class Segments:
    """A context that captures its block on the current stream into `pool`; afterwards each of `parts`, called in order, replays it.

    After an exception in the block no graph is left and the stream no longer captures. Only a `breakable` capture may meet eager ops.
    `playable` makes of a captured graph what plays it."""

    def __init__(self, pool: tuple[int, int], breakable: bool, playable: Callable[[torch.cuda.CUDAGraph], Callable[[], None]]):
        self.pool, self.breakable, self.playable = pool, breakable, playable
        self.parts: list[Callable[[], None]] = []
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.called: list[Callable] = []               # the eager ops met, in order
        self.nodes = 0
        self._open: torch.cuda.CUDAGraph | None = None

    def __enter__(self) -> Segments:
        self._stream = torch.cuda.current_stream()
        self._begin()
        self._outer = _capturing.set(self)
        return self

    def __exit__(self, kind, error, traceback):
        _capturing.reset(self._outer)
        if kind is None:
            try:
                self._end()
            except BaseException:
                self._discard()
                raise
        else:
            self._discard()

    def call(self, fn: Callable, args: tuple, kwargs: dict) -> object:
        """Ends the graph, replays it so that the op sees real values, runs the op outside of any capture, and begins the next graph."""
        if not self.breakable:
            raise RuntimeError(f"gkernels.graph.GraphRunner: step: got a call of {name_of(fn)}, which is marked eager, expected a step that one "
                               "graph can hold; capture it with PiecewiseRunner")
        if torch.cuda.current_stream() != self._stream:
            raise RuntimeError(f"gkernels.graph.eager: {name_of(fn)}: got a call on a side stream, expected the capturing stream; let that wait "
                               "for the side stream and call there")
        done = len(self.parts)
        self._end()
        for part in self.parts[done:]:
            part()
        token = _capturing.set(None)
        try:
            results = fn(*args, **kwargs)
        finally:
            _capturing.reset(token)
        self.called.append(fn)
        storages = {t.untyped_storage().data_ptr() for t in tensors_in([args, kwargs])}
        self.parts.append(EagerCall(fn, borrowed(args), borrowed(kwargs), borrowed(results, storages)))
        self._begin()
        return results

    def _begin(self):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        graph.capture_begin(pool=self.pool)
        self._open = graph

    def _end(self):
        graph = self._open
        if graph is None:
            raise RuntimeError("gkernels.graph.eager: the step went on after an eager op had failed, expected the error to end the capture")
        with warnings.catch_warnings():
            if self.breakable:                          # nothing may stand between two eager ops
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            graph.capture_end()
        self._open = None
        self.graphs.append(graph)
        nodes = count_nodes(graph)
        self.nodes = -1 if nodes < 0 else self.nodes + nodes
        if nodes or not self.breakable:
            self.parts.append(self.playable(graph))

    def _discard(self):
        """Ends a capture that is still open and drops every graph. What the driver says now is no news: an error is under way."""
        open_, self._open = self._open, None
        if open_ is not None:
            try:
                open_.capture_end()
                open_.reset()
            except RuntimeError:
                release_failed(self.pool)
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()
        self.parts.clear()


@dataclass(frozen=True)
class EagerCall:
    """An eager op between two graphs. `results` is what it returned at capture: there the next graph reads it."""

    fn: Callable
    args: tuple
    kwargs: dict
    results: object

    def __call__(self) -> None:
        refresh(self.results, self.fn(*self.args, **self.kwargs), name_of(self.fn))


def name_of(fn: Callable) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def refresh(want: object, got: object, name: str) -> None:
    """Copies the tensors that an eager op returned now to those that it returned at capture; RuntimeError where they are not alike."""
    if isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor):
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            raise RuntimeError(f"gkernels.graph.eager: {name}: returned {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)} as "
                               "at capture; return tensors whose shapes follow from the bucket")
        if want.data_ptr() != got.data_ptr() or want.stride() != got.stride():
            want.copy_(got)
    elif isinstance(want, tuple | list) and type(want) is type(got) and len(want) == len(got):
        for old, new in zip(want, got, strict=True):
            refresh(old, new, name)
    elif isinstance(want, dict) and isinstance(got, dict) and want.keys() == got.keys():
        for key in want:
            refresh(want[key], got[key], name)
    elif want is not got and want != got:
        raise RuntimeError(f"gkernels.graph.eager: {name}: returned {got!r}, expected {want!r} as at capture, which the next graph holds; return it "
                           "in a tensor")


def borrowed(value: Any, only: set[int] | None = None) -> Any:
    """The value with each CUDA tensor in its tuples, lists and dicts replaced by one at the same place that does not keep the memory; of `only`
    those whose storage's address is in it.

    The pool gives memory that nobody keeps to whatever is captured next, as within one graph: replays come in that order."""
    if isinstance(value, torch.Tensor):
        return _borrow(value) if value.is_cuda and (only is None or value.untyped_storage().data_ptr() in only) else value
    if isinstance(value, dict):
        return {key: borrowed(item, only) for key, item in value.items()}
    return type(value)(borrowed(item, only) for item in value) if type(value) in (tuple, list) else value


def _borrow(t):
    storage = t.untyped_storage()
    size = storage.nbytes() // t.itemsize * t.itemsize
    if not size:
        return t
    return torch.as_tensor(_Place(storage.data_ptr(), size), device=t.device).view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())


class _Place:
    """Bytes of device memory that somebody else owns."""

    def __init__(self, address, size):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "strides": None, "typestr": "|u1", "version": 3}


def release_failed(pool: tuple[int, int]) -> None:
    """Gives back what a failed capture_end leaves in torch's allocator: a pool that goes on receiving (up to 2.11) and is never freed
    (up to 2.13; pytorch#180395, pytorch#190308)."""
    device, version = torch.cuda.current_device(), tuple(map(int, torch.__version__.split(".")[:2]))
    with suppress(RuntimeError):                        # where it does not receive any more
        torch._C._cuda_endAllocateToPool(device, pool)
    if version < (2, 14):
        with suppress(RuntimeError):                    # a vendor's build may have the mend earlier
            torch._C._cuda_releasePool(device, pool)


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
