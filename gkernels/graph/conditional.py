"""A WHILE node around a captured graph: the device turns it, the host launches once. Made through cuda.bindings, which torch does not bring.

    go_on(handle, left, running, 0)
    while handle:
        body
        go_on(handle, left, running, 1)

`go_on` takes what was just done from `left` and asks for another turn while turns are left and rows run, so that a body that forgets to count
ends too.
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import ExitStack
from functools import lru_cache

import torch

from .nodes import answered

FIRST_DRIVER = 12040     # WHILE nodes came with CUDA 12.4
SOURCE = b"""
typedef unsigned long long Handle;
extern "C" __device__ void cudaGraphSetConditional(Handle handle, unsigned int value);     // known to the compiler, as printf is

extern "C" __global__ void go_on(Handle handle, int* left, const int* running, int done) {
    *left -= done;
    cudaGraphSetConditional(handle, *left > 0 && *running > 0);
}
"""


def unavailable() -> str:
    """Why no WHILE node can be made on a CUDA device here, and the mend; "" where one can."""
    try:
        from cuda.bindings import driver, nvrtc
        nvrtc.nvrtcVersion()
    except ImportError:
        return "WHILE nodes are made through cuda.bindings, which is not installed; pip install 'gkernels[loop]'"
    except RuntimeError as error:
        return f"WHILE nodes need NVRTC, which cuda.bindings does not find ({error}); pip install nvidia-cuda-nvrtc"
    version, = answered(driver.cuDriverGetVersion())
    if version < FIRST_DRIVER:
        return f"the driver is of CUDA {version // 1000}.{version % 1000 // 10}, WHILE nodes came with 12.4; update it"
    return ""


class WhileLoop:
    """`body`, a captured graph that is kept, in a WHILE node over `left` and `running`, int32 [1]. A call launches it on the current stream.

    `body` holds the memory pool of what it captured, and must live as long as this does. RuntimeError where the driver refuses; nothing is left
    behind then, nor with the last reference."""

    def __init__(self, body: torch.cuda.CUDAGraph, left: torch.Tensor, running: torch.Tensor):
        from cuda.bindings import driver
        if not (left.is_cuda and running.is_cuda):
            raise ValueError(f"gkernels.graph.Loop: left, running: got tensors on {left.device} and {running.device}, expected them on the device")
        self._driver, self._device, owned = driver, left.device, ExitStack()
        weakref.finalize(self, owned.close)
        try:
            graph, = answered(driver.cuGraphCreate(0))
            owned.callback(driver.cuGraphDestroy, graph)
            context, = answered(driver.cuCtxGetCurrent())
            handle, = answered(driver.cuGraphConditionalHandleCreate(graph, context, 0, 1))      # 0 at each launch, until go_on says more
            arguments = (int(handle), left.data_ptr(), running.data_ptr())
            before = add_go_on(driver, graph, None, (*arguments, 0))
            loop = driver.CUgraphNodeParams()
            loop.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
            loop.conditional.handle, loop.conditional.ctx, loop.conditional.size = handle, context, 1
            loop.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
            add_node = getattr(driver, "cuGraphAddNode_v2", driver.cuGraphAddNode)               # its name in cuda-bindings 12
            answered(add_node(graph, [before], None, 1, loop))
            inside = loop.conditional.phGraph_out[0]
            turn, = answered(driver.cuGraphAddChildGraphNode(inside, None, 0, driver.CUgraph(init_value=int(body.raw_cuda_graph()))))
            add_go_on(driver, inside, turn, (*arguments, 1))
            self._executable, = answered(driver.cuGraphInstantiate(graph, 0))
            owned.callback(driver.cuGraphExecDestroy, self._executable)
        except BaseException:
            owned.close()
            raise

    def __call__(self) -> None:
        answered(self._driver.cuGraphLaunch(self._executable, torch.cuda.current_stream(self._device).cuda_stream))


def add_go_on(driver, graph, after, values):
    """A node of the kernel behind the node `after`."""
    node = driver.CUDA_KERNEL_NODE_PARAMS()
    node.func = kernel(torch.cuda.current_device())
    node.gridDimX = node.gridDimY = node.gridDimZ = node.blockDimX = node.blockDimY = node.blockDimZ = 1
    node.kernelParams = values, (ctypes.c_ulonglong, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    added, = answered(driver.cuGraphAddKernelNode(graph, [after] if after else None, 1 if after else 0, node))
    return added


@lru_cache(None)
def kernel(device: int):
    """go_on, compiled for a device and loaded there for good."""
    from cuda.bindings import driver, nvrtc
    program, = answered(nvrtc.nvrtcCreateProgram(SOURCE, b"go_on.cu", 0, None, None))
    try:
        major, minor = torch.cuda.get_device_capability(device)
        answered(nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture=sm_{major}{minor}".encode()]))
        size, = answered(nvrtc.nvrtcGetCUBINSize(program))
        binary = bytes(size)
        answered(nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    module, = answered(driver.cuModuleLoadData(binary))
    function, = answered(driver.cuModuleGetFunction(module, b"go_on"))
    return function
