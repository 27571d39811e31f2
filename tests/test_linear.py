"""linear on both paths, norm_linear and linear_residual with weights of every kind against their twins, and the properties that these do not show."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.linear as twin
import reference.rmsnorm as norms
from gkernels.kernels import linear as room
from gkernels.kernels import qkv, rmsnorm
from gkernels.kernels._product import check_workspace
from gkernels.kernels._quantized import Kind, Quantized
from gkernels.kernels._tile import SHARED_BYTES, STREAMED_ROWS, parts
from tests import weights
from tests.close import assert_close, assert_no_worse, assert_same
from tests.strategies import counter, dtypes, poisons, randn, scaled, seeds, strided
from tests.weights import KINDS, kinds

rows = st.sampled_from([1, 2, 5, 16, 17, 33, 100])
shapes = st.sampled_from([(1, 1), (3, 5), (16, 16), (40, 24), (64, 100), (33, 256), (70, 300)])   # N, K
fused_shapes = shapes | st.sampled_from([(140, 640), (24, 512)])                                  # several groups and blocks, in both splits
paths = st.sampled_from([room.MOST_TOKENS, 0])                                                   # Triton's product, torch's product


splits = st.booleans()                                                                             # whether K is split: given a workspace


def scratch(device, wanted=True):
    """A workspace that holds junk, or none."""
    workspace = room.Workspace.allocate(device) if wanted else None
    if wanted:
        workspace.partials.fill_(float("nan"))
    return workspace


def inputs(seed, T, N, K, dtype, device):
    return tuple(randn(seed + i, *shape, dtype=dtype, device=device) for i, shape in enumerate([(T, K), (N, K), (N,)]))


@given(seeds, dtypes, rows, shapes, paths, st.booleans(), st.booleans(), st.booleans(), splits)
def test_equals_reference(device, monkeypatch, seed, dtype, T, shape, path, has_bias, is_wide, is_strided, is_split):
    monkeypatch.setattr(room, "MOST_TOKENS", path)
    x, weight, bias = inputs(seed, T, *shape, dtype, device)
    bias, out_dtype = bias if has_bias else None, torch.float32 if is_wide else dtype
    got = room.linear(strided(x) if is_strided else x, weight, bias, dtype=out_dtype, workspace=scratch(device, is_split))
    want = twin.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == out_dtype
    assert_close(got, want, twin.linear(x, weight, bias, dtype=out_dtype))


def normed(x, norm, weight, eps=1e-6, bias=None, **options):
    """An RMSNorm and a product, in two nodes that share it."""
    return room.norm_linear(scaled(rmsnorm.scale, x, norm), weight, eps, bias, **options)


def check_norm(normed, device, seed, dtype, T, shape, has_bias=False, is_wide=False, is_split=True, size=1.0, kind="plain"):
    (x, _, bias), weight = inputs(seed, T, *shape, dtype, device), weights.draw(seed + 1, kind, *shape, dtype, device)
    norm, x, bias = randn(seed + 3, shape[1], dtype=dtype, device=device), x * size, bias if has_bias else None
    got = normed(x, norm, weight.given, 1e-5, bias, dtype=torch.float32 if is_wide else dtype, workspace=scratch(device, is_split))
    wide = None if bias is None else bias.double()
    want = twin.norm_linear(scaled(norms.scale, x.double(), norm.double()), weight.values, 1e-5, wide)
    plain = twin.linear(norms.rmsnorm(x, norm, 1e-5), weight.values.float(), bias, dtype=got.dtype)
    assert_no_worse(got, want, plain, operands=dtype, chain_terms=shape[1])


@given(seeds, dtypes, st.sampled_from([1, 2, 17, 33]), fused_shapes, st.booleans(), st.booleans(), splits, st.sampled_from([1.0, 2.0**-8]), kinds)
def test_norm_equals_reference(device, seed, dtype, T, shape, has_bias, is_wide, is_split, size, kind):
    """The smaller rows have a mean square near eps."""
    check_norm(normed, device, seed, dtype, T, shape, has_bias, is_wide, is_split, size, kind)


@pytest.mark.parametrize("broken", [
    lambda x, norm, weight, eps, bias, **options: normed(x, norm, weight, 0.0, bias, **options),
    lambda x, norm, weight, eps, bias, **options: normed(x, 1 + norm, weight, eps, bias, **options),
    lambda x, norm, weight, eps, bias, **options: normed(x.roll(1, 1), norm, weight.roll(1, 1), eps, bias, **options),
    lambda x, norm, weight, eps, bias, **options: normed(x, norm, weight, eps, bias, **options) * (1 + 2.0**-6),
    lambda x, norm, weight, eps, bias, **options: room.norm_linear(
        room.Scaled(*(t.roll(1, i) for i, t in enumerate(scaled(rmsnorm.scale, x, norm)))), weight, eps, bias, **options),
], ids=["eps forgotten", "one added to the norm", "another column's norm", "a mean over fewer columns", "another row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_control_broken_norms_are_caught(device, broken, dtype):
    with pytest.raises(AssertionError, match=r"RMS error|greatest error"):
        check_norm(broken, device, 0, dtype, 3, (64, 128), size=2.0**-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_control_another_scale_is_caught(device, kind, dtype):
    def broken(x, norm, given, *rest, **options):
        return normed(x, norm, weights.Weight.of(kind, given, x.shape[1]).rolled(), *rest, **options)

    check_norm(normed, device, 0, dtype, 3, (140, 640), kind=kind)
    with pytest.raises(AssertionError, match=r"RMS error|greatest error"):
        check_norm(broken, device, 0, dtype, 3, (140, 640), kind=kind)


def check_gather(norm_linear, device, seed, dtype, index, shape):
    """Rows by index are those of the whole product, bit for bit, in any company."""
    x, weight, _ = inputs(seed, 5, *shape, dtype, device)
    halves, rows = scaled(rmsnorm.scale, x, weight[0]), torch.tensor(index, dtype=torch.int32, device=device)
    got, want = norm_linear(halves, weight, index=rows), twin.gather(room.norm_linear(halves, weight), rows)
    assert_same(got.isnan(), want.isnan())
    assert_same(got.nan_to_num(0), want.nan_to_num(0))


@given(seeds, dtypes, st.lists(st.sampled_from([0, 1, 4, -1, 5, 2**31 - 1, -2**31]), min_size=1, max_size=20), shapes)
def test_rows_are_gathered(device, seed, dtype, index, shape):
    check_gather(room.norm_linear, device, seed, dtype, index, shape)


@pytest.mark.parametrize("broken", [lambda rows: rows.flip(0), lambda rows: rows.clamp(max=4), lambda rows: rows.clamp(min=0)],
                         ids=["another order", "none too great", "none negative"])
def test_control_other_rows_are_caught(device, broken):
    with pytest.raises(AssertionError):
        check_gather(lambda halves, weight, index: room.norm_linear(halves, weight, index=broken(index)), device, 0, torch.float16, [3, 0, -1, 7],
                     (16, 16))


def check_residual(linear_residual, device, seed, dtype, T, shape, live, is_split, is_strided=False, kind="plain", poison=0.0):
    (x, _, bias), weight = inputs(seed, T, *shape, dtype, device), weights.draw(seed + 1, kind, *shape, dtype, device)
    x[live:] = poison
    residual = randn(seed + 3, T, shape[0], dtype=dtype, device=device)
    got, want, plain = (strided(residual) if is_strided else residual.clone()), residual.double(), residual.clone()
    linear_residual(x, weight.given, got, bias, counter(live, device), scratch(device, is_split))
    x[live:] = 0
    twin.linear_residual(x.double(), weight.values, want, bias.double(), counter(live, device))
    twin.linear_residual(x, weight.values.float(), plain, bias, counter(live, device))
    assert_close(got.contiguous(), want, plain)
    assert_same(got[live:].contiguous(), torch.zeros_like(plain[live:]))


@given(seeds, dtypes, st.sampled_from([1, 5, 17, 40]), fused_shapes, st.sampled_from([0, 1, 5, 40]), splits, st.booleans(), kinds, poisons)
def test_residual_equals_reference(device, seed, dtype, T, shape, live, is_split, is_strided, kind, poison):
    check_residual(room.linear_residual, device, seed, dtype, T, shape, min(live, T), is_split, is_strided and shape[0] % 8 == 0, kind, poison)


@pytest.mark.parametrize("broken", [
    lambda x, weight, residual, *rest: room.linear_out(x, weight, residual, *rest),
    lambda x, weight, residual, *rest: room.linear_residual(x, weight, residual.clone(), *rest),
    lambda x, weight, residual, bias, n, workspace: room.linear_residual(x, weight, residual, bias, None, workspace),
    lambda x, weight, residual, bias, *rest: [room.linear_residual(x, weight, residual, b, *rest) for b in (bias, None)],
], ids=["nothing added to", "nothing written", "pads added to", "added twice"])
def test_control_broken_residuals_are_caught(device, broken):
    with pytest.raises(AssertionError):
        check_residual(broken, device, 0, torch.float16, 5, (64, 100), 3, True)


def check_scaled(linear_residual, device, seed, dtype, T, shape, live, is_split, kind="plain"):
    """What is left for the next product follows from the residual as it was rounded: x by one rounding, the squares' sum by those of a sum."""
    (x, _, bias), weight = inputs(seed, T, *shape, dtype, device), weights.draw(seed + 1, kind, *shape, dtype, device).given
    residual, norm = (randn(seed + i, *size, dtype=dtype, device=device) for i, size in ((3, (T, shape[0])), (4, shape[:1])))
    got = room.Scaled.empty(T, shape[0], dtype, device, is_split)
    for t in got:
        t.fill_(float("nan"))
    plain = residual.clone()
    room.linear_residual(x, weight, plain, bias, counter(live, device), scratch(device, is_split))
    linear_residual(x, weight, residual, bias, counter(live, device), scratch(device, is_split), norm, got)
    assert_same(residual, plain)
    assert_same(got.x[:live], (residual[:live].float() * norm.float()).to(dtype))
    assert_same(got.x[live:], torch.zeros_like(got.x[live:]))
    want, sums = residual[:live].double().square().sum(1), got.squares[:live].sum(1)
    assert_close(sums, want, residual[:live].float().square().sum(1))
    assert got.squares[live:].isnan().all(), "pads write squares"


