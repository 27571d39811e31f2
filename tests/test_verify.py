"""verify against its twin, the distribution of what it emits, and speculative decoding against plain decoding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference.ngram as ngram_twin
import reference.sampling as sampling_twin
import reference.verify as twin
from gkernels.kernels import ngram
from gkernels.kernels import verify as room
from tests.close import CHI_SQUARE_BOUND, assert_same
from tests.strategies import randn, seeds

INF, NAN = float("inf"), float("nan")
few = settings(max_examples=settings.default.max_examples // 2)
vocabularies = st.sampled_from([1, 2, 16, 300])
ragged = st.lists(st.integers(-1, 4), min_size=1, max_size=5)           # drafts of each request; -1 for an unused one
configs = st.sampled_from([room.Config(512, 1), room.Config(128, 1)])


def ints(values, device="cpu"):
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def starts_of(num_drafts, device="cpu"):
    return ints([sum(n + 1 for n in num_drafts[:r]) for r in range(len(num_drafts) + 1)], device)


def distributions(seed, T, V):
    """Peaked, flat and with holes; each sums to 1 but for rounding."""
    x = randn(seed, T, V) * torch.tensor([0.0, 1.0, 6.0])[torch.arange(T) % 3, None]
    x[1::2] = torch.where(randn(seed + 1, T, V) > 0.5, -INF, x)[1::2]
    x[:, seed % V] = x[:, seed % V].clamp(min=-5.0)
    return x.softmax(-1)


def draw_from(p, seed):
    return torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed))[:, 0].int()


def batch(seed, num_drafts, V, device, mode="mixed", pads=2):
    """The arguments of `verify`: drafts drawn from q, of which target tokens often repeat one."""
    T, R = sum(n + 1 for n in num_drafts) + pads, len(num_drafts)
    p, q = distributions(seed, T, V), distributions(seed + 2, T, V)
    draft, sampled, random = draw_from(q, seed), draw_from(p, seed + 1), torch.Generator().manual_seed(seed)
    sampled = torch.where(torch.rand(T, generator=random) < 0.6, draft, sampled)
    is_drawn = {"mixed": torch.randint(0, 2, (R,), generator=random), "drawn": torch.ones(R), "alike": torch.zeros(R)}[mode]
    probs = room.Probabilities(p, q, ints(is_drawn), torch.randint(-2**63, 2**63 - 1, (R,), generator=random), ints(torch.arange(T) * 7 + seed % 999))
    probs = room.Probabilities(**{name: t.to(device) for name, t in vars(probs).items()})
    return dict(draft=draft.to(device), sampled=sampled.to(device), query_start_loc=starts_of(num_drafts, device), status=ints([0] * R, device), K=4,
                probs=probs)


def copied(arguments):
    return arguments | dict(status=arguments["status"].clone())


def check_equals_reference(verify, arguments):
    mine, its = copied(arguments), copied(arguments)
    for got, want in zip((*verify(**mine), mine["status"]), (*twin.verify(**its), its["status"]), strict=True):
        assert got.tolist() == want.tolist(), f"{got.tolist()}, expected {want.tolist()}"
        assert_same(got, want)


@given(seeds, ragged, vocabularies, st.sampled_from(["mixed", "drawn", "alike", None]), configs)
def test_equals_reference(device, monkeypatch, seed, num_drafts, V, mode, config):
    monkeypatch.setattr(room, "config", lambda V: config)
    arguments = batch(seed, num_drafts, V, device, mode or "mixed")
    check_equals_reference(room.verify, arguments if mode else arguments | dict(probs=None))


@pytest.mark.parametrize("V", [4097, *(pytest.param(V, marks=pytest.mark.gpu) for V in (128256, 262144))])
def test_equals_reference_at_vocabulary(device, V):
    arguments = batch(V, [3, 4, 1, 2], V, device, "drawn")
    check_equals_reference(room.verify, arguments)


@pytest.mark.parametrize("broken", [
    lambda probs, **arguments: room.verify(probs=replace(probs, is_drawn=1 - probs.is_drawn), **arguments),
    lambda probs, **arguments: room.verify(probs=replace(probs, seed=probs.seed + 1), **arguments),
    lambda probs, **arguments: room.verify(probs=replace(probs, position=probs.position + 1), **arguments),
    lambda probs, **arguments: room.verify(probs=replace(probs, draft=probs.target), **arguments),
    lambda sampled, **arguments: room.verify(sampled=sampled.roll(1), **arguments),
    lambda draft, **arguments: room.verify(draft=draft.roll(1), **arguments)],
    ids=["the other mode", "another seed", "another position", "q is p", "tokens a row late", "drafts a row late"])
def test_a_wrong_verdict_is_caught(device, broken):
    with pytest.raises(AssertionError, match="expected"):
        for seed in range(4):
            check_equals_reference(broken, batch(seed, [3, 4, 1, 2, 0], 16, device))


def proposal(kind, p):
    """An adversary's distributions for the rows of p."""
    worst = torch.nn.functional.one_hot(p.argmin(-1), p.shape[1])
    return {"p": p, "flat": torch.full_like(p, 1 / 64), "peaked": 0.1 * p + 0.9 * worst, "certain": worst.float(),
            "disjoint": torch.where(p > 0, 0.0, 1 / 32), "near": (p.log() + randn(5, 3, 64) * 0.5).softmax(-1)}[kind]


