"""sample against its twin (a stable sort in float64), its parts, and the distribution that it draws from."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import reference.sampling as twin
from gkernels.kernels import _noise, _sampling
from gkernels.kernels import sampling as room
from tests.close import CHI_SQUARE_BOUND, NEAR, assert_close, assert_same
from tests.strategies import dtypes, far, poisons, randn, seeds, strided

INF, NAN = float("inf"), float("nan")
OPTIONS = dict(temperature=(1.0, torch.float32), top_k=(0, torch.int32), top_p=(1.0, torch.float32), min_p=(0.0, torch.float32),
               seed=(0, torch.int64), position=(0, torch.int32), seq_lens=(1, torch.int32), status=(0, torch.int32),
               typical_p=(1.0, torch.float32))

few = settings(max_examples=settings.default.max_examples // 3)       # a row's bisections take the interpreter 0.1 s
vocabularies = st.sampled_from([1, 2, 16, 100, 300])
temperatures = st.sampled_from([0.0, 0.2, 0.7, 1.0, 3.0, 1e4])
top_ks = st.sampled_from([0, 1, 2, 5, 50, 10**6])
top_ps = st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6])
min_ps = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])
typical_ps = st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1])
# Chunks of a row, and of its list; a list of two tokens sends every row with a cut the long way
configs = st.sampled_from([room.Config(512, 512, 512, 1), room.Config(256, 128, 256, 1), room.Config(128, 128, 2, 1)])


def batch(logits, **given):
    """The arguments of `sample`: each option a number for all rows, or one a row."""
    R, device = logits.shape[0], logits.device
    return dict(logits=logits, **{name: torch.as_tensor(given.get(name, default), dtype=dtype, device=device).expand(R).clone()
                                  for name, (default, dtype) in OPTIONS.items()})


def draw_logits(seed, kind, R, V, dtype, device):
    x = randn(seed, R, V) * 3
    return {"normal": x, "ties": x.round(), "flat": x * 0, "peaked": x * 20, "holes": x.masked_fill(x > 2, -INF)}[kind].to(device, dtype)


kinds = st.sampled_from(["normal", "ties", "flat", "peaked", "holes"])


def right_tokens(arguments):
    """For each row the tokens that may be drawn: one, but for decisions within NEAR."""
    options = {k: v for k, v in arguments.items() if k not in ("seq_lens", "status")}
    answers = [set() for _ in range(len(arguments["status"]))]
    for factor in (1 - NEAR, 1.0, 1 + NEAR):
        moved = {name: (options[name] * factor).clamp(max=1.0) for name in ("top_p", "min_p", "typical_p")}
        scores = twin.scores(**options | moved)
        for answer, near in zip(answers, scores >= scores.amax(-1, keepdim=True) - NEAR, strict=True):
            answer.update(near.nonzero()[:, 0].tolist())
    return answers


def check_equals_reference(sample, arguments):
    mine, its = ({k: v.clone() for k, v in arguments.items()} for _ in range(2))
    got, want = sample(**mine).tolist(), twin.sample(**its).tolist()
    assert_same(mine["status"], its["status"])
    for row, (g, w, allowed) in enumerate(zip(got, want, right_tokens(arguments), strict=True)):
        drawn = w >= 0 and 0 < arguments["temperature"][row] < INF
        assert g == w or (drawn and g in allowed), f"row {row}: token {g}, expected {w}"


@given(seeds, dtypes, kinds, vocabularies, temperatures, top_ks, top_ps, min_ps, typical_ps, st.booleans(), configs)
def test_equals_reference(device, monkeypatch, seed, dtype, kind, V, temperature, top_k, top_p, min_p, typical_p, is_strided, config):
    monkeypatch.setattr(room, "config", lambda R, V: config)
    logits = draw_logits(seed, kind, 2, V, dtype, device)
    arguments = batch(strided(logits) if is_strided else logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                      typical_p=typical_p, seed=[-seed, 2**63 - 1 - seed], position=[2**31 - 1, seed % 1000])
    check_equals_reference(room.sample, arguments)


@pytest.mark.parametrize("V", [1, 2, 999, 1024, 4097, *(pytest.param(V, marks=pytest.mark.gpu) for V in (32000, 128256, room.MAX_V))])
def test_equals_reference_at_vocabulary(device, V):
    logits = randn(V, 3, V, device=device) * 3
    logits[:, -1] += 9.0                             # the last token of the last, ragged tile counts
    check_equals_reference(room.sample, batch(logits, temperature=0.8, top_k=[0, 40, 0], top_p=[1.0, 0.9, 0.95], position=[1, 2, 3], seed=V))


def test_a_top_k_off_by_one_is_caught(device):
    def broken(top_k, **arguments):
        return room.sample(top_k=top_k + 1, **arguments)

    with pytest.raises(AssertionError):
        check_equals_reference(broken, batch(torch.zeros(8, 16, device=device), top_k=4, position=range(8)))


def sampled(arguments, has_probs=False):
    """The tokens, the modes that the passes leave, and where asked for what was drawn from, float32 [R, V]."""
    R, V = arguments["logits"].shape
    device, arguments = arguments["logits"].device, {k: v.clone() if k != "logits" else v for k, v in arguments.items()}
    workspace, out = room.Workspace.allocate(R, V, device), torch.empty(R, dtype=torch.int32, device=device)
    probs = torch.empty(R, V, device=device) if has_probs else None
    room.sample_out(**arguments, workspace=workspace, out=out, probs=probs)
    assert not workspace.counts.any(), "counts are left for the next launch"
    return out, workspace.state[:, 0].tolist(), probs


def probs_by_kernel(arguments):
    return sampled(arguments, has_probs=True)[2]


def check_kept(probs, arguments, is_exact):
    """A prefix of the stable sort, and as long as the twin's; masses that are not whole may move its end by what NEAR explains."""
    kept, logits, factors = probs > 0, arguments["logits"], (1.0, 1.0) if is_exact else (1 - NEAR, 1 + NEAR)
    ordered = kept.gather(-1, logits.sort(dim=-1, descending=True, stable=True).indices).int()
    assert (ordered.diff(dim=-1) <= 0).all(), "not a prefix of the stable sort"
    least, most = ((twin.probs(**arguments | dict(top_p=(arguments["top_p"] * f).clamp(max=1.0))) > 0).sum(-1) for f in factors)
    count = kept.sum(-1)
    assert ((least <= count) & (count <= most)).all(), f"kept {count.tolist()}, expected {least.tolist()} to {most.tolist()}"


