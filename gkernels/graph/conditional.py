"""Conditional nodes around captured graphs, made through cuda.bindings, which torch does not bring. The host launches once, the device decides.
Without cuda.bindings, `capture_while` makes WHILE nodes by the methods of torch's CUDAGraph, which came with torch 2.14: a turn then launches a
handful of torch's kernels where `go_on` is one.

WhileLoop, of `steps` calls of a body a turn, and where these are more than one, of the turns of one call that are left over:

    go_on(handle, left, running, 0, steps)
    while handle:
        body, ..., body
        go_on(handle, left, running, steps, steps)

`go_on` takes what was just done from `left` and asks for another turn while there is enough left for one and rows run, so that a body that forgets
to count ends too. A turn costs 4 us on an H100 beside its kernels, which more steps a turn share.

Switch, of as many bodies as there are sizes:

    choose(handle, live, sizes, count, taken)
    switch handle: body of the least size that `live` does not exceed
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from .executable import Executable, raw
from .nodes import Bodies, Node, answered, nodes_of
from .segments import refresh

WHILE, SWITCH = "WHILE", "SWITCH"
FIRST_DRIVER = {WHILE: 12040, SWITCH: 12080}     # came with CUDA 12.4 and 12.8
MOST_BODIES = 1024                               # a thread of one block for each
SOURCE = b"""
typedef unsigned long long Handle;
extern "C" __device__ void cudaGraphSetConditional(Handle handle, unsigned int value);     // known to the compiler, as printf is

extern "C" __global__ void go_on(Handle handle, int* left, const int* running, int done, int steps) {
    *left -= done;
    cudaGraphSetConditional(handle, *left >= steps && *running > 0);
}

extern "C" __global__ void choose(Handle handle, const int* live, const int* sizes, int count, int* taken) {
    int n = *live, first = __syncthreads_count(sizes[threadIdx.x] < n);     // a thread for each of count sizes, which rise
    bool covered = n > 0 && first < count;
    if (threadIdx.x == 0) {
        *taken = covered ? sizes[first] : 0;
        cudaGraphSetConditional(handle, covered ? first : count);           // there is no body number count: none runs
    }
}
"""
POINTER, INT = ctypes.c_void_p, ctypes.c_int
PARAMETERS = {b"go_on": (ctypes.c_ulonglong, POINTER, POINTER, INT, INT), b"choose": (ctypes.c_ulonglong, POINTER, POINTER, INT, POINTER)}


def unavailable(kind: str = WHILE) -> str:
    """Why no WHILE, or SWITCH, node can be made on a CUDA device here, and the mend; "" where one can."""
    why = without_bindings(kind)
    if why and kind == WHILE and has_methods():
        return too_old(driver_version(), kind)
    return why


def without_bindings(kind: str) -> str:
    """Why cuda.bindings makes none; "" where it can."""
    try:
        from cuda.bindings import driver, nvrtc
        nvrtc.nvrtcVersion()
    except ImportError:
        return f"{kind} nodes are made through cuda.bindings, which is not installed; pip install 'gkernels[loop]'"
    except RuntimeError as error:
        return f"{kind} nodes need NVRTC, which cuda.bindings does not find ({error}); pip install nvidia-cuda-nvrtc"
    return too_old(answered(driver.cuDriverGetVersion())[0], kind)


def too_old(version: int, kind: str) -> str:
    first = FIRST_DRIVER[kind]
    return f"the driver is of CUDA {dotted(version)}, {kind} nodes came with {dotted(first)}; update it" if version < first else ""


def driver_version() -> int:
    """The CUDA version of the driver, without cuda.bindings: 13020 for 13.2."""
    version = ctypes.c_int()
    error = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return answered((error, version.value))[0]


def has_methods() -> bool:
    """Whether torch makes WHILE nodes."""
    return hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")


def capture_while(call: Callable[[], object], left: torch.Tensor, running: torch.Tensor, steps: int = 1) -> object:
    """WhileLoop's turns of `call`, for the capture that goes on: by torch's methods, into the graph under capture. Returns what the first node's last
    call returned; the second node's calls copy theirs there."""
    graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    outputs = None
    for n in dict.fromkeys((steps, 1)):
        more = goes_on(left, running, n)
        graph.begin_capture_to_while_node(more)
        try:
            for _ in range(n):
                results = call()
            if n == steps:
                outputs = results
            else:
                refresh(outputs, results, "step")
            left.sub_(n)
            more.copy_(goes_on(left, running, n))
            graph.set_conditional_handle_for_current_node(more)
        finally:
            graph.end_capture_to_conditional_node()
    return outputs


