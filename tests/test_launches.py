"""Launches depend on shapes and options only, and no int32 or int64 that stands in memory leads a kernel outside its arguments."""

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import interpreter
from tests.calls import ROOMS
from tests.close import assert_same
from tests.launches import fill_with_junk, record, tensors_in
from tests.strategies import DTYPES, counter, randn, seeds

CUDA = torch.cuda.is_available()
CONTENTS = 50   # random contents over all calls, at least two a call


def calls_of(room, device, dtype):
    """The room's calls, in float32 where it has none in this dtype."""
    return list(ROOMS[room](device, dtype)) or list(ROOMS[room](device, torch.float32))


def same_record(function, arguments, contents, seed=0):
    """The record of a call, which must be the same for each of `contents` random contents of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    with record() as first:
        function(*arguments)
    assert first, f"{function.__name__} launched nothing"
    for _ in range(contents):
        fill_with_junk(tensors_in(arguments), generator)
        with record() as again:
            function(*arguments)
        assert again == first, f"{function.__name__}: the launches depend on what the tensors contain"
    return first


@pytest.mark.parametrize("room", ROOMS)
def test_contents_change_no_launch(device, room):
    calls = calls_of(room, device, torch.float16)
    for _, function, arguments in calls:
        launches = same_record(function, arguments, contents=max(2, -(-CONTENTS // (len(calls) * len(ROOMS)))))
        assert all(type(entry) is int and entry > 0 for launch in launches for entry in launch.grid)


@pytest.mark.parametrize("room", ROOMS)
@settings(max_examples=25)
@given(st.data(), seeds)
def test_junk_stays_inside_the_arguments(device, room, data, seed):
    _, function, arguments = data.draw(st.sampled_from(calls_of(room, device, data.draw(st.sampled_from(DTYPES)))), label="call")
    fill_with_junk((t for t in tensors_in(arguments) if t.dtype in (torch.int32, torch.int64)), torch.Generator().manual_seed(seed))
    with nullcontext() if CUDA else interpreter.sanitize():
        function(*arguments)
    if CUDA:
        torch.cuda.synchronize()


@pytest.mark.skipif(CUDA, reason="looks at the CPU interpreter")
@pytest.mark.parametrize("room", ROOMS)
def test_programs_neither_race_nor_mind_their_order(device, room):
    for i, (_, function, arguments) in enumerate(calls_of(room, device, torch.float16)):
        tensors = list(tensors_in(arguments))
        for t in tensors:
            if t.is_floating_point():
                t.copy_(randn(i, *t.shape))
        before = [t.clone() for t in tensors]
        with interpreter.accesses():
            function(*arguments)
        after = [t.clone() for t in tensors]
        for t, content in zip(tensors, before, strict=True):
            t.copy_(content)
        with interpreter.shuffled(i):
            function(*arguments)
        for t, content in zip(tensors, after, strict=True):
            assert_same(t, content)


@triton.jit
def _fill_kernel(out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, 1.0, offs < n)


@triton.jit
def _trusting_kernel(ids_ptr, table_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(table_ptr + tl.load(ids_ptr + i).to(tl.int64)))


def grid_from_contents(length, out):
    _fill_kernel[(min(max(length.item(), 1), 4),)](out, 8, BLOCK=8)


def scalar_from_contents(length, out):
    _fill_kernel[(2,)](out, length.item() % 8, BLOCK=8)


def constexpr_from_contents(length, out):
    _fill_kernel[(2,)](out, 8, BLOCK=8 if length.item() % 2 else 16)


def address_from_contents(length, out):
    _fill_kernel[(2,)](out[length.item() % 2:], 4, BLOCK=8)


@pytest.mark.parametrize("bad", [grid_from_contents, scalar_from_contents, constexpr_from_contents, address_from_contents])
def test_a_launch_that_reads_contents_is_caught(device, bad):
    with pytest.raises(AssertionError, match="the launches depend on what the tensors contain"):
        same_record(bad, (counter(3, device), torch.zeros(32, device=device)), contents=20)


@pytest.mark.skipif(CUDA, reason="an illegal address ends the CUDA context")
def test_a_kernel_that_trusts_an_index_is_caught(device):
    arguments = torch.zeros(2, dtype=torch.int32), torch.zeros(4), torch.zeros(2)
    fill_with_junk(arguments[:1], torch.Generator().manual_seed(1))
    with interpreter.sanitize(), pytest.raises(AssertionError, match=r"_trusting_kernel: load .* is outside every argument"):
        _trusting_kernel[(2,)](*arguments)


def test_record_names_everything_that_a_graph_bakes_in(device):
    out = torch.zeros(8, device=device)
    with record() as launches:
        _fill_kernel[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](out, 8, BLOCK=4, num_warps=2)
    launch, = launches
    assert (launch.kernel, launch.grid) == ("_fill_kernel", (2,))
    assert launch.scalars == dict(n=8, BLOCK=4, num_warps=2) and launch.pointers == dict(out_ptr=out.data_ptr())
    with record() as launches:
        pass
    assert launches == [] and out.tolist() == [1.0] * 8