@few
@given(seeds, kinds, vocabularies, st.sampled_from([0.2, 1.0, 3.0]), top_ks, top_ps, configs)
def test_kept_set_is_the_sorts(device, monkeypatch, seed, kind, V, temperature, top_k, top_p, config):
    monkeypatch.setattr(room, "config", lambda R, V: config)
    arguments = batch(draw_logits(seed, kind, 3, V, torch.float32, device), temperature=temperature, top_k=[top_k, 0, top_k],
                      top_p=[top_p, top_p, 1.0])
    check_kept(probs_by_kernel(arguments), arguments, is_exact=kind == "flat" or top_p == 1.0)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 2.0, 50.0])
@pytest.mark.parametrize("spread", [0.01, 2.0, 300.0])
def test_kept_set_is_the_sorts_at_any_scale(device, temperature, spread):
    """Bins at their edges: a wide vocabulary of small and of large logits, cut where many are near."""
    logits = randn(int(spread), 5, 6020, device=device) * spread           # 189 groups: an odd number is missing to a power of two
    arguments = batch(logits, temperature=temperature, top_k=[0, 700, 3000, 0, 40], top_p=[0.9, 1.0, 0.97, 0.5, 0.8])
    check_kept(probs_by_kernel(arguments), arguments, is_exact=False)


