"""linear against its twin on both paths, and the properties that the twin does not show."""

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

import reference.linear as twin
from gkernels.kernels import linear as room
from tests.close import assert_close, assert_same
from tests.strategies import counter, dtypes, poisons, randn, seeds, strided

rows = st.sampled_from([1, 2, 5, 16, 17, 33, 100])
shapes = st.sampled_from([(1, 1), (3, 5), (16, 16), (40, 24), (64, 100), (33, 256), (70, 300)])   # N, K
paths = st.sampled_from([room.TRITON_TOKENS, 0])                                                   # Triton's product, torch's product


def inputs(seed, T, N, K, dtype, device):
    return tuple(randn(seed + i, *shape, dtype=dtype, device=device) for i, shape in enumerate([(T, K), (N, K), (N,)]))


@given(seeds, dtypes, rows, shapes, paths, st.booleans(), st.booleans(), st.booleans())
def test_equals_reference(device, monkeypatch, seed, dtype, T, shape, path, has_bias, is_wide, is_strided):
    monkeypatch.setattr(room, "TRITON_TOKENS", path)
    x, weight, bias = inputs(seed, T, *shape, dtype, device)
    bias, out_dtype = bias if has_bias else None, torch.float32 if is_wide else dtype
    got = room.linear(strided(x) if is_strided else x, weight, bias, dtype=out_dtype)
    want = twin.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == out_dtype
    assert_close(got, want, twin.linear(x, weight, bias, dtype=out_dtype))


@given(seeds, dtypes, rows, shapes, paths)
def test_integers_are_exact(device, monkeypatch, seed, dtype, T, shape, path):
    monkeypatch.setattr(room, "TRITON_TOKENS", path)
    x, weight, bias = (t.mul(2).round().clamp(-4, 4) for t in inputs(seed, T, *shape, dtype, device))
    assert_same(room.linear(x, weight, bias, dtype=torch.float32), twin.linear(x.double(), weight.double(), bias.double()).float())


def check_rows_keep_their_bits(linear, seed, dtype, T, shape, order):
    """Each row alone, in a batch of T among other rows and under every row tile equals the row in the smallest batch."""
    x, weight, _ = inputs(seed, T, *shape, dtype, order.device)
    want = torch.cat([linear(row[None].clone(), weight) for row in x[:4]])
    place = order[order < T]
    assert_same(linear(x[place], weight)[place.argsort()][:4], want)


@given(seeds, dtypes, st.sampled_from([4, 20, 40, 64]), st.sampled_from([(16, 256), (40, 300), (20, 640)]))
def test_rows_keep_their_bits(device, seed, dtype, T, shape):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).to(device)
    check_rows_keep_their_bits(room.linear, seed, dtype, T, shape, order)


def test_a_split_that_looks_at_the_batch_is_caught(device):
    def split(x, weight):
        if x.shape[0] <= 16:
            return room.linear(x, weight)
        halves = zip(x.split(320, 1), weight.split(320, 1), strict=True)
        return sum(room.linear(a.contiguous(), b.contiguous()) for a, b in halves)

    with pytest.raises(AssertionError):
        check_rows_keep_their_bits(split, 0, torch.float32, 40, (16, 640), torch.arange(200, device=device))


def check_pads(linear, seed, dtype, live, pads, shape, poison, device):
    x, weight, bias = inputs(seed, live + pads, *shape, dtype, device)
    x[live:] = 0
    want = linear(x, weight, bias, counter(live, device))
    x[live:] = poison
    got = linear(x, weight, bias, counter(live, device))
    assert_same(got, want)
    assert_same(got[live:], torch.zeros_like(got[live:]))
    assert_close(got[:live], twin.linear(x[:live].double(), weight.double(), bias.double()), twin.linear(x[:live], weight, bias))


@given(seeds, dtypes, st.integers(0, 20), st.sampled_from([0, 1, 7, 30]), shapes, paths, poisons)
def test_pads_are_zero_and_leak_nothing(device, monkeypatch, seed, dtype, live, pads, shape, path, poison):
    monkeypatch.setattr(room, "TRITON_TOKENS", path)
    check_pads(room.linear, seed, dtype, live, pads, shape, poison, device)


