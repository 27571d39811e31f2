"""rmsnorm and add_rmsnorm against their twins, and the properties that the twin does not show."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.rmsnorm as twin
from gkernels.kernels import rmsnorm as room
from tests.close import assert_close, assert_same
from tests.strategies import counter, dtypes, poisons, randn, seeds, strided

widths = st.sampled_from([1, 2, 3, 16, 64, 80, 127, 128, 1000])


@given(seeds, dtypes, st.integers(0, 5), widths, st.booleans())
def test_equals_reference(device, seed, dtype, T, D, is_strided):
    x, weight = randn(seed, T, D, dtype=dtype, device=device), randn(seed + 1, D, dtype=dtype, device=device)
    got = room.rmsnorm(strided(x) if is_strided else x, weight, 1e-5)
    assert_close(got, twin.rmsnorm(x.double(), weight.double(), 1e-5), twin.rmsnorm(x, weight, 1e-5))


@given(seeds, dtypes, st.integers(1, 4), st.integers(1, 5), st.sampled_from([16, 80, 128]))
def test_heads_equal_rows(device, seed, dtype, T, H, D):
    qkv, weight = randn(seed, T, (H + 2) * D, dtype=dtype, device=device), randn(seed + 1, D, dtype=dtype, device=device)
    q = qkv[:, :H * D].view(T, H, D)
    assert_same(room.rmsnorm(q, weight).reshape(T * H, D), room.rmsnorm(q.reshape(T * H, D), weight))


@given(seeds, dtypes, st.integers(1, 4), widths)
def test_add_equals_separate(device, seed, dtype, T, D):
    x, residual, weight = (randn(seed + i, *shape, dtype=dtype, device=device) for i, shape in enumerate([(T, D), (T, D), (D,)]))
    want_residual = (x.float() + residual.float()).to(dtype)
    got = room.add_rmsnorm(x, residual, weight)
    assert_same(residual, want_residual)
    assert_same(got, room.rmsnorm(want_residual, weight))


@given(seeds, dtypes, st.integers(1, 5), st.integers(0, 5), widths, poisons)
def test_pads_are_zero_and_leak_nothing(device, seed, dtype, live, pads, D, poison):
    x, residual, weight = (randn(seed + i, *shape, dtype=dtype, device=device) for i, shape in enumerate([(live + pads, D), (live + pads, D), (D,)]))
    want, want_sum = room.rmsnorm(x[:live], weight), (x + residual)[:live] if dtype == torch.float32 else None
    x[live:], residual[live:] = poison, poison
    num_tokens = counter(live, device)
    got = room.rmsnorm(x, weight, num_tokens=num_tokens)
    assert_same(got[:live], want)
    assert_same(got[live:], torch.zeros_like(got[live:]))
    room.add_rmsnorm(x, residual, weight, num_tokens=num_tokens)
    assert_same(residual[live:], torch.zeros_like(residual[live:]))
    if want_sum is not None:
        assert_same(residual[:live], want_sum)


@given(seeds, dtypes, st.permutations(range(4)), widths)
def test_row_order_changes_no_bit(device, seed, dtype, order, D):
    x, weight = randn(seed, 4, D, dtype=dtype, device=device), randn(seed + 1, D, dtype=dtype, device=device)
    assert_same(room.rmsnorm(x[order], weight), room.rmsnorm(x, weight)[order])


@given(seeds, st.sampled_from([0.25, 2.0, 1024.0]), widths)
def test_scale_invariance(device, seed, c, D):
    x, weight = randn(seed, 3, D, device=device), randn(seed + 1, D, device=device)
    assert_same(room.rmsnorm(c * x, weight, 0.0), room.rmsnorm(x, weight, 0.0))


def test_widest_row_and_zero_row(device):
    x, weight = randn(0, 2, room.MAX_D, dtype=torch.float16, device=device), torch.ones(room.MAX_D, dtype=torch.float16, device=device)
    x[1] = 0
    got = room.rmsnorm(x, weight)
    assert_close(got, twin.rmsnorm(x.double(), weight.double()), twin.rmsnorm(x, weight))
    assert_same(got[1], torch.zeros_like(got[1]))


@pytest.mark.parametrize("change, error, words", [
    (dict(weight=torch.ones(9)), ValueError, r"rmsnorm: weight: got shape \[9\], expected \[8\]"),
    (dict(x=torch.ones(8)), ValueError, r"rmsnorm: x: got 1 dimensions"),
    (dict(x=torch.ones(2, 8, dtype=torch.int32)), TypeError, "rmsnorm: x: got torch.int32, expected torch.float16"),
    (dict(x=torch.ones(8, 2).T), ValueError, r"call .contiguous\(\)"),
    (dict(x=torch.ones(17)[1:].view(2, 8)), ValueError, r"call .clone\(\)"),
    (dict(x=torch.ones(1, 16385), weight=torch.ones(16385)), ValueError, "D = 16385, expected 1 to 16384"),
    (dict(num_tokens=torch.ones(1)), TypeError, "num_tokens: got torch.float32"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(x=torch.ones(2, 8), weight=torch.ones(8), num_tokens=None) | change
    storages = {k: v.to(device) if v is not None and v.data_ptr() % 16 == 0 else v for k, v in arguments.items()}
    with pytest.raises(error, match=words):
        room.rmsnorm(**storages)
