"""The capture-safety checker: is a callable on static tensors safe in a CUDA graph, for any batch that it may be given?

    from gkernels.graph.check import check

    def make_inputs(case):                                   # fills, or makes, the tensors that `fn` reads
        lengths = case.batch(max_requests, max_length)
        ...
        return {"token_ids": ..., "seq_lens": ...}

    report = check(fn, make_inputs, outputs={"logits": logits}, state=cache, scratch=workspace)
    print(report)

`fn(inputs)` is called with one set of tensors whose addresses stay. On a GPU it is captured and replayed; on a CPU its kernels run in Triton's
interpreter, where every access is seen, and a capture is emulated by doing the recorded launches and torch operations again. The report
names each defect by a stable name (gkernels.graph.findings.MENDS), and says what was proven, over how many cases, and what was not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from .capture import GraphRunner
from .findings import Report


@dataclass(frozen=True)
class Case:
    """One batch that a callable must bear. `batch()` turns it into lengths; all draws come from its seed."""

    name: str
    requests: str = "some"      # "all", "one" or "some" of the capacity
    lengths: str = "some"       # "most", "least" or "some" of what a request may have
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def batch(self, max_requests: int, max_length: int, min_length: int = 1) -> list[int]:
        """A length for each request of this case."""
        g = self.generator()
        draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
        n = {"all": max_requests, "one": 1}.get(self.requests) or draw(1, max_requests)
        fixed = {"most": max_length, "least": min_length}.get(self.lengths)
        return [draw(min_length, max_length) if fixed is None else fixed for _ in range(n)]

    def __str__(self) -> str:
        return self.name


CASES = (Case("all longest", "all", "most"), Case("all of length 1", "all", "least"), Case("one longest", "one", "most"),
         Case("random 1", seed=1), Case("random 2", seed=2))


@dataclass(frozen=True)
class Subject:
    """A callable and what a check must know of it: what `python -m gkernels check module:function` expects the function to return.

    fn           called as fn(inputs); what it returns is compared too, as "result"
    make_inputs  called as make_inputs(case), the same values for the same case: a dict, a dataclass or a tuple of tensors. Where they come
                 in the same tensors each time, as from an engine that stages into its own buffers, these are the static ones; else fn gets
                 copies of the first case's, and the later ones are copied to their front. The first case's must be the largest.
    cases        what make_inputs takes, at least two; each is named by str(case)
    outputs      tensors that fn fills, each element for each batch; they are poisoned before every call
    state        tensors that carry values from call to call, such as a KV cache or counters; they are put back before every call
    scratch      tensors whose contents mean nothing between calls; they are poisoned
    weights      tensors that fn reads; where given, memory that is declared nowhere is a finding
    pads         pads(case): masks, by tensor name, of the elements of inputs and state that no live row may depend on
    live         live(case): masks, by tensor name, of the elements of results that are compared (default: all)
    allocates    whether fn may make tensors: lawful in a graph's pool, and forbidden to a function that is given its outputs"""

    fn: Callable[[Any], Any]
    make_inputs: Callable[[Any], Any]
    cases: Sequence[Any] = CASES
    outputs: Any = ()
    state: Any = ()
    scratch: Any = ()
    weights: Any = None
    pads: Callable[[Any], dict[str, torch.Tensor]] | None = None
    live: Callable[[Any], dict[str, torch.Tensor]] | None = None
    allocates: bool = True
    name: str = ""


def check(fn: Callable[[Any], Any], make_inputs: Callable[[Any], Any], **options: Any) -> Report:
    """Checks a callable; `options` are the fields of Subject. Raises ValueError where the declarations contradict each other or the inputs."""
    return examine(Subject(fn, make_inputs, **options))


def examine(subject: Subject) -> Report:
    """Checks a Subject: what runs anywhere, and on a GPU what only a capture shows."""
    from .examination import Examination
    examination = Examination(subject)
    examination.run_all()
    return examination.report


def check_runner(runner: GraphRunner, stage: Callable[[Any], None], cases: Sequence[Any] = CASES) -> Report:
    """Captures a runner of `gkernels.graph` once for each case, and for the first once more, and compares what its graphs hold, node by node, down
    into the bodies of a Loop's WHILE and a ChoosingRunner's SWITCH nodes: a difference is a decision of the host that the graphs freeze. `check`
    proves more, of the step itself; a runner's conditional nodes it never meets, for no capture may launch one.

    `stage(case)` fills the static inputs, and is called before each capture; cases are at least two, as Subject's. What the runner held before is
    dropped, and it keeps the last case's graphs."""
    from .recaptures import examine_runner
    if len(cases) < 2:
        raise ValueError(f"gkernels.graph.check_runner: cases: got {len(cases)}, expected at least 2, which differ in all that a batch may differ in")
    return examine_runner(runner, stage, cases)


def load(target: str) -> Subject:
    """The Subject that the function named by "module:function" returns, from the working directory or the installed packages. Raises ValueError
    where there is none."""
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"gkernels.graph.check: target: got {target!r}, expected module:function, as in my_engine.checks:step")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        build = getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"gkernels.graph.check: target: got {target!r}: {error}; expected a module that can be imported from here and a function "
                         "in it") from error
    subject = build() if callable(build) else build
    if not isinstance(subject, Subject):
        raise ValueError(f"gkernels.graph.check: target: got {type(subject).__name__} from {target}, expected a gkernels.graph.check.Subject; return "
                         "one that names the callable, its inputs and what it writes")
    return subject