@pytest.mark.parametrize("path", [room.TRITON_TOKENS, 0])
def test_a_product_that_reads_pads_is_caught(device, monkeypatch, path):
    monkeypatch.setattr(room, "TRITON_TOKENS", path)
    with pytest.raises(AssertionError):
        check_pads(lambda x, weight, bias, num_tokens: room.linear(x, weight, bias), 0, torch.float16, 3, 2, (40, 24), float("nan"), device)


@given(seeds, dtypes, st.sampled_from([-1, 0, 2, 50]), paths)
def test_a_bad_counter_is_clamped(device, monkeypatch, seed, dtype, count, path):
    monkeypatch.setattr(room, "TRITON_TOKENS", path)
    x, weight, bias = inputs(seed, 5, 20, 24, dtype, device)
    assert_same(room.linear(x, weight, bias, counter(count, device)), room.linear(x, weight, bias, counter(min(max(count, 0), 5), device)))


@given(seeds, dtypes, paths)
def test_a_strided_out_keeps_what_lies_between_its_rows(device, monkeypatch, seed, dtype, path):
    monkeypatch.setattr(room, "TRITON_TOKENS", path)
    x, weight, bias = inputs(seed, 5, 24, 40, dtype, device)
    roomy = torch.full((5, 40), 7.0, dtype=dtype, device=device)
    room.linear_out(x, weight, roomy[:, :24], bias, counter(3, device))
    got, want = roomy[:, :24].contiguous(), room.linear(x, weight, bias, counter(3, device))
    if path:
        assert_same(got, want)
    else:                                              # cuBLAS may choose another kernel for another stride
        assert_close(got, twin.linear(x.double(), weight.double(), bias.double(), counter(3, device)), want)
    assert_same(roomy[:, 24:].contiguous(), torch.full((5, 16), 7.0, dtype=dtype, device=device))


def test_no_rows(device):
    assert room.linear(torch.ones(0, 8, device=device), torch.ones(3, 8, device=device)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_config_fixes_the_k_order_and_fits_the_chip(dtype):
    for N, K in ((1, 1), (2048, 2048), (2048, 8192), (3072, 2048), (16384, 2048), (28672, 4096), (4096, 14336), (128256, 4096)):
        configs = [room.config(T, N, K, dtype) for T in (1, 16, 17, 40, 64)]
        assert len({(c.BLOCK_N, c.BLOCK_K) for c in configs}) == 1
        assert all(c.num_stages >= 3 for c in configs)
        assert max((c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * c.num_stages for c in configs) * dtype.itemsize <= room.SHARED_BYTES
    assert triton.cdiv(2048, room.config(1, 2048, 8192, torch.float16).BLOCK_N) == 128


@pytest.mark.gpu
@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([1, 16, 17, 40, 64]))
def test_rows_keep_their_bits_at_model_shapes(device, seed, dtype, T):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(seed)).to(device)
    for shape in ((2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192)):
        check_rows_keep_their_bits(room.linear, seed, dtype, T, shape, order)


@pytest.mark.parametrize("change, error, words", [
    (dict(weight=torch.ones(4, 9)), ValueError, r"linear: weight: got shape \[4, 9\], expected \[any, 8\]"),
    (dict(weight=torch.ones(0, 8)), ValueError, r"linear: weight: got shape \[0, 8\], expected at least one row"),
    (dict(weight=torch.ones(4, 8).half()), TypeError, "linear: weight: got torch.float16, expected torch.float32; convert"),
    (dict(weight=torch.ones(8, 4).T), ValueError, r"weight: got strides \[1, 4\].*call .contiguous\(\)"),
    (dict(x=torch.ones(8)), ValueError, r"linear: x: got shape \[8\], expected \[any, any\]"),
    (dict(x=torch.ones(2, 8, dtype=torch.int32)), TypeError, "linear: x: got torch.int32, expected torch.float16"),
    (dict(bias=torch.ones(5)), ValueError, r"linear: bias: got shape \[5\], expected \[4\]"),
    (dict(num_tokens=torch.ones(1)), TypeError, "num_tokens: got torch.float32"),
    (dict(dtype=torch.float16), TypeError, "linear: out: got torch.float16, expected torch.float32; convert"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(x=torch.ones(2, 8), weight=torch.ones(4, 8), bias=None, num_tokens=None, dtype=None) | change
    with pytest.raises(error, match=words):
        room.linear(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
