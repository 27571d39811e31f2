"""The nodes of a captured graph, those in its conditional bodies among them, and what differs between two captures of one callable.

`read_nodes` asks the CUDA driver; all else is plain Python over `Node`.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

IN_BODIES = {"kernel", "memcpy", "memset", "empty", "graph", "conditional"}     # kinds that a replay repeats as they are, in a conditional body too
SAFE = IN_BODIES | {"wait_event", "event_record"}
FIRST_READ = 13020              # the driver that tells a conditional node's bodies, of CUDA 13.2
Word = tuple[int, int, int]     # node, parameter, number of the 8-byte word in it
Bodies = tuple[str, list]       # a conditional node's kind, and the CUgraph of each of its bodies


@dataclass(frozen=True)
class Node:
    """One node. `parameters` are the bytes of a kernel's arguments, in order, as the launch stores them."""

    kind: str
    name: str = ""              # of a conditional one "WHILE of 1 bodies"; "" where its bodies are not known
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared: int = 0             # bytes of dynamic shared memory
    parameters: tuple[bytes, ...] = ()
    within: str = ""            # the conditional bodies that it lies in, "body 0 of node 4 (WHILE)", the innermost first


@dataclass(frozen=True)
class Difference:
    finding: str
    node: int
    what: str


def words(parameter: bytes) -> list[int]:
    """A parameter as unsigned numbers of 8 bytes, the last one of what is left."""
    return [int.from_bytes(parameter[i:i + 8], "little") for i in range(0, len(parameter), 8)]


def different_words(first: Sequence[Node], other: Sequence[Node]) -> Iterator[Word]:
    """Where the parameters of two captures differ, node by node."""
    for i, (a, b) in enumerate(zip(first, other, strict=False)):
        for j, (x, y) in enumerate(zip(a.parameters, b.parameters, strict=False)):
            yield from ((i, j, k) for k, (u, v) in enumerate(zip(words(x), words(y), strict=False)) if u != v)


def compare_nodes(first: Sequence[Node], other: Sequence[Node], noise: Iterable[Word] = (),
                  names: Mapping[int, Sequence[str]] | None = None) -> list[Difference]:
    """What a graph of one batch holds that a graph of another holds otherwise.

    noise   words that differ between captures of the same batch: addresses in their pools, and bytes that no one writes
    names   by node: its parameters' names, where they are known

    A nameless parameter of one byte that is no truth value is passed over: an empty C++ object is one, and nobody writes its byte."""
    found, names, noise = list[Difference](), names or {}, set(noise)
    for i, (a, b) in enumerate(zip(first, other, strict=False)):
        if (a.kind, a.name, a.within) != (b.kind, b.name, b.within):
            return [*found, Difference("kernel-by-data", i, f"node {i} is {label(a)} in one capture and {label(b)} in another")]
        if a.grid != b.grid:
            found.append(Difference("data-dependent-grid", i, f"node {i}, {label(a)}: grid {a.grid} in one capture, {b.grid} in another"))
        for what in ("block", "shared"):
            if getattr(a, what) != getattr(b, what):
                found.append(Difference("different-node", i, f"node {i}, {label(a)}: {what} {getattr(a, what)} in one capture, "
                                                             f"{getattr(b, what)} in another"))
        if [len(p) for p in a.parameters] != [len(p) for p in b.parameters]:
            found.append(Difference("specialisation", i, f"node {i}, {label(a)}: takes other parameters in another capture"))
    for i, j, k in different_words(first, other):
        if (i, j, k) not in noise and len(first[i].parameters) == len(other[i].parameters):
            u, v = words(first[i].parameters[j])[k], words(other[i].parameters[j])[k]
            known = names.get(i, ())
            if len(first[i].parameters[j]) == 1 and max(u, v) > 1 and not known:
                continue
            name = known[j] if j < len(known) else f"parameter {j}" + (f", word {k}" if len(first[i].parameters[j]) > 8 else "")
            found.append(Difference("baked-scalar", i, f"node {i}, {label(first[i])}: {name} is {u:#x} in one capture, {v:#x} in another"))
    if len(first) != len(other):
        i = min(len(first), len(other))
        found.append(Difference("kernel-by-data", i, f"{len(first)} nodes in one capture, {len(other)} in another; node {i} is "
                                                     f"{label((first if len(first) > i else other)[i])}"))
    return found


