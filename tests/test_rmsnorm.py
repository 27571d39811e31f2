"""rmsnorm and add_rmsnorm against their twins, and the properties that the twin does not show."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.rmsnorm as twin
from gkernels.kernels import rmsnorm as room
from tests.close import assert_close, assert_same
from tests.strategies import counter, dtypes, far, poisons, randn, seeds, strided

widths = st.sampled_from([1, 2, 3, 16, 64, 80, 127, 128, 1000])


def check_equals_reference(rmsnorm, device, seed, dtype, T, D, is_strided=False, size=1.0):
    x, weight = randn(seed, T, D, dtype=dtype, device=device) * size, randn(seed + 1, D, dtype=dtype, device=device)
    got = rmsnorm(strided(x) if is_strided else x, weight, 1e-5)
    assert_close(got, twin.rmsnorm(x.double(), weight.double(), 1e-5), twin.rmsnorm(x, weight, 1e-5))


@given(seeds, dtypes, st.integers(0, 5), widths, st.booleans(), st.sampled_from([1.0, 2.0**-8]))
def test_equals_reference(device, seed, dtype, T, D, is_strided, size):
    """The smaller rows have a mean square near eps."""
    check_equals_reference(room.rmsnorm, device, seed, dtype, T, D, is_strided, size)


@pytest.mark.parametrize("broken", [
    lambda x, weight, eps: room.rmsnorm(x, weight, 0.0),
    lambda x, weight, eps: room.rmsnorm(x, weight, eps) * torch.rsqrt(1 + eps / x.float().square().mean(-1, keepdim=True)).to(x.dtype),
    lambda x, weight, eps: room.rmsnorm(x, 1 + weight, eps),
    lambda x, weight, eps: room.rmsnorm(x - x.mean(-1, keepdim=True), weight, eps),
], ids=["eps forgotten", "eps twice", "one added to the weight", "mean removed, as in LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_broken_norms_are_caught(device, broken, dtype):
    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error"):
        check_equals_reference(broken, device, 0, dtype, 3, 64, size=2.0**-8)


def check_heads(rmsnorm, device, seed, dtype, T, H, D):
    qkv, weight = randn(seed, T, (H + 2) * D, dtype=dtype, device=device), randn(seed + 1, D, dtype=dtype, device=device)
    q = qkv[:, :H * D].view(T, H, D)
    assert_same(rmsnorm(q, weight).reshape(T * H, D), room.rmsnorm(q.reshape(T * H, D), weight))


@given(seeds, dtypes, st.integers(1, 4), st.integers(1, 5), st.sampled_from([16, 80, 128]))
def test_heads_equal_rows(device, seed, dtype, T, H, D):
    check_heads(room.rmsnorm, device, seed, dtype, T, H, D)


@pytest.mark.parametrize("broken", [lambda x, w: room.rmsnorm(x.flip(1), w),
                                    lambda x, w: room.rmsnorm(x.flatten(1), w.repeat(x.shape[1])).view(x.shape)])
def test_mixed_heads_are_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_heads(broken, device, 0, torch.float32, 2, 3, 16)


def check_add(add_rmsnorm, device, seed, dtype, T, D):
    x, residual, weight = (randn(seed + i, *shape, dtype=dtype, device=device) for i, shape in enumerate([(T, D), (T, D), (D,)]))
    want_residual = (x.float() + residual.float()).to(dtype)
    got = add_rmsnorm(x, residual, weight)
    assert_same(residual, want_residual)
    assert_same(got, room.rmsnorm(want_residual, weight))


@given(seeds, dtypes, st.integers(1, 4), widths)
def test_add_equals_separate(device, seed, dtype, T, D):
    check_add(room.add_rmsnorm, device, seed, dtype, T, D)


def sum_not_rounded(x, residual, weight):
    total = x.float() + residual.float()
    residual.copy_(total)
    return room.rmsnorm(total, weight.float()).to(x.dtype)


def residual_not_written(x, residual, weight):
    return room.add_rmsnorm(x, residual.clone(), weight)


@pytest.mark.parametrize("broken", [sum_not_rounded, residual_not_written])
def test_a_wrong_sum_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_add(broken, device, 0, torch.float16, 4, 1000)


def check_pads(rmsnorm, add_rmsnorm, device, seed, dtype, live, pads, D, poison):
    x, residual, weight = (randn(seed + i, *shape, dtype=dtype, device=device) for i, shape in enumerate([(live + pads, D), (live + pads, D), (D,)]))
    want, want_sum = room.rmsnorm(x[:live], weight), residual[:live].clone()
    want_added = room.add_rmsnorm(x[:live], want_sum, weight)
    x[live:], residual[live:] = poison, poison
    num_tokens = counter(live, device)
    got = rmsnorm(x, weight, num_tokens=num_tokens)
    assert_same(got[:live], want)
    assert_same(got[live:], torch.zeros_like(got[live:]))
    added = add_rmsnorm(x, residual, weight, num_tokens=num_tokens)
    for result, clean in ((added, want_added), (residual, want_sum)):
        assert_same(result[:live], clean)
        assert_same(result[live:], torch.zeros_like(result[live:]))


@given(seeds, dtypes, st.integers(1, 5), st.integers(0, 5), widths, poisons)
def test_pads_are_zero_and_leak_nothing(device, seed, dtype, live, pads, D, poison):
    check_pads(room.rmsnorm, room.add_rmsnorm, device, seed, dtype, live, pads, D, poison)


@pytest.mark.parametrize("broken", [
    (lambda x, weight, num_tokens: room.rmsnorm(x, weight), room.add_rmsnorm),
    (room.rmsnorm, lambda x, residual, weight, num_tokens: room.add_rmsnorm(x, residual, weight)),
    (lambda x, weight, num_tokens: room.rmsnorm(x, weight, num_tokens=num_tokens - 1), room.add_rmsnorm),
], ids=["num_tokens ignored", "num_tokens ignored by the add", "a live row too few"])
def test_broken_pads_are_caught(device, broken):
    for poison in (float("nan"), 6e4):
        with pytest.raises(AssertionError):
            check_pads(*broken, device, 0, torch.float32, 2, 2, 16, poison)


def check_rows_keep_their_bits(rmsnorm, device, seed, dtype, order, D):
    """Each row alone equals the row in any place among any others."""
    x, weight = randn(seed, 4, D, dtype=dtype, device=device), randn(seed + 1, D, dtype=dtype, device=device)
    want = torch.cat([rmsnorm(row[None].clone(), weight) for row in x])
    assert_same(rmsnorm(x[order], weight), want[order])


@given(seeds, dtypes, st.permutations(range(4)), widths)
def test_rows_keep_their_bits(device, seed, dtype, order, D):
    check_rows_keep_their_bits(room.rmsnorm, device, seed, dtype, order, D)


def test_a_norm_that_sees_the_batch_is_caught(device):
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(lambda x, weight: room.rmsnorm(x, weight) + 1e-6 * x.mean(), device, 0, torch.float32, [2, 0, 3, 1], 64)


def check_scale_invariance(rmsnorm, device, seed, c, D):
    x, weight = randn(seed, 3, D, device=device), randn(seed + 1, D, device=device)
    assert_same(rmsnorm(c * x, weight, 0.0), rmsnorm(x, weight, 0.0))


@given(seeds, st.sampled_from([0.25, 2.0, 1024.0]), widths)
def test_scale_invariance(device, seed, c, D):
    check_scale_invariance(room.rmsnorm, device, seed, c, D)


@pytest.mark.parametrize("c", [0.25, 1024.0])
def test_a_norm_that_sees_the_scale_is_caught(device, c):
    with pytest.raises(AssertionError, match="elements differ"):
        check_scale_invariance(lambda x, weight, eps: room.rmsnorm(x, weight, 1e-6), device, 0, c, 64)


def check_far(sound, op, device, name, dim):
    """The same bits where the last token or head of one tensor lies past element 2^31."""
    keys, shape = (("x", "out", "residual"), (3, 16)) if sound == room.add_rmsnorm_out else (("x", "out"), (3, 5, 16))
    near = {key: randn(i, *shape, dtype=torch.float16, device=device) for i, key in enumerate(keys)}
    distant = {key: far(t, dim) if key == name else t.clone() for key, t in near.items()}
    weight = randn(3, 16, dtype=torch.float16, device=device)
    sound(**near, weight=weight, eps=1e-6)
    op(**distant, weight=weight, eps=1e-6)
    for key in near:
        assert_same(distant[key], near[key])


FAR_DIMS = [("rmsnorm_out", "x", 0), ("rmsnorm_out", "x", 1), ("rmsnorm_out", "out", 0), ("rmsnorm_out", "out", 1),
            ("add_rmsnorm_out", "x", 0), ("add_rmsnorm_out", "residual", 0), ("add_rmsnorm_out", "out", 0)]


@pytest.mark.parametrize("op, name, dim", FAR_DIMS)
def test_strides_pass_32_bits(device, op, name, dim):
    check_far(getattr(room, op), getattr(room, op), device, name, dim)


@pytest.mark.parametrize("op, name, dim", FAR_DIMS)
def test_another_place_past_32_bits_is_caught(device, op, name, dim):
    def broken(**arguments):
        wrap = lambda: arguments[name].select(dim, -1).copy_(arguments[name].select(dim, 0))
        wrap()
        getattr(room, op)(**arguments)
        wrap()

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(getattr(room, op), broken, device, name, dim)


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
