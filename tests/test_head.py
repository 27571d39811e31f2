"""The head against the two nodes that it stands for, bit for bit, against its twin, and what it leaves to `sample`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.head as twin
import reference.linear as products
import reference.sampling as draws
from gkernels.kernels import head as room
from gkernels.kernels import linear, rmsnorm, sampling
from tests import weights
from tests.close import NEAR, assert_same
from tests.strategies import dtypes, poisons, randn, scaled, seeds
from tests.weights import kinds

INF, NAN = float("inf"), float("nan")
shapes = st.sampled_from([(1, 1), (3, 5), (64, 100), (300, 64), (600, 256)])               # V, K
temperatures = st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.0, 30.0, 1e4, -1.0, NAN, INF])
EPS, UNTOUCHED = 1e-5, -7


def batch(seed, R, shape, dtype, device, kind="plain", bias=None, index=None, **given):
    """The arguments of `draw`: each option a number for all rows, or one a row."""
    V, K = shape
    R = R if index is None else len(index)
    x, norm = randn(seed, 5 if index is not None else R, K, dtype=dtype, device=device), randn(seed + 1, K, dtype=dtype, device=device)
    row = lambda value, kind: torch.as_tensor(value, dtype=kind, device=device).expand(R).clone()
    options = dict(temperature=(0.8, torch.float32), seed=(range(seed, seed + R), torch.int64), position=(9, torch.int32),
                   seq_lens=(1, torch.int32), status=(0, torch.int32))
    return dict(scaled=scaled(rmsnorm.scale, x, norm), weight=weights.draw(seed + 2, kind, V, K, dtype, device).given, eps=EPS,
                **{name: row(given.get(name, default), kind) for name, (default, kind) in options.items()},
                bias=None if bias is None else torch.as_tensor(bias, dtype=dtype, device=device).expand(V).clone(),
                index=None if index is None else torch.tensor(index, dtype=torch.int32, device=device))


def logits_of(a):
    return linear.norm_linear(a["scaled"], a["weight"], EPS, a["bias"], dtype=torch.float32, index=a["index"])


def two_nodes(a):
    """What norm_linear and sample make of a batch: tokens and status."""
    status, off = a["status"].clone(), torch.zeros_like(a["status"])
    tokens = sampling.sample(logits_of(a), a["temperature"], off, off.float() + 1, off.float(), a["seed"], a["position"], a["seq_lens"], status)
    return tokens, status


def check_equals_two_nodes(draw, a):
    want, want_status = two_nodes(a)
    assert_same(draw(**a), want)
    assert_same(a["status"], want_status)


@given(seeds, dtypes, st.sampled_from([1, 2, 17, 70]), shapes, kinds, st.data())
def test_equals_two_nodes(device, seed, dtype, R, shape, kind, data):
    heat = data.draw(st.lists(temperatures, min_size=R, max_size=R))
    lens = data.draw(st.lists(st.integers(0, 3), min_size=R, max_size=R))
    check_equals_two_nodes(room.draw, batch(seed, R, shape, dtype, device, kind, temperature=heat, seq_lens=lens, position=2**31 - 1))


@pytest.mark.parametrize("kind", ["plain", "fp8 row", "fp8 block", "int4 32", "int4 128"])
@pytest.mark.parametrize("R", [1, 16, 17, 60])
def test_equals_two_nodes_in_the_tiles_of_a_real_vocabulary(device, kind, R):
    """From 132 tiles of 64 rows on, which a GPU multiplies by another instruction than smaller ones."""
    check_equals_two_nodes(room.draw, batch(R, R, (132 * 64, 256), torch.float16, device, kind, temperature=[0.0, 0.8] * (R // 2) + [1.0] * (R % 2)))


@given(seeds, dtypes, st.lists(st.sampled_from([0, 1, 4, -1, 5, 2**31 - 1, -2**31]), min_size=1, max_size=20), shapes, temperatures)
def test_rows_are_gathered(device, seed, dtype, index, shape, temperature):
    """A negative index is a row of zeros, one that does not exist has no token."""
    check_equals_two_nodes(room.draw, batch(seed, None, shape, dtype, device, index=index, temperature=temperature))


@given(seeds, st.lists(st.sampled_from([0.0, 1.0, INF, -INF, NAN]), min_size=3, max_size=3), st.sampled_from([0.0, 0.7]))
def test_odd_logits(device, seed, odd, temperature):
    """Infinity wins, minus infinity and NaN are no tokens, in one tile or in several."""
    bias = torch.zeros(600)
    bias[[3, 4, 590]] = torch.tensor(odd)
    check_equals_two_nodes(room.draw, batch(seed, 3, (600, 16), torch.float32, device, bias=bias, temperature=temperature))
    check_equals_two_nodes(room.draw, batch(seed, 3, (3, 16), torch.float32, device, bias=odd, temperature=temperature))


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1e4])
def test_ties_go_to_the_lowest_id(device, temperature):
    a = batch(0, 40, (600, 16), torch.float32, device, temperature=temperature)
    a["weight"].zero_()
    check_equals_two_nodes(room.draw, a)
    assert temperature or not room.draw(**a).any()


def check_equals_reference(draw, seed, device, R=64, shape=(600, 64)):
    a = batch(seed, R, shape, torch.float32, device, temperature=[0.0, 0.5, 1.0, 3.0] * (R // 4))
    wide = {name: t.double() for name, t in zip("xs", a["scaled"], strict=True)}
    logits, off = products.norm_linear((wide["x"], wide["s"]), a["weight"].double(), EPS), torch.zeros_like(a["status"])
    scores = draws.scores(logits, a["temperature"], off, off.float() + 1, off.float(), a["seed"], a["position"])
    best = torch.where((a["temperature"] > 0)[:, None], scores, logits)
    first, second = best.topk(2, dim=-1).values.T
    size = logits.abs().amax(-1) / torch.where(a["temperature"] > 0, a["temperature"], 1.0)
    decided = first - second > NEAR * (1 + size)
    assert decided.float().mean() > 0.9
    want, got = twin.draw(**a | dict(status=off.clone())), draw(**a)
    assert_same(got[decided], want[decided])


@given(seeds)
def test_equals_reference(device, seed):
    check_equals_reference(room.draw, seed, device)


@pytest.mark.parametrize("broken", [
    lambda a: a | dict(position=a["position"] + 1), lambda a: a | dict(seed=a["seed"].roll(1)),
    lambda a: a | dict(temperature=a["temperature"] * 1.5), lambda a: a | dict(weight=a["weight"].roll(1, 0)), lambda a: a | dict(eps=1.0),
], ids=["another position", "another seed", "another temperature", "another token's weight", "another eps"])
def test_control_another_draw_is_caught(device, broken):
    check_equals_reference(room.draw, 0, device)
    with pytest.raises(AssertionError):
        check_equals_reference(lambda **a: room.draw(**broken(a)), 0, device)


def check_company(draw, device, seed, dtype, shape):
    """A row's token is that of the row alone."""
    a = batch(seed, 66, shape, dtype, device, temperature=[0.0, 0.8, 1.0] * 22)
    tokens = draw(**a)
    for row in (0, 1, 65):
        alone = a | {name: a[name][row:row + 1].clone() for name in ("temperature", "seed", "position", "seq_lens", "status")}
        alone["scaled"] = linear.Scaled(*(t[row:row + 1].clone() for t in a["scaled"]))
        assert_same(draw(**alone), tokens[row:row + 1])


