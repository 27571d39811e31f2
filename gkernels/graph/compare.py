"""Two records of one callable, side by side: every difference is a decision that a graph freezes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .memory import different
from .trace import Trace


def differences(first: Trace, other: Trace, why: str) -> Iterator[tuple[str, str, str]]:
    """(name, place, what) of each difference between two calls. `why` says what differs between them: "with other data"."""
    for a, b in zip(first.events, other.events, strict=False):
        if a.name != b.name:
            yield "kernel-by-data", b.place, f"runs {a.name} in one call and {b.name} in another {why}"
            return
        if a.grid != b.grid:
            yield "data-dependent-grid", b.place, f"{a.name}: grid {a.grid} in one call, {b.grid} in another {why}"
        for n in sorted({*a.shapes, *b.shapes}):
            if a.shapes.get(n) != b.shapes.get(n):
                was, now = tensor(a.shapes.get(n)), tensor(b.shapes.get(n))
                yield "data-dependent-shape", b.place, f"{a.name}: {n} is {was} in one call, {now} in another {why}"
        for n in sorted({*a.scalars, *b.scalars}):
            if repr(a.scalars.get(n)) != repr(b.scalars.get(n)):
                yield "baked-scalar", b.place, f"{a.name}: {n} is {a.scalars.get(n)} in one call, {b.scalars.get(n)} in another {why}"
        for n in sorted({*a.pointers, *b.pointers}):
            here, there = first.region(a.pointers.get(n, 0)), other.region(b.pointers.get(n, 0))
            if here != there:
                yield "stale-pointer", b.place, f"{a.name}: {n} points to {where(here)} in one call, to {where(there)} in another {why}"
        for n in sorted({*a.classes} & {*b.classes}):
            if a.classes[n] != b.classes[n]:
                yield "specialisation", b.place, f"{a.name}: {n} is compiled as {a.classes[n]} in one call, as {b.classes[n]} in another {why}"
    if len(first.events) != len(other.events):
        longer = max(first.events, other.events, key=len)
        event = longer[min(len(first.events), len(other.events))]
        yield "kernel-by-data", event.place, f"runs {event.name} in one call and not in another {why}"


def tensor(shape: tuple | None) -> str:
    return "absent" if shape is None else f"{list(shape[0])} with strides {list(shape[1])} of {shape[2]}"


def where(region: tuple[str, int]) -> str:
    return f"{region[0]}{f' + {region[1]} bytes' if region[1] else ''}"


Results = dict[str, torch.Tensor]


def result_differences(want: Results, got: Results, masks: Results) -> Iterator[tuple[str, torch.Tensor]]:
    """(tensor name, mask of the elements that differ) of two runs' results, among the elements that `masks` lets through."""
    for name in want:
        if want[name].shape != got[name].shape:
            yield name, torch.ones((), dtype=torch.bool)
            continue
        mask = different(want[name], got[name])
        if name in masks:
            mask &= masks[name]
        if mask.any():
            yield name, mask
