"""What only a GPU shows: real captures of every case, their nodes side by side, replays against calls, late compilations, growing pools."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from triton import knobs

from .findings import Report
from .launches import Launch, record, user_place
from .memory import named_tensors, poison
from .nodes import Node, compare_nodes, different_words, missing_kernels, read_nodes, unread, unreadable, unsafe_nodes
from .trace import Trace

if TYPE_CHECKING:
    from .examination import Examination

AGAIN = 6               # captures of one case, each dropped before the next
GROWTH = 1 << 20        # bytes: what captures behind the third may add to what torch's pools hold


@dataclass
class Capture:
    case: Any
    graph: torch.cuda.CUDAGraph
    result: Any
    launches: list[Launch]
    nodes: list[Node]


class CaptureFailed(Exception):
    """The finding says why."""


@contextmanager
def armed(report: Report) -> Iterator[None]:
    """While it lasts, every compilation and every module load is a finding."""
    def compiled(**kwargs):
        report.add("late-compile", user_place(), f"{kwargs.get('repr')} is compiled after warm-up")

    def loaded(module, function, name, *rest):
        report.add("late-module-load", user_place(), f"{name} is loaded after warm-up")

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = compiled
    knobs.runtime.kernel_load_start_hook.add(loaded)
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = before
        knobs.runtime.kernel_load_start_hook.remove(loaded)


@contextmanager
def quiet() -> Iterator[None]:
    """No collection, no filling of new memory, which would add nodes, and an error where torch waits for the device."""
    memory: Any = torch.utils.deterministic
    enabled, fill, mode = gc.isenabled(), memory.fill_uninitialized_memory, torch.cuda.get_sync_debug_mode()
    gc.collect()
    gc.disable()
    memory.fill_uninitialized_memory = False
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        if enabled:
            gc.enable()


def first_of(error: BaseException) -> BaseException:
    """The error that began it: ending a capture that failed raises another one."""
    return first_of(error.__context__) if error.__context__ else error


def why(error: BaseException) -> str:
    """The finding that a failed capture's error means."""
    words = str(error).lower()
    return "unjoined-stream" if "unjoined" in words else "hidden-sync" if "synchroniz" in words else "capture-fails"