def targets(kind):
    x = randn(0, 3, 64) * 0.7
    return (x.masked_fill(torch.arange(64) % 2 == 0, -INF) if kind == "disjoint" else x).softmax(-1)


def emitted(verify, p, q, n, seed, device):
    """Tokens and counts of n requests, all judged by the rows of p and q but for the last, which has no draft; their seeds differ. Drafts and the
    target's tokens are drawn by `sample` with the request's own seed, so that their noise at a place is the same."""
    rows, seeds = len(p), torch.arange(n) + seed * n
    at, one, zero = torch.arange(rows).repeat(n), torch.ones(rows * n), torch.zeros(rows * n, dtype=torch.int32)
    draw = lambda p: sampling_twin.sample(p.log().repeat(n, 1), one, zero, one, one * 0, seeds.repeat_interleave(rows), at, zero + 1, zero.clone())
    probs = room.Probabilities(p.repeat(n, 1), q.repeat(n, 1), ints([1] * n), seeds, ints(at))
    probs = room.Probabilities(**{name: t.to(device) for name, t in vars(probs).items()})
    tokens, num_accepted = verify(draw(q).to(device), draw(p).to(device), ints(torch.arange(n + 1) * rows, device), ints([0] * n, device),
                                  rows - 1, probs)
    return tokens.cpu().long(), num_accepted.cpu()


def chi_square(tokens, p):
    """Pearson's statistic over the 64 tokens; those without probability must not occur."""
    seen, expected = torch.bincount(tokens, minlength=64), p.double() * len(tokens)
    assert not seen[p == 0].any(), "a token outside of the target's support"
    return float(((seen - expected) ** 2 / expected)[p > 0].sum())


def assert_frequency(happened, probability):
    """Within six standard deviations."""
    probability, n = float(probability), len(happened)
    strays = abs(float(happened.double().mean()) - probability)
    assert strays <= 6 * (max(probability * (1 - probability), 1 / n) / n) ** 0.5, f"strays by {strays} from {probability}"


def check_distribution(verify, kind, n, device):
    """The token at each place, where the drafts before it stood, follows the target there; as many drafts stand as p and q have in common."""
    p = targets(kind)
    q = proposal(kind, p)
    tokens, num_accepted = emitted(verify, p, q, n, 1, device)
    for place in range(3):
        reached = num_accepted >= place
        if reached.sum() >= 300:                                                  # the statistic needs some of each token
            assert chi_square(tokens[reached, place], p[place]) < CHI_SQUARE_BOUND, f"place {place}"
    assert_frequency(num_accepted >= 1, torch.minimum(p[0], q[0]).sum().clamp(max=1.0))


