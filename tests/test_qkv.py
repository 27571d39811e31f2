"""norm_qkv with weights of every kind against its twin, and the properties that the twin does not show."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.qkv as twin
import reference.rmsnorm as norms
from gkernels.kernels import qkv as room
from gkernels.kernels import rmsnorm
from gkernels.kernels._quantized import Quantized
from gkernels.kernels.rotary import cos_sin_table
from tests import weights
from tests.close import assert_no_worse, assert_same
from tests.strategies import counter, dtypes, poisons, randn, scaled, seeds, strided
from tests.weights import KINDS, Weight, kinds

shapes = st.sampled_from([(1, 1, 2, 16), (3, 1, 16, 40), (4, 2, 20, 64), (2, 2, 64, 100), (4, 1, 80, 32), (2, 1, 48, 640)])    # H, KV, D, K
PAGES, PAGE, LENGTH = 12, 4, 40


def draw(seed, T, shape, dtype, device, part=1.0, has_bias=True, has_norms=True, is_split=True, kind="plain",
         integers=False):
    """Arguments by name; of the positions and slots about one in seven is outside its table."""
    (H, KV, D, K), generator = shape, torch.Generator().manual_seed(seed)
    pages = max(PAGES * 2, -(-T // PAGE))
    N, maybe = (H + 2 * KV) * D, lambda wanted, i, n: randn(seed + i, n, dtype=dtype, device=device) if wanted else None
    strange = lambda good, *bad: torch.where(torch.rand(T, generator=generator) < 0.15,
                                             torch.tensor(bad)[torch.randint(len(bad), (T,), generator=generator)], good)
    workspace = room.Workspace.allocate(device) if is_split else None
    if workspace is not None:
        workspace.partials.fill_(float("nan"))
    return dict(
        x=randn(seed, T, K, dtype=dtype, device=device), norm=maybe(True, 1, K),
        weight=weights.draw(seed + 2, kind, N, K, dtype, device, K ** -0.5, integers),
        eps=1e-5, positions=strange(torch.randint(LENGTH, (T,), generator=generator), -1, LENGTH, 2**31 - 1).to(device, torch.int32),
        cos_sin=cos_sin_table(max(int(D * part) // 2 * 2, 2), LENGTH, device=device),
        slot_mapping=strange(torch.randperm(pages * PAGE, generator=generator)[:T], -1, pages * PAGE, 2**40).to(device),
        k_cache=torch.full((pages, PAGE, KV, D), 7.0, dtype=dtype, device=device),
        v_cache=torch.full((pages, PAGE, KV, D), 7.0, dtype=dtype, device=device), q_out=torch.full((T, H, D), 7.0, dtype=dtype, device=device),
        bias=maybe(has_bias, 3, N), q_norm=maybe(has_norms, 4, D), k_norm=maybe(has_norms, 5, D), workspace=workspace)


def norm_qkv(x, norm, weight, **others):
    """The whole norm, in two nodes that share it."""
    room.norm_qkv(scaled(rmsnorm.scale, x, norm), weight.given, **others)


def plain_qkv(x, norm, weight, eps, num_tokens=None, **others):
    """The twin's chain, one op by one: rows that are normed already, and squares that scale them by 1."""
    ones = torch.full((len(x), 1), x.shape[1] * (1 - eps), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    twin.norm_qkv((norms.rmsnorm(x, norm, eps), ones), weight.values.to(ones.dtype), eps, num_tokens=num_tokens, **others)


def run(op, arguments, num_tokens=None, **changes):
    """(q, k cache, v cache) of a call on copies."""
    arguments = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in (arguments | changes).items()}
    op(**arguments, num_tokens=num_tokens)
    return SimpleNamespace(**{name: arguments[name] for name in ("q_out", "k_cache", "v_cache")})


def twin_of(arguments, dtype=None):
    """The twin's results, in `dtype` or the arguments' own."""
    arguments = {name: t for name, t in arguments.items() if name != "workspace"}
    wide = lambda t: t.to(dtype) if dtype and isinstance(t, torch.Tensor) and t.is_floating_point() else t
    return run(plain_qkv, {name: wide(t) for name, t in arguments.items()})


def check_equals_reference(op, arguments):
    got, want, plain = run(op, arguments), twin_of(arguments, torch.float64), twin_of(arguments)
    for name in vars(got):
        results = [getattr(r, name) for r in (got, want, plain)]
        if name != "q_out":                                  # what no slot names keeps its bits, and tells nothing about errors
            kept = results[1] == 7.0
            assert_same(results[0][kept], torch.full_like(results[0][kept], 7.0))
            results = [r[~kept] for r in results]
        assert_no_worse(*results, chain_terms=arguments["x"].shape[1])