class Captures:
    """The captures of an examination's subject."""

    def __init__(self, examination: Examination):
        self.examination, self.setting, self.report = examination, examination.setting, examination.report
        self.stream = torch.cuda.Stream(examination.device)
        self.made: list[Capture] = []
        self.unreadable = unreadable()

    def run_all(self) -> None:
        """Captures every case, the first twice and once more at the end; compares, replays, and captures again and again."""
        first, *others = self.setting.cases
        try:
            for case in (first, first, *others, first):
                self.made.append(self.capture(case))
        except CaptureFailed:
            self.report.unproven.append("captures: one failed")
            return
        self.compare()
        self.replay()
        self.grow()

    def capture(self, case: Any) -> Capture:
        self.setting.prepare(case)
        self.stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            with torch.no_grad(), quiet(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="global"), record() as launches:
                result = self.setting.subject.fn(self.setting.inputs)
        except Exception as error:
            cause = first_of(error)
            self.report.add(why(cause), self.examination.raised_at(cause), f"{type(cause).__name__}: {str(cause).splitlines()[0]}", str(case))
            raise CaptureFailed from error
        nodes = [] if self.unreadable else read_nodes(graph.raw_cuda_graph())
        graph.instantiate()
        return Capture(case, graph, result, launches, nodes)

    def compare(self) -> None:
        """The captures against the second, and what each of them holds. What differs among those of the first case alone is noise."""
        if self.unreadable:
            self.report.unproven.append(f"the nodes of captures: {self.unreadable}")
            return
        before, first, *others = self.made
        noise, names = [word for again in (before, others[-1]) for word in different_words(again.nodes, first.nodes)], parameter_names(first)
        for capture in (before, *others):
            for difference in compare_nodes(first.nodes, capture.nodes, noise, names):
                self.report.add(difference.finding, self.place(first, difference.node), difference.what, str(capture.case))
        for capture in (first, *others):
            for difference in unsafe_nodes(capture.nodes):
                self.report.add(difference.finding, self.place(capture, difference.node), difference.what, str(capture.case))
            for kernel, n in missing_kernels((launch.symbol for launch in capture.launches if launch.symbol), capture.nodes).items():
                place = next(launch.place for launch in capture.launches if launch.symbol == kernel)
                self.report.add("uncaptured-launch", place, f"{n} launches of {kernel} are not in the graph", str(capture.case))
        self.examination.prove(f"{len(first.nodes)} nodes, all safe, are the same in {len(self.made)} captures of {len(self.setting.cases)} cases",
                               {"kernel-by-data", "data-dependent-grid", "different-node", "specialisation", "baked-scalar", "forbidden-node",
                                "uncaptured-launch"})
        if hidden := unread(first.nodes):
            self.report.unproven.append(f"the bodies of {hidden} conditional nodes, which drivers before CUDA 13.2 do not tell")

    def replay(self) -> None:
        """The first case's graph on all cases and on its own again, then the others' on the first: allocations and collections in between."""
        runs = [(1, i) for i in (*range(len(self.setting.cases)), 0)] + [(i + 1, 0) for i in range(1, len(self.setting.cases))]
        for recorded, i in runs:
            capture, case = self.made[recorded], self.setting.cases[i]
            self.setting.prepare(case)
            for _, t in named_tensors(capture.result):
                if self.setting.declared.find(t.data_ptr()) is None:
                    poison(t, again=False)
            junk = [torch.full((1 << 20,), float("nan"), device=self.examination.device) for _ in range(4)]
            del junk
            gc.collect()
            capture.graph.replay()
            trace = Trace(self.setting.declared, self.setting.writable)
            trace.result = capture.result
            self.examination.compare("replay-differs", f"differs between a call and a replay of the graph of {capture.case}", case, i,
                                     self.setting.collect(trace))
        self.examination.prove(f"{len(runs)} replays of {len(self.setting.cases)} graphs on the data of other cases equal calls bit for bit",
                               {"replay-differs"})

    def grow(self) -> None:
        """One case captured again and again, each graph dropped before the next: the process must not grow."""
        held = []
        for _ in range(AGAIN):
            try:
                self.capture(self.setting.cases[0]).graph.reset()
            except CaptureFailed:
                self.report.unproven.append("pool growth: a later capture failed")
                return
            gc.collect()
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_reserved())                   # of this process alone: others may share the device
        if held[-1] - held[2] > GROWTH:
            self.report.add("pool-growth", self.examination.home, f"{AGAIN - 3} captures, each dropped, leave {held[-1] - held[2]} more bytes held")
        self.examination.prove(f"{AGAIN} captures of one case leave no memory behind", {"pool-growth"})

    def place(self, capture: Capture, node: int) -> str:
        launch = triton_launches(capture).get(node)
        return launch.place if launch else self.examination.home


def triton_launches(capture: Capture) -> dict[int, Launch]:
    """By node: the launch that it came from, for kernels whose launches were seen: the n-th node of a name is its n-th launch."""
    waiting: dict[str, list[Launch]] = {}
    for launch in capture.launches:
        waiting.setdefault(launch.symbol, []).append(launch)
    return {i: waiting[node.name].pop(0) for i, node in enumerate(capture.nodes) if node.kind == "kernel" and waiting.get(node.name)}


def parameter_names(capture: Capture) -> dict[int, list[str]]:
    """By node: the names of its arguments."""
    return {i: passed_names(launch) for i, launch in triton_launches(capture).items()}


def passed_names(launch: Launch) -> list[str]:
    """The arguments that Triton passes, in order; what it folds into the binary is left out."""
    return [name for name, kind in launch.classes.items() if not kind.startswith("constexpr")]