KINDS = ["p", "flat", "peaked", "certain", "disjoint", "near"]


@pytest.mark.parametrize("kind", KINDS)
def test_emitted_tokens_follow_the_target(device, kind):
    """The twin's, and the kernel's on a GPU; on a CPU, where a request takes it 20 ms, some of its requests, which are the twin's."""
    check_distribution(twin.verify, kind, 8000, torch.device("cpu"))
    if device.type == "cuda":
        check_distribution(room.verify, kind, 20_000, device)
    p = targets(kind)
    got, want = (emitted(verify, p, proposal(kind, p), 12, 2, device) for verify in (room.verify, twin.verify))
    for mine, its in zip(got, want, strict=True):
        assert_same(mine, its)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_tokens_follow_the_target(device, kind):
    p = targets(kind)
    tokens = torch.cat([emitted(room.verify, p, proposal(kind, p), 20_000, seed, device)[0][:, 0] for seed in range(50)])
    assert chi_square(tokens, p[0]) < CHI_SQUARE_BOUND


def draw_again(draft, sampled, query_start_loc, status, K, probs):
    """Puts the target's own token in the place of a fallen draft."""
    tokens, num_accepted = twin.verify(draft, sampled, query_start_loc, status, K, probs)
    own = sampled.view(-1, K + 1).gather(1, num_accepted[:, None].long())
    return tokens.scatter(1, num_accepted[:, None].long(), own), num_accepted


@pytest.mark.parametrize("broken", [
    lambda *arguments: twin.verify(*arguments[:-1], replace(arguments[-1], draft=arguments[-1].draft * 0)),
    lambda *arguments: twin.verify(*arguments[:-1], replace(arguments[-1], draft=arguments[-1].draft * 1.5)), draw_again],
    ids=["every draft stands", "q too large", "a fallen draft's place taken by p"])
def test_a_biased_verdict_is_caught(broken):
    with pytest.raises(AssertionError, match="place 0"):
        check_distribution(broken, "flat", 8000, torch.device("cpu"))


def check_noise_is_its_own(verify, device):
    """Where draft 0 won over 1 and falls, the draw from the residual of 1 and 2 must not know that the draft's noise at 1 was the smaller."""
    p, q = torch.tensor([[0.0, 0.75, 0.25]]).repeat(2, 1), torch.tensor([[0.5, 0.5, 0.0]]).repeat(2, 1)
    tokens, _ = emitted(verify, p, q, 8000, 0, device)
    assert_frequency(tokens[:, 0] == 1, 0.75)


def test_noise_is_its_own(device):
    check_noise_is_its_own(room.verify if device.type == "cuda" else twin.verify, device)


def test_the_drafts_noise_is_caught(monkeypatch):
    random = twin.random
    monkeypatch.setattr(twin, "random", lambda seed, position: (random(seed, position)[0], seed.expand_as(position)))
    with pytest.raises(AssertionError, match=r"strays by 0\.0[789]"):
        check_noise_is_its_own(twin.verify, torch.device("cpu"))


def check_order(verify, device, seed):
    """Requests in another order, with other pads, at other rows: each emits what it did."""
    num_drafts, order = [3, 0, 4, -1, 2], [4, 2, 3, 0, 1]
    arguments = batch(seed, num_drafts, 16, device)
    want, starts = verify(**copied(arguments)), arguments["query_start_loc"].tolist()
    rows = torch.tensor([0] + [row for r in order for row in range(starts[r], starts[r + 1])], device=device)
    p, moved = arguments["probs"], [num_drafts[r] for r in order]
    probs = room.Probabilities(p.target[rows], p.draft[rows], p.is_drawn[order], p.seed[order], p.position[rows])
    got = verify(arguments["draft"][rows], arguments["sampled"][rows], starts_of(moved, device) + 1, ints([0] * 5, device), 4, probs)
    for mine, its in zip(got, want, strict=True):
        assert_same(mine, its[order])


