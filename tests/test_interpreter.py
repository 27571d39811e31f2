"""The interpreter's repairs, and the watchers of gkernels.graph.interpreter: each must see what it is for, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from gkernels.graph import interpreter
from tests.close import assert_same, bits
from tests.strategies import counter, randn, seeds

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the CPU interpreter")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, offs < n).to(out_ptr.dtype.element_ty), offs < n)


@triton.jit
def _through_float32_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(tl.float32).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    out = tl.dot(tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n), input_precision="ieee")
    tl.store(out_ptr + m * N + n, out)


@triton.jit
def _double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x + x)


@triton.jit
def _count_kernel(bounds_ptr, out_ptr):
    total = 0
    for i in tl.range(tl.load(bounds_ptr), tl.load(bounds_ptr + 1)):
        total += i
    for _ in range(tl.load(bounds_ptr)):
        total += 1
    tl.store(out_ptr, total)


@triton.jit
def _lookup(table_ptr, i):
    return tl.load(table_ptr + i)


@triton.jit
def _gather_kernel(table_ptr, ids_ptr, out_ptr, stride_t, CLAMP: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0)
    row = tl.load(ids_ptr + i).to(tl.int64)
    if CLAMP:
        row = tl.minimum(tl.maximum(row, 0), N - 1)
    tl.store(out_ptr + i, _lookup(table_ptr, row * stride_t))


@triton.jit
def _reverse_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    offs = start + tl.arange(0, BLOCK + OVERLAP)
    tl.store(out_ptr + n - 1 - offs, tl.load(x_ptr + offs, offs < n), offs < n)


@triton.jit
def _shift_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def _last_arriver_kernel(x_ptr, partial_ptr, ticket_ptr, out_ptr, BLOCK: tl.constexpr, SEM: tl.constexpr):
    i, n = tl.program_id(0), tl.num_programs(0)
    tl.store(partial_ptr + i, tl.sum(tl.load(x_ptr + i * BLOCK + tl.arange(0, BLOCK))))
    if tl.atomic_add(ticket_ptr, 1, sem=SEM) == n - 1:
        total = 0.0
        for j in range(n):
            total += tl.load(partial_ptr + j)
        tl.store(out_ptr, total)
        tl.store(ticket_ptr, 0)


def convert(x, dtype, kernel=_copy_kernel):
    out = torch.empty(x.shape, dtype=dtype)
    extra = (x.numel(),) if kernel is _copy_kernel else ()
    kernel[(1,)](x, out, *extra, BLOCK=x.numel())
    return out


def any_float(seed, n):
    """Every kind of float32: random bit patterns, then the neighbourhoods of what rounds to the edges of the narrow types."""
    edges = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, 65519.9, 65520.0, 448.0, 464.0, 57344.0, 3.4e38,
                          6e-8, 1e-40])
    random = torch.randint(-2**31, 2**31, (n - 2 * len(edges),), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    return torch.cat([edges, torch.nextafter(edges, torch.tensor(0.0)), random.to(torch.int32).view(torch.float32)])


def same_or_nan(got, want):
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert_same(torch.where(nan, 0, bits(got)), torch.where(nan, 0, bits(want)))


def test_every_bf16_pattern_widens_exactly():
    x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    same_or_nan(convert(x, torch.float32), x.float())
    same_or_nan(convert(x, torch.bfloat16, _through_float32_kernel), x)


@given(seeds, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_float32_rounds_as_torch_rounds(seed, dtype):
    x = any_float(seed, 4096)
    same_or_nan(convert(x, dtype), x.to(dtype))


def test_float16_widens_exactly():
    x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    same_or_nan(convert(x, torch.float32), x.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_widens_exactly_and_saturates(dtype):
    x, limit = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype), torch.finfo(dtype).max
    same_or_nan(convert(x, torch.float32), x.float())
    wide = any_float(0, 4096)
    got = convert(wide, dtype)
    assert torch.equal(got.float().isnan(), wide.isnan())
    assert_same(bits(got)[~wide.isnan()], bits(wide.clamp(-limit, limit).to(dtype))[~wide.isnan()])


@given(seeds, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_dot_equals_torch(seed, dtype):
    a, b = (torch.randint(-8, 9, (16, 16), generator=torch.Generator().manual_seed(seed + i)).to(dtype) for i in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, M=16, N=16, K=16)
    assert_same(out, a.float() @ b.float())


def test_bf16_arithmetic_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match=r"TypeError.*cast to tl\.float32 right after tl.load"):
        _double_kernel[(1,)](x, torch.empty_like(x), BLOCK=16)
    for dtype in (torch.float16, torch.float32):
        got = torch.empty(16, dtype=dtype)
        _double_kernel[(1,)](x.to(dtype), got, BLOCK=16)
        assert_same(got, torch.full_like(got, 2))


@given(st.integers(0, 5), st.integers(0, 9))
def test_loops_over_loaded_bounds(start, stop):
    out = torch.empty(1, dtype=torch.int32)
    _count_kernel[(1,)](torch.tensor([start, stop], dtype=torch.int32), out)
    assert out.item() == sum(range(start, stop)) + start


@given(st.lists(st.integers(-2**31, 2**31 - 1), min_size=1, max_size=6))
def test_sanitizer_sees_a_lane_outside_and_only_that(ids):
    table, out = randn(0, 8), torch.empty(len(ids))
    ids = torch.tensor(ids, dtype=torch.int32)
    with interpreter.sanitize():
        _gather_kernel[(len(ids),)](table, ids, out, 1, CLAMP=True, N=8)
        assert_same(out, table[ids.long().clamp(0, 7)])
        outside = (ids < 0) | (ids >= 8)
        if outside.any():
            first = tuple([int(outside.nonzero()[0]), 0, 0])
            with pytest.raises(AssertionError) as caught:
                _gather_kernel[(len(ids),)](table, ids, out, 1, CLAMP=False, N=8)
            message = str(caught.value)
            assert message.startswith("_gather_kernel: load of 4 bytes at 0x") and f"lane 0 of program {first}" in message
            assert "is outside every argument" in message
        else:
            _gather_kernel[(len(ids),)](table, ids, out, 1, CLAMP=False, N=8)


def test_sanitizer_sees_stores_past_the_end_and_reads_between_rows():
    x = torch.ones(8)
    outside = r"store of 4 bytes .* outside every argument: \+0 bytes from out_ptr \(1 of 8"
    with interpreter.sanitize(), pytest.raises(AssertionError, match=outside):
        _copy_kernel[(1,)](x, torch.empty(8)[:7], 8, BLOCK=8)
    rows = torch.ones(4, 8)[:, :6]
    with interpreter.sanitize():
        _gather_kernel[(4,)](rows, torch.arange(4, dtype=torch.int32), torch.empty(4), 8, CLAMP=True, N=4)
        with pytest.raises(AssertionError, match="load of 4 bytes"):
            _gather_kernel[(4,)](rows, torch.tensor([6], dtype=torch.int32), torch.empty(4), 1, CLAMP=False, N=4)


def test_accesses_are_the_elements_touched():
    table, ids, out = torch.randn(6, 4)[:, :3], torch.tensor([4, 1, 4], dtype=torch.int32), torch.empty(5)
    with interpreter.accesses() as launches:
        _gather_kernel[(3,)](table, ids, out, 4, CLAMP=True, N=6)
    launch, = launches
    assert launch.kernel == "_gather_kernel"
    assert {name: elements.tolist() for name, elements in launch.reads.items()} == dict(table_ptr=[4, 16], ids_ptr=[0, 1, 2], out_ptr=[])
    assert {name: elements.tolist() for name, elements in launch.writes.items()} == dict(table_ptr=[], ids_ptr=[], out_ptr=[0, 1, 2])
    assert launch.read("table_ptr").nonzero().tolist() == [[1, 0], [4, 0]]
    assert launch.written("out_ptr").tolist() == [True] * 3 + [False] * 2


def test_masked_lanes_are_no_accesses():
    with interpreter.accesses() as launches, interpreter.sanitize():
        _copy_kernel[(2,)](torch.ones(10), torch.empty(10), 10, BLOCK=8)
    assert launches[0].writes["out_ptr"].tolist() == list(range(10))


def test_race_between_writers_is_seen():
    x = torch.ones(16)
    with interpreter.accesses():
        _reverse_kernel[(4,)](x, torch.empty(16), 16, BLOCK=4, OVERLAP=0)
        with pytest.raises(AssertionError, match=r"_reverse_kernel: race on element 3 of out_ptr: store by .* and store by "):
            _reverse_kernel[(4,)](x, torch.empty(16), 16, BLOCK=4, OVERLAP=4)


def test_race_between_reader_and_writer_is_seen():
    with interpreter.accesses(), pytest.raises(AssertionError, match=r"race on element 1 of x_ptr: load by program \(0, 0, 0\) and store"):
        _shift_kernel[(4,)](torch.ones(5), BLOCK=1)
    with interpreter.accesses(races=False) as launches:
        _shift_kernel[(4,)](torch.ones(5), BLOCK=1)
    assert launches[0].writes["x_ptr"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sem", ["acq_rel", "relaxed"])
def test_atomics_order_what_they_release(sem):
    def run():
        x, out = torch.arange(16.0), torch.empty(1)
        _last_arriver_kernel[(4,)](x, torch.empty(4), torch.zeros(1, dtype=torch.int32), out, BLOCK=4, SEM=sem)
        return out
    with interpreter.accesses():
        if sem == "relaxed":
            with pytest.raises(AssertionError, match="race on element 0 of "):
                run()
        else:
            assert run().item() == 120


@given(seeds, st.integers(1, 6))
def test_shuffled_runs_every_program_once(seed, programs):
    x, out = randn(seed, programs * 4), torch.full((programs * 4,), float("nan"))
    with interpreter.shuffled(seed), interpreter.accesses() as launches:
        _copy_kernel[(programs,)](x, out, x.numel(), BLOCK=4)
    assert_same(out, x)
    assert sorted(launches[0].epochs) == [(i, 0, 0) for i in range(programs)]


def test_shuffled_shows_an_order_that_matters():
    def run(seed):
        x = torch.arange(9.0)
        with interpreter.shuffled(seed):
            _shift_kernel[(8,)](x, BLOCK=1)
        return x
    assert len({tuple(run(seed).tolist()) for seed in range(5)}) > 1
    assert_same(run(3), run(3))


def test_watchers_nest_and_leave_nothing_behind():
    before = interpreter.interpreter._interpreter, interpreter.interpreter.GridExecutor.__call__
    with interpreter.shuffled(0), interpreter.accesses() as launches, interpreter.sanitize():
        _copy_kernel[(1,)](torch.ones(4), torch.empty(4), 4, BLOCK=4)
        with pytest.raises(AssertionError, match="outside every argument"):
            _copy_kernel[(1,)](torch.ones(4), torch.empty(3), 4, BLOCK=4)
    assert len(launches) == 2
    assert before == (interpreter.interpreter._interpreter, interpreter.interpreter.GridExecutor.__call__)


def test_another_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    with pytest.raises(RuntimeError, match=r"got 3\.9\.0"):
        with interpreter.sanitize():
            pass


def test_integers_wrap_as_on_the_gpu():
    out = torch.empty(1, dtype=torch.int32)
    with np.errstate(over="ignore"):
        _double_kernel[(1,)](counter(2**30, "cpu"), out, BLOCK=1)
    assert out.item() == -2**31


@pytest.mark.parametrize("first, works", [("", True), ("import triton.language", False), ("from gkernels import ops", False)])
def test_what_comes_before_enable(first, works):
    """Triton decides what is interpreted where a function is decorated: its own tl.sum at its import, ours at theirs."""
    code = f"{first}\nfrom gkernels import interpret\ninterpret.enable()\nfrom gkernels import ops"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (run.returncode == 0) == works and ("call it first" in run.stderr) != works, run.stderr
