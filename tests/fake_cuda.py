"""Stands in for the parts of torch.cuda that a capture uses, on a machine without a GPU.

As on a GPU, what is called while a graph captures is noted and not computed (its results hold NaN or junk until a replay), reading a tensor
on the host spoils the capture, a failed capture keeps its pool, and a pool's memory is freed when no graph holds it and the cache is emptied.
Torch's operators on CPU tensors and interpreted Triton kernels stand for kernels. `Driver` stands for cuda.bindings', as far as graphs are made
through it: conditional nodes, child graphs, executables and their updates.
"""

import ctypes
import functools
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from gkernels.graph import conditional, segments
from gkernels.graph.memory import fill_with_junk, tensors_in


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


def named(names):
    """An enumeration whose members have a name."""
    return SimpleNamespace(**{name: SimpleNamespace(name=name) for name in names})


class Driver:
    """cuda.bindings.driver. Every call is an event. A graph is a list of nodes, each behind the one before; addresses are numbers."""

    CUresult = SimpleNamespace(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE=910)
    CUgraphNodeType = named(f"CU_GRAPH_NODE_TYPE_{kind}" for kind in ("KERNEL", "GRAPH", "CONDITIONAL"))
    CUgraphConditionalNodeType = named(f"CU_GRAPH_COND_TYPE_{kind}" for kind in ("WHILE", "SWITCH"))
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace
    version = 13000

    def __init__(self, cuda):
        self.cuda, self.graphs, self.captured, self.executables, self.conditions, self.updates = cuda, {}, {}, {}, {}, 0
        self.bodies, self.torn, self.made = {}, set(), 0
        self.order, self.calls, self.kept = {}, {}, []                  # by graph the addresses of its nodes; by node its call

    def new(self, table, value):
        self.cuda.event()
        self.made += 1
        table[self.made] = value
        return self.made

    def CUgraph(self, init_value):
        return init_value

    def CUgraphNodeParams(self):
        return SimpleNamespace(conditional=SimpleNamespace())

    def cuDriverGetVersion(self):
        return 0, self.version

    def cuCtxGetCurrent(self):
        return 0, 1

    def cuGraphCreate(self, flags):
        return 0, self.new(self.graphs, [])

    def cuGraphDestroy(self, graph):
        del self.graphs[graph]
        return (0,)

    def add(self, graph, after, count, call, params=None):
        self.cuda.event()
        nodes = self.nodes(graph)
        assert (after or []) == self.addresses(graph)[-1:] and count == bool(nodes), "behind the last node, and that alone"
        call.params = params
        nodes.append(call)
        return 0, self.addresses(graph)[-1]

    def cuGraphConditionalHandleCreate(self, graph, context, value, flags):
        assert graph in self.graphs and (value, flags) == (0, 1)
        return 0, self.new(self.conditions, value)

    def cuGraphAddKernelNode(self, graph, after, count, node):
        values, types = node.kernelParams
        assert len(values) == len(types) and (node.gridDimX, node.gridDimY, node.gridDimZ, node.blockDimY, node.blockDimZ) == (1,) * 5
        return self.add(graph, after, count, functools.partial(getattr(self, node.func.decode()), node.blockDimX, *values), node)

    def cuGraphAddChildGraphNode(self, graph, after, count, child):
        assert child in self.captured, "a captured graph"
        return self.add(graph, after, count, functools.partial(self.play, list(self.captured[child].tape)))

    def cuGraphAddNode(self, graph, after, data, count, params):
        assert params.type is self.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL and data is None and graph in self.graphs
        node = params.conditional
        made = [self.new(self.bodies, []) for _ in range(node.size)]
        node.phGraph_out = made
        assert node.type.name.endswith("SWITCH") or node.size == 1
        return self.add(graph, after, count, functools.partial(self.decide, node.type.name, node.handle, [self.bodies[body] for body in made]), node)

    def decide(self, kind, handle, bodies):
        while kind.endswith("WHILE") and self.conditions[handle]:
            self.play(bodies[0])
        if kind.endswith("SWITCH") and self.conditions[handle] < len(bodies):
            self.play(bodies[self.conditions[handle]])

    def play(self, calls):
        for call in calls:
            call()

    def go_on(self, threads, handle, left, running, done, steps):
        left, running = (ctypes.c_int32.from_address(address) for address in (left, running))
        left.value -= done
        self.conditions[handle] = int(left.value >= steps and running.value > 0)

    def choose(self, threads, handle, live, sizes, count, taken):
        assert threads == count
        n, sizes = ctypes.c_int32.from_address(live).value, (ctypes.c_int32 * count).from_address(sizes)
        first = sum(size < n for size in sizes)
        covered = n > 0 and first < count
        ctypes.c_int32.from_address(taken).value = sizes[first] if covered else 0
        self.conditions[handle] = first if covered else count

    def cuGraphInstantiate(self, graph, flags):
        return 0, self.new(self.executables, list(self.nodes(graph)))

    def nodes(self, graph):
        return self.captured[graph].tape if graph in self.captured else self.graphs[graph] if graph in self.graphs else self.bodies[graph]

    # reading

    def addresses(self, graph):
        known = self.order.setdefault(graph, [])
        for call in self.nodes(graph)[len(known):]:
            self.made += 1
            known.append(self.made)
            self.calls[self.made] = call
        return known

    def cuGraphGetNodes(self, graph, count=0):
        return 0, self.addresses(graph)[:count], len(self.nodes(graph))

    def cuGraphNodeGetType(self, node):
        name = {self.play: "GRAPH", self.decide: "CONDITIONAL"}.get(self.calls[node].func, "KERNEL")
        return 0, getattr(self.CUgraphNodeType, f"CU_GRAPH_NODE_TYPE_{name}")

    def cuGraphChildGraphNodeGetGraph(self, node):
        self.made += 1
        self.bodies[self.made], = self.calls[node].args
        return 0, self.made

    def cuGraphNodeGetParams(self, node):
        assert self.version >= 13020, "came with CUDA 13.2"
        return 0, SimpleNamespace(conditional=self.calls[node].params)

    def launched(self, node):
        """(name, grid, block, values) of a kernel: one of conditional.py's, one of Triton's, or an operator of torch's."""
        call, number = self.calls[node], lambda value: isinstance(value, int | float)
        if params := getattr(call, "params", None):
            return params.func.decode(), (1, 1, 1), (params.blockDimX, 1, 1), params.kernelParams[0]
        op, args = (call.args[1], call.args[2:]) if call.func is again else (call.func, [call.args, call.keywords])
        if isinstance(getattr(call, "args", (None,))[0], GridExecutor):
            op, args = call.args[0], call.args[1:]
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in flat(args) if number(v) or isinstance(v, torch.Tensor)]
        return getattr(getattr(op, "fn", op), "__name__", str(op)), tuple(getattr(op, "grid", (1, 1, 1))), (32, 1, 1), values

    def cuGraphKernelNodeGetParams(self, node):
        _, grid, block, values = self.launched(node)
        numbers = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in values]
        table = (ctypes.c_void_p * len(numbers))(*map(ctypes.addressof, numbers))
        self.kept.append((numbers, table))
        grid, block = ((dict(zip("XYZ", sizes, strict=False)) | dict.fromkeys("XYZ"[len(sizes):], 1)) for sizes in (grid, block))
        return 0, SimpleNamespace(func=node, kern=0, sharedMemBytes=0, kernelParams=ctypes.addressof(table) if numbers else 0,
                                  **{f"gridDim{axis}": n for axis, n in grid.items()}, **{f"blockDim{axis}": n for axis, n in block.items()})

    def cuFuncGetName(self, function):
        return 0, self.launched(function)[0].encode()

    def cuFuncGetParamInfo(self, function, i):
        return (0, 0, 8) if i < len(self.launched(function)[3]) else (1, 0, 0)

    def cuGraphExecUpdate(self, executable, graph):
        """Nodes are alike where the same operator stands in the same place."""
        self.cuda.event()
        kind = lambda call: call.args[1] if call.func is again else call.func
        old, new = self.executables[executable], self.nodes(graph)
        if list(map(kind, old)) != list(map(kind, new)):
            self.torn.add(executable)
            return 910, None
        self.executables[executable], self.updates = list(new), self.updates + 1
        self.torn.discard(executable)
        return 0, None

    def cuGraphExecDestroy(self, executable):
        del self.executables[executable]
        return (0,)

    def cuGraphLaunch(self, executable, stream):
        assert not self.cuda.capturing and executable not in self.torn
        self.play(self.executables[executable])
        return (0,)


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


def flat(values):
    """What stands in nested lists, tuples and dicts, in order."""
    for value in values.values() if isinstance(values, dict) else values:
        yield from flat(value) if isinstance(value, dict | list | tuple) else [value]


def again(results, op, args, kwargs):
    for old, new in zip(tensors_in([results]), tensors_in([op(*args, **kwargs)]), strict=True):
        old.copy_(new)
