"""Stands in for cuda.bindings.driver on a machine without a GPU, as far as graphs are made, read and launched through it: conditional nodes, child
graphs, executables and their updates."""

import ctypes
import functools
from types import SimpleNamespace

import torch
from triton.runtime.interpreter import GridExecutor

from gkernels.graph.memory import tensors_in


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


def flat(values):
    """What stands in nested lists, tuples and dicts, in order."""
    for value in values.values() if isinstance(values, dict) else values:
        yield from flat(value) if isinstance(value, dict | list | tuple) else [value]


def again(results, op, args, kwargs):
    for old, new in zip(tensors_in([results]), tensors_in([op(*args, **kwargs)]), strict=True):
        old.copy_(new)