@given(seeds, dtypes, st.sampled_from([1, 5, 17, 40]), fused_shapes, st.sampled_from([0, 1, 5, 40]), splits, kinds)
def test_a_residual_leaves_half_a_norm(device, seed, dtype, T, shape, live, is_split, kind):
    check_scaled(room.linear_residual, device, seed, dtype, T, shape, min(live, T), is_split, kind)


def misleads(change):
    def linear_residual(*arguments):
        room.linear_residual(*arguments)
        change(arguments[-1])
    return linear_residual


@pytest.mark.parametrize("broken", [
    misleads(lambda scaled: scaled.x.copy_(scaled.x.roll(1, 1))), misleads(lambda scaled: scaled.squares.mul_(1 + 2.0**-10)),
    misleads(lambda scaled: scaled.squares[3:].zero_()), lambda *arguments: room.linear_residual(*arguments[:6]),
], ids=["another column", "other squares", "squares of pads", "nothing left"])
def test_control_broken_halves_are_caught(device, broken):
    with pytest.raises(AssertionError):
        check_scaled(broken, device, 0, torch.float16, 5, (64, 100), 3, True)


def integers(t):
    """None of them -0, whose sign an exact sum need not keep."""
    return t.mul(2).round().clamp(-4, 4) + 0.0


