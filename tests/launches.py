"""What a call launches: kernels, grids, scalars and addresses, in both worlds.

A captured graph replays exactly this record. An op is graph-safe when the record does not depend on what its tensors contain.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from unittest.mock import patch

import torch
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple
    scalars: dict    # by name: run-time numbers, strides, constexprs, absent (None) arguments, num_warps and the like
    pointers: dict   # by name: data_ptr of each tensor


def launch(kernel, names, grid, args, kwargs):
    """The record of one launch. A callable grid sees plain Python values, as it does on the GPU."""
    bound = dict(zip(names, args, strict=False)) | kwargs
    grid = tuple(grid(bound)) if callable(grid) else tuple(grid)
    tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
    return Launch(kernel, grid, {name: value for name, value in bound.items() if name not in tensors},
                  {name: value.data_ptr() for name, value in tensors.items()})


@contextmanager
def record():
    """Yields a list that grows by one Launch for every Triton kernel launched; the kernels run as ever."""
    launches, interpret, run = [], GridExecutor.__call__, JITFunction.run

    def recorded_interpret(self, *args, **kwargs):
        launches.append(launch(self.fn.__name__, self.arg_names, self.grid, args, kwargs))
        return interpret(self, *args, **kwargs)

    def recorded_run(self, *args, grid, warmup, **kwargs):
        if not warmup:
            launches.append(launch(self.__name__, self.arg_names, grid, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with patch.object(GridExecutor, "__call__", recorded_interpret), patch.object(JITFunction, "run", recorded_run):
        yield launches


def tensors_in(value):
    """Every tensor in a call's arguments, whatever dataclasses, tuples, lists and dicts hold them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


def fill_with_junk(tensors, generator, largest=2**31 - 1):
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
