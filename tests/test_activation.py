"""silu_and_mul against its twin, and the properties that the twin does not show."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.activation as twin
from gkernels.kernels import activation as room
from tests.close import assert_close, assert_same
from tests.strategies import counter, dtypes, poisons, randn, seeds, strided

widths = st.sampled_from([1, 3, 16, 127, 128, 1000, 1025, 3000])


def check_equals_reference(op, device, seed, dtype, T, F, is_strided=False):
    x = randn(seed, T, 2 * F, dtype=dtype, device=device) * 4
    got = op(strided(x) if is_strided else x)
    assert_close(got, twin.silu_and_mul(x.double()), twin.silu_and_mul(x))


def check_pads(op, device, seed, dtype, live, pads, F, poison):
    x = randn(seed, live + pads, 2 * F, dtype=dtype, device=device)
    want = room.silu_and_mul(x[:live])
    x[live:] = poison
    got = op(x, counter(live, device))
    assert_same(got[:live], want)
    assert_same(got[live:], torch.zeros_like(got[live:]))


@given(seeds, dtypes, st.integers(0, 5), widths, st.booleans())
def test_equals_reference(device, seed, dtype, T, F, is_strided):
    check_equals_reference(room.silu_and_mul, device, seed, dtype, T, F, is_strided)


@given(seeds, dtypes, st.integers(1, 4), st.integers(0, 4), widths, poisons)
def test_pads_are_zero_and_leak_nothing(device, seed, dtype, live, pads, F, poison):
    check_pads(room.silu_and_mul, device, seed, dtype, live, pads, F, poison)


def test_broken_variants_are_caught(device):
    with pytest.raises(AssertionError):                    # gate and up exchanged
        check_equals_reference(lambda x: room.silu_and_mul(x.roll(x.shape[1] // 2, 1)), device, 0, torch.float32, 3, 128)
    with pytest.raises(AssertionError):                    # num_tokens ignored: 0 * NaN reaches the output
        check_pads(lambda x, num_tokens: room.silu_and_mul(x), device, 0, torch.float32, 2, 2, 16, float("nan"))


def check_rows_keep_their_bits(op, device, seed, dtype, order, F):
    """Each row alone equals the row in any place among any others."""
    x = randn(seed, 4, 2 * F, dtype=dtype, device=device)
    assert_same(op(x[order]), torch.cat([op(row[None].clone()) for row in x])[order])


@given(seeds, dtypes, st.permutations(range(4)), widths)
def test_rows_keep_their_bits(device, seed, dtype, order, F):
    check_rows_keep_their_bits(room.silu_and_mul, device, seed, dtype, order, F)


def test_a_gate_that_sees_the_batch_is_caught(device):
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(lambda x: room.silu_and_mul(x) + 1e-6 * x.mean(), device, 0, torch.float32, [2, 0, 3, 1], 16)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")   # numpy's word on exp(1024) = inf
@given(seeds, dtypes, widths)
def test_degenerate_gates(device, seed, dtype, F):
    up = randn(seed, 2, F, dtype=dtype, device=device)
    gate = lambda value: torch.cat([torch.full_like(up, value), up], 1)
    assert_same(room.silu_and_mul(gate(0.0)).abs(), torch.zeros_like(up))
    assert_same(room.silu_and_mul(gate(1024.0)), up * 1024)          # silu(g) = g once exp(-g) vanishes; a power of two is exact
    assert_same(room.silu_and_mul(gate(-1024.0)).abs(), torch.zeros_like(up))


def test_rows_of_no_columns(device):
    assert room.silu_and_mul(torch.empty(3, 0, device=device)).shape == (3, 0)


@pytest.mark.parametrize("change, error, words", [
    (dict(x=torch.ones(2, 9)), ValueError, "silu_and_mul: x: got 9 columns, expected an even number"),
    (dict(x=torch.ones(8)), ValueError, r"x: got shape \[8\], expected \[any, any\]"),
    (dict(x=torch.ones(2, 8, dtype=torch.int32)), TypeError, "x: got torch.int32"),
    (dict(x=torch.ones(8, 2).T), ValueError, r"call .contiguous\(\)"),
    (dict(out=torch.ones(2, 8)), ValueError, r"out: got shape \[2, 8\], expected \[2, 4\]"),
    (dict(out=torch.ones(2, 4, dtype=torch.float16)), TypeError, "out: got torch.float16, expected torch.float32"),
    (dict(num_tokens=torch.ones(2, dtype=torch.int32)), ValueError, r"num_tokens: got shape \[2\]"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(x=torch.ones(2, 8), out=torch.ones(2, 4), num_tokens=None) | change
    with pytest.raises(error, match=words):
        room.silu_and_mul_out(**{name: t if t is None else t.to(device) for name, t in arguments.items()})
