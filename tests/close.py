"""The only tolerances of the project, and how each is derived.

A kernel's result is judged against its twin run in float64, by two rules that must both hold:
1. Relative RMS error at most RELATIVE_RMS of the output's dtype. Storing a value in fp16 costs 2.8e-4 RMS at most (2^-11 / sqrt 3), in bf16
   2.3e-3; the bounds leave room for a second rounding inside (the softmax weights of attention), not for a key too many in a row of 2000
   (5.5e-3 in bf16). float32 outputs carry the error of sums in another order: about sqrt(K) * 2^-24, 1e-6 up to K = 16384.
   The mean square over n elements strays by 0.9 / sqrt(n) of itself (one rounding error is uniform), so the bound grows by 2 / sqrt(n):
   four standard deviations of its root. `tensor_core_terms` is the K of a float32 result that tensor cores summed in one
   chain: each of its K / 16 additions cuts off half a last place of a partial sum that is 2/3 of the whole on average, 0.5 * 2^-24 of it,
   and always toward zero, so these errors add up (predicted 1.5e-5 at K = 8192, measured 0.9e-5 on the H200); to the others, which are
   independent of them, they add as squares do.
2. Greatest absolute error at most twice that of plain PyTorch in the same dtypes (the FlashAttention rule), plus some units in the last
   place of the greatest value, because PyTorch is sometimes exact by luck: one where storing rounds, four in float32, where the error is that
   of a sum one by one: 0.3 sqrt(K) 2^-24 of its value is one standard deviation (1.5 units at K = 100, more in PyTorch's own term beyond).
   PyTorch on a GPU sums in blocks, so its term does not grow so; `chain_terms` is the K of a float32 result summed one by one, and gives it four
   of these deviations, 0.6 sqrt(K) units, where that is more.
Several ops in one kernel are judged against PyTorch doing them one by one, by `assert_no_worse`: such a kernel rounds at some of the places where
the chain does and nowhere else, so the variance of its error is no greater; twice the chain's RMS and greatest errors leave room for the draw.
Where two such sums are multiplied, the variances of their relative errors add: `chain_terms` is then 2 K.
Copies, indices and integer arithmetic are compared bit for bit with `assert_same`.
Sampled tokens are compared exactly, but where the twin decides by less than NEAR: a float32 score or mass is off by a few 2^-22. Draws are
judged by chi-square over 64 buckets of equal mass: the mean of 63 degrees of freedom plus six standard deviations.
"""

import math

import torch

NEAR = 1e-5
CHI_SQUARE_BOUND = 63 + 6 * (2 * 63) ** 0.5
RELATIVE_RMS = {torch.float16: 5e-4, torch.bfloat16: 2.8e-3, torch.float32: 1e-6}


def assert_close(got, want, plain, tensor_core_terms=0, chain_terms=0):
    """got: the kernel's output. want: the twin's, computed in float64. plain: the twin's, computed from the kernel's own inputs."""
    assert got.shape == want.shape == plain.shape, f"shapes {list(got.shape)}, {list(want.shape)}, {list(plain.shape)}"
    got64, want, plain = got.double(), want.double(), plain.double()
    assert torch.equal(got64.isnan(), want.isnan()), f"NaN in {int(got64.isnan().sum())} places, expected {int(want.isnan().sum())}"
    infinite = want.isinf()
    assert torch.equal(got64.isinf(), infinite) and torch.equal(got64[infinite], want[infinite]), "infinities differ"
    live = torch.isfinite(want)
    error, size = (got64 - want)[live], want[live]
    if not size.numel():
        return
    dtype, truncation = got.dtype, tensor_core_terms / 16 * 0.5 * 2**-24
    rms, greatest = error.norm() / size.norm().clamp_min(1e-30), error.abs().max()
    allowed_rms = math.hypot(RELATIVE_RMS[dtype], truncation) * (1 + 2 / size.numel() ** 0.5)
    allowed = 2 * (plain - want)[live].abs().max() + (units(dtype, chain_terms) * torch.finfo(dtype).eps + truncation) * size.abs().max()
    assert rms <= allowed_rms or greatest == 0, f"relative RMS error {rms:.2e}, allowed {allowed_rms:.1e} for {dtype}"
    assert greatest <= allowed, f"greatest error {greatest:.3e}, allowed {allowed:.3e}"


def units(dtype, chain_terms):
    """Units in the last place of the greatest value that any error may have."""
    return max(4, 0.6 * chain_terms**0.5) if dtype == torch.float32 else 1


def assert_no_worse(got, want, plain, operands=None, chain_terms=0):
    """got: a fused kernel's output. want: the twin's in float64. plain: the chain of single ops in got's dtype. `operands`: the dtype that operands
    of products are rounded to, if not got's; PyTorch may be exact by luck, so an RMS error of one such rounding is always allowed."""
    assert got.shape == want.shape == plain.shape, f"shapes {list(got.shape)}, {list(want.shape)}, {list(plain.shape)}"
    assert torch.equal(got.isnan(), want.isnan()), f"NaN in {int(got.isnan().sum())} places, expected {int(want.isnan().sum())}"
    live, dtype = torch.isfinite(want), operands or got.dtype
    size = want.double()[live]
    if not size.numel():
        return
    error, simple = (t.double()[live] - size for t in (got, plain))
    rms, allowed_rms = error.norm(), max(2 * simple.norm(), RELATIVE_RMS[dtype] * (1 + 2 / size.numel() ** 0.5) * size.norm())
    assert rms <= allowed_rms, f"RMS error {rms / size.norm():.2e} of the result's, allowed {allowed_rms / size.norm():.1e} for {dtype}"
    greatest, allowed = error.abs().max(), 2 * simple.abs().max() + units(dtype, chain_terms) * torch.finfo(dtype).eps * size.abs().max()
    assert greatest <= allowed, f"greatest error {greatest:.3e}, allowed {allowed:.3e}"


def assert_same(got, want):
    """Bit for bit, so that NaN equals the same NaN and -0.0 is not 0.0."""
    assert got.shape == want.shape and got.dtype == want.dtype, f"{got.dtype} {list(got.shape)} against {want.dtype} {list(want.shape)}"
    same = bits(got) == bits(want)
    assert same.all(), f"{int((~same).sum())} of {same.numel()} elements differ, first at {(~same).nonzero()[0].tolist()}"


def bits(t):
    """The tensor's bit patterns as integers."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
