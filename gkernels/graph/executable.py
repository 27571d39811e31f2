"""Executable graphs made through cuda.bindings, which torch does not bring: one of a graph of nodes, and one that graphs alike take turns in."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch

from .nodes import answered


def raw(graph: torch.cuda.CUDAGraph) -> int:
    """The address of a captured graph that is kept."""
    return int(graph.raw_cuda_graph())


class Executable:
    """Makes a graph, given by its address, executable. A call launches it on the device's current stream. It is freed with the last reference to it.
    RuntimeError where the driver refuses."""

    def __init__(self, graph: int, device: torch.device):
        from cuda.bindings import driver
        self._driver, self._device = driver, device
        self._executable, = answered(driver.cuGraphInstantiate(driver.CUgraph(init_value=graph), 0))
        weakref.finalize(self, driver.cuGraphExecDestroy, self._executable)

    def __call__(self) -> None:
        answered(self._driver.cuGraphLaunch(self._executable, torch.cuda.current_stream(self._device).cuda_stream))

    def update(self, graph: int) -> bool:
        """Takes over the kernels, grids and arguments of a graph with the same nodes and edges, from the next launch on; False where it has others,
        after which this may hold parts of both."""
        error, _ = self._driver.cuGraphExecUpdate(self._executable, self._driver.CUgraph(init_value=graph))
        if error == self._driver.CUresult.CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE:
            return False
        answered((error,))
        return True


class Turns:
    """An executable that captured graphs with the same nodes and edges take turns in."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device):
        self.executable = Executable(raw(graph), device)
        self.holds: torch.cuda.CUDAGraph | None = graph

    def take(self, graph: torch.cuda.CUDAGraph) -> bool:
        """Whether it now holds the graph."""
        if self.holds is not graph:
            self.holds = None
            if not self.executable.update(raw(graph)):
                return False
            self.holds = graph
        return True

    def play(self, graph: torch.cuda.CUDAGraph) -> None:
        if not self.take(graph):
            raise RuntimeError("gkernels.graph.GraphRunner: share: the driver refuses a graph that it took at capture, expected it again; capture")
        self.executable()


def shared(graph: torch.cuda.CUDAGraph, device: torch.device, executables: list[Turns]) -> Callable[[], None]:
    """What plays a captured graph: in the first of `executables` that can hold it, or in a new one, which is added to them."""
    found = next((turns for turns in executables if turns.take(graph)), None)
    if found is None:
        found = Turns(graph, device)
        executables.append(found)
    return partial(found.play, graph)