def goes_on(left: torch.Tensor, running: torch.Tensor, steps: int) -> torch.Tensor:
    """Whether another turn follows, bool []."""
    return (left[0] >= steps) & (running[0] > 0)


def dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


class Conditional:
    """A graph that `build` makes, on the device of its tensors. A call launches it on the current stream. RuntimeError where the driver refuses;
    nothing is left behind then, nor with the last reference."""

    def __init__(self, device: torch.device):
        with Nodes() as nodes:
            self.build(nodes)
            self.launch = Executable(int(nodes.graph), device)

    def __call__(self) -> None:
        self.launch()

    def build(self, nodes: Nodes) -> None:
        """Adds the nodes to a graph that is empty."""
        raise NotImplementedError

    def nodes(self) -> list[Node]:
        """What a launch does, the bodies' nodes among it: read from a graph made once more, without the handles of its own that each has."""
        with Nodes() as nodes:
            self.build(nodes)
            made = nodes_of(nodes.driver, nodes.graph, nodes.bodies)
        return [replace(node, parameters=node.parameters[1:]) if node.name.encode() in PARAMETERS else node for node in made]


class WhileLoop(Conditional):
    """`body`, a captured graph that is kept, in WHILE nodes over `left` and `running`, int32 [1]. It holds the memory pool of what it captured, and
    must live as long as this does."""

    def __init__(self, body: torch.cuda.CUDAGraph, left: torch.Tensor, running: torch.Tensor, steps: int = 1):
        require_device("Loop", left=left, running=running)
        self.body, self.left, self.running, self.steps = body, left, running, steps
        super().__init__(left.device)

    def build(self, nodes: Nodes) -> None:
        at = None
        for n in dict.fromkeys((self.steps, 1)):
            handle = nodes.handle()
            arguments = (int(handle), self.left.data_ptr(), self.running.data_ptr())
            at, (inside,) = nodes.conditional(nodes.kernel(nodes.graph, at, b"go_on", (*arguments, 0, n)), handle, WHILE, 1)
            turn = None
            for _ in range(n):
                turn = nodes.child(inside, turn, self.body)
            nodes.kernel(inside, turn, b"go_on", (*arguments, n, n))


class Switch(Conditional):
    """`bodies`, captured graphs that are kept, in a SWITCH node: a call launches, on the current stream, the one of the least of `sizes`, which rise,
    that `live` does not exceed, and none where there is none or `live` is below 1. All int32 on the device: live [1], sizes [bodies], and
    taken [1], which the launch sets to that size, or to 0. Lifetime as WhileLoop's."""

    def __init__(self, bodies: Sequence[torch.cuda.CUDAGraph], live: torch.Tensor, sizes: torch.Tensor, taken: torch.Tensor):
        require_device("ChoosingRunner", live=live, sizes=sizes, taken=taken)
        self.bodies, self.live, self.sizes, self.taken = bodies, live, sizes, taken               # sizes are read at every launch
        if not len(bodies) <= MOST_BODIES:
            raise ValueError(f"gkernels.graph.ChoosingRunner: buckets: got {len(bodies)}, expected at most {MOST_BODIES}")
        super().__init__(live.device)

    def build(self, nodes: Nodes) -> None:
        handle, count = nodes.handle(), len(self.bodies)
        values = (int(handle), self.live.data_ptr(), self.sizes.data_ptr(), count, self.taken.data_ptr())
        _, insides = nodes.conditional(nodes.kernel(nodes.graph, None, b"choose", values, threads=count), handle, SWITCH, count)
        for inside, body in zip(insides, self.bodies, strict=True):
            nodes.child(inside, None, body)


