"""What a check found: findings with a stable name each, and the report that lists them beside what was proven and what was not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

MENDS = {   # every name that a finding may bear, and how to mend what it names
    "allocation": "take the tensor from a workspace that the caller owns, sized from capacities",
    "autotune": "choose the configuration offline, from static integers; the benchmark synchronises, and its key follows the batch",
    "baked-scalar": "pass a capacity, and let the kernel read the live value from a device tensor",
    "capture-fails": "run the callable eagerly for the same case and read the error; a capture forbids all that waits, allocates or loads",
    "data-dependent-grid": "launch for the capacity, and let programs past the live length, read from a device tensor, end at once",
    "data-dependent-shape": "keep the capacity's shape and mask: torch.where, masked_fill_, or a kernel that reads the live length",
    "different-node": "make the choice from shapes and configuration alone, or on the device",
    "forbidden-node": "keep to kernels, memsets and copies inside the device; a host call or an allocation cannot be replayed safely",
    "fresh-output": "write into a tensor that is declared in `outputs`; until then read the result before the next replay of any graph",
    "gc-in-capture": "collect before the capture and disable collection while it lasts; a graph or a kernel freed meanwhile ends it",
    "hidden-sync": "keep the value on the device: torch.where, a tensor argument, or a kernel that reads it",
    "host-constant": "make the tensor once, outside, and let the host write its new values into it before a replay",
    "host-rng": "draw on the device from a counter: a seed and a step that live in device tensors",
    "kernel-by-data": "launch the same kernels for every batch, and branch inside them on what device tensors hold",
    "late-compile": "call every variant once before the capture, and list run-time integers in do_not_specialize",
    "late-module-load": "launch every kernel once before the capture: modules load at the first launch",
    "not-repeatable": "order what programs add: no floating-point atomics, no read of memory that nothing wrote",
    "order-dependent": "give each program its own place to write, and merge in a fixed order",
    "other-thread": "launch from the capturing thread: another one has its own current stream, which nothing captures",
    "out-of-bounds": "clamp what is read from memory before it forms an address, and mask the tile's end",
    "pad-leak": "mask pads where they are loaded, not where they are used: 0 times NaN is NaN",
    "pool-growth": "share one pool, capture the largest first, and fix the library's workspace",
    "race": "give each program its own place to write, or order the two by an acquire-release atomic behind tl.debug_barrier()",
    "raises": "make the callable accept every batch that fits its capacity",
    "replay-differs": "look for what the callable does outside torch and Triton, and for memory that two graphs share",
    "specialisation": "list the argument in do_not_specialize, or do_not_specialize_on_alignment, or keep it a capacity",
    "stale-pointer": "write into the tensor that was there at the capture instead of replacing it",
    "stale-scratch": "write scratch before reading it, or declare it in `state` if it carries a value from step to step",
    "stale-tail": "write pad values behind the live ones whenever a batch is staged, or mask by the live length on the device",
    "uncaptured-launch": "launch on the capturing stream: what the legacy stream runs is done once and never replayed",
    "undeclared-memory": "declare the tensor in `inputs`, `outputs`, `state`, `scratch` or `weights`, or pass it in",
    "undeclared-write": "declare the tensor in `outputs`, `state` or `scratch`, or write into one that is",
    "unjoined-stream": "let the capturing stream wait for the side stream before the capture ends",
    "unwritten-output": "write every element of an output for every batch, pads too",
}
NOTES = {"fresh-output"}       # lawful, but to be known


@dataclass(frozen=True)
class Finding:
    """One defect: a name from MENDS, the user's line as "file:line", what is wrong there, and in which cases it showed. A note does not
    make a report unclean: what is lawful with care, and what only the text of the code shows."""

    name: str
    place: str
    what: str
    cases: tuple[str, ...] = ()
    note: bool = False

    @property
    def mend(self) -> str:
        return MENDS[self.name]

    def __str__(self) -> str:
        where = f" [{', '.join(self.cases)}]" if self.cases else ""
        return f"{'note' if self.note else 'error'}: {self.name} at {shown(self.place)}{where}\n    {self.what}\n    mend: {self.mend}"


def shown(place: str) -> str:
    """A place with its path relative to the working directory where it lies in it."""
    file, _, line = place.rpartition(":")
    try:
        return f"{Path(file).relative_to(Path.cwd())}:{line}"
    except ValueError:
        return place


@dataclass
class Report:
    """The outcome of a check. `clean` is True where nothing but notes was found; read it beside `unproven`."""

    subject: str
    device: str
    cases: list[str]
    findings: list[Finding] = field(default_factory=list)
    proven: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.note]

    @property
    def clean(self) -> bool:
        return not self.errors

    @property
    def names(self) -> set[str]:
        """The names of all errors."""
        return {finding.name for finding in self.errors}

    def add(self, name: str, place: str, what: str, case: str = "", note: bool = False) -> None:
        """Adds a finding, or a case to the one of this name at this place. An error takes the place of a note."""
        if name not in MENDS:
            raise ValueError(f"gkernels.graph.check: finding: got the name {name!r}, expected one of {sorted(MENDS)}")
        note = note or name in NOTES
        for i, known in enumerate(self.findings):
            if (known.name, known.place) == (name, place):
                cases = known.cases + ((case,) if case and case not in known.cases else ())
                self.findings[i] = Finding(name, place, what if known.note and not note else known.what, cases, known.note and note)
                return
        self.findings.append(Finding(name, place, what, (case,) if case else (), note))

    def text(self) -> str:
        errors, notes = len(self.errors), len(self.findings) - len(self.errors)
        counted = [f"{n} {word}{'s' * (n != 1)}" for n, word in ((errors, "error"), (notes, "note")) if n]
        lines = [f"{self.subject} on {self.device}: {', '.join(['clean'] * self.clean + counted)}; {len(self.cases)} cases: {', '.join(self.cases)}"]
        lines += [str(finding) for finding in sorted(self.findings, key=lambda f: f.note)]
        lines += [f"proven: {words}" for words in self.proven] + [f"not proven: {words}" for words in self.unproven]
        return "\n".join(lines)

    def json(self) -> str:
        findings = [asdict(finding) | {"mend": finding.mend} for finding in self.findings]
        return json.dumps(asdict(self) | {"clean": self.clean, "findings": findings}, indent=1)

    def require_clean(self) -> Report:
        """Returns the report, or raises AssertionError with its text."""
        if not self.clean:
            raise AssertionError(self.text())
        return self

    __str__ = text