@given(seeds, dtypes, shapes)
def test_company_changes_no_token(device, seed, dtype, shape):
    check_company(room.draw, device, seed, dtype, shape)


def test_control_noise_by_row_is_caught(device):
    def by_row(**a):
        return room.draw(**a | dict(seed=torch.arange(len(a["seed"]), device=device)))

    with pytest.raises(AssertionError):
        check_company(by_row, device, 0, torch.float32, (600, 64))


def both(a, keeps, top_k, poison):
    """The head for some rows, `sample` with top-k for those that keep their logits: tokens, status and logits."""
    R, (V, device) = len(keeps), (len(a["weight"]), a["status"].device)
    logits, out = torch.full((R, V), poison, device=device), torch.full((R,), UNTOUCHED, dtype=torch.int32, device=device)
    workspace = room.Workspace.allocate(R, V, a["scaled"].x.dtype, device)
    for t in vars(workspace).values():
        t.fill_(-1)
    room.draw_out(**a, workspace=workspace, out=out, keeps=keeps, logits=logits)
    assert_same(out[keeps != 0], torch.full_like(out, UNTOUCHED)[keeps != 0])
    off, left = torch.zeros(R, device=device), sampling.Workspace.allocate(R, V, device)
    sampling.sample_out(logits, a["temperature"], top_k, off + 1, off, a["seed"], a["position"], a["seq_lens"], a["status"], left, out, keeps=keeps)
    assert not left.counts.any()
    return out, a["status"], logits


