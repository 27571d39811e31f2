"""logprobs against its twin, a stable sort in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.logprobs as twin
from gkernels.kernels import logprobs as room
from tests.close import assert_close, assert_same
from tests.strategies import dtypes, poisons, randn, seeds, strided

INF, NAN = float("inf"), float("nan")
vocabularies = st.sampled_from([1, 2, 31, 300, 2049, 5000])
counts = st.sampled_from([0, 1, 5, 20])


def draw(seed, R, V, kind, dtype, device):
    x = randn(seed, R, V) * 3
    x = {"normal": x, "ties": x.round(), "flat": x * 0, "holes": x.masked_fill(x > 2, -INF)}[kind].to(device, dtype)
    random = torch.Generator().manual_seed(seed)
    token = torch.randint(0, V, (R,), generator=random).to(torch.int32).to(device)
    return x, torch.tensor([3, 0, 1, 9][:R], dtype=torch.int32, device=device), token


def check_equals_reference(logprobs, logits, lens, token, n):
    got = logprobs(logits, lens, token, n)
    want, plain = (twin.logprobs(x, lens, token, n) for x in (logits.double(), logits))
    for name, exact, w, p in zip(("logsumexp", "logprob", "rank", "top_ids", "top_logprobs"), (0, 0, 1, 1, 0), want, plain, strict=True):
        g = getattr(got, name)
        if exact:
            assert_same(g, w)
        elif g.numel():
            assert_close(g, w, p)


@given(seeds, dtypes, st.sampled_from(["normal", "ties", "flat", "holes"]), vocabularies, counts, st.booleans())
def test_equals_reference(device, seed, dtype, kind, V, n, is_strided):
    logits, lens, token = draw(seed, 4, V, kind, dtype, device)
    check_equals_reference(room.logprobs, strided(logits) if is_strided else logits, lens, token, n)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [32000, 128256, room.MAX_V])
def test_equals_reference_at_vocabulary(device, V):
    check_equals_reference(room.logprobs, *draw(V, 4, V, "normal", torch.float32, device), 20)


def test_a_rank_that_counts_equals_is_caught(device):
    def broken(logits, lens, token, n):
        return room.logprobs(logits, lens, token + 1, n)

    with pytest.raises(AssertionError):
        check_equals_reference(broken, torch.zeros(2, 40, device=device), *(torch.ones(2, dtype=torch.int32, device=device) for _ in range(2)), 3)


@given(seeds, st.permutations(range(4)), counts)
def test_row_order_changes_no_bit(device, seed, order, n):
    logits, lens, token = draw(seed, 4, 2500, "normal", torch.float32, device)
    want, got = room.logprobs(logits, lens, token, n), room.logprobs(logits[order].clone(), lens[order], token[order], n)
    for a, b in zip(vars(got).values(), vars(want).values(), strict=True):
        assert_same(a, b[order])


@given(seeds, poisons, st.sampled_from([40, 2500]))
def test_bad_rows_touch_no_other(device, seed, poison, V):
    logits, lens, token = draw(seed, 4, V, "normal", torch.float32, device)
    want = room.logprobs(logits, lens, token, 3)
    logits[0] = poison
    token[3] = V
    got = room.logprobs(logits, lens, token, 3)
    for a, b in zip(vars(got).values(), vars(want).values(), strict=True):
        assert_same(a[1:3], b[1:3])
    assert got.logprob[3].isnan() and got.rank[3] == 0


def test_a_workspace_serves_launch_after_launch(device):
    logits, lens, token = draw(5, 4, 5000, "normal", torch.float32, device)
    workspace = room.Workspace.allocate(4, 5000, 5, device)
    outs = [room.Logprobs.allocate(4, 5, device) for _ in range(2)]
    for out in outs:
        room.logprobs_out(logits, lens, token, workspace, out)
        assert not workspace.counts.any()
    for a, b in zip(*(vars(out).values() for out in outs), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("change, error, words", [
    (dict(n=21), ValueError, "logprobs: out.top_ids: got n = 21, expected 0 to 20"),
    (dict(token=torch.zeros(3)), TypeError, "logprobs: token: got torch.float32, expected torch.int32"),
    (dict(seq_lens=torch.zeros(2, dtype=torch.int32)), ValueError, r"logprobs: seq_lens: got shape \[2\], expected \[3\]"),
    (dict(logits=torch.zeros(3, 8, dtype=torch.int32)), TypeError, "logprobs: logits: got torch.int32"),
])
def test_misuse_is_named(device, change, error, words):
    one = torch.ones(3, dtype=torch.int32)
    arguments = dict(logits=torch.zeros(3, 8), seq_lens=one, token=one, n=2) | change
    with pytest.raises(error, match=words):
        room.logprobs(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()})
