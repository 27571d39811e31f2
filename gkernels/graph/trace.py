"""One call, watched: every kernel launched and every torch operation in order, what each would do in a capture, and the call again.

`replay()` does again what was recorded, on the same memory and with the same numbers, as a graph would: the host's decisions are those of
the recorded call, whatever the memory holds now.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.autotuner import Autotuner

from .launches import Launch, record, user_place
from .memory import Memory, named_tensors, poison, span, tensors_in

HOST_READS = {"tolist", "numpy", "__array__", "cpu", "__repr__", "__format__"}      # of these a CPU tensor tells the dispatcher nothing
HOST_OPERATIONS = {"_local_scalar_dense", "equal"}
SHAPES_FROM_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"}


class NotReplayable(RuntimeError):
    """A recorded operation gives a result of another shape now."""


@dataclass(frozen=True)
class Operation:
    """One torch operation: the counterpart of a Launch."""

    name: str
    scalars: dict[str, object]
    pointers: dict[str, int]
    shapes: dict[str, tuple]
    place: str
    again: Callable[[], None] = field(compare=False, repr=False)
    grid: tuple = ()
    classes: dict[str, str] = field(default_factory=dict)


class Trace:
    """`events` in order; `hits` are findings as (name, place, what); `made` the memory of tensors that the call made, by their number;
    `result` what the call returned. All tensors stay alive with the trace, so that no two of them share an address."""

    def __init__(self, declared: Memory, writable: Memory, again: bool = False):
        self.declared, self.writable, self.poison = declared, writable, again
        self.events: list[Launch | Operation] = []
        self.hits: list[tuple[str, str, str]] = []
        self.made, self.makers, self.kept = Memory(), list[tuple[str, int]](), list[Any]()
        self.result: Any = None

    @property
    def launches(self) -> list[Launch]:
        return [event for event in self.events if isinstance(event, Launch)]

    def hit(self, name: str, what: str, place: str = "") -> None:
        self.hits.append((name, place or user_place(), what))

    def region(self, address: int) -> tuple[str, int]:
        """An address by the declared tensor or the tensor made on the way in which it lies; by itself where it lies in neither."""
        return self.declared.find(address) or self.made.find(address) or (hex(address), 0)

    def check_write(self, t: torch.Tensor, what: str) -> None:
        first, end = span(t)
        edges = np.array([first, end - 1])
        if end > first and self.writable.outside(edges).any() and self.made.outside(edges).any():
            region, _ = self.region(first)
            self.hit("undeclared-write", f"{what} writes {region}, which is declared neither as output nor as state or scratch")

    def replay(self) -> None:
        """Does the call again, over poison in what it returned. Raises NotReplayable where an operation's result has another shape now."""
        with torch.inference_mode():
            for t in tensors_in(self.result):
                if self.made.find(t.data_ptr()) is not None:
                    poison(t, self.poison)
            for event in self.events:
                event.again()