@given(seeds, dtypes, rows, shapes, paths, splits)
def test_integers_are_exact(device, monkeypatch, seed, dtype, T, shape, path, is_split):
    monkeypatch.setattr(room, "MOST_TOKENS", path)
    x, weight, bias = (integers(t) for t in inputs(seed, T, *shape, dtype, device))
    want = twin.linear(x.double(), weight.double(), bias.double()).float()
    assert_same(room.linear(x, weight, bias, dtype=torch.float32, workspace=scratch(device, is_split)), want)


@given(seeds, dtypes, st.sampled_from([1, 17, 40]), fused_shapes, splits, kinds)
def test_integers_are_exact_in_fused_products(device, seed, dtype, T, shape, is_split, kind):
    """Entries of x are 2 or -2, so each row's root mean square is 2 and its inverse 0.5, exactly."""
    (x, _, bias), weight = inputs(seed, T, *shape, dtype, device), weights.draw(seed + 1, kind, *shape, dtype, device, integers=True)
    norm = integers(randn(seed, shape[1], dtype=dtype, device=device))
    x, bias = 2 * (x > 0) - 2 * (x <= 0).to(dtype), integers(bias)
    want = twin.linear((x * norm / 2).double(), weight.values, bias.double())
    assert_same(normed(x, norm, weight.given, 0.0, bias, dtype=torch.float32, workspace=scratch(device, is_split)), want.float() + 0.0)
    residual = torch.ones_like(want, dtype=dtype)
    room.linear_residual(x * norm / 2, weight.given, residual, bias, None, scratch(device, is_split))
    assert_same(residual, (want + 1).to(dtype))


