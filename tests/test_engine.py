"""The engine: whatever it is asked and however it batches, a request's tokens are those that the reference gives it alone.

Two worlds stand behind one engine. In the real one a step runs the kernels of a tiny random model. In the paper world a step writes the
token ids into a paged table and answers with a hash of what a request's pages then hold, so that thousands of steps show what the scheduler
and the page book do; a page that is shared, lost or stale changes the hash.
"""

import itertools
import zlib
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import reference.adjust as reference_adjust
import reference.llama as reference_llama
import reference.sampling as reference_sampling
from gkernels import ops
from gkernels.graph import Buckets, Burst, Loop
from gkernels.kernels import attention
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.engine import Engine, Event, Sampling
from gkernels.model.llama import Llama
from gkernels.model.load import empty_weights, random_weights, views
from gkernels.model.speculation import Speculation, SpeculativeStep
from gkernels.model.step import Row, Step
from tests.close import assert_same
from tests.strategies_model import tiny_config

VOCAB, EOS, UNLUCKY = 97, 2, 13     # UNLUCKY: the token whose embedding is NaN
MAX_LEN = 48
SMALL = dict(max_tokens=16, max_requests=4, max_len=MAX_LEN, page_size=4, loop=5)


@lru_cache(None)
def build(device, architecture="LlamaForCausalLM", layers=1):
    """A random model whose logits lie far apart, with one token whose embedding is NaN; the same on every device."""
    config = LlamaConfig.from_dict(tiny_config(architecture, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers))
    drawn, weights = random_weights(config, "cpu", torch.float32), empty_weights(config, device, torch.float32, config.tie_word_embeddings)
    for (name, view), value in zip(views(weights, config).items(), views(drawn, config).values(), strict=True):
        view.copy_(value if name.endswith("norm.weight") else value * 5)
    weights.embed[UNLUCKY] = float("nan")
    weights.lm_head[UNLUCKY] = 0.0                 # its logit is 0, far below the best: never drawn greedily
    return Llama.build(config, weights, MAX_LEN)


class Real:
    """Steps on the kernels; the next token by the reference."""

    def __init__(self, device, **model):
        self.model = build(device, **model)

    def engine(self, kind=Engine, **options):
        return kind(self.model, **SMALL | options)

    def next_token(self, tokens, s):
        return self.drawn(tokens, (s.temperature, s.top_k, s.top_p, s.min_p, s.seed))

    @lru_cache(None)    # noqa: B019
    def drawn(self, tokens, options):
        m, device = self.model, self.model.weights.embed.device
        one = lambda value, dtype: torch.tensor([value], dtype=dtype, device=device)
        logits = reference_llama.forward(m.weights, m.config, torch.tensor(tokens, device=device), m.cos_sin)[-1:]
        dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
        row = [one(value, dtype) for value, dtype in zip((*options, len(tokens)), (*dtypes, torch.int32), strict=True)]
        return int(reference_sampling.sample(logits, *row, row[-1], torch.zeros_like(row[-1])))


