"""Callables that a CUDA graph would break, one for each class of bug, and one that it would not: what the checker must tell apart.

Each doubles the first `lens[r]` elements of row r of `x` into `out` and puts zeros behind them, or tries to. `GALLERY` maps a name to an
Exhibit: a function that builds the Subject, and the names of all errors that a check of it must find. Each builds its state afresh.
"""

import gc
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl

from gkernels.graph.check import Subject

R, N = 4, 8     # rows and columns: the capacities


@triton.jit(do_not_specialize=["n"])
def _double_kernel(x_ptr, lens_ptr, out_ptr, n, N: tl.constexpr):
    # x, out [programs, N]; lens [programs]
    r, c = tl.program_id(0), tl.arange(0, N)
    live = c < tl.minimum(tl.load(lens_ptr + r), n)
    tl.store(out_ptr + r * N + c, tl.load(x_ptr + r * N + c, live, 0.0) * 2)


@triton.jit
def _special_kernel(x_ptr, lens_ptr, out_ptr, n, N: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, N)
    live = c < tl.minimum(tl.load(lens_ptr + r), n)
    tl.store(out_ptr + r * N + c, tl.load(x_ptr + r * N + c, live, 0.0) * 2)


@triton.jit
def _first_column_kernel(x_ptr, out_ptr, N: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, N)
    tl.store(out_ptr + r * N + c, tl.where(c == 0, tl.load(x_ptr + r * N) * 2, 0.0))


@triton.jit
def _late_mask_kernel(x_ptr, lens_ptr, out_ptr, N: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, N)
    live = (c < tl.load(lens_ptr + r)).to(tl.float32)
    tl.store(out_ptr + r * N + c, tl.load(x_ptr + r * N + c) * 2 * live)


@triton.jit
def _live_rows_kernel(x_ptr, lens_ptr, out_ptr, N: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, N)
    length = tl.load(lens_ptr + r)
    if length > 0:
        tl.store(out_ptr + r * N + c, tl.load(x_ptr + r * N + c, c < length, 0.0) * 2)


@triton.jit
def _gather_kernel(x_ptr, lens_ptr, out_ptr, N: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, N)
    length = tl.load(lens_ptr + r)
    last = tl.load(x_ptr + r * N + length)                    # one behind the last row's end where it is full
    tl.store(out_ptr + r * N + c, tl.load(x_ptr + r * N + c, c < length, 0.0) * 2 + 0 * last)


@triton.jit
def _sum_kernel(x_ptr, lens_ptr, out_ptr, total_ptr, ATOMIC: tl.constexpr, N: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, N)
    x = tl.load(x_ptr + r * N + c, c < tl.load(lens_ptr + r), 0.0) * 2
    tl.store(out_ptr + r * N + c, x)
    if ATOMIC:
        tl.atomic_add(total_ptr, tl.sum(x))
    else:
        tl.store(total_ptr, tl.load(total_ptr) + tl.sum(x))


@triton.autotune(configs=[triton.Config({}, num_warps=w) for w in (1, 2)], key=["n"])
@triton.jit
def _tuned_kernel(x_ptr, lens_ptr, out_ptr, n, N: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, N)
    tl.store(out_ptr + r * N + c, tl.load(x_ptr + r * N + c, c < tl.load(lens_ptr + r), 0.0) * 2)


class Engine:
    """Static tensors and what a host knows of the batch that it staged last."""

    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.x, self.out = torch.zeros(R, N, device=self.device), torch.zeros(R, N, device=self.device)
        self.lens = torch.zeros(R, dtype=torch.int32, device=self.device)
        self.total = torch.zeros(1, device=self.device)
        self.lengths: list[int] = []
        self.calls = 0

    def batch(self, case):
        """Lengths as a list, and a row of x for each."""
        lengths = case.batch(R, N)
        return lengths, torch.randn(len(lengths), N, generator=case.generator()).to(self.device)

    def stage(self, case):
        """Fills all of `lens` and `x`, zeros behind the live rows."""
        self.lengths, x = self.batch(case)
        self.lens.copy_(torch.tensor(self.lengths + [0] * (R - len(self.lengths)), dtype=torch.int32))
        self.x.zero_()[:len(x)].copy_(x)
        return {"x": self.x, "lens": self.lens}

    def pads(self, case):
        lens = torch.tensor((self.batch(case)[0] + [0] * R)[:R], device=self.device)
        return {"x": torch.arange(N, device=self.device) >= lens[:, None]}

    def double(self, rows=R, n=N):
        _double_kernel[(rows,)](self.x, self.lens, self.out, n, N=N)

    def subject(self, fn, **options):
        declared = dict(outputs={"out": self.out}, pads=self.pads)
        return Subject(fn, options.pop("make_inputs", self.stage), **declared | options)