def check_rows_keep_their_bits(linear, seed, dtype, T, shape, order, kind="plain"):
    """Each row alone, in a batch of T among other rows and under every row tile equals the row in the smallest batch."""
    (x, *_), weight = inputs(seed, T, *shape, dtype, order.device), weights.draw(seed + 1, kind, *shape, dtype, order.device).given
    want = torch.cat([linear(row[None].clone(), weight) for row in x[:4]])
    place = order[order < T]
    assert_same(linear(x[place], weight)[place.argsort()][:4], want)


def fused(device, seed, shape, dtype):
    """Each op as a function of x and weight alone."""
    norm, bias = randn(seed + 3, shape[1], dtype=dtype, device=device), randn(seed + 4, shape[0], dtype=dtype, device=device)

    def residual(x, weight):
        out = x[:, :1].expand(x.shape[0], weight.shape[0]).contiguous()
        room.linear_residual(x, weight, out, bias, None, scratch(device))
        return out

    return [residual, lambda x, weight: normed(x, norm, weight, 1e-5, bias),
            lambda x, weight: normed(x, norm, weight, workspace=scratch(device)), lambda x, weight: handed_on(x, weight, bias, device),
            partial(room.linear, invariant=True), lambda x, weight: room.linear(x, weight, workspace=scratch(device), invariant=True)]


ops = st.tuples(st.integers(0, 3), kinds) | st.tuples(st.integers(4, 5), st.just("plain"))        # of `fused`; linear takes plain weights


def handed_on(x, weight, bias, device):
    """(a residual, what it leaves: x, squares), side by side."""
    out = x[:, :1].expand(x.shape[0], weight.shape[0]).contiguous()
    halves = room.Scaled.empty(*out.shape, out.dtype, device, True)
    room.linear_residual(x, weight, out, bias, None, scratch(device), bias, halves)
    return torch.cat([out.float(), halves.x.float(), halves.squares], 1)


@given(seeds, dtypes, st.sampled_from([4, 20, 40, 64, 65, 200]), st.sampled_from([(16, 256), (40, 300), (20, 640)]), ops)
def test_rows_keep_their_bits(device, seed, dtype, T, shape, op):
    order, (i, kind) = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).to(device), op
    check_rows_keep_their_bits(fused(device, seed, shape, dtype)[i], seed, dtype, T, shape, order, kind)


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
    monkeypatch.setattr(room, "MOST_TOKENS", path)
    check_pads(room.linear, seed, dtype, live, pads, shape, poison, device)


@pytest.mark.parametrize("path", [room.MOST_TOKENS, 0])
def test_a_product_that_reads_pads_is_caught(device, monkeypatch, path):
    monkeypatch.setattr(room, "MOST_TOKENS", path)
    with pytest.raises(AssertionError):
        check_pads(lambda x, weight, bias, num_tokens: room.linear(x, weight, bias), 0, torch.float16, 3, 2, (40, 24), float("nan"), device)


@given(seeds, dtypes, st.sampled_from([-1, 0, 2, 50]), paths)
def test_a_bad_counter_is_clamped(device, monkeypatch, seed, dtype, count, path):
    monkeypatch.setattr(room, "MOST_TOKENS", path)
    x, weight, bias = inputs(seed, 5, 20, 24, dtype, device)
    assert_same(room.linear(x, weight, bias, counter(count, device)), room.linear(x, weight, bias, counter(min(max(count, 0), 5), device)))