@pytest.mark.parametrize("options, mode, mode_with_probs", [
    (dict(top_k=40), _sampling.SHORT, _sampling.SHORT), (dict(top_k=40, top_p=0.9, min_p=0.1), _sampling.SHORT, _sampling.SHORT),
    (dict(top_k=400), _sampling.LIST, _sampling.LIST), (dict(top_k=40, typical_p=0.9), _sampling.LIST, _sampling.LIST),
    (dict(min_p=0.1), _sampling.SHORT, _sampling.SHORT), (dict(), _sampling.DONE, _sampling.DONE),
    (dict(top_p=0.6), _sampling.SHORT, _sampling.SHORT), (dict(top_p=0.9999), None, _sampling.LIST),
    (dict(min_p=0.5, top_p=0.999), None, _sampling.SHORT)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_rows_that_keep_few_tokens_go_the_short_way(device, kind, options, mode, mode_with_probs):
    """What the passes leave for `select`. A nucleus is found for its probabilities only."""
    arguments = batch(draw_logits(3, kind, 2, 6020, torch.float32, device), **options)
    tokens, modes, _ = sampled(arguments)
    assert set(modes) <= ({_sampling.DONE, _sampling.WINNER} if mode is None else {mode})
    found, modes, _ = sampled(arguments, has_probs=True)
    assert modes == [mode_with_probs] * 2
    assert_same(found, tokens)
    check_equals_reference(room.sample, arguments)


def turned_down(arguments):
    """How many winners each row turns down before it keeps one, by the twin's scores and sorts: int64 [R]."""
    options = {k: v for k, v in arguments.items() if k not in ("seq_lens", "status")}
    scores = twin.scores(**options | dict(top_p=torch.ones_like(options["top_p"])))
    kept = twin.keep(**{k: v for k, v in options.items() if k not in ("seed", "position")})
    place = twin.clean(options["logits"]).sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    numbers, winner = torch.zeros(len(kept), dtype=torch.long, device=kept.device), scores.argmax(-1, keepdim=True)
    while not kept.gather(-1, winner).all():
        numbers += ~kept.gather(-1, winner)[:, 0]
        following = torch.where(place < place.gather(-1, winner), scores, -INF).argmax(-1, keepdim=True)
        winner = torch.where(kept.gather(-1, winner), winner, following)
    return numbers


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("config, first_judges", [(room.Config(512, 512, 512, 1), 1), (room.Config(128, 128, 128, 1), 2)], ids=str)
def test_winners_are_turned_down_until_one_is_kept(device, monkeypatch, kind, config, first_judges):
    """Rows that keep the first winner, the second, and those that one program goes on with, which are rare: found among 6000 seeds."""
    monkeypatch.setattr(room, "config", lambda R, V: config)
    monkeypatch.setattr(room, "TWICE_FROM", 1 if first_judges == 2 else 100)
    logits, options = draw_logits(5, kind, 1, 300, torch.float32, device), dict(temperature=3.0, top_p=_sampling.LEAST_P)
    numbers = turned_down(batch(logits.expand(6000, -1), seed=range(6000), **options))
    seeds = [int(seed) for number in range(4) for seed in (numbers == number).nonzero()[:1]]
    arguments = batch(logits.expand(len(seeds), -1).contiguous(), seed=seeds, **options)
    numbers, (tokens, modes, _) = turned_down(arguments).tolist(), sampled(arguments)
    assert {0, 1, 2, 3} <= set(numbers)
    assert modes == [_sampling.DONE if number < first_judges else _sampling.WINNER for number in numbers]
    assert_same(tokens, sampled(arguments, has_probs=True)[0])
    check_equals_reference(room.sample, arguments)
    check_equals_reference(room.sample, arguments | dict(min_p=torch.full_like(arguments["min_p"], 0.5)))


@few
@given(seeds, kinds, st.sampled_from([1537, 6020, 8200]), st.sampled_from([0.2, 1.0, 3.0]), st.integers(1, 5), top_ps, min_ps)
def test_a_small_top_k_is_bounded_by_families(device, seed, kind, V, temperature, top_k, top_p, min_p):
    """Vocabularies of 4, 12 and 17 families of 512 tokens, of whose greatest logits 1, 4 and 5 bound a top_k."""
    top_k, size = min(top_k, -(-V // 512) // 3), _sampling.GROUP * _sampling.FAMILY
    logits = draw_logits(seed, kind, 2, V, torch.float32, device)
    arguments, workspace = batch(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), room.Workspace.allocate(2, V, device)
    out = torch.empty(2, dtype=torch.int32, device=device)
    room.sample_out(**{k: v.clone() for k, v in arguments.items()}, workspace=workspace, out=out)
    bits = torch.nn.functional.pad(logits + 0.0, (0, -V % size), value=-INF).unflatten(1, (-1, size)).amax(-1).view(torch.int32)
    assert_same(workspace.groups[:, 2 * -(-V // _sampling.GROUP):], torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    assert workspace.state[:, 0].tolist() == [_sampling.SHORT] * 2 and not workspace.counts.any()
    check_equals_reference(room.sample, arguments)
    if min_p == 0.0:
        check_kept(probs_by_kernel(arguments), arguments, is_exact=kind == "flat" or top_p == 1.0)


def test_many_equal_logits_fit_no_list(device):
    """Every group reaches the bound: the row is counted, and then read whole."""
    arguments, workspace = batch(torch.zeros(1, 9000, device=device), top_k=40), room.Workspace.allocate(1, 9000, device)
    out = torch.empty(1, dtype=torch.int32, device=device)
    room.sample_out(**arguments, workspace=workspace, out=out)
    assert workspace.state[:, 0].tolist() == [_sampling.ROW] and 0 <= out[0] < 40


@given(seeds, st.integers(1, 70), top_ks, st.sampled_from([1.0, 0.75, 0.5, 0.25, 0.1]), st.sampled_from([1.0, 0.5]))
def test_ties_keep_the_lowest_ids(device, seed, V, top_k, top_p, typical_p):
    arguments = batch(torch.where(randn(seed, 1, V) > 0, 0.0, -0.0).to(device), top_k=top_k, top_p=top_p, typical_p=typical_p)
    kept = probs_by_kernel(arguments) > 0
    assert_same(kept, twin.probs(**arguments) > 0)
    n = math.ceil(min(top_k or V, V) * arguments["top_p"][0].item())
    assert kept.sum(-1).tolist() == [math.ceil(n * typical_p)] and kept[:, 0].all()


@given(seeds, kinds, vocabularies, temperatures, top_ks, top_ps, min_ps)
def test_probabilities_are_the_references(device, seed, kind, V, temperature, top_k, top_p, min_p):
    arguments = batch(draw_logits(seed, kind, 3, V, torch.float32, device), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                      seq_lens=[3, 0, 1])
    got, want = probs_by_kernel(arguments), twin.probs(**arguments)
    same = ((got > 0) == (want > 0)).all(-1)               # elsewhere a cut fell within NEAR, which test_kept_set_is_the_sorts judges
    assert same.sum() >= 2 or kind != "flat"
    assert ((got - want).abs()[same] <= 4 * 2**-24 * want[same] * (1 + 16 * (want[same] > 0))).all()


def test_a_cut_off_by_one_is_caught(device):
    arguments = batch(randn(0, 2, 100, device=device), top_k=5)
    with pytest.raises(AssertionError, match=r"kept \[6, 6\], expected \[5, 5\]"):
        check_kept(probs_by_kernel(arguments | dict(top_k=arguments["top_k"] + 1)), arguments, True)


@triton.jit
def _noise_kernel(seed_ptr, position_ptr, ids_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, _noise.gumbel(tl.load(seed_ptr), tl.load(position_ptr), tl.load(ids_ptr + offs)))


@given(seeds, st.integers(-2**63, 2**63 - 1), st.integers(0, 2**31 - 1))
def test_noise_equals_reference(device, seed, key, position):
    keys, positions = torch.tensor([key], device=device), torch.tensor([position], dtype=torch.int32, device=device)
    order = twin.random_bits(keys, positions, 50_000)[0][0].sort().indices
    ids = torch.cat([order[:256], order[-256:], order[::97][:512]]).int()       # both tails and the middle
    got = torch.empty(1024, device=device)
    _noise_kernel[(1,)](keys, positions, ids, got, BLOCK=1024)
    want = twin.noise(keys, positions, 50_000)[0, ids.long()]
    assert_close(got, want, want.float())


def test_philox_is_the_published_generator():
    """Known answers of Random123 for philox4x32-10 at counter and key zero."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(word) for word in twin.philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@triton.jit
def _words_kernel(seeds_ptr, positions_ptr, out_ptr, V, BLOCK: tl.constexpr):
    key = _noise.key_at(tl.load(seeds_ptr + tl.program_id(0)), tl.load(positions_ptr + tl.program_id(0)))
    offs = tl.arange(0, BLOCK)
    for which in tl.static_range(2):
        words = _noise.word_of(offs, key[2 * which], key[2 * which + 1])
        tl.store(out_ptr + (tl.program_id(0) * 2 + which) * V + offs, words.to(tl.int32, bitcast=True), offs < V)


def noise_words(seed, position, V):
    """Both words of every token, int64 [R, 2, V], by the kernel's own mix."""
    out = torch.empty(len(seed), 2, V, dtype=torch.int32, device=seed.device)
    _words_kernel[(len(seed),)](seed, position, out, V, BLOCK=triton.next_power_of_2(V))
    return out.long() & 2**32 - 1


@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**31 - 1))
def test_noise_words_are_the_references(device, seed, position):
    seed, position = torch.tensor([seed], device=device), torch.tensor([position], dtype=torch.int32, device=device)
    assert_same(noise_words(seed, position, 300), torch.stack(twin.random_bits(seed, position, 300), 1))


def check_independence(words, device):
    """Of each word, and of it with its neighbour in every direction (the next ids, position, seed, and the other word), the joint counts of the top 3
    bits, of the low 3 bits, and of how often both are in the tail that wins."""
    seed = torch.tensor([5, 5, 5, 6, 7, 2**40 + 5, -1, 0], device=device)
    position = torch.tensor([9, 10, 11, 9, 9, 9, 0, 0], dtype=torch.int32, device=device)
    w = words(seed, position, 1 << 15)
    pairs = {f"id + {lag}": (w[:, 0, :-lag], w[:, 0, lag:]) for lag in (1, 2, 3, 16, 32, 1024, 4096)}
    pairs |= {"position + 1": (w[[0, 1], 0], w[[1, 2], 0]), "seed + 1": (w[[0, 3], 0], w[[3, 4], 0]), "seed + 2^40": (w[0, 0], w[5, 0]),
              "other word": (w[:, 0], w[:, 1]), "other word's next id": (w[:, 0, :-1], w[:, 1, 1:])}
    for name, (a, b) in pairs.items():
        for shift, bits in ((29, "top"), (0, "low"), (13, "middle")):
            cells = torch.bincount(((a >> shift & 7) * 8 + (b >> shift & 7)).flatten(), minlength=64).double()
            statistic = float(((cells - a.numel() / 64) ** 2 / (a.numel() / 64)).sum())
            assert statistic < CHI_SQUARE_BOUND, f"{name}: {bits} bits of neighbours depend on each other, chi-square {statistic:.0f}"
        expected = a.numel() / 1024
        both = int(((a < 2**27) & (b < 2**27)).sum())
        assert abs(both - expected) < 6 * expected**0.5 + 1, f"{name}: both in the tail {both} times, expected {expected:.0f}"


def test_noise_is_independent_of_its_neighbours(device):
    check_independence(noise_words, device)


@pytest.mark.parametrize("broken", [
    lambda ids, key: ids * 0x9E3779B1 + key[0],                                              # no mix: the next id's word is this one's and a constant
    lambda ids, key: twin.mixed(ids, key[0] * 0, key[1] * 0),                                # no key: every row the same
    lambda ids, key: twin.mixed(ids >> 1, key[0], key[1])])                                  # two ids a word
def test_dependent_noise_is_caught(broken):
    def words(seed, position, V):
        key, ids = [word[:, None] for word in twin.philox(seed, position, position * 0)], torch.arange(V)
        return torch.stack([broken(ids, key) & 2**32 - 1, broken(ids, key[2:]) & 2**32 - 1], 1).expand(len(seed), 2, V)

    with pytest.raises(AssertionError):
        check_independence(words, torch.device("cpu"))


@few
@given(seeds, dtypes, kinds, vocabularies)
def test_degenerate_options_are_greedy(device, seed, dtype, kind, V):
    logits = draw_logits(seed, kind, 4, V, dtype, device)
    greedy = room.sample(**batch(logits, temperature=0.0))
    assert_same(greedy, twin.first_max(twin.clean(logits))[1].int().where(logits.isfinite().any(-1), -1))
    assert_same(room.sample(**batch(logits, top_k=1, position=range(4))), greedy)
    assert_same(room.sample(**batch(logits, top_p=1e-9, position=range(4))), greedy)
    assert_same(room.sample(**batch(logits, temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)), greedy)
    if kind != "ties" and kind != "flat" and dtype == torch.float32:
        assert_same(room.sample(**batch(logits, temperature=1e-30)), greedy)
        assert_same(room.sample(**batch(logits, min_p=1.0)), greedy)


@given(seeds, dtypes, kinds, vocabularies)
def test_options_that_keep_all_change_nothing(device, seed, dtype, kind, V):
    logits = draw_logits(seed, kind, 4, V, dtype, device)
    plain = room.sample(**batch(logits, position=range(4), seed=seed))
    assert_same(room.sample(**batch(logits, position=range(4), seed=seed, top_k=[V, V + 1, 10**9, 2**31 - 1])), plain)
    if kind in ("ties", "flat"):                      # whole numbers: adding 8 is exact, and must change nothing
        assert_same(room.sample(**batch(logits.float() + 8.0, position=range(4), seed=seed)), plain)


@few
@given(seeds, st.sampled_from([1.0, 50.0]), st.sampled_from([1, 3, 7]))
def test_support_is_never_left(device, seed, temperature, top_k):
    logits = randn(seed, 1, 20, device=device).expand(4, 20)
    tokens = room.sample(**batch(logits, temperature=temperature, top_k=top_k, seed=range(seed, seed + 4), position=range(4)))
    assert set(tokens.tolist()) <= set(logits[0].topk(top_k).indices.tolist())


def check_rows_are_their_own(sample, logits, order, options):
    arguments = batch(logits, **options)
    want = sample(**arguments)
    assert_same(sample(**{k: v[order].clone() for k, v in arguments.items()}), want[order])


ROW_OPTIONS = dict(temperature=[0.0, 0.7, 1.0, 2.0], top_k=[0, 5, 0, 9], top_p=[1.0, 1.0, 0.8, 0.9], seed=[3, 3, 4, 5], position=[7, 7, 8, 9])


@few
@given(seeds, dtypes, st.permutations(range(4)), vocabularies)
def test_row_order_changes_no_token(device, seed, dtype, order, V):
    check_rows_are_their_own(room.sample, randn(seed, 4, V, dtype=dtype, device=device), order, ROW_OPTIONS)


def test_noise_that_knows_its_row_is_caught(device):
    def broken(seed, **arguments):
        return room.sample(seed=seed + torch.arange(len(seed), device=device), **arguments)

    with pytest.raises(AssertionError):
        check_rows_are_their_own(broken, torch.zeros(4, 300, device=device), [3, 2, 1, 0], ROW_OPTIONS)


def check_bad_rows(sample, device, seed, dtype, poison, V):
    logits = randn(seed, 4, V, dtype=dtype, device=device)
    want = room.sample(**batch(logits, **ROW_OPTIONS))
    logits[1], logits[3] = poison, -INF
    status = torch.tensor([1, 2, 0, 16], dtype=torch.int32, device=device)
    arguments = batch(logits, **ROW_OPTIONS) | dict(status=status, seq_lens=torch.tensor([5, 1, 9, 0], dtype=torch.int32, device=device))
    got = sample(**arguments)
    assert_same(got[[0, 2]], want[[0, 2]])
    hopeless = math.isnan(poison) or poison == -INF
    assert got[1] == -1 if hopeless else 0 <= got[1] < V
    assert got[3] == -1 and status.tolist() == [1, 2 | (room.NO_TOKEN if hopeless else 0), 0, 16]


@few
@given(seeds, dtypes, poisons, vocabularies)
def test_bad_rows_touch_no_other(device, seed, dtype, poison, V):
    check_bad_rows(room.sample, device, seed, dtype, poison, V)


def test_a_spreading_row_is_caught(device):
    def spreading(logits, **options):
        return room.sample(logits - logits.sum(0) * 0, **options)

    with pytest.raises(AssertionError):
        check_bad_rows(spreading, device, 0, torch.float32, NAN, 100)


@pytest.mark.filterwarnings("ignore:overflow")       # numpy says what the GPU keeps to itself: 3e38 + 3e38 is infinite
def test_nan_counts_as_minus_infinity_and_infinity_wins(device):
    logits = torch.tensor([[NAN, 1.0, NAN, 0.5], [NAN, INF, 3.0, INF], [NAN, -INF, -INF, -7.0], [3e38, -3e38, NAN, 3.1e38]], device=device)
    for temperature in (0.0, 1.0, 1e-38, 3e38):
        for filters in (dict(), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.9)):
            a, b, c, d = room.sample(**batch(logits, temperature=temperature, **filters)).tolist()
            assert a in (1, 3) and b == 1 and c == 3 and d in (0, 1, 3)
            assert temperature != 0 or (a, d) == (1, 3)


@pytest.mark.parametrize("bad, same_as", [
    (dict(temperature=NAN), dict(temperature=0.0)), (dict(temperature=-1.0), dict(temperature=0.0)), (dict(temperature=INF), dict(temperature=0.0)),
    (dict(top_k=-1), dict()), (dict(top_p=NAN), dict()), (dict(top_p=0.0), dict()), (dict(top_p=1.5), dict()), (dict(top_p=-0.5), dict()),
    (dict(min_p=NAN), dict()), (dict(min_p=-0.1), dict()), (dict(min_p=1.5), dict()),
    (dict(typical_p=NAN), dict()), (dict(typical_p=0.0), dict()), (dict(typical_p=1.5), dict()),
])
def test_bad_options_are_switched_off_and_flagged(device, bad, same_as):
    logits = randn(0, 2, 50, device=device)
    arguments = batch(logits, position=[1, 2], **bad)
    assert_same(room.sample(**arguments), room.sample(**batch(logits, position=[1, 2], **same_as)))
    assert arguments["status"].tolist() == [room.BAD_OPTION] * 2
    check_equals_reference(room.sample, batch(logits, position=[1, 2], **bad))
    assert (twin.NO_TOKEN, twin.BAD_OPTION) == (room.NO_TOKEN, room.BAD_OPTION)


def chi_square(tokens, probabilities):
    """Pearson's statistic over 64 buckets of neighbouring ids, or of equal mass where there are more ids."""
    V = len(probabilities)
    buckets = ((probabilities.cumsum(0) - probabilities / 2) * 64).long().clamp(max=63) if V > 64 else torch.arange(V)
    buckets = buckets.to(tokens.device)
    seen = torch.bincount(buckets[tokens.long()], minlength=64).double()
    expected = torch.zeros(64, dtype=torch.float64, device=tokens.device).index_add(0, buckets, probabilities.to(tokens.device)) * len(tokens)
    drawn = expected > 0                              # a token of more than 1/64 leaves buckets empty, and nothing may fall into them
    assert not seen[~drawn].any()
    return float(((seen - expected) ** 2 / expected)[drawn].sum())


def draws(sample, logits, n, **options):
    return sample(**batch(logits.expand(n, -1), position=range(n), **options))


def test_distribution(device):
    logits = randn(0, 1, 64)
    n = 256 if device.type == "cpu" else 100_000
    tokens = draws(room.sample, logits.to(device), n, seed=1)
    assert chi_square(tokens, logits[0].double().softmax(-1)) < CHI_SQUARE_BOUND


def test_distribution_of_the_reference():
    logits = randn(0, 1, 64)
    probabilities = logits[0].double().softmax(-1)
    assert chi_square(draws(twin.sample, logits, 20_000, seed=1), probabilities) < CHI_SQUARE_BOUND
    assert chi_square(draws(twin.sample, logits, 20_000, seed=1, temperature=1.2), probabilities) > CHI_SQUARE_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("V", [1, 2, 999, 1024, 4097, 32000, 128256])
@pytest.mark.parametrize("options", [dict(), dict(top_k=50), dict(top_p=0.9), dict(min_p=0.05), dict(temperature=0.0)], ids=str)
def test_distribution_of_a_million_draws(device, V, options):
    logits = randn(V, 1, V, device=device) * 2
    probabilities = twin.probs(**batch(logits, **options))[0].cpu()
    tokens = torch.cat([draws(room.sample, logits, 20_000, seed=i, **options) for i in range(50)])
    assert not (probabilities[tokens.cpu().long()] == 0).any(), "a token outside of the kept set"
    assert chi_square(tokens, probabilities) < CHI_SQUARE_BOUND
    if V >= 999 and not options:
        biased = torch.cat([draws(room.sample, logits, 20_000, seed=i, temperature=1.05) for i in range(50)])
        assert chi_square(biased, probabilities) > CHI_SQUARE_BOUND


@pytest.mark.gpu
def test_no_tail_is_cut_off(device):
    """One token 18 above 128 K others: together they have 0.2 % of the mass, each 1.5e-8, which 24-bit uniforms do not reach."""
    V, n = 128256, 1_000_000
    logits = torch.zeros(1, V, device=device)
    logits[0, 77] = 18.0
    tail = sum(int((draws(room.sample, logits, 20_000, seed=i) != 77).sum()) for i in range(n // 20_000))
    p = (V - 1) / (V - 1 + math.exp(18))
    assert abs(tail - n * p) < 6 * (n * p * (1 - p)) ** 0.5


def check_far(sample, device):
    logits = randn(0, 3, 100, dtype=torch.float16, device=device)
    logits[range(3), [7, 70, 99]] = 40.0
    for temperature in (0.0, 1.0):
        options = dict(temperature=temperature, top_k=20, position=range(3))
        assert_same(sample(**batch(far(logits, 0), **options)), room.sample(**batch(logits, **options)))


def test_offsets_pass_32_bits(device):
    """Three rows, of which the last begins past element 2^31."""
    check_far(room.sample, device)


def test_another_row_past_32_bits_is_caught(device):
    def broken(logits, **options):
        logits[-1] = logits[0].clone()
        return room.sample(logits, **options)

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(broken, device)


def test_no_rows(device):
    assert room.sample(**batch(torch.ones(0, 8, device=device))).shape == (0,)


@pytest.mark.parametrize("change, error, words", [
    (dict(logits=torch.ones(8)), ValueError, r"sample: logits: got shape \[8\], expected \[any, any\]"),
    (dict(logits=torch.ones(2, 0)), ValueError, "sample: logits: got V = 0, expected 1 to 262144"),
    (dict(logits=torch.ones(8, 2).T), ValueError, r"call .contiguous\(\)"),
    (dict(top_k=torch.ones(2)), TypeError, "sample: top_k: got torch.float32, expected torch.int32; convert"),
    (dict(temperature=torch.ones(3)), ValueError, r"sample: temperature: got shape \[3\], expected \[2\]"),
    (dict(seed=1), TypeError, "sample: seed: got int, expected a torch.Tensor"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = batch(torch.ones(2, 8)) | change
    with pytest.raises(error, match=words):
        room.sample(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


@pytest.mark.parametrize("change, words", [
    (dict(temperature=NAN), "sample: temperature: got nan, expected a finite number, at least 0; 0 takes the likeliest token"),
    (dict(temperature=-1.0), "temperature: got -1.0"), (dict(temperature=INF), "temperature: got inf"),
    (dict(top_k=-1), "top_k: got -1"), (dict(top_k=101), "top_k: got 101, expected an integer from 0 to the vocabulary's 100; 0 keeps every token"),
    (dict(top_p=0.0), "top_p: got 0.0"), (dict(top_p=1.1), "top_p: got 1.1"), (dict(top_p=NAN), "top_p: got nan"),
    (dict(min_p=-0.1), "min_p: got -0.1"), (dict(min_p=1.1), "min_p: got 1.1"), (dict(min_p=NAN), "min_p: got nan"),
    (dict(typical_p=0.0), "typical_p: got 0.0"), (dict(typical_p=1.1), "typical_p: got 1.1"),
])
def test_options_of_a_request_are_checked(change, words):
    good = dict(temperature=0.7, top_k=100, top_p=1.0, min_p=0.0, vocab_size=100)
    room.check_options(**good)
    with pytest.raises(ValueError, match=words):
        room.check_options(**good | change)
