"""Stands in for the parts of torch.cuda that a capture uses, on a machine without a GPU.

As on a GPU, what is called while a graph captures is noted and not computed (its results hold NaN or junk until a replay), reading a tensor
on the host spoils the capture, a failed capture keeps its pool, and a pool's memory is freed when no graph holds it and the cache is emptied.
Torch's operators on CPU tensors and interpreted Triton kernels stand for kernels. fake_driver.py stands for cuda.bindings.
"""

import functools
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from gkernels.graph import conditional, segments
from gkernels.graph.memory import fill_with_junk, tensors_in
from tests.fake_driver import Driver, again


class Planted(Exception):
    """A fault that a test asked for."""


class Pool:
    def __init__(self):
        self.bytes = self.graphs = 0
        self.receives = False


class FakeCuda:
    """`fail_at = n` raises Planted at the n-th event from now: a call of torch.cuda, or what the step itself reports with `event()`.
    `spoils` makes that fault invalidate the capture under way, as a fault of the driver does."""

    def __init__(self):
        self.pools, self.capturing, self.streams = {}, None, [Stream(self)]
        self.events, self.fail_at, self.spoils = 0, None, False
        self.driver = Driver(self)

    def event(self):
        self.events += 1
        if self.fail_at is not None and self.events > self.fail_at:
            self.fail_at = None
            if self.capturing and self.spoils:
                self.capturing.valid = False
            raise Planted

    def plant(self, at, spoils):
        self.events, self.fail_at, self.spoils = 0, at, spoils

    def install(self, monkeypatch):
        launch = GridExecutor.__call__

        def noted_launch(executor, *args, **kwargs):
            call = functools.partial(launch, executor, *args, **kwargs)
            return self.capturing.tape.append(call) if self.capturing else call()

        for name, here in dict(CUDAGraph=functools.partial(Graph, self), Stream=lambda device: Stream(self), stream=self.stream,
                               current_stream=self.current_stream, current_device=lambda: 0, synchronize=self.synchronize,
                               empty_cache=self.empty_cache, memory_reserved=lambda device=None: self.reserved,
                               graph_pool_handle=self.graph_pool_handle).items():
            monkeypatch.setattr(torch.cuda, name, here)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release_pool)
        package = ModuleType("cuda.bindings")
        package.driver, package.nvrtc = self.driver, SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", package)
        monkeypatch.setattr(conditional, "require_device", lambda what, **tensors: None)
        monkeypatch.setattr(conditional, "function", lambda device, name: name)
        monkeypatch.setattr(segments, "count_nodes", lambda graph: len(graph.tape))
        monkeypatch.setattr(GridExecutor, "__call__", noted_launch)
        return self

    def lose_bindings(self, monkeypatch, version=13000):
        """As torch 2.14 without cuda.bindings, on a driver of that version: WHILE nodes by methods of CUDAGraph."""
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        monkeypatch.setattr(conditional, "driver_version", lambda: version)
        torch.cuda.CUDAGraph.begin_capture_to_while_node = Graph.begin_capture_to_while_node       # the stand-in's: it goes with it
        torch.cuda.CUDAGraph.get_currently_capturing_graph = lambda: self.capturing

    @property
    def reserved(self):
        return sum(pool.bytes for pool in self.pools.values())

    @property
    def idle(self):
        """Nothing is left of a capture."""
        return (self.capturing is None and len(self.streams) == 1 and not any(pool.receives for pool in self.pools.values()) and
                not self.driver.graphs)

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def current_stream(self, device=None):
        return self.streams[-1]

    def synchronize(self, device=None):
        self.event()
        assert not self.capturing, "a capture does not wait for the device"

    def empty_cache(self):
        self.event()
        self.pools = {handle: pool for handle, pool in self.pools.items() if pool.graphs}

    def graph_pool_handle(self):
        self.event()
        return (0, len(self.pools) + 1)

    def end_allocate(self, device, handle):
        if not self.pools[handle].receives:
            raise RuntimeError("not receiving")
        self.pools[handle].receives = False

    def release_pool(self, device, handle):
        self.pools[handle].graphs -= 1
        assert self.pools[handle].graphs >= 0, "released more often than it was taken"


class Stream:
    cuda_stream = 0

    def __init__(self, cuda):
        self.cuda = cuda

    def wait_stream(self, other):
        self.cuda.event()


class Graph:
    """A CUDAGraph whose nodes are calls."""

    def __init__(self, cuda, keep_graph=False):
        self.cuda, self.tape, self.open, self.valid, self.ended, self.ready = cuda, [], [], True, False, False

    def capture_begin(self, pool):
        self.cuda.event()
        assert self.cuda.capturing is None and len(self.cuda.streams) > 1, "one capture at a time, and not on the default stream"
        self.handle, self.pool = pool, self.cuda.pools.setdefault(pool, Pool())
        self.pool.graphs, self.pool.receives, self.cuda.capturing = self.pool.graphs + 1, True, self
        self.mode = Tape(self)
        self.mode.__enter__()

    def capture_end(self):
        self.cuda.event()
        if self.cuda.capturing is not self:
            raise RuntimeError("this stream does not capture")
        self.mode.__exit__(None, None, None)
        self.cuda.capturing = None
        assert not self.open, "in a body yet"
        if not self.valid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.pool.receives, self.ended = False, True

    def begin_capture_to_while_node(self, more):
        """What follows is the body of a WHILE node, before which `more` is looked at."""
        self.check_condition(more)
        body, condition = [], [False]
        self.tape += [functools.partial(hold, condition, more), functools.partial(turn, condition, body)]
        self.open.append((self.tape, condition))
        self.tape = body

    def set_conditional_handle_for_current_node(self, more):
        self.check_condition(more)
        self.tape.append(functools.partial(hold, self.open[-1][1], more))

    def end_capture_to_conditional_node(self):
        self.tape, _ = self.open.pop()
        self.cuda.event()

    def check_condition(self, more):
        self.cuda.event()
        assert self.cuda.capturing is self and more.dtype == torch.bool and more.shape == (), "a condition of one truth"

    def instantiate(self):
        self.cuda.event()
        self.ready = True

    def replay(self):
        assert self.ready and not self.cuda.capturing
        for call in self.tape:
            call()

    def raw_cuda_graph(self):
        assert self.ended
        self.cuda.driver.captured[id(self)] = self
        return id(self)

    def reset(self):
        if self.ended:
            self.pool.graphs -= 1
        self.ended = self.ready = False


class Tape(TorchDispatchMode):
    """Notes operators for a graph. Their results get memory from the graph's pool, and no values."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, op._schema
        if op is torch.ops.aten._local_scalar_dense.default:
            self.graph.valid = False
            raise RuntimeError("operation not permitted when stream is capturing")
        if schema.is_mutable:
            self.graph.tape.append(functools.partial(op, *args, **kwargs))
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            written = [given[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write]
            return written[0] if len(schema.returns) == 1 else tuple(written) if schema.returns else None
        results = op(*args, **kwargs)
        owned = {t.untyped_storage().data_ptr() for t in tensors_in([args, kwargs])}
        fresh = [t for t in tensors_in([results]) if t.untyped_storage().data_ptr() not in owned]
        if fresh:
            self.graph.pool.bytes += sum(t.untyped_storage().nbytes() for t in fresh)
            self.graph.tape.append(functools.partial(again, results, op, args, kwargs))
            fill_with_junk(fresh, torch.Generator().manual_seed(len(self.graph.tape)))
        return results


def hold(condition, more):
    condition[0] = bool(more)


def turn(condition, body):
    while condition[0]:
        for call in body:
            call()
