"""What the GPU would let pass: addresses outside every argument, races between programs, and who reads what.

Context managers over the CPU interpreter of Triton 3.6. Kernels run as they are; each load, store and atomic is looked at, lane by lane,
on its way to memory. They nest, and each puts back what it changed.

    with sanitize(): ...            raises OutOfBounds before a lane touches a byte that belongs to no argument of the launch
    with accesses() as launches:    the elements each launch read and wrote, by argument; raises Race on one
    with shuffled(seed): ...        runs each grid's programs in a random order
"""

from contextlib import contextmanager
from functools import lru_cache
from itertools import combinations
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from .memory import named_tensors

SUPPORTED = "3.6."   # _interpreter, GridExecutor and set_grid_idx are private names, read in these releases only


class OutOfBounds(AssertionError):
    """An access outside every argument of its launch."""


class Race(AssertionError):
    """Two programs of one launch touch a byte, one writes it, and nothing orders them."""


def guard():
    """Raises RuntimeError on a Triton release whose interpreter was not read."""
    if not triton.__version__.startswith(SUPPORTED):
        raise RuntimeError(f"gkernels.graph.interpreter knows the interpreter of Triton {SUPPORTED}x, got {triton.__version__}: "
                           "read its GridExecutor and InterpreterBuilder again, then raise SUPPORTED")


def arguments_of(executor, args, kwargs):
    """A launch's arguments by name; what the kernel does not name (num_warps and the like) is left out."""
    return dict(zip(executor.arg_names, args, strict=False)) | {name: value for name, value in kwargs.items() if name in executor.arg_names}