@dataclass(frozen=True)
class Exhibit:
    build: Callable[[], Subject]
    catches: frozenset[str]
    bug_class: str
    gpu: bool = False


GALLERY: dict[str, Exhibit] = {}


def exhibit(bug_class, *catches, gpu=False):
    def add(build):
        GALLERY[build.__name__] = Exhibit(lambda: replace(build(), name=build.__name__), frozenset(catches), bug_class, gpu)
        return build
    return add


@exhibit("none")
def clean():
    e = Engine()

    def fn(inputs):
        e.double()
    return e.subject(fn, weights=(), allocates=False)


@exhibit("a hidden wait: .item()", "hidden-sync")
def reads_an_item():
    e = Engine()

    def fn(inputs):
        assert inputs["lens"].max().item() <= N
        e.double()
    return e.subject(fn)


@exhibit("a hidden wait: .tolist()", "hidden-sync")
def reads_a_list():
    e = Engine()

    def fn(inputs):
        assert max(inputs["lens"].tolist()) <= N
        e.double()
    return e.subject(fn)


@exhibit("a hidden wait: .cpu()", "hidden-sync")
def copies_to_the_host():
    e = Engine()

    def fn(inputs):
        inputs["lens"].cpu()
        e.double()
    return e.subject(fn)


@exhibit("a hidden wait: a tensor in a log line", "hidden-sync")
def logs_a_tensor():
    e, log = Engine(), []

    def fn(inputs):
        log.append(f"lengths: {inputs['lens']}")
        e.double()
    return e.subject(fn)


@exhibit("a hidden wait: an assertion over a tensor", "hidden-sync")
def asserts_a_tensor():
    e = Engine()

    def fn(inputs):
        assert (inputs["lens"] <= N).all()
        e.double()
    return e.subject(fn)


@exhibit("a shape from data: a boolean mask", "data-dependent-shape")
def indexes_by_a_mask():
    e = Engine()

    def fn(inputs):
        e.double()
        e.total.fill_(0.0)
        e.total += inputs["x"][inputs["lens"] > 0].sum()
    return replace(e.subject(fn, outputs={"out": e.out, "total": e.total}), pads=None)


@exhibit("a shape from data: nonzero", "data-dependent-shape")
def counts_rows():
    e = Engine()

    def fn(inputs):
        inputs["lens"].nonzero()
        e.double()
    return e.subject(fn)


@exhibit("a grid from data", "data-dependent-grid", "replay-differs")
def launches_the_live_rows():
    e = Engine()

    def fn(inputs):
        e.out.zero_()
        e.double(rows=len(e.lengths))
    return e.subject(fn)


@exhibit("a baked number: a kernel's argument", "baked-scalar", "replay-differs")
def passes_the_longest():
    e = Engine()

    def fn(inputs):
        e.double(n=max(e.lengths))
    return e.subject(fn)


@exhibit("a baked number: a torch operation's", "baked-scalar", "replay-differs")
def scales_by_the_host():
    e = Engine()

    def fn(inputs):
        e.double()
        e.out.mul_(1.0 / max(e.lengths))
    return e.subject(fn)


@exhibit("a baked number: a counter of the host", "baked-scalar", "not-repeatable")
def counts_its_calls():
    e = Engine()

    def fn(inputs):
        e.calls += 1
        e.double()
        e.out.add_(float(e.calls))
    return e.subject(fn)


@exhibit("a kernel chosen by data", "kernel-by-data", "replay-differs")
def takes_the_short_way():
    e = Engine()

    def fn(inputs):
        if e.lengths == [1] * R:
            _first_column_kernel[(R,)](e.x, e.out, N=N)
        else:
            e.double()
    return e.subject(fn)


@exhibit("a specialised number", "baked-scalar", "specialisation", "replay-differs")
def compiles_for_the_longest():
    e = Engine()

    def fn(inputs):
        _special_kernel[(R,)](e.x, e.lens, e.out, max(e.lengths), N=N)
    return e.subject(fn)