class PaperStep:
    """Stands for a Step: tokens go into their slots, and a request's next token is a hash of all that its pages hold."""

    def __init__(self, engine):
        self.max_tokens, self.max_requests = engine.step_fn.max_tokens, engine.step_fn.max_requests
        self.width, self.page_size, self.slots = engine.step_fn.table_width, engine.page_size, {}
        self.depth, self.adjusts = engine.step_fn.depth, True
        self.left, self.running = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def stage(self, rows, turns):
        pages = [page for row in rows for page in row.pages]
        assert len(pages) == len(set(pages)) and 0 not in pages, "a page is shared, or the null page is used"
        lens = [len(row.token_ids) for row in rows]
        assert len(rows) <= self.max_requests and sum(lens) <= self.max_tokens and all(lens)
        for row in rows:
            assert row.seq_len <= len(row.pages) * self.page_size and len(row.pages) <= self.width
            for at, token in enumerate(map(int, row.token_ids), row.seq_len - len(row.token_ids)):
                self.slots[row.pages[at // self.page_size], at % self.page_size] = token
        self.rows, self.lines, self.flags, self.lens = rows, [], [0] * len(rows), [row.seq_len for row in rows]
        self.left[0], self.running[0] = turns, len(rows)
        return sum(len(row.token_ids) for row in rows)

    def __call__(self, bucket):
        """Draws, and advances rows that emit, as the device does."""
        self.lines.append([-1] * len(self.rows))
        for i, row in enumerate(self.rows):
            held = tuple(self.slots[row.pages[at // self.page_size], at % self.page_size] for at in range(self.lens[i]))
            if UNLUCKY in held:
                self.flags[i], self.lens[i] = ops.NO_TOKEN, 0
            if self.lens[i]:
                token, at, n = self.draw(i, held, row.sampling.seed), self.lens[i], self.lens[i] - row.seq_len + 1
                self.lines[-1][i] = token
                ends = token in row.ends or row.generated + n >= row.sampling.max_tokens or at + 1 >= row.max_len
                self.lens[i] = at + 1 if row.emits and not ends else 0
                if self.lens[i] and len(row.pages) * self.page_size > at:
                    self.slots[row.pages[at // self.page_size], at % self.page_size] = token
        self.running[0] = sum(n > 0 for n in self.lens)

    def read(self, num_requests):
        assert len(self.lines) == 1
        return self.lines[0], self.flags

    def read_ring(self, bucket, num_requests):
        assert 0 < len(self.lines) <= self.depth
        return self.lines, self.flags

    def enter(self, slot, prompt, output):
        assert not (slot, len(prompt), len(output)) < (0, 1, 0)

    def draw(self, row, tokens, seed):
        return zlib.crc32(repr((tokens, seed)).encode()) % VOCAB


class Paper(Real):
    """The same engine over PaperStep."""

    step = PaperStep

    def engine(self, kind=Engine, **options):
        engine = kind(self.model, **SMALL | options, capture=False)
        paper, real = self.step(engine), engine.ahead.runner
        engine.step_fn = engine.runner.step = paper
        runner = (Loop(paper, paper.left, paper.running, real.buckets, "cpu") if isinstance(real, Loop) else
                  Burst(paper, real.steps, real.buckets, "cpu"))
        engine.ahead = replace(engine.ahead, runner=runner)
        return engine

    def next_token(self, tokens, s):
        return PaperStep.draw(None, None, tokens, s.seed)


WORLDS = [Paper, Real]


def want(world, prompt, s=Sampling(), max_len=MAX_LEN):
    """(tokens, finish_reason) of a request that is served alone."""
    tokens = list(prompt)
    ends = {*s.stop_token_ids, *(() if s.ignore_eos else (EOS,))}
    while True:
        if UNLUCKY in tokens:
            return tokens[len(prompt):], "error: no finite logit"
        tokens.append(world.next_token(tuple(tokens), s))
        if tokens[-1] in ends:
            return tokens[len(prompt):], "stop"
        if len(tokens) - len(prompt) >= s.max_tokens or len(tokens) >= max_len:
            return tokens[len(prompt):], "length"


def check_books(engine):
    """The pool and the requests agree on who holds what."""
    held = [page for request in engine.running for page in request.pages]
    assert len(held) == len(set(held)) == engine.pool.held and 0 not in held
    assert not any(request.pages or request.computed for request in engine.waiting)
    for queue in (engine.running, engine.waiting):
        assert [r.id for r in queue] == sorted(r.id for r in queue), "a younger request overtook an older one"
    for request in engine.requests.values():
        places = (request in engine.waiting) + (request in engine.running)
        assert places == (request.finish_reason is None) and (not request.pages or request in engine.running)


def step(engine):
    """One step that must get on, its events checked against the requests."""
    steps, lengths = engine.steps, {i: len(r.output) for i, r in engine.requests.items()}
    busy, events = engine.busy, engine.step()
    assert engine.steps - steps in (range(1, engine.step_fn.depth + 1) if busy else (0,)), "the engine is busy, but computed nothing"
    brought = {}
    for event in events:
        brought.setdefault(event.request_id, []).append(event)
    for i, news in brought.items():
        request = engine.requests[i]
        assert len(news) <= engine.steps - steps and news[-1].finish_reason == request.finish_reason
        assert not any(event.finish_reason for event in news[:-1])
        assert request.output[lengths.pop(i):] == [event.token for event in news if event.token is not None]
    assert all(len(engine.requests[i].output) == n for i, n in lengths.items()), "a token without an event"
    check_books(engine)
    return events


def drain(engine, limit=2000):
    while engine.busy:
        assert engine.steps < limit, "no end in sight"
        step(engine)
    assert engine.pool.held == 0 and engine.pool.available == engine.pool.num_pages - 1


def check_ended(world, engine, max_len=MAX_LEN):
    for request in engine.requests.values():
        tokens, reason = want(world, request.prompt, request.sampling, max_len)
        if request.finish_reason == "cancelled":
            assert request.output == tokens[:len(request.output)]
        else:
            assert (request.output, request.finish_reason) == (tokens, reason)


def prompts(*lengths):
    """Prompts of the given lengths, without EOS and UNLUCKY."""
    ids = itertools.cycle([i for i in range(VOCAB) if i not in (EOS, UNLUCKY)])
    return [[next(ids) for _ in range(n)] for n in lengths]


WARM = Sampling(max_tokens=5, temperature=0.8, top_k=20)


# Tokens


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_greedy_equals_reference(device, architecture):
    world = Real(device, architecture=architecture, layers=2)
    m, batch = world.model, prompts(5, 1, 21, 3, 17)                        # two prompts longer than a step's 16 tokens; five for four places
    assert (m.weights.layers[0].qkv_bias is not None, m.weights.layers[0].q_norm is not None) == (architecture[4] == "2", architecture[4] == "3")
    got = world.engine().generate(batch, Sampling(max_tokens=5))
    assert got == [reference_llama.generate(m.weights, m.config, m.cos_sin, p, 5, m.config.eos_token_ids) for p in batch]
    assert len({tuple(tokens) for tokens in got}) == len(batch) and len({t for tokens in got for t in tokens}) > 8


def test_sampled_requests_draw_the_same_together_and_alone(device):
    world, batch = Real(device), prompts(4, 9, 1, 4)
    batch[3] = batch[0]                                                      # the same prompt with another seed
    options = [Sampling(5, 0.8, 20, 1.0, 0.0, 7), Sampling(5, 0.8, 20, 0.9, 0.0, -2**63), Sampling(5, 0.8, 20, 1.0, 0.1, 2**63 - 1), WARM]
    together = world.engine().generate(batch, options)
    alone = world.engine()
    assert together == [alone.generate([p], s)[0] for p, s in zip(batch, options, strict=True)]
    assert together == [want(world, p, s)[0] for p, s in zip(batch, options, strict=True)]
    assert together[0] != together[3]


def check_logits(model, device, length, cut, others, bucket, seed):
    """The logits of one prompt alone and at once, then in two chunks, in other pages, among others and in another bucket: the same bits."""
    prompt, *rest = prompts(length, *others)
    alone = Engine(model, **SMALL, capture=False).step_fn
    clean = alone(alone.stage([Row(prompt, length, [1, 2, 3, 4])]))[0].clone()
    s, random = Engine(model, **SMALL, capture=False).step_fn, torch.Generator().manual_seed(seed)
    pages = (torch.randperm(20, generator=random) + 1).tolist()
    s.cache.keys[:, 0], s.cache.values[:, 0] = float("nan"), float("nan")                     # the null page and what no row owns
    s.cache.keys[:, 21:], s.cache.values[:, 21:] = float("nan"), float("nan")
    for start, end in ((0, cut), (cut, length)):
        rows = [Row(p, len(p), pages[4 + 4 * i:8 + 4 * i]) for i, p in enumerate(rest)]
        place = int(torch.randint(len(rows) + 1, (), generator=random))
        rows.insert(place, Row(prompt[start:end], end, pages[:4]))
        logits = s(max(s.stage(rows), bucket))
    assert_same(logits[place], clean)


@settings(max_examples=6)
@given(st.integers(2, 9), st.integers(1, 8), st.lists(st.integers(1, 2), max_size=3), st.integers(1, 16), st.integers(0, 99))
def test_company_chunks_pages_and_bucket_change_no_bit(device, length, cut, others, bucket, seed):
    check_logits(build(device), device, length, min(cut, length - 1), others, bucket, seed)


def test_a_row_that_sees_its_company_is_caught(device):
    class Mixed(Llama):
        def feed_forward(self, x, *rest):
            out = super().feed_forward(x, *rest)
            return out._replace(x=out.x + 1e-6 * out.x.mean(0))

    m = build(device)
    with pytest.raises(AssertionError):
        check_logits(Mixed(m.config, m.weights, m.cos_sin), device, 5, 2, [1, 2], 16, 0)


@pytest.fixture
def two_launches(monkeypatch):
    """Large steps have a second launch of attention, as on Hopper, but from 12 tokens on."""
    config = attention.config
    monkeypatch.setattr(attention, "APART_FROM", 12)
    monkeypatch.setattr(attention, "config", lambda *model: replace(own := config(*model), STAGES=4, TALL_M=2 * own.TALL_PART))


def check_workspaces(cuts, of):
    """Each bucket finds as much of what all share as it asks for, though the largest asks for less than some."""
    assert any(cut.tall_programs for cut in cuts.values()) and max(cut.states for cut in cuts.values()) > cuts[max(cuts)].states
    for cut in cuts.values():
        workspace = of(cut)
        assert workspace.states.numel() == cut.states and workspace.counters.numel() == cut.counters


def test_one_workspace_fits_every_bucket(device, two_launches):
    """Of decodes alone, of mixed steps with one launch, and of large ones with two; and of drafts, for few requests and many."""
    m = build(device)
    c = m.config
    s = Step(m, PagedCache.allocate(c.num_layers, 9, 4, c.num_kv_heads, c.head_dim, torch.float32, device), 16, 4, MAX_LEN, has_history=True)
    cuts = {bucket: s.tiling(bucket) for bucket in range(1, 17)}
    assert {(cut.has_tall, cut.tall_programs > 0) for cut in cuts.values()} == {(False, False), (True, False), (True, True)}
    check_workspaces(cuts, s.workspace)
    drafts = SpeculativeStep(s, Speculation(3))
    check_workspaces({bucket: drafts.tiling(bucket) for bucket in range(1, 5)}, drafts._workspace.of)


def check_turns(kind, device):
    """Buckets with room for tall requests and without take turns in one workspace: what its states held changes no bit, its counters end as zeros."""
    m = build(device)
    c = m.config
    s = kind(m, PagedCache.allocate(c.num_layers, 9, 4, c.num_kv_heads, c.head_dim, torch.float32, device), 16, 4, MAX_LEN)
    s.stage([Row(p, len(p), [1 + i]) for i, p in enumerate(prompts(2, 1))])
    both = [s.workspace(s.tiling(bucket)) for bucket in (4, 16)]
    assert both[0].states.data_ptr() == both[1].states.data_ptr()
    assert [s.tiling(bucket).has_tall for bucket in (4, 16)] == [False, True]
    seen = []
    for bucket in (4, 16, 4, 16):
        for w in both:
            w.states.fill_(float("nan"))
        seen.append(s(bucket)[:2].clone())
        assert not any(w.counters.any() for w in both)
    for logits in seen[1:]:
        assert_same(logits, seen[0])


def test_buckets_take_turns_in_one_workspace(device):
    check_turns(Step, device)


def test_counters_that_are_left_are_caught(device):
    class Dirty(Step):
        def __call__(self, bucket):
            self.workspace(self.tiling(bucket)).counters.fill_(1)
            return super().__call__(bucket)

    with pytest.raises(AssertionError):
        check_turns(Dirty, device)


engine_options = st.fixed_dictionaries(dict(max_tokens=st.sampled_from([4, 7, 16]), page_size=st.sampled_from([1, 3, 4, 16]),
                                            buckets=st.sampled_from([None, Buckets([3]), Buckets([2, 4])]), loop=st.sampled_from([1, 2, 7]),
                                            burst=st.sampled_from([1, 3])))
samplings = st.builds(Sampling, max_tokens=st.integers(1, 5), temperature=st.sampled_from([0.0, 0.8]), top_k=st.just(20), seed=st.integers(0, 3))


def check_arrivals(world, requests, options):
    """requests: (arrival step, prompt length, sampling) of each."""
    engine = world.engine(**options)
    batch = sorted(zip(requests, prompts(*(length for _, length, _ in requests)), strict=True), key=lambda b: b[0][0])
    for now in range(max(arrival for arrival, _, _ in requests) + 1):
        for (_, _, s), prompt in [b for b in batch if b[0][0] == now]:
            engine.add(prompt, s)
        step(engine)
    drain(engine)
    check_ended(world, engine)
    assert len(engine.requests) == len(requests)


def arrivals(most, longest):
    return st.lists(st.tuples(st.integers(0, 6), st.integers(1, longest), samplings), min_size=1, max_size=most)


@settings(max_examples=200)
@given(arrivals(9, 40), engine_options)
def test_arrivals_change_no_token(device, requests, options):
    check_arrivals(Paper(device), requests, options)


@settings(max_examples=8)
@given(arrivals(5, 18), engine_options)
def test_arrivals_change_no_token_on_the_kernels(device, requests, options):
    check_arrivals(Real(device), requests, options)


def check_ahead(device, mode, options, kind=Engine):
    """Launches of many steps bring the tokens, and leave the keys and values, of single steps."""
    world = Real(device)
    samplings = [Sampling(9, ignore_eos=True), Sampling(7, 0.8, 20, seed=3), Sampling(5, ignore_eos=True), Sampling(8, 0.9, seed=5)]
    engines = [world.engine(kind, num_pages=60, **choice) for choice in (dict(loop=1, burst=1), options)]
    left = [engine.generate(prompts(3, 1, 6, 2), samplings) for engine in engines]
    assert {*engines[0].modes} == {"single"} and {*engines[1].modes} == {"single", mode} and left[0] == left[1]
    assert left[0] == [want(world, p, s)[0] for p, s in zip(prompts(3, 1, 6, 2), samplings, strict=True)]
    for name in ("keys", "values"):
        single, many = (getattr(engine.cache, name).view(-1) for engine in engines)
        assert_same(single.sort().values, many.sort().values)             # pages come in another order, so slots differ, not their contents


AHEAD = [("burst", dict(loop=1, burst=5)), ("loop", dict(loop=3)), ("loop", dict(loop=64))]


@pytest.mark.parametrize("mode, options", AHEAD, ids=str)
def test_many_steps_a_launch_equal_single_steps(device, mode, options):
    check_ahead(device, mode, options)


class Overrunning(Engine):
    """Its last step of a launch, or every one, is two."""

    def capture(self, progress=False):
        call = self.ahead.runner.step
        self.ahead.runner.step = lambda bucket: (call(bucket), self.step_fn(bucket))
        super().capture(progress)


class Forgetting(Engine):
    """Its steps append their tokens to a copy, so that those of a launch all compute the first one's."""

    def capture(self, progress=False):
        state = type(self.step_fn).state
        self.step_fn.state = lambda R: replace(state(self.step_fn, R), token_ids=self.step_fn.buffers["token_ids"][:R].clone())
        super().capture(progress)


@pytest.mark.parametrize("mode, options", AHEAD[:2], ids=str)
@pytest.mark.parametrize("kind", [Overrunning, Forgetting])
def test_a_broken_launch_is_caught(device, kind, mode, options):
    with pytest.raises((AssertionError, RuntimeError)):
        check_ahead(device, mode, options, kind)


def test_turns_follow_need_pages_and_arrivals(device):
    """As many as the longest request needs, as there are pages for, one where a request waits; all that they may bring has its pages before."""
    world, ends = Paper(device), lambda n: Sampling(n, ignore_eos=True)
    engine = world.engine(loop=64, num_pages=9, max_requests=2)
    engine.add(prompts(2)[0], ends(9))
    step(engine)
    step(engine)
    assert engine.modes == {"single": 1, "loop": 8} and not engine.busy
    for n in (20, 20):
        engine.add(prompts(4)[0], ends(n))
    step(engine)                                           # 5 tokens each, 8 pages of 4: 12 more fit each
    step(engine)
    assert engine.modes == {"single": 2, "loop": 20} and engine.pool.available == 0
    engine.add(prompts(4)[0], ends(2))
    step(engine)
    assert engine.modes == {"single": 3, "loop": 20}, "a request waits"


def test_without_a_loop_bursts_serve_and_say_so(device, monkeypatch):
    monkeypatch.setattr(Loop, "why", "planted")
    engine = Real(device).engine(loop=64, burst=3)
    assert engine.why == "planted" and engine.generate(prompts(3), Sampling(7, ignore_eos=True)) == [
        want(Real(device), prompts(3)[0], Sampling(7, ignore_eos=True))[0]]
    assert engine.modes == {"single": 1, "burst": 6} and Real(device).engine(loop=1, burst=3).why == ""


PENALISED = Sampling(8, 0.7, 40, seed=2, ignore_eos=True, repetition_penalty=2.5, presence_penalty=9.0, frequency_penalty=5.0,
                     logit_bias={7: 20.0, 9: -2.0}, banned_token_ids=(11, 12), typical_p=0.95)


def adjusted(world, prompt, s):
    """The tokens of a request with penalties, or with a grammar, by the references."""
    m, device, tokens = world.model, world.model.weights.embed.device, list(prompt)
    one = lambda value, dtype=torch.int32: torch.tensor([value], dtype=dtype, device=device)
    real = torch.float32
    while len(tokens) - len(prompt) < s.max_tokens:
        logits = reference_llama.forward(m.weights, m.config, torch.tensor(tokens, device=device), m.cos_sin)[-1:]
        bits = torch.zeros(1, 32 * -(-VOCAB // 32), dtype=torch.int64)
        bits[0, prompt] = 1
        words = (bits.view(1, -1, 32) << torch.arange(32)).sum(-1).to(torch.int32).to(device)
        counts = torch.bincount(torch.tensor(tokens[len(prompt):], dtype=torch.int64), minlength=VOCAB).to(torch.int32)[None].to(device)
        mask = None if s.allowed_tokens is None else torch.from_numpy(s.mask(tokens[len(prompt):], VOCAB))[None].to(device)
        options = ops.Adjustments(one([*s.logit_bias]), one([*s.logit_bias.values()], real), one(s.repetition_penalty, real),
                                  one(s.presence_penalty, real), one(s.frequency_penalty, real), counts, words, mask, one([*s.banned_token_ids]),
                                  one([EOS, *s.stop_token_ids]), one(s.min_tokens), one(len(tokens) - len(prompt)))
        n, status = one(len(tokens)), one(0)
        x = reference_adjust.adjust(logits, options, n, status)
        tokens.append(int(reference_sampling.sample(x, one(s.temperature, real), one(s.top_k), one(s.top_p, real), one(s.min_p, real),
                                                    one(s.seed, torch.int64), n, n, status, one(s.typical_p, real))))
    return tokens[len(prompt):]


@pytest.mark.parametrize("mode, options", [("single", dict(loop=1, burst=1)), ("burst", dict(loop=1, burst=3)), ("loop", dict(loop=5))], ids=str)
def test_penalties_biases_and_bans_follow_their_request(device, mode, options):
    """Through single steps, launches of many and preemptions, among requests without them."""
    world, batch = Real(device), prompts(3, 5, 2)
    engine = world.engine(num_pages=7, **options)
    options = [PENALISED, Sampling(8, ignore_eos=True), replace(PENALISED, seed=9, temperature=0.0)]
    got = engine.generate(batch, options)
    assert engine.preemptions > 0 and engine.modes[mode] > 0
    assert got == [adjusted(world, batch[0], options[0]), want(world, batch[1], options[1])[0], adjusted(world, batch[2], options[2])]
    assert got[0] != want(world, batch[0], PENALISED)[0] and not {11, 12} & {*got[0], *got[2]}


def test_min_tokens_hold_back_the_end(device):
    world, prompt = Real(device), prompts(3)[0]
    tokens = want(world, prompt, Sampling(6, ignore_eos=True))[0]
    s = Sampling(6, stop_token_ids=tuple(tokens[:2]), min_tokens=4)
    got = world.engine().generate([prompt], s)[0]
    assert len(got) >= 4 and not set(got[:4]) & set(tokens[:2]) and world.engine().generate([prompt], replace(s, min_tokens=0)) == [tokens[:1]]


@pytest.mark.parametrize("s", [PENALISED, Sampling(allowed_tokens=lambda output: None)], ids=["penalties", "grammar"])
def test_an_engine_without_adjustments_refuses_them(device, s):
    engine = Paper(device).engine()
    engine.step_fn.adjusts = False
    with pytest.raises(ValueError, match="min_tokens or allowed_tokens, expected none of them in an engine made with adjusts=False; make"):
        engine.add([3], s)
    assert not engine.requests


def test_a_token_that_depends_on_its_place_is_caught(device):
    class Placed(PaperStep):
        def draw(self, row, tokens, seed):
            return super().draw(row, (*tokens, row), seed)

    world = type("World", (Paper,), {"step": Placed})(device)
    with pytest.raises(AssertionError):
        check_arrivals(world, [(0, 5, Sampling(5)), (0, 4, Sampling(5))], {})


# Pages


def check_pages(world, batch, s, num_pages, kind=Engine, **options):
    engine = world.engine(kind, num_pages=num_pages, **options)
    for prompt in batch:
        engine.add(prompt, s)
    drain(engine)
    check_ended(world, engine, engine.max_len)
    return engine.preemptions


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 17), st.integers(4, 16), st.integers(1, 5))
def test_few_pages_cost_time_not_tokens(device, lengths, max_tokens, budget, page_size):
    """From the fewest pages that hold the longest request alone: no deadlock, and the tokens of a roomy engine."""
    longest = min(max(lengths) + max_tokens - 1, MAX_LEN)
    least = -(-longest // page_size) + 1
    for num_pages in (least, least + 1, least + 3, 4 * least):
        check_pages(Paper(device), prompts(*lengths), Sampling(max_tokens), num_pages, max_tokens=budget, page_size=page_size)


def test_few_pages_cost_time_not_tokens_on_the_kernels(device):
    preemptions = [check_pages(Real(device), prompts(3, 9, 6), Sampling(6, 0.8, 20), num_pages) for num_pages in (5, 6, 8, 13)]
    assert preemptions[0] > 0 and preemptions[-1] == 0


@pytest.mark.parametrize("num_pages, page_size", [(2, 1), (2, 4), (3, 3)])
def test_a_cache_smaller_than_max_len_bounds_the_sequence(device, num_pages, page_size):
    """A request that alone fills the cache ends there; it does not wait for pages that do not exist."""
    world, capacity = Paper(device), (num_pages - 1) * page_size
    engine = world.engine(num_pages=num_pages, page_size=page_size)
    request = engine.requests[engine.add(prompts(1)[0], Sampling(64, ignore_eos=True))]
    drain(engine, 100)
    assert request.finish_reason == "length" and request.length == capacity + 1           # the last token needs no slot
    with pytest.raises(ValueError, match=f"prompt: got {capacity + 1} tokens, expected at most {capacity}"):
        engine.add([1] * (capacity + 1))


class Forgetful(Engine):
    """Believes, after a preemption, that the cache still holds the request."""

    def _preempt(self, request):
        computed = request.computed
        super()._preempt(request)
        request.computed = min(computed, 1)


class Leaky(Engine):
    """Returns all pages but the last."""

    def _release(self, request):
        request.pages = request.pages[:-1]
        super()._release(request)


class Sharing(Engine):
    """Gives a request its pages back and goes on using them."""

    def _release(self, request):
        pages = list(request.pages)
        super()._release(request)
        request.pages = pages


def test_take_forgets_an_ended_request(device):
    engine = Paper(device).engine()
    i = engine.add([1], Sampling(2, ignore_eos=True))
    for wrong in (i, i + 1):
        with pytest.raises(ValueError, match=f"Engine.take: request_id: got {wrong}, expected the id of a request that has ended"):
            engine.take(wrong)
    list(engine.stream())
    assert len(engine.take(i).output) == 2 and not engine.requests


@pytest.mark.parametrize("kind", [Forgetful, Leaky, Sharing])
def test_a_broken_page_book_is_caught(device, kind):
    case = Paper(device), prompts(3, 9, 6), Sampling(8), 6
    assert check_pages(*case) > 0
    with pytest.raises((AssertionError, KeyError)):
        check_pages(*case, kind)


# Cancelling


def state_of(engine, i):
    request = engine.requests[i]
    if request.finish_reason or request in engine.waiting:
        return "ended" if request.finish_reason else "waiting"
    return "decoding" if request.output else "prefilling"


@pytest.mark.parametrize("steps, state", [(0, "waiting"), (1, "waiting"), (2, "prefilling"), (3, "prefilling"), (4, "decoding"), (6, "decoding")])
@pytest.mark.parametrize("kind", WORLDS)
def test_cancel_leaves_the_others_alone(device, kind, steps, state):
    """Two places; the victim comes third, and its 30 tokens of prompt take three steps of twelve. The fourth takes its place."""
    world = kind(device)
    engine = world.engine(max_tokens=12, max_requests=2, num_pages=24)
    short, long, last = (Sampling(n, ignore_eos=True) for n in (1, 8, 2))
    ids = [engine.add(p, s) for p, s in zip(prompts(3, 2, 30, 5), (short, long, long, last), strict=True)]
    for _ in range(steps):
        step(engine)
    assert state_of(engine, ids[2]) == state
    held = engine.pool.held - len(engine.requests[ids[2]].pages)
    engine.cancel(ids[2])
    assert engine.pool.held == held and not engine.requests[ids[2]].pages
    check_books(engine)
    drain(engine)
    check_ended(world, engine)
    assert engine.requests[ids[2]].finish_reason == "cancelled" and len(engine.requests[ids[0]].output) == 1


def test_ended_and_unknown_requests_cannot_be_cancelled(device):
    engine = Paper(device).engine(loop=1, burst=1)
    ended, cancelled = engine.add([5], Sampling(1)), engine.add([6])
    step(engine)
    engine.cancel(cancelled)
    for i in (ended, cancelled, 99, -1, None):
        with pytest.raises(ValueError, match=f"Engine.cancel: request_id: got {i}, expected the id of a request that has not ended"):
            engine.cancel(i)
    assert not engine.busy and engine.step() == [] and engine.steps == 1


# Ends


def test_every_end_has_its_reason(device):
    world, prompt = Real(device), prompts(3)[0]
    tokens, _ = want(world, prompt, Sampling(6, ignore_eos=True))
    cases = [(Sampling(4), tokens[:4], "length"), (Sampling(6, stop_token_ids=(tokens[2], 0)), tokens[:tokens.index(tokens[2]) + 1], "stop"),
             (Sampling(6, stop_token_ids=[tokens[1]]), tokens[:tokens.index(tokens[1]) + 1], "stop"),
             (Sampling(1, stop_token_ids=(tokens[0],)), tokens[:1], "stop")]
    engine = world.engine()
    ids = [engine.add(prompt, s) for s, _, _ in cases]
    events = list(engine.stream())
    assert [(engine.requests[i].output, engine.requests[i].finish_reason) for i in ids] == [case[1:] for case in cases]
    for i, (_, output, reason) in zip(ids, cases, strict=True):
        assert [e for e in events if e.request_id == i] == [*(Event(i, t) for t in output[:-1]), Event(i, output[-1], reason)]


def test_eos_and_max_len_end_a_request(device):
    world = Paper(device)
    prompt = next([i, j] for i in range(VOCAB) for j in range(VOCAB)
                  if UNLUCKY not in (i, j) and EOS in want(world, [i, j], Sampling(9, ignore_eos=True))[0][:5])
    engine = world.engine()
    ids = [engine.add(prompt, s) for s in (Sampling(9), Sampling(9, ignore_eos=True), Sampling(64, ignore_eos=True),
                                           Sampling(9, stop_token_ids=(EOS,), ignore_eos=True))]
    drain(engine)
    check_ended(world, engine)
    stopped, on, longest, asked = (engine.requests[i] for i in ids)
    assert (stopped.finish_reason, stopped.output[-1]) == ("stop", EOS) == (asked.finish_reason, asked.output[-1])
    assert on.output[:len(stopped.output)] == stopped.output and on.output == longest.output[:len(on.output)]
    assert longest.finish_reason.startswith("error") or (longest.finish_reason, longest.length) == ("length", MAX_LEN)


@pytest.mark.parametrize("length, kind", [(MAX_LEN - 1, Paper), (MAX_LEN - 2, Paper), (MAX_LEN - 2, Real)])
def test_the_last_place_of_max_len_is_used(device, length, kind):
    world = kind(device)
    engine = world.engine()
    request = engine.requests[engine.add(prompts(length)[0], Sampling(64, ignore_eos=True))]
    drain(engine)
    check_ended(world, engine)
    assert request.length == MAX_LEN and request.finish_reason == "length"


# Bad data and bad input


@pytest.mark.parametrize("kind", WORLDS)
def test_bad_data_stays_in_its_row(device, kind):
    """The prompts with the token of the NaN embedding fail, one at once and one in its second chunk; their neighbours see none of it."""
    world = kind(device)
    engine, (a, b, c) = world.engine(num_pages=25), prompts(6, 2, 9)
    bad = [engine.add([4, UNLUCKY, 5], Sampling(5)), engine.add([7] * 20 + [UNLUCKY, 8], WARM)]
    good = [engine.add(p, s) for p, s in ((a, Sampling(5)), (b, WARM), (c, Sampling(3)))]        # the last in pages that held NaN
    drain(engine)
    check_ended(world, engine)
    assert all(engine.requests[i].finish_reason == "error: no finite logit" and not engine.requests[i].output for i in bad)
    assert all(engine.requests[i].finish_reason == "length" for i in good)


def test_a_flag_in_the_first_chunk_ends_the_request(device):
    engine = Paper(device).engine()
    i = engine.add([UNLUCKY] + [7] * 30)
    assert step(engine) == [Event(i, None, "error: no finite logit")] and not engine.busy and engine.pool.held == 0


@pytest.mark.parametrize("flags, why", [(0, "no token"), (ops.BAD_PAGE | ops.BAD_OPTION, "a page outside the cache, a bad sampling option")])
def test_an_answer_without_a_token_is_an_error(device, flags, why):
    class Mute(PaperStep):
        def read(self, num_requests):
            return [-1] * num_requests, [flags] * num_requests

    engine = type("World", (Paper,), {"step": Mute})(device).engine()
    ids = [engine.add(p) for p in prompts(3, 2)]
    assert step(engine) == [Event(i, None, f"error: {why}") for i in ids]


def test_bad_rows_of_a_step_are_flagged_and_alone(device):
    """Rows with a page outside the cache and with lengths that make no sense, among good ones: flags, and the same bits as without them."""
    engine = Real(device).engine(capture=False)
    s, (a, b, c) = engine.step_fn, prompts(3, 2, 1)
    good = [Row(a, 3, [1]), Row(b, 2, [2])]
    clean = s.single(s.stage(good)).clone()
    tokens, status = s.read(2)
    assert status == [0, 0]
    logits = s.single(s.stage([Row(c, 1, [10**6]), good[0], Row(c, 1, [-1]), good[1]]))
    assert s.read(4)[1] == [ops.BAD_PAGE | ops.NO_TOKEN, 0, ops.BAD_PAGE | ops.NO_TOKEN, 0] and s.read(4)[0] == [-1, tokens[0], -1, tokens[1]]
    assert_same(logits[[1, 3]], clean[:2])
    n = s.stage([Row(b, 2, [3]), good[0], Row(c, 1, [4]), Row(c, 1, [5], Sampling(temperature=-1.0))])
    s.buffers.stage("seq_lens", [1, 3, 10**6, 1])
    s.buffers.upload()
    logits = s.single(n)
    assert s.read(4)[1] == [ops.BAD_LENGTH | ops.NO_TOKEN, 0, ops.BAD_LENGTH | ops.NO_TOKEN, ops.BAD_OPTION] and s.read(2)[0][1] == tokens[0]
    assert_same(logits[1], clean[0])


@pytest.mark.parametrize("rows, got", [([Row([1] * 17, 17, [1])], "17 tokens in 1 requests"), ([Row([1], 1, [1])] * 5, "5 tokens in 5 requests")])
def test_a_step_names_what_does_not_fit(device, rows, got):
    with pytest.raises(ValueError, match=f"Step: rows: got {got}, expected at most 16 in 4; split the batch"):
        Real(device).engine(capture=False).step_fn.stage(rows)


@pytest.mark.parametrize("row", [Row([], 1, [1]), Row([1, 2], 1, [1]), Row([1], 5, [1]), Row([1], 1, []), Row([1], 1, [0])])
def test_a_step_refuses_rows_without_tokens_or_pages(device, row):
    with pytest.raises(ValueError, match=r"Step: rows\[1\]: got . tokens, seq_len . and . pages, expected 1 to seq_len tokens and pages of 4"):
        Real(device).engine(capture=False).step_fn.stage([Row([1], 1, [1]), row])


def test_generate_names_what_failed(device):
    engine = Real(device).engine(capture=False)
    with pytest.raises(RuntimeError, match="generate: prompt 1: error: no finite logit; use add"):
        engine.generate([[1, 2], [3, UNLUCKY]], Sampling(2, ignore_eos=True))
    assert not engine.requests and engine.pool.held == 0


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_generate_leaves_nothing_behind(device, monkeypatch, interruption):
    engine = Paper(device).engine()
    monkeypatch.setattr(engine.step_fn, "read", lambda n: (_ for _ in ()).throw(interruption("planted")))
    with pytest.raises(interruption, match="planted"):
        engine.generate([[1, 2], [3]], Sampling(4))
    assert not engine.requests and not engine.busy and engine.pool.held == 0


BAD_ADDS = [
    ([], {}, "prompt: got no tokens, expected at least one"),
    ([VOCAB], {}, rf"got \[{VOCAB}\], expected Python integers from 0 to {VOCAB - 1}"),
    ([5, -1], {}, r"got \[-1\], expected Python integers"),
    ([True], {}, r"got \[True\], expected Python integers"),
    ([1.0], {}, r"got \[1.0\], expected Python integers"),
    (["a"], {}, r"got \['a'\], expected Python integers"),
    ([1] * MAX_LEN, {}, f"prompt: got {MAX_LEN} tokens, expected at most {MAX_LEN - 1}"),
    ([1], dict(stop_token_ids=(VOCAB,)), rf"stop_token_ids: got \[{VOCAB}\]"),
    ([1], dict(max_tokens=0), "max_tokens: got 0, expected at least 1"),
    ([1], dict(max_tokens=2.0), "max_tokens: got 2.0, expected at least 1"),
    ([1], dict(max_tokens=True), "max_tokens: got True, expected at least 1"),
    ([1], dict(seed=2**63), "seed: got 9223372036854775808, expected a 64-bit integer"),
    ([1], dict(seed=-2**63 - 1), "seed: got -9223372036854775809, expected a 64-bit integer"),
    ([1], dict(seed=1.5), "seed: got 1.5, expected a 64-bit integer"),
    ([1], dict(temperature=float("nan")), "sample: temperature: got nan, expected a finite number"),
    ([1], dict(temperature=float("inf")), "sample: temperature: got inf, expected a finite number"),
    ([1], dict(temperature=-0.5), "sample: temperature: got -0.5, expected a finite number"),
    ([1], dict(top_k=-1), f"sample: top_k: got -1, expected an integer from 0 to the vocabulary's {VOCAB}"),
    ([1], dict(top_k=VOCAB + 1), "sample: top_k: got 98, expected an integer from 0 to"),
    ([1], dict(top_k=1.5), "sample: top_k: got 1.5, expected an integer"),
    ([1], dict(temperature=None), "sample: temperature: got None, expected a finite number"),
    ([1], dict(temperature=1e39), r"sample: temperature: got 1e\+39, expected a finite number"),
    ([1], dict(top_p=0.0), "sample: top_p: got 0.0, expected a number above 0"),
    ([1], dict(top_p=1.01), "sample: top_p: got 1.01, expected a number above 0"),
    ([1], dict(min_p=-0.1), "sample: min_p: got -0.1, expected a number from 0 to 1"),
    ([1], dict(min_p=float("nan")), "sample: min_p: got nan, expected a number from 0 to 1"),
    ([1], dict(typical_p=0.0), "sample: typical_p: got 0.0, expected a number above 0"),
    ([1], dict(logit_bias={VOCAB: 1.0}), f"adjust: bias: got token {VOCAB}, expected token ids from 0"),
    ([1], dict(logit_bias={i: 1.0 for i in range(33)}), "logit_bias: got 33 tokens, expected at most 32"),
    ([1], dict(stop_token_ids=tuple(range(16))), "end-of-sequence tokens: got 17 tokens, expected at most 16") if EOS > 15 else
    ([1], dict(stop_token_ids=tuple(range(17))), "end-of-sequence tokens: got 17 tokens, expected at most 16"),
    ([1], dict(repetition_penalty=0.0), "adjust: repetition: got 0.0, expected a positive number"),
    ([1], dict(min_tokens=-1), "adjust: min_tokens: got -1"),
    ([1], dict(allowed_tokens=[3]), "add: allowed_tokens: got list, expected None or a callable"),
]


@pytest.mark.parametrize("prompt, options, words", BAD_ADDS, ids=lambda value: None if isinstance(value, list | dict) else value[:40])
def test_bad_requests_are_named_and_queue_nothing(device, prompt, options, words):
    engine = Paper(device).engine()
    engine.add([3])
    with pytest.raises(ValueError, match=words):
        engine.add(prompt, Sampling(**options))
    assert len(engine.requests) == len(engine.waiting) == 1


@pytest.mark.parametrize("second, options, error", [([VOCAB], Sampling(), ValueError), ([1], [Sampling()], ValueError),
                                                    ([1], [Sampling(), Sampling(temperature=None)], ValueError)])
def test_generate_runs_all_prompts_or_none(device, second, options, error):
    engine = Paper(device).engine()
    with pytest.raises(error):
        engine.generate([[1, 2, 3], second], options)
    assert not engine.busy and engine.steps == 0 and engine.pool.held == 0
    assert engine.generate([[1, 2, 3]], Sampling(3)) == [want(Paper(device), [1, 2, 3], Sampling(3))[0]]
    assert engine.generate([]) == []


@pytest.mark.parametrize("options, words", [
    (dict(max_tokens=3), "max_tokens: got 3, expected at least max_requests = 4"),
    (dict(max_tokens=0), "max_tokens: got 0, expected at least 1"),
    (dict(max_requests=0), "max_requests: got 0, expected at least 1"),
    (dict(max_len=1), "max_len: got 1, expected at least 2"),
    (dict(max_len=-5), "max_len: got -5, expected at least 2"),
    (dict(num_pages=1), "num_pages: got 1, expected at least 2"),
    (dict(page_size=0), "page_size: got 0, expected 1 to 256"),
    (dict(page_size=257), "page_size: got 257, expected 1 to 256"),
    (dict(loop=0), "loop: got 0, expected at least 1"),
    (dict(burst=0), "burst: got 0, expected at least 1"),
    (dict(buckets=Buckets([8, 32])), r"buckets: got Buckets\(\[8, 32\]\), expected none above max_tokens = 16"),
])
def test_bad_engines_are_named(device, options, words):
    with pytest.raises(ValueError, match=f"gkernels.Engine: {words}"):
        Engine(build(device), **SMALL | options)


def test_a_cache_beyond_the_device_is_named(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**34))
    with pytest.raises(ValueError, match=r"num_pages: the cache needs 2.0 GiB, got 1.0 GiB free; ask for fewer pages"):
        Engine.check_memory(2**31, torch.device("cuda"))
    Engine.check_memory(2**30, torch.device("cuda"))
    Engine.check_memory(2**62, torch.device("cpu"))


# Anything


class Server(RuleBasedStateMachine):
    """Requests come, run and are cancelled in any order over few pages."""

    world, longest, most, kind = None, 24, 12, Engine

    @initialize(budget=st.integers(3, 16), places=st.integers(1, 3), page_size=st.sampled_from([1, 3, 4, 8]), spare=st.integers(0, 3))
    def start(self, budget, places, page_size, spare):
        num_pages = -(-(self.longest + self.most - 1) // page_size) + 1 + spare
        self.engine = self.world.engine(self.kind, max_tokens=budget, max_requests=places, page_size=page_size, num_pages=num_pages)

    @rule(data=st.data(), s=samplings, seed=st.integers(20, 40), unlucky=st.integers(0, 9))
    def add(self, data, s, seed, unlucky):
        length, more = data.draw(st.integers(1, self.longest)), data.draw(st.integers(1, self.most))
        prompt = [(seed * i + length) % 80 + 14 for i in range(length)]
        self.engine.add(prompt if unlucky else prompt[:-1] + [UNLUCKY], replace(s, max_tokens=more))

    @precondition(lambda self: self.engine.busy)
    @rule(times=st.integers(1, 3))
    def step(self, times):
        for _ in range(times):
            step(self.engine)

    @precondition(lambda self: self.engine.busy)
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        live = [*self.engine.running, *self.engine.waiting]
        self.engine.cancel(live[which % len(live)].id)

    @invariant()
    def books(self):
        if hasattr(self, "engine"):
            check_books(self.engine)

    def teardown(self):
        if hasattr(self, "engine"):
            drain(self.engine)
            check_ended(self.world, self.engine, self.engine.max_len)


def serve(world, examples, steps, phases=settings().phases, **attributes):
    machine = type("Machine", (Server,), {"world": world, **attributes})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=steps, phases=phases))


def test_anything_goes(device):
    serve(Paper(device), examples=150, steps=30)


def test_anything_goes_on_the_kernels(device):
    serve(Real(device), examples=6, steps=12, longest=9, most=5)


@pytest.mark.parametrize("kind", [Forgetful, Leaky])
def test_anything_breaks_a_broken_engine(device, kind):
    with pytest.raises((AssertionError, KeyError)):
        serve(Paper(device), examples=150, steps=30, phases=[Phase.generate], kind=kind)
