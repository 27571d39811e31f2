"""Static buffers: the tensors whose addresses a graph bakes in, filled from the host by one copy a step.

All fields lie in one block of device memory and in a few pinned blocks of the same layout on the host, which take turns: a step writes one, pads
the rest with each field's pad value, and `upload()` copies the block once. The next step writes another, while the device may still be busy with
the steps before, behind which the copy waits.

The copy is a graph of its own, one a pinned block, for a copy and an event of the stream's cost the host 100 us behind a busy device, and the
launch of such a graph 6. It ends with the block's serial number in pinned memory, where the host sees, without a call of the driver's, which
blocks the device has done with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

import numpy as np
import torch

from .buckets import Buckets
from .capture import GraphRunner

PATIENCE = 0.05      # seconds until a host that waits asks whether its device has failed
LONGEST_NAP = 5e-3   # and that it sleeps at once


@dataclass(frozen=True)
class Field:
    """One input of a step: its capacity, and what stands where no live value does. pad "last" repeats the last live value."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int32
    pad: float | str = 0


class StaticBuffers:
    """`buffers["name"]` is the device tensor, whose address never changes. `stage(name, values)` writes the host side.

    On CUDA its uploads are captured as it is made: meanwhile no other thread may use the device. `upload` is for the host's turn between launches: in
    a step that is captured it raises, for the graph would hold whichever pinned block had its turn."""

    ALIGNMENT = 256   # bytes: as cudaMalloc aligns, so that every view keeps its loads vectors
    BLOCKS = 8        # pinned ones, so many steps may be under way

    def __init__(self, fields: dict[str, Field], device: torch.device | str):
        self.fields, self.device = fields, torch.device(device)
        offsets, size = {}, 0
        for name, field in fields.items():
            if field.pad == "last" and len(field.shape) != 1:
                raise ValueError(f"gkernels.graph.StaticBuffers: {name}: got pad 'last' for shape {field.shape}, expected it for one dimension")
            offsets[name] = size
            bytes_ = prod(field.shape) * field.dtype.itemsize
            size += -(-bytes_ // self.ALIGNMENT) * self.ALIGNMENT
        pinned = lambda *shape, dtype: torch.zeros(*shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        self._staging = [pinned(size + self.ALIGNMENT, dtype=torch.uint8) for _ in range(self.BLOCKS)]           # behind the fields the serial
        self._block = torch.zeros(size + self.ALIGNMENT, dtype=torch.uint8, device=self.device)
        self._arrived = pinned(1, dtype=torch.int64)
        serial = slice(size, size + self._arrived.nbytes)
        self._serials, self._arrivals = [block[serial].view(torch.int64).numpy() for block in self._staging], self._arrived.numpy()
        self._copies = uploads(self._staging, self._block, serial, self._arrived)
        self._turn, self._is_sent, self._sent = 0, False, 0
        self._pace, self._waited = 1e-5, (time.monotonic(), 0)      # the least seconds an upload lately; when a wait ended last, and what had arrived
        self._staged: set[str] = set()                 # since the last upload
        self._known: list[dict[str, tuple | None]] = [dict.fromkeys(fields) for _ in self._staging]      # steady values that the blocks hold
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
        its last turn is written. Raises ValueError, and changes nothing, if they do not fit."""
        if self._is_sent:
            self._next()
        self._write(name, values, steady)
        self._staged.add(name)

    def stage_steady(self, fields: Mapping[str, Sequence]) -> None:
        """`stage` of many steady fields. One that the block holds costs 0.1 us, by itself 1."""
        if self._is_sent:
            self._next()
        known = self._known[self._turn]
        for name, values in fields.items():
            held = known[name]
            if held is not values and held != values:
                self._write(name, values, True)
        self._staged.update(fields)

    def _write(self, name, values, steady):
        known = self._known[self._turn]
        held = known[name]
        if steady and (held is values or held == values):
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

    def upload(self) -> None:
        """Copies everything staged to the device, on the current stream, without waiting for it. A field that was not staged since the last upload
        stays as it is. Raises RuntimeError, and changes nothing, where that stream is captured."""
        if self._copies.graphs and torch.cuda.is_current_stream_capturing():     # before `_next`, whose question to a stream would end the capture
            raise RuntimeError("gkernels.graph.StaticBuffers: upload: got a stream that is captured, expected one between launches: every replay "
                               "would bring the same pinned block; upload before the graph is launched")
        if self._is_sent:
            self._next()
        before = self._turn - 1
        for name in self.fields.keys() - self._staged:
            np.copyto(self._host[name], self._hosts[before][name])
            self._known[self._turn][name] = self._known[before][name]
        self._serials[self._turn][0] = self._sent + 1
        self._copies.run(1 + self._turn)
        self._staged.clear()
        self._sent += 1
        self._is_sent = True

    def _next(self):
        """Turns to the block that was sent longest ago, once it is free."""
        self._turn, self._is_sent = (self._turn + 1) % self.BLOCKS, False
        self.wait()

    def wait(self) -> None:
        """Returns once no upload reads the block that is written next. Where one does, only once half of all blocks are free, so that a host which
        is ahead of its device sleeps once in so many steps. Raises what torch raises of a device that has failed."""
        sent = self._serials[self._turn][0]
        if self._arrivals[0] >= sent:
            return
        began, pause, enough = time.monotonic(), 50e-6, sent + (self.BLOCKS - 1) // 2
        while (missing := int(enough - self._arrivals[0])) > 0:
            if time.monotonic() - began > PATIENCE:
                torch.cuda.current_stream(self.device).query()             # its errors are all that it is asked for; 25 to 50 us behind a busy device
            # Three quarters of what is expected: should steps have become four times as short, those still under way last until the host is back
            time.sleep(max(pause, min(0.75 * missing * self._pace, LONGEST_NAP)))
            pause = min(1.5 * pause, 1e-3)
        (then, before), self._waited = self._waited, (time.monotonic(), int(self._arrivals[0]))
        self._pace = min(1.5 * self._pace, (self._waited[0] - then) / (self._waited[1] - before))

    def check_addresses(self) -> None:
        """Raises RuntimeError if a buffer moved since it was made: a graph would go on reading the old place."""
        for name, address in self.addresses.items():
            if self._views[name].data_ptr() != address:
                raise RuntimeError(f"gkernels.graph.StaticBuffers: {name} moved from {address:#x} to {self._views[name].data_ptr():#x}; "
                                   "write into the tensor instead of replacing it")


def uploads(blocks: list[torch.Tensor], target: torch.Tensor, serial: slice, arrived: torch.Tensor) -> GraphRunner:
    """A runner whose bucket n copies the n-th of pinned `blocks` to `target`, and then its bytes in `serial` to pinned `arrived`."""
    number = target[serial].view(arrived.dtype)

    def upload(n):
        target.copy_(blocks[n - 1], non_blocking=True)
        arrived.copy_(number, non_blocking=True)

    runner = GraphRunner(upload, Buckets(range(1, len(blocks) + 1)), target.device)
    runner.capture(progress=False)
    return runner
