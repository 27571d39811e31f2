"""The course of a check: each case watched, the records compared, then one condition after another changed that must change no bit."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import triton

from . import interpreter
from .captures import Captures, armed
from .check import Subject
from .compare import Results, differences, result_differences
from .findings import Report
from .launches import LIBRARIES
from .lint import lint, unwrapped
from .memory import is_poison, named_tensors
from .setting import Setting
from .trace import NotReplayable, Trace, tracing

WARM_UPS = 2        # the first call may make lazily what later ones keep, the second runs as all others
ORDERS = 2          # random orders of programs, for each case
ENDS = {"raises", "out-of-bounds"}                              # a call does not go on behind these
SILENT = {"hidden-sync", "data-dependent-shape", "host-constant", "host-rng", "autotune", "other-thread", "gc-in-capture"}
BAKED = {"kernel-by-data", "data-dependent-grid", "data-dependent-shape", "baked-scalar", "stale-pointer", "specialisation"}


class Stopped(Exception):
    """A call did not come to its end; the finding says why."""


class Examination:
    """One subject under check. `report` grows as the steps run."""

    def __init__(self, subject: Subject):
        self.subject, self.setting = subject, Setting(subject)
        self.cases, self.device = self.setting.cases, self.setting.device
        self.interpreted = self.device.type == "cpu" and bool(triton.knobs.runtime.interpret)
        world = self.device.type if self.device.type != "cpu" else "the CPU interpreter" if self.interpreted else "the CPU"
        self.report = Report(subject.name or getattr(subject.fn, "__qualname__", type(subject.fn).__name__), world, [str(c) for c in self.cases])
        self.text = lint(subject.fn)
        self.traces: list[Trace] = []
        self.results: list[Results] = []

    def run_all(self) -> None:
        """Every step in turn; a step that cannot run says so in `unproven`."""
        self.read_text()
        try:
            for _ in range(WARM_UPS):
                self.setting.prepare(self.cases[0])
                self.call(self.cases[0], "warm-up")
            with armed(self.report):
                self.watch_cases()
                if self.repeats():
                    self.change_what_stood_before()
                    self.poison_pads()
                    if self.device.type == "cuda":
                        Captures(self).run_all()
                    else:
                        self.replay()
                    self.shuffle()
                if self.device.type == "cuda":
                    self.prove("nothing is compiled or loaded after warm-up", {"late-compile", "late-module-load"})
        except Stopped:
            self.report.unproven.append("all that follows: a call did not come to its end")
        if self.device.type == "cpu":
            self.report.unproven.append("what only a GPU shows: nodes of captured graphs that are not Triton's, compilations and module loads after "
                                        "warm-up, waits inside libraries, copies between host and device, streams, pool growth, real replays")

    # the steps

    def read_text(self) -> None:
        for name, place, what in self.text:
            self.report.add(name, place, what, note=True)

    def watch_cases(self) -> None:
        events = launches = 0
        for case in self.cases:
            self.setting.prepare(case)
            trace = self.call(case)
            events, launches = events + len(trace.events), launches + len(trace.launches)
            self.results.append(self.setting.collect(trace))
            if self.device.type == "cpu" or not self.traces:        # a trace holds all tensors of its call; a GPU replays none of them
                self.traces.append(trace)
            for hit in differences(self.traces[0], trace, "with other data"):
                self.report.add(*hit, str(case))
        amount = f"{launches} launches and {events - launches} torch operations in {len(self.cases)} cases"
        self.prove(f"no wait, no value of the host, no generator, no tuning, no thread: {amount}", SILENT)
        self.prove(f"kernels, grids, scalars, shapes, addresses and binaries are the same in {len(self.cases)} cases", BAKED)
        if self.interpreted:
            self.prove(f"no access outside an argument, no race, no write outside outputs, state and scratch: {launches} launches",
                       {"out-of-bounds", "race", "undeclared-write"})
        if self.subject.weights is not None:
            self.prove("no memory but what is declared", {"undeclared-memory"})
        made = self.traces[0].makers
        if not self.subject.allocates:
            self.prove("no allocation", {"allocation"})
        elif made:
            self.report.proven.append(f"a call makes {len(made)} tensors of {sum(size for _, size in made) / 1024:.0f} KiB, lawful in a graph's pool")

    def repeats(self) -> bool:
        """The first case twice: the same record, the same bits."""
        case = self.cases[0]
        self.setting.prepare(case)
        trace = self.call(case)
        for hit in differences(self.traces[0], trace, "with the same data"):
            self.report.add(*hit, str(case))
        self.compare("not-repeatable", "differs between two calls with the same data", case, 0, self.setting.collect(trace))
        if "not-repeatable" in self.report.names:
            self.report.unproven.append("what needs calls that repeat bit for bit: stale memory, pads, replays, the order of programs")
            return False
        return True

    def change_what_stood_before(self) -> None:
        """Another poison in outputs and scratch, and in the static inputs what the largest batch left there."""
        for i, case in enumerate(self.cases):
            self.setting.prepare(case, over=self.cases[0], again=True)
            after = self.setting.collect(self.call(case, f"after {self.cases[0]}", again=True))
            if not list(result_differences(self.results[i], after, self.setting.live(case))):
                continue
            self.setting.prepare(case, again=True)
            poisoned = self.setting.collect(self.call(case, "over another poison", again=True))
            self.compare("stale-tail", "depends on what an earlier, larger batch left in a static input", case, i, after, poisoned)
            for name, mask in result_differences(self.results[i], poisoned, self.setting.live(case)):
                left = is_poison(self.results[i][name]) & is_poison(poisoned[name], again=True)
                unwritten = name not in self.setting.state and bool(left[mask].all())
                words = "are not written" if unwritten else "follow what scratch or outputs held before"
                self.report.add("unwritten-output" if unwritten else "stale-scratch", self.home, f"{name}: {int(mask.sum())} elements {words}",
                                str(case))
        self.prove(f"results do not depend on what outputs, scratch and static inputs held before: {2 * len(self.cases)} calls",
                   {"stale-tail", "stale-scratch", "unwritten-output"})

    def poison_pads(self) -> None:
        elements = 0
        for i, case in enumerate(self.cases if self.subject.pads else ()):
            pads = self.setting.pads(case)
            self.setting.prepare(case)
            elements += self.setting.fill_pads(pads, i)
            outside = {name: ~mask for name, mask in pads.items()}
            live = self.setting.live(case)
            masks = outside | {name: mask & outside.get(name, mask) for name, mask in live.items()}
            self.compare("pad-leak", "depends on what stands in pads", case, i, self.setting.collect(self.call(case, "pads poisoned")), masks=masks)
        if elements:
            self.prove(f"{elements} poisoned pad elements change no live bit in {len(self.cases)} cases", {"pad-leak"})
        else:
            self.report.unproven.append("pads: none were declared")

    def replay(self) -> None:
        """The first call, done again on the data of every case and then of the first once more: A, B, ..., A. The others on the first's."""
        runs = [(0, i) for i in (*range(len(self.cases)), 0)] + [(i, 0) for i in range(1, len(self.cases))]
        for recorded, i in runs:
            case, trace = self.cases[i], self.traces[recorded]
            self.setting.prepare(case)
            try:
                with interpreter.sanitize() if self.interpreted else ExitStack():
                    trace.replay()
            except NotReplayable as error:
                self.report.unproven.append(f"replays: {error}")
                return
            except interpreter.OutOfBounds as error:
                self.report.add("replay-differs", self.home, f"a replay leaves its memory where a call does not: {error}", str(case))
                continue
            self.compare("replay-differs", f"differs between a call and a replay of the one recorded for {self.cases[recorded]}", case, i,
                         self.setting.collect(trace))
        self.prove(f"{len(runs)} replays of recorded calls on the data of other cases equal calls bit for bit", {"replay-differs"})

    def shuffle(self) -> None:
        if not self.interpreted:
            self.report.unproven.append("accesses, races and the order of programs: kernels are not interpreted here")
            return
        for seed in range(ORDERS * len(self.cases)):
            i = seed % len(self.cases)
            self.setting.prepare(self.cases[i])
            with interpreter.shuffled(seed):
                got = self.setting.collect(self.call(self.cases[i], "programs shuffled"))
            self.compare("order-dependent", "depends on the order in which programs run", self.cases[i], i, got)
        self.prove(f"programs in {ORDERS} random orders give the same bits in {len(self.cases)} cases", {"order-dependent"})

    # their tools

    @property
    def home(self) -> str:
        """Where the subject begins."""
        function, _ = unwrapped(self.subject.fn)
        return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}" if function else "?:0"

    def raised_at(self, error: BaseException) -> str:
        """The user's innermost line in a traceback."""
        place, step = self.home, error.__traceback__
        while step is not None:
            file = step.tb_frame.f_code.co_filename
            place = place if file.startswith(LIBRARIES) else f"{file}:{step.tb_lineno}"
            step = step.tb_next
        return place

    def prove(self, words: str, against: set[str]) -> None:
        """Lists words as proven, unless a finding of these names speaks against them."""
        if not against & self.report.names:
            self.report.proven.append(words)

    def call(self, case: Any, how: str = "", again: bool = False) -> Trace:
        """Calls the subject, watched. `how` names what is unlike a plain call, of which only an early end is reported then; `again` chooses the
        poison of new memory. Raises Stopped where the call ends early."""
        accesses: list[interpreter.Launch] = []
        with ExitStack() as stack, torch.no_grad():
            if self.interpreted:
                stack.enter_context(interpreter.sanitize())
            if self.interpreted and not how:
                accesses = stack.enter_context(interpreter.accesses(races=False))
            trace = stack.enter_context(tracing(self.setting.declared, self.setting.writable, again))
            ended = False
            try:
                trace.result = self.subject.fn(self.setting.inputs)
                ended = True
            except interpreter.OutOfBounds as error:
                trace.hit("out-of-bounds", str(error), trace.launches[-1].place)
            except Exception as error:                              # whatever it is, it is the subject's, and the report's matter
                trace.hit("raises", f"{type(error).__name__}: {error}", self.raised_at(error))
        for access, launch in zip(accesses, trace.launches, strict=False):       # one that failed at once was not accessed
            self.look(access, launch, trace)
        self.look_at_memory(trace)
        for name, place, what in trace.hits:
            if name in ENDS or not how:
                self.report.add(name, self.place_of(name) if place == "?" else place, what, f"{case}{how and f' ({how})'}")
        if not ended:
            raise Stopped
        return trace

    def place_of(self, name: str) -> str:
        """Where the text suggests this finding; else where the subject begins."""
        return next((place for suggested, place, _ in self.text if suggested == name), self.home)

    def look(self, access: interpreter.Launch, launch: Any, trace: Trace) -> None:
        """Races of a launch, and writes outside what may be written."""
        try:
            access.check_races()
        except interpreter.Race as error:
            trace.hit("race", str(error), launch.place)
        for name, elements in access.writes.items():
            argument = access.arguments[name]
            addresses = argument.base + elements * argument.size
            bad = self.setting.writable.outside(addresses) & trace.made.outside(addresses)
            if bad.any():
                region, _ = trace.region(int(addresses[bad][0]))
                trace.hit("undeclared-write", f"{launch.kernel} writes {int(bad.sum())} elements through {name} into "
                                              f"{region}, which is declared neither as output nor as state or scratch", launch.place)

    def look_at_memory(self, trace: Trace) -> None:
        if not self.subject.allocates:
            for place, size in trace.makers:
                trace.hit("allocation", f"makes a tensor of {size} bytes", place)
        for name, t in named_tensors({"result": trace.result}):
            if t.numel() and trace.declared.find(t.data_ptr()) is None and trace.made.find(t.data_ptr()) is not None:
                trace.hit("fresh-output", f"{name} is made inside: in a graph it lies in the pool, where the next replay overwrites it", self.home)
        for event in trace.events if self.subject.weights is not None else ():
            for name, address in event.pointers.items():
                if address and trace.declared.find(address) is None and trace.made.find(address) is None:
                    trace.hit("undeclared-memory", f"{event.name}: {name} points to {address:#x}, which is declared nowhere", event.place)

    def compare(self, finding: str, words: str, case: Any, i: int, got: Results, want: Results | None = None, masks: Results | None = None) -> None:
        for name, mask in result_differences(self.results[i] if want is None else want, got, self.setting.live(case) if masks is None else masks):
            self.report.add(finding, self.home, f"{name} {words}: {int(mask.sum())} of {mask.numel()} elements", str(case))