def require_device(what: str, **tensors: torch.Tensor) -> None:
    if not all(t.is_cuda for t in tensors.values()):
        raise ValueError(f"gkernels.graph.{what}: {', '.join(tensors)}: got tensors on {', '.join(str(t.device) for t in tensors.values())}, "
                         "expected them on the device")


class Nodes(ExitStack):
    """A graph under construction, which its block's end destroys: an executable made of it needs it no longer."""

    def __enter__(self) -> Nodes:
        from cuda.bindings import driver
        super().__enter__()
        self.driver = driver
        self.context, = answered(driver.cuCtxGetCurrent())
        self.bodies = dict[int, Bodies]()           # of its conditional nodes, by their addresses
        self.graph, = answered(driver.cuGraphCreate(0))
        self.callback(driver.cuGraphDestroy, self.graph)
        return self

    def handle(self):
        """A condition of the graph, 0 at each launch until a kernel says more."""
        return answered(self.driver.cuGraphConditionalHandleCreate(self.graph, self.context, 0, 1))[0]

    def kernel(self, graph, after, name: bytes, values: tuple, threads: int = 1):
        """A node of one of SOURCE's kernels, one block, behind the node `after`."""
        node = self.driver.CUDA_KERNEL_NODE_PARAMS()
        node.func = function(torch.cuda.current_device(), name)
        node.gridDimX = node.gridDimY = node.gridDimZ = node.blockDimY = node.blockDimZ = 1
        node.blockDimX, node.kernelParams = threads, (values, PARAMETERS[name])
        return answered(self.driver.cuGraphAddKernelNode(graph, [after] if after else None, 1 if after else 0, node))[0]

    def child(self, graph, after, body: torch.cuda.CUDAGraph):
        """A node that holds a copy of a captured graph."""
        captured = self.driver.CUgraph(init_value=raw(body))
        return answered(self.driver.cuGraphAddChildGraphNode(graph, [after] if after else None, 1 if after else 0, captured))[0]

    def conditional(self, after, handle, kind: str, bodies: int) -> tuple:
        """A conditional node behind `after`, and the graphs of its bodies, which are empty."""
        params, driver = self.driver.CUgraphNodeParams(), self.driver
        params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle, params.conditional.ctx, params.conditional.size = handle, self.context, bodies
        params.conditional.type = getattr(driver.CUgraphConditionalNodeType, f"CU_GRAPH_COND_TYPE_{kind}")
        add_node = getattr(driver, "cuGraphAddNode_v2", driver.cuGraphAddNode)               # its name in cuda-bindings 12
        node, = answered(add_node(self.graph, [after], None, 1, params))
        inside = [driver.CUgraph(init_value=int(body)) for body in params.conditional.phGraph_out]
        self.bodies[int(node)] = kind, inside
        return node, inside


def function(device: int, name: bytes):
    """One of SOURCE's kernels on a device."""
    from cuda.bindings import driver
    return answered(driver.cuModuleGetFunction(module(device), name))[0]


@lru_cache(None)
def module(device: int):
    """SOURCE, compiled for a device and loaded there for good."""
    from cuda.bindings import driver, nvrtc
    program, = answered(nvrtc.nvrtcCreateProgram(SOURCE, b"conditional.cu", 0, None, None))
    try:
        major, minor = torch.cuda.get_device_capability(device)
        answered(nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture=sm_{major}{minor}".encode()]))
        size, = answered(nvrtc.nvrtcGetCUBINSize(program))
        binary = bytes(size)
        answered(nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return answered(driver.cuModuleLoadData(binary))[0]