@given(seeds, dtypes, st.lists(st.sampled_from([0, 0, 1, -3]), min_size=1, max_size=20), shapes, poisons)
def test_rows_that_keep_their_logits(device, seed, dtype, keeps, shape, poison):
    """Their logits are those of norm_linear, others' stay as they are; each row's token is that of `sample`, over whatever the others left."""
    a, keeps = batch(seed, len(keeps), shape, dtype, device), torch.tensor(keeps, dtype=torch.int32, device=device)
    want, top_k = logits_of(a), torch.where(keeps != 0, 2, 0).int()
    off, status = torch.zeros_like(a["temperature"]), a["status"].clone()
    tokens = sampling.sample(want, a["temperature"], top_k, off + 1, off, a["seed"], a["position"], a["seq_lens"], status)
    got, got_status, logits = both(a, keeps, top_k, poison)
    assert_same(got, tokens)
    assert_same(got_status, status)
    assert_same(logits[keeps != 0], want[keeps != 0])
    assert_same(logits[keeps == 0], torch.full_like(want, poison)[keeps == 0])


def test_no_rows(device):
    assert room.draw(**batch(0, 0, (5, 16), torch.float32, device)).shape == (0,)


@pytest.mark.parametrize("name, value, words", [
    ("temperature", lambda t: t[:1], r"temperature: got .*expected"), ("seed", lambda t: t.int(), "seed: got"),
    ("weight", lambda t: t[:, :8], "weight: got"), ("index", lambda t: torch.zeros(2, 2, dtype=torch.int32), "index: got"),
    ("bias", lambda t: torch.zeros(3), "bias: got"),
])
def test_bad_arguments_are_named(device, name, value, words):
    a = batch(0, 2, (5, 16), torch.float32, device)
    with pytest.raises((ValueError, TypeError), match=rf"gkernels\.draw: {words}"):
        room.draw(**a | {name: value(a[name]).to(device) if a[name] is not None else value(None).to(device)})


def test_keeps_and_logits_come_together(device):
    a = batch(0, 2, (5, 16), torch.float32, device)
    workspace, ints = room.Workspace.allocate(2, 5, torch.float32, device), torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="keeps: got one of keeps and logits, expected both or none"):
        room.draw_out(**a, workspace=workspace, out=ints, keeps=ints)
    with pytest.raises(ValueError, match=r"workspace\.tops: got 1 rows, expected at least 2"):
        room.draw_out(**a, workspace=room.Workspace.allocate(1, 5, torch.float32, device), out=ints)
    logits, rows = torch.zeros(2, 5, device=device), torch.zeros(2, device=device)
    with pytest.raises(ValueError, match="keeps: got probs too"):
        sampling.sample_out(logits, rows, ints, rows + 1, rows, a["seed"], ints, ints, ints, sampling.Workspace.allocate(2, 5, device), ints,
                            probs=logits.clone(), keeps=ints)