def unsafe_nodes(nodes: Iterable[Node]) -> list[Difference]:
    """Nodes that a replay does not repeat safely: calls of the host, allocations, and in conditional bodies events."""
    return [Difference("forbidden-node", i, f"node {i} is {label(node)}") for i, node in enumerate(nodes)
            if node.kind not in (IN_BODIES if node.within else SAFE)]


def missing_kernels(launched: Iterable[str], nodes: Iterable[Node]) -> dict[str, int]:
    """By kernel: how many of its launches the graph does not hold."""
    return dict(Counter(launched) - Counter(node.name for node in nodes if node.kind == "kernel"))


def unread(nodes: Iterable[Node]) -> int:
    """How many conditional nodes there are whose bodies are not known."""
    return sum(node.kind == "conditional" and not node.name for node in nodes)


def label(node: Node) -> str:
    return f"{node.kind} {node.name}".rstrip() + (f" in {node.within}" if node.within else "")


def unreadable() -> str:
    """Why no nodes can be read here, and the mend; "" where they can."""
    try:
        from cuda.bindings import driver  # noqa: F401
    except ImportError:
        return "cuda.bindings, which reads them, is not installed; pip install 'gkernels[loop]'"
    return ""


def read_nodes(graph: int) -> list[Node]:
    """The nodes of a cudaGraph_t (torch.cuda.CUDAGraph.raw_cuda_graph()), in the order in which they were captured. Raises ImportError without
    cuda.bindings, RuntimeError where the driver refuses."""
    from cuda.bindings import driver
    return nodes_of(driver, driver.CUgraph(init_value=graph))


def nodes_of(driver, graph, known: Mapping[int, Bodies] | None = None) -> list[Node]:
    """The nodes of a graph, those of each child graph and of each conditional body behind the node that holds them. `known`: the bodies of
    conditional nodes by the node's address, where the driver may not tell them."""
    found = list[Node]()

    def walk(graph, within):
        _, count = answered(driver.cuGraphGetNodes(graph))
        nodes, _ = answered(driver.cuGraphGetNodes(graph, count)) if count else ((), 0)
        for node in nodes[:count]:
            at = len(found)
            found.append(replace(read_node(driver, node), within=within))
            if found[at].kind == "graph":
                walk(*answered(driver.cuGraphChildGraphNodeGetGraph(node)), within)
            elif found[at].kind == "conditional" and (told := (known or {}).get(int(node)) or bodies_of(driver, node)):
                kind, bodies = told
                found[at] = replace(found[at], name=f"{kind} of {len(bodies)} bodies")
                for i, body in enumerate(bodies):
                    walk(body, f"body {i} of node {at} ({kind})" + (f" in {within}" if within else ""))

    walk(graph, "")
    return found


def bodies_of(driver, node) -> Bodies | None:
    """A conditional node's kind and the graphs of its bodies; None where bindings or driver are too old to tell."""
    if not hasattr(driver, "cuGraphNodeGetParams") or answered(driver.cuDriverGetVersion())[0] < FIRST_READ:
        return None
    params = answered(driver.cuGraphNodeGetParams(node))[0].conditional
    return params.type.name.removeprefix("CU_GRAPH_COND_TYPE_"), [driver.CUgraph(init_value=int(body)) for body in params.phGraph_out]


def read_node(driver, node) -> Node:
    kind, = answered(driver.cuGraphNodeGetType(node))
    if kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return Node(kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower())
    params, = answered(driver.cuGraphKernelNodeGetParams(node))
    function, name_of, info_of = ((params.func, driver.cuFuncGetName, driver.cuFuncGetParamInfo) if int(params.func) else
                                  (params.kern, driver.cuKernelGetName, driver.cuKernelGetParamInfo))
    name, = answered(name_of(function))
    sizes = list[int]()
    while True:
        error, _, size = info_of(function, len(sizes))
        if int(error):                       # behind the last parameter
            break
        sizes.append(size)
    values = ctypes.cast(int(params.kernelParams), ctypes.POINTER(ctypes.c_void_p)) if int(params.kernelParams) else None
    return Node("kernel", name.decode(), (params.gridDimX, params.gridDimY, params.gridDimZ), (params.blockDimX, params.blockDimY, params.blockDimZ),
                params.sharedMemBytes, tuple(ctypes.string_at(values[i], size) for i, size in enumerate(sizes)) if values else ())


def answered(answer: tuple) -> tuple:
    """A driver call's results without its error, which must be success."""
    error, *results = answer
    if int(error):
        raise RuntimeError(f"gkernels.graph.nodes: the CUDA driver answered {error}")
    return tuple(results)