@given(seeds)
def test_order_of_requests_changes_nothing(device, seed):
    check_order(room.verify, device, seed)


def test_a_verdict_by_row_is_caught(device):
    def broken(draft, sampled, query_start_loc, status, K, probs):
        return room.verify(draft, sampled, query_start_loc, status, K, replace(probs, seed=torch.arange(len(status), device=device)))

    with pytest.raises(AssertionError, match="elements differ"):
        for seed in range(4):
            check_order(broken, device, seed)


def spoil(arguments, what, r):
    """Bad data for request r of 3 drafts, which begins at row `start`; and the flag that it earns."""
    start, probs = int(arguments["query_start_loc"][r]), arguments["probs"]
    if what == "no token":
        arguments["sampled"][start:start + 4] = -1
    elif what == "draft":
        arguments["draft"][start] = [-1, 16, 2**31 - 1, -2**31][start % 4]
    else:
        name, value = what
        getattr(probs, name)[start:start + 3, 5] = value
        if value == INF or value < 0:
            arguments["draft"][start] = 5
    return arguments


BAD = ["no token", "draft", *((name, value) for name in ("target", "draft") for value in (NAN, INF, -1.0))]


def check_bad_data(verify, device, seed, what):
    """Request 1 fails closed with a flag; the others keep their tokens and flags."""
    mode = "alike" if what == "no token" else "drawn"
    good = batch(seed, [2, 3, 1], 16, device, mode)
    good["probs"].draft[3, 5], good["draft"][3] = 1.0, 5                          # the first draft of request 1 falls, but for bad data
    good["probs"].target[3] = torch.where(torch.arange(16, device=device) == 5, 0.0, 1 / 15)
    good["status"] += ints([16, 2, 0], device)
    want = verify(**copied(good))
    bad = spoil(copied(good) | dict(draft=good["draft"].clone(), sampled=good["sampled"].clone(), probs=room.Probabilities(
        **{name: t.clone() for name, t in vars(good["probs"]).items()})), what, 1)
    check_equals_reference(verify, bad)
    tokens, num_accepted = verify(**bad)
    assert tokens[1].tolist() == [-1] * 5 and num_accepted[1] == -1, "a token of bad data"
    assert bad["status"].tolist() == [16, 2 | room.NO_TOKEN, 0]
    for got, expected in zip((tokens, num_accepted), want, strict=True):
        assert_same(got[[0, 2]], expected[[0, 2]])


@few
@given(seeds, st.sampled_from(BAD))
def test_bad_data_stays_in_its_request(device, seed, what):
    check_bad_data(room.verify, device, seed, what)


def test_bad_data_that_passes_is_caught(device):
    def broken(probs, **arguments):
        return room.verify(probs=replace(probs, target=probs.target.nan_to_num(0.0)), **arguments)

    with pytest.raises(AssertionError):
        check_bad_data(broken, device, 0, ("target", NAN))


@pytest.mark.parametrize("starts", [[0, 3, 99, 99], [-1, 3, 7, 9], [0, 5, 3, 9], [0, 6, 7, 9], [2**31 - 2, -2**31, 7, 9],
                                    [0, 3, 2**31 - 1, 2**31 - 1]])
@pytest.mark.parametrize("mode", ["alike", "drawn"])
def test_bad_rows_are_flagged(device, starts, mode):
    """Rows outside of T = 11, in the wrong order, or more than K + 1 = 5."""
    arguments = batch(0, [2, 3, 1], 16, device, mode) | dict(query_start_loc=ints(starts, device))
    check_equals_reference(room.verify, arguments)
    room.verify(**arguments)
    assert room.BAD_LENGTH in arguments["status"].tolist()


