"""The tensors that a subject declares, and the condition in which each call finds them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from .check import Subject
from .compare import Results
from .memory import Memory, fill_with_junk, named_tensors, poison, span
from .trace import Trace


class Setting:
    """A subject's static inputs, outputs, state and scratch by name. Raises ValueError where the declarations contradict each other."""

    def __init__(self, subject: Subject):
        self.subject, self.cases, self.kept = subject, list(subject.cases), list[Any]()
        if len(self.cases) < 2:
            raise ValueError(f"gkernels.graph.check: cases: got {len(self.cases)}, expected at least 2 batches that differ as much as they may")
        self.inputs, self.constants = self.make_static()
        self.static = named("inputs", self.inputs)
        if not self.static:
            raise ValueError("gkernels.graph.check: make_inputs: got no tensors, expected a dict, dataclass or tuple that holds the static ones")
        self.outputs, self.state = named("outputs", subject.outputs), named("state", subject.state)
        self.scratch, weights = named("scratch", subject.scratch), named("weights", subject.weights)
        self.tensors: Results = {}
        for group in (self.static, self.outputs, self.state, self.scratch):
            for name, t in group.items():
                if self.tensors.setdefault(name, t).data_ptr() != t.data_ptr():
                    raise ValueError(f"gkernels.graph.check: {name}: got two tensors of this name, expected one; name them apart")
        writable = {**self.outputs, **self.state, **self.scratch}
        self.writable = Memory((name, span(t)) for name, t in writable.items())
        self.declared = Memory((name, span(t)) for name, t in {**writable, **self.static, **weights}.items())
        self.saved = {name: t.clone() for name, t in self.state.items()}
        self.device = next(iter(self.static.values())).device

    def make_static(self) -> tuple[Any, set[str]]:
        """What `fn` is called with, and the names of tensors that no case fills. Tensors that come with the same address for two cases are the
        subject's own; of the others, the static one is a copy."""
        given, other = (self.subject.make_inputs(case) for case in self.cases[:2])
        theirs = named("inputs", other)
        own = {name: t for name, t in named("inputs", given).items() if name in theirs and theirs[name].data_ptr() == t.data_ptr()}
        values = {name: t.clone() for name, t in own.items()}
        with torch.inference_mode():                                # which may write to tensors that an engine made in it
            for t in own.values():
                t.zero_()
        self.kept += [other, self.subject.make_inputs(self.cases[1])]
        constants = {name for name, t in own.items() if values[name].any() and not t.any()}
        with torch.inference_mode():
            for name in constants:
                own[name].copy_(values[name])
        return deepcopy(given, {id(t): t for t in own.values()}), constants

    def prepare(self, case: Any, over: Any = None, again: bool = False) -> None:
        """Puts state back, poisons outputs and scratch, and stages a case over zeros or over another case."""
        with torch.inference_mode():
            for name, t in self.state.items():
                t.copy_(self.saved[name])
            for t in (*self.outputs.values(), *self.scratch.values()):
                poison(t, again)
            for name, t in self.static.items():
                if name not in self.constants:
                    t.zero_()
        for staged in (case,) if over is None else (over, case):
            self.stage(staged)

    def stage(self, case: Any) -> None:
        given = named("inputs", self.subject.make_inputs(case))
        self.kept.append(given)                                     # so that no later tensor takes an address that was in use
        if given.keys() != self.static.keys():
            raise ValueError(f"gkernels.graph.check: make_inputs: got {sorted(given)} for the case {case}, expected {sorted(self.static)}")
        for name, t in self.static.items():
            new = given[name]
            if new.dim() != t.dim() or any(n > most for n, most in zip(new.shape, t.shape, strict=True)):
                raise ValueError(f"gkernels.graph.check: make_inputs: got {name} {list(new.shape)} for the case {case}, expected at most the first "
                                 f"case's {list(t.shape)}; put the largest case first")
            if new.data_ptr() != t.data_ptr():
                with torch.inference_mode():
                    t[tuple(slice(n) for n in new.shape)].copy_(new)

    def collect(self, trace: Trace) -> Results:
        """Copies of all that a call leaves behind."""
        return {name: t.clone() for name, t in (*self.outputs.items(), *self.state.items(), *named_tensors({"result": trace.result}))}

    def live(self, case: Any) -> Results:
        return self.masks("live", self.subject.live(case) if self.subject.live else {})

    def pads(self, case: Any) -> Results:
        return self.masks("pads", self.subject.pads(case) if self.subject.pads else {})

    def masks(self, argument: str, masks: Results) -> Results:
        for name, mask in masks.items():
            t = self.tensors.get(name)
            if t is None and not (argument == "live" and name.startswith("result")):
                raise ValueError(f"gkernels.graph.check: {argument}: got a mask for {name!r}, expected one of {sorted(self.tensors)}")
            if mask.dtype != torch.bool or (t is not None and mask.shape != t.shape):
                raise ValueError(f"gkernels.graph.check: {argument}: got {mask.dtype} {list(mask.shape)} for {name}, expected torch.bool of its "
                                 "shape")
        return masks

    @torch.inference_mode()
    def fill_pads(self, pads: Results, i: int) -> int:
        """NaN or infinity, and integers of the whole range, into the elements that masks name; returns how many."""
        for name, mask in pads.items():
            t = self.tensors[name]
            if t.is_floating_point() and t.element_size() > 1:
                t.masked_fill_(mask, float("inf") if i % 2 else float("nan"))
            else:
                junk = torch.empty(t.shape, dtype=t.dtype)
                fill_with_junk([junk], torch.Generator().manual_seed(i))
                t.copy_(torch.where(mask, junk.to(t.device), t))
        return sum(int(mask.sum()) for mask in pads.values())


def named(group: str, value: object) -> Results:
    """The tensors of a declaration by name: their path, behind the group's name where the path begins with a number."""
    return {name if name and not name[0].isdigit() else f"{group}.{name}".rstrip("."): t for name, t in named_tensors(value)}
