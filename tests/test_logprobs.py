"""logprobs against its twin (a stable sort in float64), and what the twin does not show."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.logprobs as twin
from gkernels.kernels import logprobs as room
from tests.close import assert_close, assert_same
from tests.strategies import dtypes, far, poisons, randn, seeds, strided

INF, NAN = float("inf"), float("nan")
vocabularies = st.sampled_from([1, 2, 16, 300])
kinds = st.sampled_from(["normal", "ties", "flat", "peaked", "holes", "infinite"])
ns = st.sampled_from([0, 1, 5, 20])
configs = st.sampled_from([room.Config(512, 1), room.Config(128, 1)])


def draw_logits(seed, kind, R, V, dtype, device):
    x = randn(seed, R, V) * 3
    x = {"normal": x, "ties": x.round(), "flat": torch.where(x > 0, 0.0, -0.0), "peaked": x * 20, "holes": x.masked_fill(x > 1, NAN),
         "infinite": x.masked_fill(x > 4, INF).masked_fill(x < -1, -INF)}[kind]
    return x.to(device, dtype)


def ints(values, device):
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def check_equals_reference(logprobs, logits, token, n):
    """Ids and ranks bit for bit, logarithms by the float64 twin."""
    lens = ints([1] * len(token), token.device)
    got = vars(logprobs(logits, lens, token, n)).values()
    want, plain = twin.logprobs(logits.double(), lens, token, n), twin.logprobs(logits, lens, token, n)
    for mine, its in zip(got, want, strict=True):
        assert mine.shape == its.shape
        if mine.dtype == torch.int32:
            assert_same(mine, its)
    floats = lambda results: torch.cat([t.flatten() for t in results if t.is_floating_point()])
    assert_close(floats(got), floats(want), floats(plain))


@given(seeds, dtypes, kinds, vocabularies, ns, st.booleans(), configs)
def test_equals_reference(device, monkeypatch, seed, dtype, kind, V, n, is_strided, config):
    monkeypatch.setattr(room, "config", lambda V: config)
    logits = draw_logits(seed, kind, 3, V, dtype, device)
    token = ints([seed % V, V - 1, [-1, V, 2**31 - 1, -2**31, 0][seed % 5]], device)
    check_equals_reference(room.logprobs, strided(logits) if is_strided else logits, token, n)


@pytest.mark.parametrize("V", [999, 4097, *(pytest.param(V, marks=pytest.mark.gpu) for V in (32000, 128256, room.MAX_V))])
def test_equals_reference_at_vocabulary(device, V):
    logits = randn(V, 2, V, device=device) * 3
    logits[:, -1] += 9.0                             # the last token of the last, ragged chunk counts
    check_equals_reference(room.logprobs, logits, ints([V - 1, V // 2], device), room.MAX_N)


def ties_by_highest_id(logits, lens, token, n):
    out, last = room.logprobs(logits.flip(1), lens, logits.shape[1] - 1 - token, n), logits.shape[1] - 1
    return room.Logprobs(out.logsumexp, out.logprob, out.rank, last - out.top_ids, out.top_logprobs)


@pytest.mark.parametrize("broken, words", [
    (ties_by_highest_id, "elements differ"),
    (lambda logits, lens, token, n: room.logprobs(logits, lens, token + 1, n), "elements differ"),
    (lambda logits, lens, token, n: room.logprobs(logits[:, :-1], lens, token, n), "elements differ|error"),
    (lambda logits, lens, token, n: room.Logprobs(*(t / math.log(2) if t.is_floating_point() else t
                                                    for t in vars(room.logprobs(logits, lens, token, n)).values())), "error")],
    ids=["ties by the highest id", "another token", "the last token left out", "binary logarithms"])
def test_wrong_logprobs_are_caught(device, broken, words):
    logits = draw_logits(0, "ties", 3, 300, torch.float32, device)
    logits[:, -1] = 5.0                              # below all of the top, but in the sum
    with pytest.raises(AssertionError, match=words):
        check_equals_reference(broken, logits, ints([0, 5, 7], device), 5)


@given(seeds, dtypes, st.integers(1, 20), st.permutations(range(20)))
def test_a_whole_vocabulary_adds_up(device, seed, dtype, V, order):
    """With all tokens among the top, probabilities add up to 1, ids are each token once, and its rank is its place."""
    logits = draw_logits(seed, "ties", 1, V, dtype, device)
    token = ints([order[0] % V], device)
    out = room.logprobs(logits, ints([1], device), token, V)
    assert sorted(out.top_ids[0].tolist()) == list(range(V)) and out.top_ids[0, out.rank - 1].tolist() == token.tolist()
    assert_same(out.top_logprobs[0, out.rank - 1], out.logprob)
    assert_close(out.top_logprobs.double().exp().sum(1).float(), torch.ones(1, device=device), torch.ones(1, device=device))


def check_rows(logprobs, device, seed, dtype, order, poison):
    """Each row alone equals the row in any place among others, of which some are unused."""
    logits, token = draw_logits(seed, "normal", 4, 300, dtype, device), ints([3, 200, 0, 299], device)
    alone = [logprobs(logits[r:r + 1].clone(), ints([1], device), token[r:r + 1].clone(), 3) for r in range(4)]
    moved, lens = logits[order].clone(), ints([2, 0, 7, -1], device)
    moved[1], moved[3] = poison, poison
    got = logprobs(moved, lens, ints([*token[order].tolist()], device), 3)
    for name, t in vars(got).items():
        for row in (0, 2):
            assert_same(t[row], getattr(alone[order[row]], name)[0])
        for row in (1, 3):
            assert_same(t[row], torch.full_like(t[row], -1 if name == "top_ids" else 0)), name


@given(seeds, dtypes, st.permutations(range(4)), poisons)
def test_rows_are_their_own_and_unused_ones_zeros(device, seed, dtype, order, poison):
    check_rows(room.logprobs, device, seed, dtype, order, poison)


@pytest.mark.parametrize("broken", [
    lambda logits, lens, token, n: room.logprobs(logits + 1e-3 * logits.nan_to_num(0.0).mean(), lens, token, n),
    lambda logits, lens, token, n: room.logprobs(logits, lens * lens, token, n)], ids=["sees the batch", "a negative length is live"])
def test_rows_that_leak_are_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows(broken, device, 0, torch.float32, [2, 0, 3, 1], 6e4)


@pytest.mark.parametrize("row, token, expected", [
    ([1.0, NAN, 1.0, -INF], 1, (1 + math.log(2), -INF, 3, [0, 2, -1, -1, -1], [-math.log(2)] * 2 + [-INF] * 3)),
    ([-INF, NAN, -INF, NAN], 2, (-INF, -INF, 3, [-1] * 5, [-INF] * 5)),
    ([INF, 3.0, INF, 2.0], 3, (INF, -INF, 4, [0, 2, 1, 3, -1], [-math.log(2)] * 2 + [-INF] * 3)),
    ([INF, 3.0, INF, 2.0], 2, (INF, -math.log(2), 2, [0, 2, 1, 3, -1], [-math.log(2)] * 2 + [-INF] * 3)),
    ([0.0, -0.0, 0.0, -0.0], 1, (math.log(4), -math.log(4), 2, [0, 1, 2, 3, -1], [-math.log(4)] * 4 + [-INF])),
    ([0.0, 0.0, 0.0, 0.0], -1, (math.log(4), NAN, 0, [0, 1, 2, 3, -1], [-math.log(4)] * 4 + [-INF])),
], ids=["NaN is -inf", "no token", "inf wins", "inf shares", "zeros tie", "no choice"])
def test_odd_rows(device, row, token, expected):
    logits = torch.tensor([row], device=device)
    out = vars(room.logprobs(logits, ints([1], device), ints([token], device), 5)).values()
    for got, want in zip(out, expected, strict=True):
        want = torch.tensor(want, dtype=torch.float64, device=device).reshape(got.shape)
        assert_close(got.float(), want, want.float())


def check_launches_in_a_row(device, spoil):
    """Two launches that share a workspace, with `spoil(workspace)` between them."""
    workspace, out = room.Workspace.allocate(6, 300, 5, device), room.Logprobs.allocate(3, 5, device)
    lens, token = ints([1, 0, 1], device), ints([4, 5, 6], device)
    for seed in (1, 2):
        logits = draw_logits(seed, "normal", 3, 300, torch.float32, device)
        room.logprobs_out(logits, lens, token, workspace, out)
        for got, want in zip(vars(out).values(), vars(room.logprobs(logits, lens, token, 5)).values(), strict=True):
            assert_same(got, want)
        assert not workspace.counts.any()
        spoil(workspace)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(room, "config", lambda V: room.Config(128, 1))


def junk(workspace):
    for t in (workspace.tops, workspace.sums, workspace.before, workspace.keys):
        t.fill_(7)


def test_a_workspace_serves_many_launches(device, small_chunks):
    check_launches_in_a_row(device, junk)


def test_a_workspace_left_dirty_is_caught(device, small_chunks):
    with pytest.raises(AssertionError):
        check_launches_in_a_row(device, lambda workspace: workspace.counts.fill_(1))


def check_far(logprobs, device):
    logits, lens, token = randn(0, 3, 100, dtype=torch.float16, device=device), ints([1, 1, 1], device), ints([7, 70, 99], device)
    for got, want in zip(vars(logprobs(far(logits, 0), lens, token, 3)).values(), vars(room.logprobs(logits, lens, token, 3)).values(), strict=True):
        assert_same(got, want)


def test_offsets_pass_32_bits(device):
    """Three rows, of which the last begins past element 2^31."""
    check_far(room.logprobs, device)


def test_another_row_past_32_bits_is_caught(device):
    def broken(logits, *rest):
        logits[-1] = logits[0].clone()
        return room.logprobs(logits, *rest)

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(broken, device)


def test_no_rows(device):
    out = room.logprobs(torch.ones(0, 8, device=device), ints([], device), ints([], device), 2)
    assert [list(t.shape) for t in vars(out).values()] == [[0], [0], [0], [0, 2], [0, 2]]


@pytest.mark.parametrize("change, error, words", [
    (dict(logits=torch.ones(2, 0)), ValueError, "logprobs: logits: got V = 0, expected 1 to 262144"),
    (dict(logits=torch.ones(8, 2).T), ValueError, r"logprobs: logits: .* call .contiguous\(\)"),
    (dict(token=torch.zeros(2, dtype=torch.int64)), TypeError, "logprobs: token: got torch.int64, expected torch.int32; convert"),
    (dict(seq_lens=torch.zeros(3, dtype=torch.int32)), ValueError, r"logprobs: seq_lens: got shape \[3\], expected \[2\]"),
    (dict(n=21), ValueError, r"logprobs: out.top_ids: got n = 21, expected 0 to 20"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(logits=torch.ones(2, 8), seq_lens=ints([1, 1], "cpu"), token=ints([0, 0], "cpu"), n=3) | change
    with pytest.raises(error, match=words):
        room.logprobs(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


def test_a_workspace_of_another_size_is_named(device):
    logits, one = torch.ones(2, 8, device=device), ints([1, 1], device)
    for workspace, words in ((room.Workspace.allocate(1, 8, 3, device), "workspace.tops: got 1 rows, expected at least the 2 of logits"),
                             (room.Workspace.allocate(2, 8, 4, device), r"workspace.keys: got shape \[2, 1, 4\], expected \[any, 1, 3\]")):
        with pytest.raises(ValueError, match=words):
            room.logprobs_out(logits, one, one, workspace, room.Logprobs.allocate(2, 3, device))