@exhibit("a specialised address", "stale-pointer", "specialisation")
def shifts_an_address():
    e = Engine()
    room = torch.zeros(R * N + 1, device=e.device)
    views = room[:-1].view(R, N), room[1:].view(R, N)

    def fn(inputs):
        shifted = views[len(e.lengths) % 2]
        shifted.copy_(e.x)
        _double_kernel[(R,)](shifted, e.lens, e.out, N, N=N)
    return e.subject(fn, scratch={"room": room})


@exhibit("tuning in the capture", "autotune")
def tunes():
    e = Engine()

    def fn(inputs):
        _tuned_kernel[(R,)](e.x, e.lens, e.out, N, N=N)
    return e.subject(fn)


@exhibit("an allocation where outputs are given", "allocation")
def allocates():
    e = Engine()

    def fn(inputs):
        copy = torch.empty_like(e.x)
        copy.copy_(e.x)
        _double_kernel[(R,)](copy, e.lens, e.out, N, N=N)
    return e.subject(fn, allocates=False)


@exhibit("a stale pointer: the producer returns a new tensor", "stale-pointer", "replay-differs")
def replaces_a_buffer():
    e = Engine()

    def make_inputs(case):
        e.lens = e.lens.clone()
        return e.stage(case)

    def fn(inputs):
        e.double()
    return e.subject(fn, make_inputs=make_inputs)


@exhibit("a stale pointer: two buffers that take turns", "stale-pointer")
def swaps_buffers():
    e = Engine()
    pair = [torch.zeros(R, N, device=e.device), torch.zeros(R, N, device=e.device)]

    def fn(inputs):
        e.calls += 1
        now, last = pair[e.calls % 2], pair[e.calls % 2 - 1]
        now.copy_(e.x)
        _double_kernel[(R,)](now, e.lens, e.out, N, N=N)
        last.zero_()
    return e.subject(fn, scratch={"pair": pair})


@exhibit("a stale tail: a small batch after a large one", "stale-tail")
def leaves_the_tail():
    e = Engine()

    def make_inputs(case):
        lengths, x = e.batch(case)
        return {"x": x, "lens": torch.tensor(lengths, dtype=torch.int32, device=e.device)}

    def fn(inputs):
        _double_kernel[(R,)](inputs["x"], inputs["lens"], e.out, N, N=N)
    return replace(e.subject(fn, make_inputs=make_inputs), pads=None)


@exhibit("numbers of the host: numpy", "host-rng")
def draws_with_numpy():
    e = Engine()

    def fn(inputs):
        e.double()
        e.out.mul_(float(np.random.rand()))
    return e.subject(fn)


@exhibit("numbers of the host: random", "host-rng")
def draws_with_python():
    e = Engine()

    def fn(inputs):
        e.double()
        e.out.mul_(random.random())
    return e.subject(fn)


@exhibit("numbers of the host: a torch generator", "host-rng", "not-repeatable")
def draws_with_torch():
    e = Engine()
    generator = torch.Generator(e.device)

    def fn(inputs):
        e.double()
        e.out.mul_(torch.rand(R, N, generator=generator, device=e.device))
    return e.subject(fn)


@exhibit("values of the host", "host-constant", "replay-differs")
def uploads_a_list():
    e = Engine()

    def fn(inputs):
        lens = torch.tensor((e.lengths + [0] * R)[:R], dtype=torch.int32, device=e.device)
        _double_kernel[(R,)](e.x, lens, e.out, N, N=N)
    return e.subject(fn)


@exhibit("collection in the capture", "gc-in-capture")
def collects_garbage():
    e = Engine()

    def fn(inputs):
        e.double()
        gc.collect()
    return e.subject(fn)


@exhibit("another thread", "other-thread")
def launches_from_a_thread():
    e = Engine()

    def fn(inputs):
        thread = threading.Thread(target=e.double)
        thread.start()
        thread.join()
    return e.subject(fn)


@exhibit("a batch that it refuses", "raises")
def refuses_a_batch():
    e = Engine()

    def fn(inputs):
        if len(e.lengths) == 1:
            raise RuntimeError("no plan for one request")
        e.double()
    return e.subject(fn)


