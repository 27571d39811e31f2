"""Static buffers: the tensors whose addresses a graph bakes in, filled from the host by one copy a step.

All fields lie in one block of device memory and in two pinned blocks of the same layout on the host, which take turns: a step writes one, pads
the rest with each field's pad value, and `upload()` copies the block once. The next step writes the other, while the device may still be busy
with the step before, behind which the copy waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
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
        self.fields, self.device = fields, torch.device(device)
        offsets, size = {}, 0
        for name, field in fields.items():
            if field.pad == "last" and len(field.shape) != 1:
                raise ValueError(f"gkernels.graph.StaticBuffers: {name}: got pad 'last' for shape {field.shape}, expected it for one dimension")
            offsets[name] = size
            bytes_ = prod(field.shape) * field.dtype.itemsize
            size += -(-bytes_ // self.ALIGNMENT) * self.ALIGNMENT
        on_gpu = self.device.type == "cuda"
        self._staging = [torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._block = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._uploaded = [torch.cuda.Event(blocking=True) if on_gpu else None for _ in range(2)]    # whose wait leaves the processor to others
        self._in_flight, self._turn, self._is_sent = [False, False], 0, False
        self._staged: set[str] = set()                 # since the last upload
        self._known: list[dict[str, tuple | None]] = [dict.fromkeys(fields), dict.fromkeys(fields)]     # steady values that the blocks hold
        cut = {name: slice(offsets[name], offsets[name] + prod(field.shape) * field.dtype.itemsize) for name, field in fields.items()}
        fit = lambda block: {name: block[cut[name]].view(field.dtype).view(field.shape) for name, field in fields.items()}
        self._views, self._hosts = fit(self._block), [{name: view.numpy() for name, view in fit(block).items()} for block in self._staging]
        for name in fields:
            self.stage(name, ())
        self.addresses = {name: view.data_ptr() for name, view in self._views.items()}
        self.upload()

    @property
    def _host(self):
        """The block that was staged last."""
        return self._hosts[self._turn]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._views[name]

    def stage(self, name: str, values: Sequence | np.ndarray, steady: bool = False) -> None:
        """Writes `values` to the front of the field on the host and its pad value behind them. Rows of a 2-D field may be shorter than the
        field: they too are padded. Of `steady` ones, a tuple of numbers or of tuples of them, only what differs from those that the block has from
        two rounds ago is written. Raises ValueError, and changes nothing, if they do not fit."""
        if self._is_sent:
            self._turn, self._is_sent = 1 - self._turn, False
            self.wait()
        known = self._known[self._turn]
        held = known[name]
        if steady and (held is values or held == values):
            self._staged.add(name)
            return
        field, host, n = self.fields[name], self._host[name], len(values)
        if n > len(host):
            raise ValueError(f"gkernels.graph.StaticBuffers: {name}: got {n} rows, expected at most {len(host)}")
        if host.ndim == 2 and (longest := max(map(len, values), default=0)) > host.shape[1]:
            raise ValueError(f"gkernels.graph.StaticBuffers: {name}: got a row of {longest}, expected at most {host.shape[1]}")
        known[name] = None                             # until all is written
        if held is None:
            host[:] = 0 if field.pad == "last" else field.pad
            held = ()
        if host.ndim == 2:                             # a row by itself costs 1 us and 20 ns an entry, so those that stay are left alone
            for i, (row, old) in enumerate(zip_longest(values, held, fillvalue=())):
                if row is not old and not (steady and row == old):
                    at = len(old) if steady and row[:len(old)] == old else 0     # pages are added at the end
                    host[i, at:len(row)] = row[at:]
                    host[i, len(row):len(old)] = field.pad
        else:
            host[:n] = values
            if field.pad == "last":
                host[n:] = values[-1] if n else 0
            else:
                host[n:len(held)] = field.pad
        if steady:                                     # copies, of which nobody can change what is compared; a tuple is its own
            known[name] = tuple(values) if host.ndim == 1 else tuple(map(tuple, values))
        self._staged.add(name)

    def upload(self) -> None:
        """Copies everything staged to the device, on the current stream, without waiting for it. A field that was not staged since the last upload
        stays as it is."""
        if not self._is_sent:
            for name in self.fields.keys() - self._staged:
                np.copyto(self._host[name], self._hosts[1 - self._turn][name])
                self._known[self._turn][name] = self._known[1 - self._turn][name]
            self._staged.clear()
        self._block.copy_(self._staging[self._turn], non_blocking=True)
        self._is_sent, uploaded = True, self._uploaded[self._turn]
        if uploaded is not None:
            uploaded.record()
            self._in_flight[self._turn] = True

    def wait(self) -> None:
        """Returns once no upload reads the block staged last. `stage` calls it for the block it turns to, so that no copy reads what it writes."""
        uploaded = self._uploaded[self._turn]
        if uploaded is not None and self._in_flight[self._turn]:
            uploaded.synchronize()
            self._in_flight[self._turn] = False

    def check_addresses(self) -> None:
        """Raises RuntimeError if a buffer moved since it was made: a graph would go on reading the old place."""
        for name, address in self.addresses.items():
            if self._views[name].data_ptr() != address:
                raise RuntimeError(f"gkernels.graph.StaticBuffers: {name} moved from {address:#x} to {self._views[name].data_ptr():#x}; "
                                   "write into the tensor instead of replacing it")