class Argument:
    """The bytes of one tensor argument: those of its elements, not those between them nor the rest of its storage."""

    def __init__(self, name, tensor):
        self.name, self.tensor, self.base, self.size = name, tensor, tensor.data_ptr(), tensor.element_size()
        self.span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
        self.exists = None
        if self.span > tensor.numel():
            exists = torch.zeros(self.span, dtype=torch.bool)
            exists.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.exists = exists.numpy()

    def holds(self, addresses, size):
        """Which accesses of `size` bytes lie in it with their first and their last byte; and the elements they start at."""
        first, last = addresses - self.base, addresses + size - 1 - self.base
        inside = (first >= 0) & (last < self.span * self.size)
        if self.exists is not None:
            inside[inside] = self.exists[first[inside] // self.size] & self.exists[last[inside] // self.size]
        return inside, first // self.size

    def shaped(self, elements):
        """The elements as a mask of the tensor's shape."""
        flat = torch.zeros(self.span, dtype=torch.bool)
        flat[torch.from_numpy(elements)] = True
        return flat.as_strided(self.tensor.shape, self.tensor.stride())


class Launch:
    """One launch's accesses. `reads` and `writes` give, by argument name, the element offsets from its data pointer, sorted;
    `read(name)` and `written(name)` the same as a mask of the argument's shape. Atomics count as both."""

    def __init__(self, kernel, arguments):
        self.kernel, self.arguments = kernel, {name: Argument(name, t) for name, t in named_tensors(arguments)}
        self.records, self.known, self.epochs, self.released = [], {}, {}, {}

    @property
    def reads(self):
        return self._elements({"load", "atomic"})

    @property
    def writes(self):
        return self._elements({"store", "atomic"})

    def read(self, name):
        return self.arguments[name].shaped(self.reads[name])

    def written(self, name):
        return self.arguments[name].shaped(self.writes[name])

    def _elements(self, kinds):
        found = {name: [np.empty(0, np.int64)] for name in self.arguments}
        for kind, _, _, _, addresses, size in self.records:
            for name, argument in self.arguments.items() if kind in kinds else ():
                inside, elements = argument.holds(addresses, size)
                found[name].append(elements[inside])
        return {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}

    def add(self, kind, addresses, size, ordered):
        """Notes an access. An atomic that orders memory first takes over what every earlier one at its address had seen, then leaves what
        its own program has seen: an access is ordered before another when the second's program knows the epoch of the first's."""
        program = interpreter.interpreter_builder.grid_idx
        known, epoch = self.known.setdefault(program, {}), self.epochs.setdefault(program, 0)
        if kind == "atomic" and ordered:
            for address in addresses.tolist():
                known = known | {p: max(e, known.get(p, -1)) for p, e in self.released.get(address, {}).items()}
            for address in addresses.tolist():
                self.released[address] = known | {program: epoch}
            self.known[program], self.epochs[program] = known, epoch + 1
        self.records.append((kind, program, epoch, known, addresses, size))

    def check_races(self):
        """Raises Race where two programs touch a byte, one writes it, and no atomic orders them. Two atomics never race."""
        if not self.records:
            return
        unit = min(size for *_, size in self.records)
        addresses = np.concatenate([(a[:, None] + np.arange(0, size, unit)).ravel() for *_, a, size in self.records])
        record = np.repeat(np.arange(len(self.records)), [len(a) * (size // unit) for *_, a, size in self.records])
        pairs = np.unique(np.stack([addresses, record], 1), axis=0)
        addresses, record = pairs.T
        programs = {p: i for i, p in enumerate(self.epochs)}
        program = np.array([programs[p] for _, p, *_ in self.records])[record]
        wrote = np.array([kind != "load" for kind, *_ in self.records])[record]
        starts = np.flatnonzero(np.r_[True, addresses[1:] != addresses[:-1]])
        shared = np.minimum.reduceat(program, starts) < np.maximum.reduceat(program, starts)
        suspect = shared & np.logical_or.reduceat(wrote, starts)
        ends = np.r_[starts[1:], len(record)]
        groups = {tuple(record[a:b]): addresses[a] for a, b in zip(starts[suspect], ends[suspect], strict=True)}

        @lru_cache(None)
        def race(i, j):
            (kind, p, epoch, *_), (later_kind, q, _, known, *_) = self.records[i], self.records[j]
            return p != q and {kind, later_kind} not in ({"load"}, {"atomic"}) and known.get(p, -1) < epoch

        for group, address in groups.items():
            for i, j in combinations(group, 2):
                if race(i, j):
                    names = [f"element {e[0]} of {name}" for name, argument in self.arguments.items()
                             for inside, e in [argument.holds(np.array([address]), unit)] if inside[0]]
                    accesses = " and ".join(f"{self.records[r][0]} by program {self.records[r][1]}" for r in (i, j))
                    raise Race(f"{self.kernel}: race on {' and '.join(names) or hex(address)}: {accesses}, in no fixed order")


class _Shim:
    """Stands before the interpreter's memory and shows each access to `see(kind, addresses, mask, size, ordered)`."""

    def __init__(self, memory, see):
        self._memory, self._see = memory, see
        self._relaxed = memory.MEM_SEMANTIC.RELAXED

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def load(self, pointers, mask, other, dtype):
        self._see("load", pointers, mask, np.dtype(dtype).itemsize, False)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._see("store", pointers, mask, value.itemsize, False)
        return self._memory.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, order):
        self._see("atomic", pointers, mask, value.itemsize, order != self._relaxed)
        return self._memory.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(self, pointers, compare, value, order):
        self._see("atomic", pointers, np.ones(np.shape(pointers), bool), value.itemsize, order != self._relaxed)
        return self._memory.atomic_cas(pointers, compare, value, order)


@contextmanager
def _watch(begin, see, end):
    """Calls begin(kernel name, arguments) before a launch, see(...) at each access, and end() after a launch that raised nothing."""
    guard()
    call = interpreter.GridExecutor.__call__

    def watched(executor, *args, **kwargs):
        begin(executor.fn.__name__, arguments_of(executor, args, kwargs))
        try:
            call(executor, *args, **kwargs)
        except InterpreterError as error:                       # the interpreter wraps what a shim raises, once for each nested helper
            cause = error
            while isinstance(cause, InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, AssertionError):
                raise cause from None
            raise
        end()

    def active(kind, pointers, mask, size, ordered):
        pointers, mask = np.broadcast_arrays(pointers, mask)
        lanes = np.flatnonzero(mask)
        see(kind, pointers.ravel()[lanes].astype(np.int64), lanes, size, ordered)

    with patch.object(interpreter, "_interpreter", _Shim(interpreter._interpreter, active)), \
            patch.object(interpreter.GridExecutor, "__call__", watched):
        yield


@contextmanager
def sanitize():
    """Raises OutOfBounds before an active lane touches a byte outside the elements of every tensor argument of its launch."""
    running = {}

    def begin(kernel, arguments):
        running.update(kernel=kernel, arguments=[Argument(name, t) for name, t in named_tensors(arguments)])

    def see(kind, addresses, lanes, size, ordered):
        bad = np.ones(len(addresses), bool)
        for argument in running["arguments"]:
            if not bad.any():
                return
            bad[bad] = ~argument.holds(addresses[bad], size)[0]
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            address = int(addresses[first])
            distances = [(address - a.base - (a.span * a.size if address >= a.base else 0), a.name) for a in running["arguments"]]
            distance, name = min(distances, key=lambda d: abs(d[0]))
            raise OutOfBounds(f"{running['kernel']}: {kind} of {size} bytes at {address:#x}, lane {lanes[first]} of program "
                                 f"{interpreter.interpreter_builder.grid_idx}, is outside every argument: {distance:+d} bytes from {name} "
                                 f"({int(bad.sum())} of {len(bad)} active lanes are outside)")

    with _watch(begin, see, lambda: None):
        yield


@contextmanager
def accesses(races=True):
    """Yields a list that grows by one Launch a launch. With `races`, each launch is searched for them when it ends."""
    launches = []

    def end():
        if races:
            launches[-1].check_races()

    with _watch(lambda kernel, arguments: launches.append(Launch(kernel, arguments)),
                lambda kind, addresses, lanes, size, ordered: launches[-1].add(kind, addresses, size, ordered), end):
        yield launches


@contextmanager
def shuffled(seed):
    """Runs each grid's programs in a random order, each once."""
    guard()
    random, builder, order = np.random.default_rng(seed), interpreter.InterpreterBuilder, {}
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def shuffle(self, *grid):
        set_grid_dim(self, *grid)
        order.update(enumerate(random.permutation(int(np.prod(grid)))))

    def place(self, x, y, z):
        _, ny, nz = self.grid_dim
        set_grid_idx(self, *map(int, np.unravel_index(order[(x * ny + y) * nz + z], self.grid_dim)))

    with patch.object(builder, "set_grid_dim", shuffle), patch.object(builder, "set_grid_idx", place):
        yield