@given(seeds, dtypes, st.sampled_from([1, 2, 17]), shapes, st.sampled_from([1.0, 0.5]), st.booleans(), st.booleans(), st.booleans(), kinds)
def test_equals_reference(device, seed, dtype, T, shape, part, has_bias, has_norms, is_split, kind):
    check_equals_reference(norm_qkv, draw(seed, T, shape, dtype, device, part, has_bias, has_norms, is_split, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:5])
@pytest.mark.parametrize("T", [1, 17, 64])
def test_equals_reference_at_model_shapes(device, dtype, kind, T):
    for shape in ((32, 8, 64, 2048), (32, 8, 128, 4096)):
        check_equals_reference(norm_qkv, draw(T, T, shape, dtype, device, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_control_another_scale_is_caught(device, kind, dtype):
    def broken(weight, **others):
        norm_qkv(weight=Weight(kind, weight.rolled(), weight.values), **others)

    with pytest.raises(AssertionError, match=r"RMS error|greatest error"):
        check_equals_reference(broken, draw(0, 5, (2, 1, 48, 640), dtype, device, kind=kind))


def swapped(name, change):
    """The op with one argument changed."""
    return lambda **arguments: norm_qkv(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize("broken", [
    swapped("q_norm", lambda t: None), swapped("k_norm", lambda t: t.roll(1)), swapped("bias", lambda t: t.roll(1)),
    swapped("positions", lambda t: t + 1), swapped("slot_mapping", lambda t: t + 1), swapped("cos_sin", lambda t: t.roll(1, 1)),
    swapped("norm", lambda t: t.roll(1)), swapped("weight", lambda t: Weight("plain", t.given.roll(1, 0), t.values)),
    swapped("k_cache", lambda t: t.clone()),
], ids=["no norm of q", "another norm of k", "another bias", "the next position", "the next slot", "cosines for sines", "another norm",
        "another row", "k not written"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_control_broken_nodes_are_caught(device, broken, dtype):
    with pytest.raises(AssertionError):
        check_equals_reference(broken, draw(0, 5, (4, 2, 20, 64), dtype, device))


def check_rows_keep_their_bits(op, arguments):
    """A row alone gives the bits that it gives in the batch, in any order, in every pad's company."""
    T, rows = arguments["x"].shape[0], ("x", "positions", "slot_mapping", "q_out")
    whole = run(op, arguments)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(T)).to(arguments["x"].device)
    turned = run(op, arguments | {name: arguments[name][order] for name in rows})
    assert_same(turned.q_out[order.argsort()], whole.q_out)
    for name in ("k_cache", "v_cache"):
        assert_same(getattr(turned, name), getattr(whole, name))
    for i in range(min(T, 3)):
        alone = run(op, arguments | {name: arguments[name][i:i + 1].clone() for name in rows})
        assert_same(alone.q_out, whole.q_out[i:i + 1])
        written = alone.k_cache != 7.0
        assert_same(alone.k_cache[written], whole.k_cache[written])


@given(seeds, dtypes, st.sampled_from([4, 20, 65]), shapes, st.booleans(), kinds)
def test_rows_keep_their_bits(device, seed, dtype, T, shape, is_split, kind):
    check_rows_keep_their_bits(norm_qkv, draw(seed, T, shape, dtype, device, is_split=is_split, kind=kind))


@pytest.mark.gpu
@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([16, 17, 40, 256]),
       st.sampled_from([(32, 8, 64, 2048), (32, 8, 128, 4096)]), kinds)
def test_rows_keep_their_bits_at_model_shapes(device, seed, dtype, T, shape, kind):
    check_rows_keep_their_bits(norm_qkv, draw(seed, T, shape, dtype, device, kind=kind))


def test_control_a_row_that_sees_the_batch_is_caught(device):
    arguments = draw(0, 20, (4, 2, 20, 64), torch.float32, device)
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(lambda **a: norm_qkv(**a | dict(x=a["x"] + 1e-6 * a["x"].mean())), arguments)


def check_pads(op, arguments, live, poison):
    rows = ("x", "positions", "slot_mapping", "q_out")
    want = run(norm_qkv, arguments | {name: arguments[name][:live].clone() for name in rows})
    poisoned = {name: arguments[name].clone() for name in rows}
    poisoned["x"][live:], poisoned["positions"][live:], poisoned["slot_mapping"][live:] = poison, 2, PAGES * PAGE * 2 - 1
    got = run(op, arguments, counter(live, arguments["x"].device), **poisoned)
    assert_same(got.q_out, torch.cat([want.q_out, torch.zeros_like(got.q_out[live:])]))
    assert_same(got.k_cache, want.k_cache)
    assert_same(got.v_cache, want.v_cache)


@given(seeds, dtypes, st.sampled_from([0, 1, 17]), st.sampled_from([0, 1, 20]), shapes, poisons, st.booleans(), kinds)
def test_pads_are_zero_and_write_nothing(device, seed, dtype, live, pads, shape, poison, is_split, kind):
    check_pads(norm_qkv, draw(seed, live + pads, shape, dtype, device, is_split=is_split, kind=kind), live, poison)


def test_control_written_pads_are_caught(device):
    with pytest.raises(AssertionError):
        check_pads(lambda num_tokens, **a: norm_qkv(**a), draw(0, 5, (4, 2, 20, 64), torch.float16, device), 3, 1.0)


@given(seeds, dtypes, shapes)
def test_strides_and_head_major_pages(device, seed, dtype, shape):
    """A strided x, and caches that are the halves of one tensor of [page, head, token] give the bits of plain ones."""
    arguments = draw(seed, 5, shape, dtype, device)
    want, (N, P, KV, D) = run(norm_qkv, arguments), arguments["k_cache"].shape
    both = torch.full((N, KV, P, 2 * -(-D // 8) * 8), 7.0, dtype=dtype, device=device)
    caches = {name: half[..., :D].transpose(1, 2) for name, half in zip(("k_cache", "v_cache"), both.chunk(2, -1), strict=True)}
    q_out = arguments["q_out"].clone()
    norm_qkv(**arguments | caches | dict(x=strided(arguments["x"]) if shape[3] % 8 == 0 else arguments["x"], q_out=q_out))
    assert_same(q_out, want.q_out)
    assert_same(caches["k_cache"], want.k_cache)
    assert_same(caches["v_cache"], want.v_cache)


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_exact(device, kind):
    """At position 0 nothing turns; entries of x are 2 or -2, so 1 / rms is 0.5."""
    arguments = draw(1, 5, (2, 1, 16, 256), torch.float16, device, has_norms=False, kind=kind, integers=True)
    change = dict(x=2 * (arguments["x"] > 0) - 2 * (arguments["x"] <= 0).half(), norm=arguments["norm"].round().clamp(-2, 2), eps=0.0,
                  positions=torch.zeros_like(arguments["positions"]), slot_mapping=torch.arange(5, device=device))
    got, want = run(norm_qkv, arguments, **change), twin_of(arguments | change, torch.float64)
    for name in vars(got):
        assert_same(getattr(got, name), getattr(want, name).half())


@pytest.mark.parametrize("change, error, words", [
    (dict(weight=torch.ones(30, 8)), ValueError, r"norm_qkv: weight: got shape \[30, 8\], expected \[32, 8\]"),
    (dict(q_out=torch.ones(3, 3, 8), k_cache=torch.ones(2, 4, 2, 8), v_cache=torch.ones(2, 4, 2, 8)), ValueError,
     r"norm_qkv: k_cache: got shape \[2, 4, 2, 8\], expected pages, and heads"),
    (dict(cos_sin=torch.ones(9, 10)), ValueError, "norm_qkv: cos_sin: got 10 columns, expected an even number, 2 to D = 8"),
    (dict(q_norm=torch.ones(9)), ValueError, r"norm_qkv: q_norm: got shape \[9\], expected \[8\]"),
    (dict(weight=Quantized(torch.ones(31, 8).to(weights.FP8), torch.ones(31))), ValueError,
     r"norm_qkv: weight.weight: got shape \[31, 8\], expected \[32, 8\]"),
    (dict(weight=Quantized(torch.ones(32, 32).int(), torch.ones(1, 31).int())), ValueError,
     r"norm_qkv: weight.scale: got shape \[1, 31\], expected \[any, 32\]"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(x=torch.ones(3, 8), norm=torch.ones(8), weight=torch.ones(32, 8), eps=1e-5, positions=torch.ones(3, dtype=torch.int32),
                     cos_sin=torch.ones(9, 8), slot_mapping=torch.ones(3, dtype=torch.int64), k_cache=torch.ones(2, 4, 1, 8),
                     v_cache=torch.ones(2, 4, 1, 8), q_out=torch.ones(3, 2, 8)) | change
    move = lambda v: Quantized(*map(move, v)) if isinstance(v, Quantized) else v.to(device) if isinstance(v, torch.Tensor) else v
    arguments = {name: move(v) for name, v in arguments.items()}
    with pytest.raises(error, match=words):
        norm_qkv(**arguments | dict(weight=Weight("", arguments["weight"], None)))