@given(seeds, dtypes, paths)
def test_a_strided_out_keeps_what_lies_between_its_rows(device, monkeypatch, seed, dtype, path):
    monkeypatch.setattr(room, "MOST_TOKENS", path)
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
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("kind", [Kind("plain"), Kind("fp8 row"), Kind("fp8 block"), Kind("int4", 32), Kind("int4", 128)], ids=str)
def test_config_fixes_the_k_order_and_fits_the_chip(monkeypatch, dtype, is_split, kind):
    monkeypatch.setattr("gkernels.kernels._check.INTERPRETED", False)
    monkeypatch.setattr("gkernels.kernels._check.capability", lambda: 90)
    takes = (1, 16, 17, 40, 64, 65, 8192)
    for N, K in ((1, 1), (8, 8), (2048, 2048), (2048, 8192), (3072, 2048), (16384, 2048), (28672, 4096), (4096, 14336), (128256, 4096)):
        fitting = kind if K % (kind.group or 1) == 0 else Kind("int4", K)
        configs = [room.config(T, N, K, dtype, is_split, fitting) for T in takes]
        assert len({(c.BLOCK_K * c.STEPS, c.SPLITS) for c in configs}) == 1
        streamed = [c for c in configs if c.IS_STREAMED]
        assert all(c.BLOCK_N == (64 if kind.name == "plain" else STREAMED_ROWS) for c in streamed)
        configs = [c for c in configs if not c.IS_STREAMED]
        assert len({c.BLOCK_K for c in configs}) == 1
        assert len({c.BLOCK_N for c in configs}) == 1
        assert all(c.num_stages >= 2 and c.SPLITS * c.STEPS * c.BLOCK_K >= K > (c.SPLITS * c.STEPS - c.STEPS) * c.BLOCK_K for c in configs)
        free = int(fitting.name != "plain" and dtype != torch.float32)         # a stage that mma.sync does not hold in shared memory, as wgmma does
        stages = [(c.BLOCK_M * c.BLOCK_K * dtype.itemsize + fitting.bytes(c.BLOCK_N, c.BLOCK_K, dtype)) * (c.num_stages - free) for c in configs]
        assert max(stages) <= SHARED_BYTES[90]
        assert kind.name != "fp8 block" or 128 % configs[0].BLOCK_K == 0, "a row of a tile has two scales"
        assert {room.config(T, N, K, dtype, is_split, fitting, True).parts for T in takes} == {parts(N, dtype, is_split)}, "of Scaled.empty"
        assert len({(c.TILES, c.ROWS) for c in configs}) == 1 and configs[0].TILES * configs[0].ROWS >= N > (configs[0].TILES - 1) * configs[0].ROWS
        assert is_split or configs[0].SPLITS == 1
    assert not is_split or room.config(1, 2048, 8192, dtype, True, kind).SPLITS > 1
    if is_split and kind.name == "plain" and dtype != torch.float32:
        assert [room.config(1, N, K, dtype, True).grid(1) for N, K in ((3072, 2048), (1280, 8192), (6144, 4096))] == [(128,), (128,), (96,)]


def test_workspaces_hold_every_model(monkeypatch, device):
    """Products of the greatest models, at the most tokens."""
    monkeypatch.setattr("gkernels.kernels._check.INTERPRETED", False)
    monkeypatch.setattr("gkernels.kernels._check.capability", lambda: 90)
    monkeypatch.setattr("gkernels.kernels._check.can_run", lambda device: True)
    workspace = room.Workspace.allocate(device)
    device = workspace.partials.device
    for kind in (Kind("plain"), Kind("fp8 block"), Kind("int4", 32), Kind("int4", 128)):
        for N in (1024, 2048, 4096, 5120, 8192, 16384):
            for T in (1, 16, 17, 40, 64):
                for K in (2048, 14336, 28672):
                    check_workspace("test", workspace, room.config(T, N, K, torch.bfloat16, True, kind), T, device)
        for heads in (6, 12, 24, 48, 66, 80):
            check_workspace("test", workspace, qkv.config(64, heads, 128, 128, 8192, torch.bfloat16, True, kind), 64, device)


@pytest.mark.parametrize("change, error, words", [
    (dict(weight=torch.ones(4, 256)), TypeError, "weight.weight: got torch.float32, expected torch.float8_e4m3fn or torch.int32"),
    (dict(weight=torch.ones(4, 255).to(weights.FP8)), ValueError, r"weight.weight: got shape \[4, 255\], expected \[any, 256\]"),
    (dict(weight=torch.ones(4, 64, dtype=torch.int32)), ValueError, r"weight.weight: got shape \[4, 64\], expected \[any, 32\]"),
    (dict(scale=torch.ones(5)), ValueError, r"weight.scale: got shape \[5\], expected \[4\]"),
    (dict(scale=torch.ones(1, 3)), ValueError, r"weight.scale: got shape \[1, 3\], expected \[1, 2\]"),
    (dict(weight=torch.ones(4, 32, dtype=torch.int32), scale=torch.ones(3, 4, dtype=torch.int32)), ValueError,
     "weight.scale: got 3 groups for 256 columns, expected a number of groups"),
])
def test_misuse_of_quantised_weights_is_named(device, change, error, words):
    given = Quantized(*(t.to(device) for t in (dict(weight=torch.ones(4, 256).to(weights.FP8), scale=torch.ones(4)) | change).values()))
    with pytest.raises(error, match=f"linear_residual: {words}"):
        room.linear_residual(torch.ones(2, 256, device=device), given, torch.ones(2, 4, device=device))