class _Functions(TorchFunctionMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in HOST_READS:
            self.trace.hit("hidden-sync", f"Tensor.{name} reads a tensor on the host, which waits for the device and is not replayed")
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            parts = function.decompose(*args, **kwargs)             # in inference mode, composite operations come whole
        if parts is not NotImplemented:
            return parts
        trace, begun, place = self.trace, len(self.trace.events), user_place()
        arguments = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        name = function._schema.name.removeprefix("aten::")
        self.look(function, name, arguments)
        may_draw = torch.Tag.nondeterministic_seeded in function.tags                # attention bears the tag too, and draws for dropout only
        before = generator_state(arguments) if may_draw else None
        result = function(*args, **kwargs)
        if before is not None and not torch.equal(before, generator_state(arguments)):
            trace.hit("host-rng", f"{name} draws from a generator that the host moves on: a replay goes on from another state than a call", place)
        empty = name.startswith(("empty", "new_empty"))
        if empty:
            poison(result, trace.poison)
        if not function._schema.name.startswith(("aten::", "prims::")):
            trace.events[begun:] = [replace(launch, again=lambda: None) for launch in trace.events[begun:]]     # the operation repeats them
        known = {t.untyped_storage().data_ptr() for t in tensors_in(arguments)} if name != "lift_fresh" else set()
        fresh = [t for t in tensors_in(result) if t.numel() and t.untyped_storage().data_ptr() not in known]
        for t in fresh:
            start = t.untyped_storage().data_ptr()
            trace.made.add(f"tensor {len(trace.makers)} made inside", (start, start + t.untyped_storage().nbytes()))
            trace.makers.append((place, t.untyped_storage().nbytes()))
        trace.kept.append((args, kwargs, result))
        shapes = {n: (tuple(t.shape), t.stride(), str(t.dtype)) for n, t in named_tensors(arguments | {"result": result})}
        scalars = {n: repr(value) for n, value in arguments.items() if not list(tensors_in(value))}
        if name == "lift_fresh" and not arguments["self"].dim():
            scalars["value"] = repr(arguments["self"].item())
        held = list(tensors_in(result))

        def again():
            if name == "lift_fresh" or not (fresh or function._schema.is_mutable):      # a constant of the capture; a view, or a number
                return
            if empty:
                poison(result, trace.poison)                        # in a graph's pool it holds whatever stood there
                return
            for old, new in zip(held, tensors_in(function(*args, **kwargs)), strict=True):
                if old.shape != new.shape:
                    raise NotReplayable(f"{name} gave {list(old.shape)} when it was recorded and gives {list(new.shape)} now")
                if any(old is f for f in fresh):
                    old.copy_(new)

        trace.events.append(Operation(name, scalars, {n: t.data_ptr() for n, t in named_tensors(arguments)}, shapes, place, again))
        return result

    def look(self, function, name, arguments):
        """What a capture would make of the operation."""
        hit = self.trace.hit
        index = list(tensors_in(arguments.get("indices", ())))
        masked = any(i.dtype in (torch.bool, torch.uint8) for i in index) and not (name == "index_put_" and arguments["values"].numel() == 1)
        counted = name == "repeat_interleave" and arguments.get("output_size") is not None
        if name in HOST_OPERATIONS:
            hit("hidden-sync", f"{name} reads a tensor on the host, which waits for the device and is not replayed")
        elif (name in SHAPES_FROM_DATA and not counted) or (name in ("index", "index_put_") and masked):
            hit("data-dependent-shape", f"{name}{' with a mask' if masked else ''} counts elements on the host: the shape of its result depends on "
                                        "what the tensor holds")
        elif name == "lift_fresh" and arguments["self"].dim():
            hit("host-constant", "makes a tensor from values of the host: a graph goes on holding those of the capture")
        elif name in ("_to_copy", "copy_") and not arguments.get("non_blocking"):
            source = arguments["src" if name == "copy_" else "self"].device.type
            target = torch.device(arguments.get("device") or source).type if name == "_to_copy" else arguments["self"].device.type
            if (source, target) == ("cuda", "cpu"):
                hit("hidden-sync", "copies from the device to the host and waits for it")
            elif (source, target) == ("cpu", "cuda"):
                hit("host-constant", "copies pageable memory of the host: a graph goes on holding what it held at the capture")
        for argument in function._schema.arguments:
            if argument.alias_info and argument.alias_info.is_write:
                for t in tensors_in(arguments.get(argument.name)):
                    self.trace.check_write(t, name)


def generator_state(arguments: dict[str, Any]) -> torch.Tensor:
    """The state of the generator that an operation of these arguments draws from."""
    if arguments.get("generator") is not None:
        return arguments["generator"].get_state()
    device = torch.device(arguments.get("device") or next((t.device for t in tensors_in(arguments)), "cpu"))
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def tracing(declared: Memory, writable: Memory, again: bool = False) -> Iterator[Trace]:
    """Watches what the body does. New memory is poisoned; `again` chooses the poison. Host generators start from one seed, so that two runs draw
    alike, and go back to where they were."""
    trace, thread = Trace(declared, writable, again), threading.get_ident()
    start, tune, wait = threading.Thread.start, Autotuner.run, torch.cuda.synchronize

    def watched_collect(generation=2):
        trace.hit("gc-in-capture", "collects garbage, which may free a graph or a kernel while the capture lasts")
        return 0

    def watched_start(self):
        trace.hit("other-thread", "starts a thread while the capture lasts")
        start(self)

    def watched_tune(tuner, *args, **kwargs):
        trace.hit("autotune", f"{tuner.base_fn.__name__} is tuned by timing it, keyed on {', '.join(tuner.keys) or 'nothing'}")
        if torch.cuda.is_available():
            return tune(tuner, *args, **kwargs)
        return tuner.fn.run(*args, **kwargs, **tuner.configs[0].all_kwargs())           # nothing to time without a GPU

    def watched_wait(*args):
        trace.hit("hidden-sync", "torch.cuda.synchronize waits for the device")
        return wait(*args) if torch.cuda.is_available() else None

    states = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        seeded = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(), patch("gc.collect", watched_collect), patch.object(threading.Thread, "start", watched_start), \
                patch.object(Autotuner, "run", watched_tune), patch("torch.cuda.synchronize", watched_wait), \
                record(trace.events):
            torch.manual_seed(0)
            with _Functions(trace), _Operations(trace):
                yield trace
    finally:
        for name, before, after in (("random", seeded[0], random.getstate()), ("numpy.random", seeded[1], np.random.get_state())):
            if not _equal(before, after):
                trace.hit("host-rng", f"draws from {name}: a graph repeats the number of the capture", "?")
        random.setstate(states[0])
        np.random.set_state(states[1])
    for launch in trace.launches:
        if launch.thread != thread:
            trace.hit("other-thread", f"{launch.kernel} is launched from another thread", launch.place)


def _equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
