"""Static buffers: the tensors whose addresses a graph bakes in, filled from the host by one copy a step.

All fields lie in one block of device memory and in one pinned block of the same layout on the host. A step writes the host side, pads the
rest with each field's pad value, and `upload()` copies the block once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch


@dataclass(frozen=True)
class Field:
    """One input of a step: its capacity, and what stands where no live value does. pad "last" repeats the last live value."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int32
    pad: float | str = 0


class StaticBuffers:
    """`buffers["name"]` is the device tensor, whose address never changes. `stage(name, values)` writes the host side."""

    ALIGNMENT = 256   # bytes: as cudaMalloc aligns, so that every view keeps its loads vectors

    def __init__(self, fields: dict[str, Field], device: torch.device | str):
        self.fields, self.device, self._host = fields, torch.device(device), {}
        offsets, size = {}, 0
        for name, field in fields.items():
            if field.pad == "last" and len(field.shape) != 1:
                raise ValueError(f"gkernels.graph.StaticBuffers: {name}: got pad 'last' for shape {field.shape}, expected it for one dimension")
            offsets[name] = size
            bytes_ = prod(field.shape) * field.dtype.itemsize
            size += -(-bytes_ // self.ALIGNMENT) * self.ALIGNMENT
        on_gpu = self.device.type == "cuda"
        self._staging = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._block = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._views, self._in_flight = {}, False
        self._uploaded = torch.cuda.Event() if on_gpu else None
        for name, field in fields.items():
            cut = slice(offsets[name], offsets[name] + prod(field.shape) * field.dtype.itemsize)
            self._views[name] = self._block[cut].view(field.dtype).view(field.shape)
            self._host[name] = self._staging[cut].view(field.dtype).view(field.shape).numpy()
            self.stage(name, ())
        self.addresses = {name: view.data_ptr() for name, view in self._views.items()}
        self.upload()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._views[name]

    def stage(self, name: str, values: Sequence | np.ndarray) -> None:
        """Writes `values` to the front of the field on the host and its pad value behind them. Rows of a 2-D field may be shorter than the
        field: they too are padded. Raises ValueError if they do not fit."""
        field, host = self.fields[name], self._host[name]
        self.wait()
        if len(values) > len(host):
            raise ValueError(f"gkernels.graph.StaticBuffers: {name}: got {len(values)} rows, expected at most {len(host)}")
        last = values[-1] if field.pad == "last" and len(values) else 0
        host[len(values):] = last if field.pad == "last" else field.pad
        if host.ndim == 1:
            host[:len(values)] = values
            return
        for row, line in zip(host, values, strict=False):
            if len(line) > len(row):
                raise ValueError(f"gkernels.graph.StaticBuffers: {name}: got a row of {len(line)}, expected at most {len(row)}")
            row[:len(line)] = line
            row[len(line):] = field.pad

    def upload(self) -> None:
        """Copies everything staged to the device, on the current stream, without waiting for it."""
        self._block.copy_(self._staging, non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()
            self._in_flight = True

    def wait(self) -> None:
        """Returns once the last upload has left the pinned block. `stage` calls it, so that no copy reads what the next step writes."""
        if self._uploaded is not None and self._in_flight:
            self._uploaded.synchronize()
            self._in_flight = False

    def check_addresses(self) -> None:
        """Raises RuntimeError if a buffer moved since it was made: a graph would go on reading the old place."""
        for name, address in self.addresses.items():
            if self._views[name].data_ptr() != address:
                raise RuntimeError(f"gkernels.graph.StaticBuffers: {name} moved from {address:#x} to {self._views[name].data_ptr():#x}; "
                                   "write into the tensor instead of replacing it")