def test_a_small_workspace_is_refused(device):
    small = room.Workspace(torch.empty(64, device=device), torch.zeros(64, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"linear: workspace.partials: got 64 elements, expected at least \d+ for 3 rows of 40 x 512"):
        room.linear(torch.ones(3, 512, device=device), torch.ones(40, 512, device=device), workspace=small)


def test_torch_beyond_the_most_tokens_is_caught(device):
    """What `invariant` is for: torch adds in another order, which float32 shows."""
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(room.linear, 0, torch.float32, 200, (40, 640), torch.arange(200, device=device))


@pytest.mark.parametrize("change, error, words", [
    (dict(norm=None), ValueError, "linear_residual: norm: got one of norm and scaled, expected both or none"),
    (dict(norm=torch.ones(5)), ValueError, r"linear_residual: norm: got shape \[5\], expected \[4\]"),
    (dict(scaled=(torch.ones(2, 4), torch.ones(2, 9))), ValueError, "linear_residual: scaled.squares: got 9 parts, expected 1; Scaled.empty makes"),
    (dict(scaled=(torch.ones(2, 5), torch.ones(2, 1))), ValueError, r"linear_residual: scaled.x: got shape \[2, 5\], expected \[2, 4\]"),
    (dict(scaled=(torch.ones(2, 4), torch.ones(3, 1))), ValueError, r"linear_residual: scaled.squares: got shape \[3, 1\], expected \[2, any\]"),
])
def test_misuse_of_halves_is_named(device, change, error, words):
    arguments = dict(norm=torch.ones(4), scaled=(torch.ones(2, 4), torch.ones(2, 1))) | change
    norm = None if arguments["norm"] is None else arguments["norm"].to(device)
    with pytest.raises(error, match=words):
        room.linear_residual(*(torch.ones(*shape, device=device) for shape in ((2, 8), (4, 8), (2, 4))), norm=norm,
                             scaled=room.Scaled(*(t.to(device) for t in arguments["scaled"])))


@pytest.mark.gpu
@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([1, 16, 17, 40, 64]), ops)
def test_rows_keep_their_bits_at_model_shapes(device, seed, dtype, T, op):
    order, (i, kind) = torch.randperm(256, generator=torch.Generator().manual_seed(seed)).to(device), op
    for shape in ((2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192)):
        check_rows_keep_their_bits(fused(device, seed, shape, dtype)[i], seed, dtype, T, shape, order, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:5])
@pytest.mark.parametrize("T", [1, 17, 64])
def test_fused_products_equal_reference_at_model_shapes(device, dtype, kind, T):
    for shape in ((3072, 2048), (4096, 4096), (4096, 14336)):
        check_norm(normed, device, T, dtype, T, shape, kind=kind)
        check_residual(room.linear_residual, device, T, dtype, T, shape, max(T - 1, 1), True, kind=kind, poison=float("nan"))


def check_replays(device, op, replays):
    """One bit pattern over many replays of a graph, in scratch that held junk, whose counters end as zeros."""
    x, weight, bias = inputs(0, 5, 2048, 2048, torch.bfloat16, device)
    workspace, out = scratch(device), torch.empty(5, 2048, dtype=torch.bfloat16, device=device)
    op(x, weight, out, bias, None, workspace)
    want, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(x, weight, out, bias, None, workspace)
    for _ in range(replays):
        out.fill_(float("nan"))
        workspace.partials.fill_(float("nan"))
        graph.replay()
        assert_same(out, want)
    assert not workspace.counters.any(), "a counter is not zero after the launch"


@pytest.mark.gpu
def test_replays_give_one_bit_pattern(device):
    check_replays(device, room.linear_out, 200)


@pytest.mark.gpu
def test_control_a_counter_that_is_not_reset_is_caught(device):
    def broken(*arguments):
        room.linear_out(*arguments)
        arguments[-1].counters.fill_(1)

    with pytest.raises(AssertionError):
        check_replays(device, broken, 2)


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