@exhibit("warm-up outside the contract: an address behind the end", "out-of-bounds")
def reads_behind_the_end():
    e = Engine()

    def fn(inputs):
        _gather_kernel[(R,)](e.x, e.lens, e.out, N=N)
    return e.subject(fn)


@exhibit("pads that leak: 0 times NaN", "pad-leak")
def masks_too_late():
    e = Engine()

    def fn(inputs):
        _late_mask_kernel[(R,)](e.x, e.lens, e.out, N=N)
    return e.subject(fn)


@exhibit("an output that is not written", "unwritten-output")
def leaves_pad_rows():
    e = Engine()

    def fn(inputs):
        _live_rows_kernel[(R,)](e.x, e.lens, e.out, N=N)
    return e.subject(fn)


@exhibit("scratch that is read before it is written", "stale-scratch")
def trusts_its_scratch():
    e = Engine()

    def fn(inputs):
        e.double()
        e.out.copy_(torch.where(e.total > 0, 0.0, e.out))
    return e.subject(fn, scratch={"total": e.total})


@exhibit("a write beside the outputs", "undeclared-write")
def writes_its_input():
    e = Engine()

    def fn(inputs):
        _double_kernel[(R,)](e.x, e.lens, e.out, N, N=N)
        _double_kernel[(R,)](e.x, e.lens, e.x, N, N=N)
    return e.subject(fn)


@exhibit("memory that was not declared", "undeclared-memory")
def reads_hidden_weights():
    e = Engine()
    hidden = torch.ones(N, device=e.device)

    def fn(inputs):
        e.double()
        e.out.mul_(hidden)
    return e.subject(fn, weights=())


@exhibit("a race", "race", "order-dependent")
def adds_without_atomics():
    e = Engine()

    def fn(inputs):
        e.total.zero_()
        _sum_kernel[(R,)](e.x, e.lens, e.out, e.total, ATOMIC=False, N=N)
    return e.subject(fn, outputs={"out": e.out, "total": e.total})


@exhibit("an order of arrival", "order-dependent")
def adds_in_any_order():
    e = Engine()

    def fn(inputs):
        e.total.zero_()
        _sum_kernel[(R,)](e.x, e.lens, e.out, e.total, ATOMIC=True, N=N)
    return e.subject(fn, outputs={"out": e.out, "total": e.total})


@exhibit("work outside the record", "replay-differs")
def works_beside_the_device():
    e = Engine()
    room = np.zeros((R, N), np.float32)
    shared = torch.from_numpy(room) if e.device.type == "cpu" else torch.zeros(R, N, device=e.device)

    def fn(inputs):
        room[:] = max(e.lengths)
        e.double()
        e.out.add_(shared)
    return e.subject(fn)


@exhibit("compilation and loading after warm-up", "late-compile", "late-module-load", "kernel-by-data", gpu=True)
def meets_a_new_kernel():
    e = Engine()

    def fn(inputs):
        if len(e.lengths) == 1:
            _late_mask_kernel[(R,)](e.x, e.lens, e.out, N=N, num_warps=2)       # as no other exhibit launches it
        else:
            e.double()
    return e.subject(fn)


@exhibit("a side stream that is not joined", "unjoined-stream", gpu=True)
def forgets_a_stream():
    e, side = Engine(), torch.cuda.Stream()

    def fn(inputs):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            e.double()
    return e.subject(fn)


@exhibit("the legacy stream", "uncaptured-launch", gpu=True)
def launches_on_the_legacy_stream():
    e = Engine()

    def fn(inputs):
        with torch.cuda.stream(torch.cuda.default_stream()):
            e.double()
    return e.subject(fn)


@exhibit("memory that each capture keeps", "pool-growth", gpu=True)
def keeps_what_it_makes():
    e, kept = Engine(), []

    def fn(inputs):
        kept.append(torch.zeros(1 << 22, device=e.device))
        e.double()
    return e.subject(fn)


@exhibit("a wait that torch does not see", "hidden-sync", gpu=True)
def waits_for_its_stream():
    e = Engine()

    def fn(inputs):
        e.double()
        torch.cuda.current_stream().synchronize()
    return e.subject(fn)


@exhibit("a question that a capture does not allow", "capture-fails", gpu=True)
def asks_whether_an_event_is_over():
    e, event = Engine(), torch.cuda.Event()

    def fn(inputs):
        e.double()
        if not torch.cuda.is_current_stream_capturing():
            event.record()
        event.query()
    return e.subject(fn)
