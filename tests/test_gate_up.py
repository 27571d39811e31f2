"""norm_gate_up with weights of every kind against its twin, and the properties that the twin does not show."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.activation as activation
import reference.gate_up as twin
import reference.rmsnorm as norms
from gkernels.kernels import gate_up as room
from gkernels.kernels import rmsnorm
from gkernels.kernels._quantized import Quantized
from reference.linear import linear
from tests import weights
from tests.close import assert_no_worse, assert_same
from tests.strategies import counter, dtypes, poisons, randn, scaled, seeds, strided
from tests.weights import KINDS, Weight, kinds

shapes = st.sampled_from([(1, 16), (5, 24), (16, 100), (48, 128), (140, 40), (140, 640)])     # F, K; gate and up of 140 lie in other blocks of fp8


def inputs(seed, T, F, K, dtype, device, kind="plain"):
    """x, norm, weight and bias, of a size that leaves silu its bend."""
    x, norm, bias = (randn(seed + i, *shape, dtype=dtype, device=device) for i, shape in ((0, (T, K)), (1, (K,)), (3, (2 * F,))))
    return x, norm, weights.draw(seed + 2, kind, 2 * F, K, dtype, device, K ** -0.5), bias


def norm_gate_up(x, norm, weight, eps, bias, num_tokens=None):
    """The whole norm, in two nodes that share it."""
    return room.norm_gate_up(scaled(rmsnorm.scale, x, norm), weight, eps, bias, num_tokens)


def check_equals_reference(op, device, seed, dtype, T, shape, has_bias=True, is_strided=False, size=1.0, kind="plain"):
    x, norm, weight, bias = inputs(seed, T, *shape, dtype, device, kind)
    x, bias = x * size, bias if has_bias else None
    got, wide = op(strided(x) if is_strided else x, norm, weight.given, 1e-5, bias), None if bias is None else bias.double()
    want = twin.norm_gate_up(scaled(norms.scale, x.double(), norm.double()), weight.values, 1e-5, wide)
    assert_no_worse(got, want, activation.silu_and_mul(linear(norms.rmsnorm(x, norm, 1e-5), weight.values.float(), bias)), chain_terms=2 * shape[1])


@given(seeds, dtypes, st.sampled_from([1, 2, 17, 33]), shapes, st.booleans(), st.booleans(), st.sampled_from([1.0, 2.0**-8]), kinds)
def test_equals_reference(device, seed, dtype, T, shape, has_bias, is_strided, size, kind):
    check_equals_reference(norm_gate_up, device, seed, dtype, T, shape, has_bias, is_strided, size, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:5])
@pytest.mark.parametrize("T", [1, 17, 64])
def test_equals_reference_at_model_shapes(device, dtype, kind, T):
    for shape in ((8192, 2048), (14336, 4096)):
        check_equals_reference(norm_gate_up, device, T, dtype, T, shape, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_control_another_scale_is_caught(device, kind, dtype):
    def broken(x, norm, given, *rest):
        return norm_gate_up(x, norm, Weight.of(kind, given, x.shape[1]).rolled(), *rest)

    with pytest.raises(AssertionError, match=r"RMS error|greatest error"):
        check_equals_reference(broken, device, 0, dtype, 3, (140, 640), kind=kind)


@pytest.mark.parametrize("broken", [
    lambda x, norm, weight, eps, bias: norm_gate_up(x, norm, weight.roll(len(weight) // 2, 0), eps, bias.roll(len(bias) // 2)),
    lambda x, norm, weight, eps, bias: norm_gate_up(x, norm, weight, 0.0, bias),
    lambda x, norm, weight, eps, bias: norm_gate_up(x, norm, weight, eps, bias.roll(1)),
    lambda x, norm, weight, eps, bias: norm_gate_up(x, norm, weight, eps, bias).roll(1, 1),
], ids=["up gated by itself", "eps forgotten", "another column's bias", "another column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_control_broken_nodes_are_caught(device, broken, dtype):
    with pytest.raises(AssertionError, match=r"RMS error|greatest error"):
        check_equals_reference(broken, device, 0, dtype, 3, (48, 128), size=2.0**-8)


def check_rows_keep_their_bits(op, device, seed, dtype, T, shape, kind="plain"):
    """Each row alone equals the row in a batch of T among others, in another place."""
    x, norm, weight, bias = inputs(seed, T, *shape, dtype, device, kind)
    weight = weight.given
    want = torch.cat([op(row[None].clone(), norm, weight, 1e-5, bias) for row in x[:4]])
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed)).to(device)
    assert_same(op(x[order], norm, weight, 1e-5, bias)[order.argsort()][:4], want)


@given(seeds, dtypes, st.sampled_from([4, 20, 40, 64, 65, 200]), shapes, kinds)
def test_rows_keep_their_bits(device, seed, dtype, T, shape, kind):
    check_rows_keep_their_bits(norm_gate_up, device, seed, dtype, T, shape, kind)


@pytest.mark.gpu
@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([16, 17, 40, 64, 256]),
       st.sampled_from([(8192, 2048), (14336, 4096)]), kinds)
def test_rows_keep_their_bits_at_model_shapes(device, seed, dtype, T, shape, kind):
    check_rows_keep_their_bits(norm_gate_up, device, seed, dtype, T, shape, kind)


def test_control_a_row_that_sees_the_batch_is_caught(device):
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(lambda x, *rest: norm_gate_up(x + 1e-6 * x.mean(), *rest), device, 0, torch.float32, 20, (48, 128))


def check_pads(op, device, seed, dtype, live, pads, shape, poison, kind="plain"):
    x, norm, weight, bias = inputs(seed, live + pads, *shape, dtype, device, kind)
    want = norm_gate_up(x[:live].clone(), norm, weight.given, 1e-5, bias)
    x[live:] = poison
    got = op(x, norm, weight.given, 1e-5, bias, counter(live, device))
    assert_same(got, torch.cat([want, torch.zeros_like(got[live:])]))


@given(seeds, dtypes, st.sampled_from([0, 1, 5, 17]), st.sampled_from([0, 1, 30]), shapes, poisons, kinds)
def test_pads_are_zero_and_leak_nothing(device, seed, dtype, live, pads, shape, poison, kind):
    check_pads(norm_gate_up, device, seed, dtype, live, pads, shape, poison, kind)


def test_control_read_pads_are_caught(device):
    with pytest.raises(AssertionError):
        check_pads(lambda *arguments: norm_gate_up(*arguments[:-1]), device, 0, torch.float16, 3, 2, (48, 128), float("nan"))


@given(seeds, dtypes, st.sampled_from([-1, 0, 2, 50]))
def test_a_bad_counter_is_clamped(device, seed, dtype, count):
    x, norm, weight, bias = inputs(seed, 5, 16, 100, dtype, device)
    got, want = (norm_gate_up(x, norm, weight.given, 1e-5, bias, counter(n, device)) for n in (count, min(max(count, 0), 5)))
    assert_same(got, want)


@given(seeds, st.sampled_from([1, 17]), shapes, kinds)
def test_integers_are_exact_before_the_activation(device, seed, T, shape, kind):
    """Entries of x are 2 or -2, so 1 / rms is 0.5; gates of 64 and more make silu the identity, so that out is the product of two integers."""
    (x, norm, *_), (F, K) = inputs(seed, T, *shape, torch.float32, device), shape
    x, norm = 2 * (x > 0) - 2.0 * (x <= 0), norm.round().clamp(-2, 2)
    weight = weights.draw(seed, kind, 2 * F, K, torch.float32, device, integers=True)
    bias = torch.cat([torch.full((F,), 128.0 + 2 * K * float(weight.values.abs().max()), device=device), torch.zeros(F, device=device)])
    g, u = (x.double() * norm.double() / 2 @ weight.values.T + bias.double()).chunk(2, 1)
    assert_same(norm_gate_up(x, norm, weight.given, 0.0, bias), (g * u).float() + 0.0)


def test_no_rows(device):
    assert norm_gate_up(*(torch.ones(*shape, device=device) for shape in ((0, 8), (8,), (6, 8))), 1e-5, None).shape == (0, 3)


@pytest.mark.parametrize("change, error, words", [
    (dict(weight=torch.ones(5, 8)), ValueError, r"norm_gate_up: weight: got shape \[5, 8\], expected an even number of rows"),
    (dict(squares=torch.ones(3, 4)), ValueError, r"norm_gate_up: scaled.squares: got shape \[3, 4\], expected \[2, any\]"),
    (dict(squares=torch.ones(2, 0)), ValueError, "norm_gate_up: scaled.squares: got no parts, expected at least one"),
    (dict(x=torch.ones(2, 8).half()), TypeError, "norm_gate_up: weight: got torch.float32, expected torch.float16; convert"),
    (dict(bias=torch.ones(3)), ValueError, r"norm_gate_up: bias: got shape \[3\], expected \[6\]"),
    (dict(weight=Quantized(torch.ones(6, 8), torch.ones(6))), TypeError, "norm_gate_up: weight.weight: got torch.float32, expected torch.float8"),
    (dict(weight=Quantized(torch.ones(6, 8).to(weights.FP8), torch.ones(1, 2))), ValueError,
     r"norm_gate_up: weight.scale: got shape \[1, 2\], expected \[1, 1\]"),
    (dict(weight=Quantized(torch.ones(5, 32).int(), torch.ones(1, 5).int())), ValueError, r"weight: got shape \[5, 8\], expected an even number"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(x=torch.ones(2, 8), squares=torch.ones(2, 3), weight=torch.ones(6, 8), bias=None) | change
    move = lambda t: Quantized(*map(move, t)) if isinstance(t, Quantized) else t if t is None else t.to(device)
    x, squares, weight, bias = map(move, arguments.values())
    with pytest.raises(error, match=words):
        room.norm_gate_up(room.Scaled(x, squares), weight, bias=bias)
