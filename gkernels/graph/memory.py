"""Tensors by name and by address: what a caller declared, what an address lies in, poison and junk to fill it with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass

import numpy as np
import torch

WHOLE = 2**31 - 1


def named_tensors(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a value with its path, whatever dataclasses, tuples, lists and dicts hold it: ("plan.positions", tensor)."""
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    for key, item in items:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in a value, in order."""
    return (t for _, t in named_tensors(value))


def fill_with_junk(tensors: Iterable[torch.Tensor], generator: torch.Generator, largest: int = WHOLE) -> None:
    """Overwrites tensors in place: integers from the whole range to `largest` with small ones among them, any float, any byte."""
    for t in tensors:
        if t.dtype in (torch.int32, torch.int64):
            wild = torch.randint(-largest - 1, largest + 1, t.shape, generator=generator)
            tame = torch.randint(-1, 9, t.shape, generator=generator)
            junk = torch.where(torch.rand(t.shape, generator=generator) < torch.rand((), generator=generator), wild, tame)
        elif t.is_floating_point() and t.element_size() > 1:
            junk = torch.randn(t.shape, generator=generator) * 10.0 ** torch.randint(-3, 6, (), generator=generator)
            junk[torch.rand(t.shape, generator=generator) < 0.05] = float("nan")
        elif t.dtype == torch.bool:
            junk = torch.rand(t.shape, generator=generator) < 0.5
        else:
            t, junk = t.view(torch.uint8), torch.randint(0, 256, t.shape, generator=generator)
        t.copy_(junk)


def poison(t: torch.Tensor, again: bool) -> None:
    """Fills a tensor with a value that no result holds by chance: NaN and -1, or `again` the largest number and 7. Small integers, so that a
    loop that takes its bound from poison ends."""
    if t.is_floating_point() and t.element_size() > 1:
        t.fill_(torch.finfo(t.dtype).max if again else float("nan"))
    elif t.dtype == torch.bool:
        t.fill_(again)
    elif t.is_floating_point():
        t.view(torch.uint8).fill_(7 if again else 0xFF)
    else:
        t.fill_(7 if again else torch.iinfo(t.dtype).max if not t.dtype.is_signed else -1)


def different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A mask of the elements whose bits differ: NaN equals itself, and 0 is not -0."""
    if a.dtype == torch.bool or not (a.is_floating_point() or a.is_complex()):
        return a != b
    if a.is_complex():
        return different(torch.view_as_real(a), torch.view_as_real(b)).any(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(bits) != b.contiguous().view(bits)


def is_poison(t: torch.Tensor, again: bool = False) -> torch.Tensor:
    """Which elements hold what `poison` writes."""
    filled = torch.empty_like(t)
    poison(filled, again)
    return ~different(t, filled)


def span(t: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to behind its last one."""
    if not t.numel():
        return t.data_ptr(), t.data_ptr()
    return t.data_ptr(), t.data_ptr() + (sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


class Memory:
    """Named regions of addresses. A region found first gives its name."""

    def __init__(self, regions: Iterable[tuple[str, tuple[int, int]]] = ()):
        self.regions = [(name, bounds) for name, bounds in regions if bounds[0] < bounds[1]]

    def add(self, name: str, bounds: tuple[int, int]) -> None:
        if bounds[0] < bounds[1]:
            self.regions.append((name, bounds))

    def find(self, address: int) -> tuple[str, int] | None:
        """(region, bytes from its start), or None for an address outside all of them."""
        return next(((name, address - start) for name, (start, end) in self.regions if start <= address < end), None)

    def outside(self, addresses: np.ndarray) -> np.ndarray:
        """Which addresses lie in no region."""
        outside = np.ones(len(addresses), bool)
        for _, (start, end) in self.regions:
            outside &= (addresses < start) | (addresses >= end)
        return outside