def test_unread_rows_change_nothing(device):
    """Probabilities of rows that have no draft, come after the first that fell, or belong to requests that are not drawn."""
    arguments = batch(3, [4, 3, 4, 0], 16, device, "drawn")
    arguments["probs"].is_drawn[1] = 0
    want = room.verify(**copied(arguments))
    poisoned = room.Probabilities(**{name: t.clone() for name, t in vars(arguments["probs"]).items()})
    starts = arguments["query_start_loc"].tolist()
    assert 0 < want[1][0] < 4 or 0 < want[1][2] < 4, "no draft fell, so nothing is shown"
    for r, accepted in enumerate(want[1].tolist()):
        unread = starts[r] if r == 1 else starts[r] + accepted + 1
        poisoned.target[unread:starts[r + 1]], poisoned.draft[unread:starts[r + 1]] = NAN, NAN
    poisoned.target[starts[4]:], poisoned.draft[starts[4]:] = NAN, NAN
    for got, expected in zip(room.verify(**copied(arguments) | dict(probs=poisoned)), want, strict=True):
        assert_same(got, expected)


def test_what_rounding_leaves_of_equal_rows(device):
    """p a trifle below q everywhere, where uniforms of 64 bits fall between the two: nothing is left to draw from, so the draft stays."""
    n = 64
    p, q = torch.full((2 * n, 4), 0.25), torch.full((2 * n, 4), 0.5)
    probs = room.Probabilities(*(t.to(device) for t in (p, q, ints([1] * n), torch.arange(n), ints(torch.arange(2 * n)))))
    draft = ints(torch.arange(2 * n) % 4, device)
    tokens, num_accepted = room.verify(draft, draft, ints(torch.arange(n + 1) * 2, device), ints([0] * n, device), 1, probs)
    assert tokens[:, 0].tolist() == draft[::2].tolist() and 16 < int((num_accepted == 0).sum()) < 48
    none = replace(probs, target=probs.target * 0)
    status = ints([0] * n, device)
    assert (room.verify(draft, draft, ints(torch.arange(n + 1) * 2, device), status, 1, none)[1] == -1).all() and (status == room.NO_TOKEN).all()


def target_tokens(table, last, seed, position, temperature):
    """What a target draws whose logits are the table's line of the last token."""
    full = lambda value, dtype=torch.float32: torch.full((len(last),), value, dtype=dtype)
    return sampling_twin.sample(table[last.long()], full(temperature), full(0, torch.int32), full(1.0), full(0.0), seed, position,
                                full(1, torch.int32), full(0, torch.int32))


def plain(table, prompts, seed, n, temperature):
    """n tokens a request, one at a time."""
    sequences = prompts
    for _ in range(n):
        token = target_tokens(table, sequences[:, -1], seed, ints([sequences.shape[1]] * len(seed)), temperature)
        sequences = torch.cat([sequences, token[:, None]], 1)
    return sequences


def speculative(look_up, verify, table, prompts, seed, n, temperature, K, device):
    """The same by n-gram drafts and verify, all requests in one ragged batch; and how many drafts stood, of how many."""
    (R, first), last = prompts.shape, prompts.shape[1] + n
    history, lengths, stood, drafted = torch.zeros(R, last + K + 1, dtype=torch.int32), torch.full((R,), first), 0, 0
    history[:, :first] = prompts
    while (lengths < last).any():
        limit = (last - lengths - 1).clamp(0, K)
        draft, draft_len = (t.cpu() for t in look_up(history.to(device), ints(lengths, device), ints(limit, device), 1, 3, K))
        num_rows = torch.where(lengths < last, draft_len + 1, 0)
        request, starts = torch.arange(R).repeat_interleave(num_rows), torch.nn.functional.pad(num_rows.cumsum(0), (1, 0))
        place = torch.arange(len(request)) - starts[request]
        inputs = torch.cat([history[torch.arange(R), lengths - 1][:, None], draft], 1)[request, place]
        sampled = target_tokens(table, inputs, seed[request], ints(lengths[request] + place), temperature)
        drafts, status = torch.nn.functional.pad(draft, (0, 1), value=-1)[request, place], ints([0] * R, device)
        tokens, accepted = (t.cpu() for t in verify(drafts.to(device), sampled.to(device), ints(starts, device), status, K))
        assert not status.any() and ((accepted >= 0) == (lengths < last)).all(), "a request without a token"
        for r, stands in enumerate(accepted.tolist()):
            history[r, lengths[r]:lengths[r] + stands + 1] = tokens[r, :stands + 1]
        lengths, stood, drafted = lengths + accepted + 1, stood + int(accepted.clamp(min=0).sum()), drafted + int((num_rows - 1).clamp(min=0).sum())
    return history[:, :last], stood, drafted


