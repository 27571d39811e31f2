"""What a call launches: kernels, grids, scalars and addresses, in both worlds.

A captured graph replays exactly this record. A callable is graph-safe when the record does not depend on what its tensors contain.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, native_specialize_impl

from .memory import named_tensors, tensors_in

LIBRARIES = tuple(f"{Path(module.__file__ or '').parent}{os.sep}" for module in (torch, triton, np)) + (f"{Path(__file__).parent}{os.sep}", "<")


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel. `classes` tells which binary it takes: Triton compiles one for each combination."""

    kernel: str
    grid: tuple[int, ...]
    scalars: dict[str, object]      # by name: run-time numbers, strides, constexprs, absent (None) arguments, num_warps and the like
    pointers: dict[str, int]        # by name: data_ptr of each tensor
    classes: dict[str, str] = field(default_factory=dict)          # by name, in the signature's order: "i32:16", "constexpr:1", "*fp32:16"
    symbol: str = ""                # its name in the binary; empty where the kernel makes its own
    place: str = field(default="", compare=False)
    thread: int = field(default=0, compare=False, repr=False)
    again: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)   # the same launch on the same memory

    @property
    def name(self) -> str:
        return self.kernel

    @property
    def shapes(self) -> dict[str, tuple]:
        return {}                   # a kernel knows no shape but through its scalars


def user_place() -> str:
    """"file:line" of the innermost frame outside torch, triton, numpy and this package: the user's line."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def specialisation(value: object, in_value: bool, in_alignment: bool) -> str:
    """The class in which Triton compiles an argument: its type, and whether it is 1, divides by 16, or points to such an address."""
    kind, key = native_specialize_impl(BaseBackend, value, False, in_value, in_alignment)
    return f"{kind}:{'16' if key == 'D' else key}" if key else kind


def classes_of(function, bound: dict[str, object]) -> dict[str, str]:
    options = options_of(function)
    fixed, unaligned = (set(options[key] or ()) for key in ("do_not_specialize", "do_not_specialize_on_alignment"))
    constants = {name for name, kind in function.fn.__annotations__.items() if "constexpr" in str(kind)}
    found: dict[str, str] = {}
    for i, name in enumerate(function.arg_names):
        value = None if name in constants else bound.get(name)
        if rank := len(getattr(value, "block_shape", ())):     # a TensorDescriptor, which the launch hands over as a map, sizes and strides
            found |= {name: specialisation(value, True, True)}
            found |= {f"{name}.{part}[{j}]": kind for part, kind in (("shape", "i32"), ("strides", "i64")) for j in range(rank)}
        elif isinstance(value, torch.Tensor | int | float):
            found[name] = specialisation(value, not fixed & {name, i}, not unaligned & {name, i})
    return found


def options_of(function) -> dict:
    """What a kernel was decorated with."""
    return function.kwargs if isinstance(function, InterpretedFunction) else vars(function) | {"repr": function._repr}


@contextmanager
def record(into: list | None = None) -> Iterator[list]:
    """Yields a list, `into` or a new one, that grows by one Launch for every Triton kernel launched; the kernels run as ever. Torch's modes
    rest while a kernel runs, for what the interpreter asks of torch is no part of the call."""
    launches: list = [] if into is None else into

    def recorded(run):
        def call(function, *args, grid, warmup, **kwargs):
            if warmup:
                return run(function, *args, grid=grid, warmup=warmup, **kwargs)
            defaults = {p.name: p.default for p in inspect.signature(function.fn).parameters.values() if p.default is not p.empty}
            bound = defaults | dict(zip(function.arg_names, args, strict=False)) | kwargs
            sizes = tuple(grid(bound)) if callable(grid) else tuple(grid)    # plain Python values, as on the GPU
            tensors = dict(named_tensors(bound))

            def again():
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    return run(function, *args, grid=sizes, warmup=False, **kwargs)

            launches.append(Launch(
                function.__name__, sizes, {name: value for name, value in bound.items() if not list(tensors_in(value))},
                {name: value.data_ptr() for name, value in tensors.items()}, classes_of(function, bound),
                "" if options_of(function)["repr"] else function.__name__, user_place(),
                threading.get_ident(), again))
            return again()
        return call

    with patch.object(InterpretedFunction, "run", recorded(InterpretedFunction.run)), \
            patch.object(JITFunction, "run", recorded(JITFunction.run)):
        yield launches