def check_speculative(look_up, verify, seed, temperature, K, device, V=8, R=10, n=24):
    """Token for token the plain decoding of random models, whose next token depends on the last: sequences often run in circles."""
    table, random = randn(seed, V, V) * 3, torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, V, (R, 5), generator=random).int()
    seeds = torch.randint(-2**63, 2**63 - 1, (R,), generator=random)
    want = plain(table, prompts, seeds, n, temperature)
    got, stood, drafted = speculative(look_up, verify, table, prompts, seeds, n, temperature, K, device)
    assert got.tolist() == want.tolist(), "not the tokens of plain decoding"
    return stood, drafted


@given(seeds, st.sampled_from([1, 3, 6]), st.sampled_from([0.0, 0.5]))
def test_speculative_decoding_equals_plain(seed, K, temperature):
    """10 prompts an example: 200 of them."""
    stood, drafted = check_speculative(ngram_twin.ngram, twin.verify, seed, temperature, K, torch.device("cpu"))
    assert 0 < stood <= drafted


@settings(max_examples=settings.default.max_examples // 5)             # an example takes the interpreter 2 s
@given(seeds, st.sampled_from([1, 3, 6]), st.sampled_from([0.0, 0.5]))
def test_speculative_decoding_by_kernels_equals_plain(device, seed, K, temperature):
    stood, drafted = check_speculative(ngram.ngram, room.verify, seed, temperature, K, device)
    assert 0 < stood <= drafted


def test_one_draft_too_many_is_caught():
    def broken(draft, sampled, *rest):
        return twin.verify(draft, torch.where((draft >= 0) & (draft % 2 == 0), draft, sampled), *rest)

    with pytest.raises(AssertionError, match="not the tokens of plain decoding"):
        for seed in range(4):
            check_speculative(ngram_twin.ngram, broken, seed, 0.5, 3, torch.device("cpu"))


def check_launches_in_a_row(device, spoil):
    """Two launches that share a workspace, with `spoil(workspace)` between them."""
    first, second = (batch(seed, [3, 4, 2, 4], 300, device, "drawn") for seed in (1, 2))
    workspace, out = room.Workspace.allocate(6, 300, device), (torch.empty(4, 5, dtype=torch.int32, device=device), ints([7] * 4, device))
    for i, arguments in enumerate((first, second)):
        given = copied(arguments)
        want = room.verify(**copied(arguments))
        given.pop("K")
        room.verify_out(**given, tokens=out[0], num_accepted=out[1], workspace=workspace)
        for got, expected in zip(out, want, strict=True):
            assert_same(got, expected)
        assert not workspace.counts.any()
        if i == 0:
            spoil(workspace)


def test_a_workspace_serves_many_launches(device, monkeypatch):
    monkeypatch.setattr(room, "config", lambda V: room.Config(128, 1))
    check_launches_in_a_row(device, lambda workspace: workspace.scores.fill_(NAN))


def test_a_workspace_left_dirty_is_caught(device, monkeypatch):
    monkeypatch.setattr(room, "config", lambda V: room.Config(128, 1))
    with pytest.raises(AssertionError):
        check_launches_in_a_row(device, lambda workspace: workspace.counts.fill_(1))


def check_far(verify, device, name):
    """A request with eight drafts, of which the last falls, at a row that begins past element 2^31."""
    stands, falls = torch.tensor([[0.0, 1.0, 0.0]]).repeat(7, 1), torch.tensor([[1.0, 0.0, 0.0]])
    p, q = torch.cat([stands, torch.tensor([[0.25, 0.75, 0.0]]), falls]), torch.cat([stands, falls, falls])
    near = room.Probabilities(*(t.to(device) for t in (p, q, ints([1]), torch.tensor([3]), ints(range(9)))))
    stride = (2**31 // 7 // 16 + 1) * 16
    memory = torch.UntypedStorage((8 * stride + 16) * 4, device=device)            # the rest of it is never touched
    distant = torch.empty(0, device=device).set_(memory, 0, (9, 3), (stride, 1)).copy_(getattr(near, name))
    call = lambda probs: (ints([1] * 7 + [0, 0], device), ints([1] * 9, device), ints([0, 9], device), ints([0], device), 8, probs)
    expected = room.verify(*call(near))
    assert expected[1].tolist() == [7]
    for got, want in zip(verify(*call(replace(near, **{name: distant}))), expected, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_offsets_pass_32_bits(device, name):
    check_far(room.verify, device, name)


@pytest.mark.parametrize("name, row", [("target", [1.0, 0.0, 0.0]), ("draft", [0.0, 1.0, 0.0])])
def test_another_row_past_32_bits_is_caught(device, name, row):
    def broken(draft, sampled, starts, status, K, probs):
        getattr(probs, name)[7] = torch.tensor(row)
        return room.verify(draft, sampled, starts, status, K, probs)

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(broken, device, name)


def test_no_requests(device):
    empty = ints([], device)
    tokens, num_accepted = room.verify(ints([1], device), ints([1], device), ints([0], device), empty, 3)
    assert tokens.shape == (0, 4) and num_accepted.shape == (0,)


@pytest.mark.parametrize("change, error, words", [
    (dict(draft=torch.zeros(8, dtype=torch.int64)), TypeError, "verify: draft: got torch.int64, expected torch.int32; convert"),
    (dict(sampled=torch.zeros(7, dtype=torch.int32)), ValueError, r"verify: sampled: got shape \[7\], expected \[8\]"),
    (dict(query_start_loc=torch.zeros(2, dtype=torch.int32)), ValueError, r"verify: query_start_loc: got shape \[2\], expected \[3\]"),
    (dict(K=1024), ValueError, r"verify: tokens: got K \+ 1 = 1025, expected 1 to 1024"),
    (dict(target=torch.zeros(8, 17)), ValueError, "verify: probs: got V = 17 and 16, expected one vocabulary of 1 to 262144"),
    (dict(seed=torch.zeros(2, dtype=torch.int32)), TypeError, "verify: probs.seed: got torch.int32, expected torch.int64"),
    (dict(target=torch.zeros(16, 8).T), ValueError, r"verify: probs.target: .* call .contiguous\(\)"),
])
def test_misuse_is_named(device, change, error, words):
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    arguments = batch(0, [2, 2], 16, device)
    arguments["probs"] = replace(arguments["probs"], **{k: v for k, v in change.items() if hasattr(arguments["probs"], k) and k != "draft"})
    with pytest.raises(error, match=words):
        room.verify(**arguments | {k: v for k, v in change.items() if k in arguments})


def test_a_workspace_is_asked_for(device):
    arguments, out = batch(0, [2, 2], 16, device), (torch.empty(2, 5, dtype=torch.int32, device=device), ints([0, 0], device))
    arguments.pop("K")
    for workspace, words in ((None, r"workspace: got None, expected one, since there are probs: Workspace.allocate"),
                             (room.Workspace.allocate(1, 16, device), "workspace.scores: got 1 rows, expected at least 2")):
        with pytest.raises(ValueError, match=words):
            room.verify_out(**arguments, tokens=out[0], num_accepted=out[1], workspace=workspace)
