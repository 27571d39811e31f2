"""Requests whose tokens a grammar allows: they draw among those alone, as if served alone, and nobody else sees it.

In the real world a step runs the kernels, and the references say what a grammar leaves. In the paper world of test_engine a mask picks among its
tokens by the hash of what a request's pages hold.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkernels import ops
from gkernels.model.engine import Engine, Sampling
from gkernels.model.speculation import Speculation
from gkernels.model.step import Step
from tests.close import assert_same
from tests.test_engine import (
    EOS,
    MAX_LEN,
    PENALISED,
    UNLUCKY,
    VOCAB,
    Paper,
    PaperStep,
    Real,
    adjusted,
    check_books,
    engine_options,
    prompts,
    want,
)

WORDS = -(-VOCAB // 32)
NONE_LEFT = "error: no finite logit among the tokens that allowed_tokens, bans and min_tokens leave"


def pack(tokens):
    bits = np.zeros(WORDS * 32, dtype=np.uint8)
    bits[[*tokens]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def unpack(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB]).tolist()


def planted(_):
    raise KeyError("planted")


class Grammar:
    """Lets sets of tokens take turns, in memory that all grammars share. With `breaks`, `how` answers in its place after so many tokens. Notes what
    it is shown."""

    memory = torch.zeros(1, WORDS, dtype=torch.int32)

    def __init__(self, sets, breaks=None, how=None):
        self.sets, self.breaks, self.how, self.shown = sets, breaks, how, []

    def __call__(self, output):
        self.shown.append([*output])
        if len(output) == self.breaks:
            return self.how(output)
        self.memory[0] = torch.from_numpy(pack(self.sets[len(output) % len(self.sets)]))
        output.append(0)                                                     # its own copy: no other sees it
        return self.memory

    def __repr__(self):
        return f"Grammar({self.sets}, {self.breaks}, {self.how})"


ODD, EVEN = range(15, VOCAB, 2), range(14, VOCAB, 2)
LONG = Sampling(8, ignore_eos=True)


def guided(s, *sets, **breaks):
    return replace(s, allowed_tokens=Grammar(sets, **breaks))


def fresh(s):
    """With a grammar that has been shown nothing."""
    grammar = s.allowed_tokens
    return s if grammar is None else guided(s, *grammar.sets, breaks=grammar.breaks, how=grammar.how)


def drain(engine):
    """Serves to the end. Each step brings news or computes something."""
    while engine.busy:
        steps = engine.steps
        assert engine.step() or engine.steps > steps, "nothing came of a step"
        check_books(engine)
    assert engine.pool.held == 0 and len(engine._slots) == engine.step_fn.max_requests


def serve(engine, batch, options):
    """The requests, served to the end."""
    ids = [engine.add(prompt, s) for prompt, s in zip(batch, options, strict=True)]
    drain(engine)
    for i, s in zip(ids, options, strict=True):
        request, grammar = engine.requests[i], s.allowed_tokens
        if grammar is not None and request.finish_reason in ("length", "stop"):
            assert grammar.shown == [request.output[:n] for n in range(len(request.output))], "asked once for each token, with those before it"
    return [engine.requests[i] for i in ids]


# On the kernels


def test_a_grammar_is_followed_and_its_neighbours_see_nothing(device):
    """Prompts in chunks and whole, one set and two that take turns, greedy and drawn, with penalties and bans and without."""
    world, drawn, batch = Real(device), replace(LONG, temperature=0.9, top_k=20, seed=3), prompts(3, 30, 5, 2)
    options = [guided(LONG, [20, 30, 40, 96]), guided(drawn, ODD, EVEN), drawn, guided(PENALISED, range(7, 60), ODD)]
    engine = world.engine()
    requests = serve(engine, batch, options)
    assert [r.output for r in requests] == [want(world, p, o)[0] if o is drawn else adjusted(world, p, fresh(o))
                                            for p, o in zip(batch, options, strict=True)]
    assert {*requests[0].output} <= {20, 30, 40, 96} and [t % 2 for t in requests[1].output] == [1, 0] * 4
    assert {*engine.modes} == {"single"} and requests[1].output != want(world, batch[1], drawn)[0]


@pytest.mark.parametrize("mode, options", [("loop", {}), ("speculative loop", dict(speculation=Speculation(3, 1, 2)))], ids=str)
def test_many_steps_a_launch_begin_where_the_last_grammar_ends(device, mode, options):
    world = Real(device)
    engine = world.engine(loop=4, **options)
    short, long = serve(engine, prompts(3, 4), [guided(replace(LONG, max_tokens=3), ODD), replace(LONG, max_tokens=9)])
    assert {*engine.modes} == {"single", mode} and engine.modes["single"] == len(short.output) == 3
    assert [r.output for r in (short, long)] == [adjusted(world, short.prompt, fresh(short.sampling)), want(world, long.prompt, long.sampling)[0]]


def test_a_grammar_ends_a_request_by_its_stop_token(device):
    s = replace(LONG, ignore_eos=False)
    request, = serve(Real(device).engine(), prompts(3), [guided(s, ODD, EVEN, [EOS])])
    assert (len(request.output), request.output[-1], request.finish_reason) == (3, EOS, "stop")


def check_reuse(device, kind=Step):
    """One place: each request finds the line of the one before, which it may not see; the second computes its prompt in chunks."""
    world, s = Real(device), replace(LONG, max_tokens=3)
    engine = world.engine(max_requests=1)
    engine.step_fn.__class__ = kind
    requests = serve(engine, prompts(2, 20, 3), [guided(s, [20]), s, guided(s, EVEN, ODD)])
    assert [r.output for r in requests] == [adjusted(world, r.prompt, fresh(r.sampling)) for r in requests]


def test_a_slot_forgets_its_grammar(device):
    check_reuse(device)


def test_a_slot_that_remembers_is_caught(device):
    class Remembering(Step):
        def leave(self, slot):
            pass

    with pytest.raises(AssertionError):
        check_reuse(device, Remembering)


def test_a_grammar_survives_preemption(device):
    world, batch = Real(device), prompts(3, 5, 2)
    engine = world.engine(num_pages=7)
    options = [guided(LONG, ODD, EVEN), LONG, guided(PENALISED, EVEN)]
    requests = serve(engine, batch, options)
    assert engine.preemptions > 0 and [r.output for r in requests] == [adjusted(world, r.prompt, fresh(r.sampling)) for r in requests]


# What goes wrong


ERRORS = [
    (planted, "KeyError: 'planted'"),
    (lambda _: pack(ODD).tolist(), "TypeError: gkernels.Sampling.allowed_tokens: mask: got list, expected a torch.Tensor or numpy.ndarray of int32"),
    (lambda _: None, "TypeError: gkernels.Sampling.allowed_tokens: mask: got NoneType, expected"),
    (lambda _: pack(ODD).astype(np.int64), "mask: got int64, expected int32, 32 tokens a word; pack bools with numpy.packbits"),
    (lambda _: torch.ones(VOCAB, dtype=torch.bool), "mask: got torch.bool, expected int32, 32 tokens a word; pack bools with numpy.packbits"),
    (lambda _: torch.ones(WORDS, dtype=torch.int32, device="meta"), "mask: got one on meta, expected one on the CPU"),
    (lambda _: pack(ODD)[:-1], f"ValueError: gkernels.Sampling.allowed_tokens: mask: bitmask too short: got shape [{WORDS - 1}], expected [{WORDS}] "
                               f"or [1, {WORDS}], for {VOCAB} tokens; make it for the model's vocabulary, which may hold more than the tokenizer's"),
    (lambda _: np.zeros(0, dtype=np.int32), "mask: bitmask too short: got shape [0]"),
    (lambda _: np.zeros(WORDS + 1, dtype=np.int32), f"mask: got shape [{WORDS + 1}], expected [{WORDS}]"),
    (lambda _: np.zeros((2, WORDS), dtype=np.int32), f"mask: got shape [2, {WORDS}], expected [{WORDS}]"),
    (lambda _: np.zeros((), dtype=np.int32), "mask: got shape [], expected"),
    (lambda _: pack([]), NONE_LEFT),
]


@pytest.mark.parametrize("how, words", ERRORS, ids=lambda value: value[:60] if isinstance(value, str) else "")
def test_an_error_ends_its_request_alone(device, how, words):
    """At once, behind a first chunk, and after two tokens; the neighbours go on, one with a grammar and one without."""
    world = type("World", (Paper,), {"step": GuidedPaper})(device)
    engine = world.engine(max_requests=5, max_tokens=16)
    options = [guided(LONG, ODD), *(guided(LONG, ODD, breaks=n, how=how) for n in (0, 0, 2)), LONG]
    requests = serve(engine, prompts(3, 2, 25, 2, 4), options)
    for request in (requests[0], requests[4]):
        assert (request.output, request.finish_reason) == alone(world, request.prompt, request.sampling)
    for request, n in zip(requests[1:4], (0, 0, 2), strict=True):
        assert len(request.output) == n and words in request.finish_reason and request.finish_reason.startswith("error: ")
        assert request.error is None if words == NONE_LEFT else str(request.error) in request.finish_reason


def test_generate_tells_what_a_grammar_raised(device):
    engine = Real(device).engine(capture=False)
    with pytest.raises(RuntimeError, match="generate: prompt 1: error: allowed_tokens: KeyError: 'planted'; use add") as raised:
        engine.generate(prompts(2, 3), [replace(LONG, max_tokens=2), guided(LONG, ODD, breaks=0, how=planted)])
    assert isinstance(raised.value.__cause__, KeyError) and raised.value.__cause__.__traceback__
    assert not engine.requests and engine.pool.held == 0


def test_a_grammar_that_leaves_no_token_ends_its_request(device):
    """No token, none but bits behind the vocabulary, a banned one, and one that min_tokens holds back."""
    world, behind = Real(device), np.array([0] * (WORDS - 1) + [-1 << VOCAB % 32], dtype=np.int32)
    options = [guided(LONG, ODD, breaks=1, how=lambda _: pack([])), guided(LONG, ODD, breaks=1, how=lambda _: behind),
               guided(replace(LONG, banned_token_ids=(20,)), ODD, [20]), guided(replace(LONG, stop_token_ids=(EOS,), min_tokens=3), ODD, [EOS]), LONG]
    *failed, good = serve(world.engine(max_requests=5), prompts(2, 3, 4, 5, 2), options)
    assert [(len(r.output), r.finish_reason) for r in failed] == [(1, NONE_LEFT)] * 4 and good.output == want(world, good.prompt, good.sampling)[0]


def test_an_interrupted_grammar_is_asked_again(device):
    world, s = Real(device), guided(LONG, ODD)

    def interrupt(_):
        s.allowed_tokens.breaks = None
        raise KeyboardInterrupt

    s.allowed_tokens.breaks, s.allowed_tokens.how = 3, interrupt
    engine = world.engine()
    ids = [engine.add(p, o) for p, o in zip(prompts(3, 2), (LONG, s), strict=True)]
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    drain(engine)
    assert [engine.requests[i].output for i in ids] == [adjusted(world, engine.requests[i].prompt, fresh(engine.requests[i].sampling)) for i in ids]


@pytest.mark.parametrize("also_raises", [False, True])
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_grammar_may_cancel_requests(device, victim, also_raises):
    """Those before it in the step, itself, those behind it, and those that wait."""
    world, ids = type("World", (Paper,), {"step": GuidedPaper})(device), []
    engine = world.engine(max_requests=3)

    def cancel(output):
        engine.cancel(ids[victim])
        return planted(output) if also_raises else pack(ODD)

    options = [guided(LONG, EVEN), guided(LONG, ODD, breaks=2, how=cancel), LONG, LONG]
    ids += [engine.add(p, s) for p, s in zip(prompts(3, 2, 4, 5), options, strict=True)]
    drain(engine)
    assert engine.requests[ids[victim]].finish_reason == "cancelled"
    for i in {0, 2, 3} - {victim}:
        request = engine.requests[ids[i]]
        assert (request.output, request.finish_reason) == alone(world, request.prompt, request.sampling)
    assert victim == 1 or engine.requests[ids[1]].finish_reason == ("error: allowed_tokens: KeyError: 'planted'" if also_raises else "length")


# A step's lines


def test_lines_are_their_slots_own(device):
    s = Real(device).engine(capture=False).step_fn
    assert (s.allowed == -1).all() and s.allowed.shape == (4, WORDS)
    s.allow([2, 0], [pack(ODD), pack([5])])
    rows = lambda: [unpack(line) for line in s.allowed.cpu().numpy()]
    every = [*range(VOCAB)]
    assert rows() == [[5], every, [*ODD], every]
    s.allow([2], [pack(EVEN)])
    s.leave(0)
    s.allow([], [])
    assert rows() == [every, every, [*EVEN], every]


@pytest.mark.parametrize("slots, masks, words", [
    ([4], [pack(ODD)], r"allow: slots: got \[4\], expected 0 to 3"), ([-1], [pack(ODD)], r"allow: slots: got \[-1\], expected 0 to 3"),
    ([1], [pack(ODD)[:1]], rf"allow: masks: got \['int32 \[1\]'\], expected int32 \[{WORDS}\] for each of 1 slots"),
    ([1, 2], [pack(ODD)], rf"allow: masks: got \['int32 \[{WORDS}\]'\], expected int32 \[{WORDS}\] for each of 2 slots"),
    ([1, 2], [pack(ODD), pack(ODD)[None]], rf"allow: masks: got \['int32 \[{WORDS}\]', 'int32 \[1, {WORDS}\]'\], expected"),
    ([1], [pack(ODD).astype(np.int64)], r"allow: masks: got \['int64")])
def test_a_step_names_masks_that_do_not_fit(device, slots, masks, words):
    s = Real(device).engine(capture=False).step_fn
    with pytest.raises(ValueError, match=f"gkernels.Step.{words}"):
        s.allow(slots, masks)
    assert (s.allowed == -1).all()


def test_a_step_without_adjustments_names_the_mend(device):
    with pytest.raises(ValueError, match="allow: slots: got a step without adjusts, expected one that adjusts; make it with adjusts=True"):
        Real(device).engine(capture=False, adjusts=False).step_fn.allow([0], [pack(ODD)])


@pytest.mark.parametrize("shape", [(WORDS,), (1, WORDS)])
@pytest.mark.parametrize("make", [torch.from_numpy, np.asarray])
def test_a_mask_is_copied_from_either_kind_and_shape(make, shape):
    memory = pack(ODD).reshape(shape)
    mask = Sampling(allowed_tokens=lambda _: make(memory)).mask([], VOCAB)
    memory[:] = 0
    assert_same(torch.from_numpy(mask), torch.from_numpy(pack(ODD)))
    assert Sampling().mask([], VOCAB) is None and hash(Sampling(allowed_tokens=lambda _: memory)) == hash(Sampling())


# On paper


class GuidedPaper(PaperStep):
    """Draws among what the row's line allows."""

    def __init__(self, engine):
        super().__init__(engine)
        self.masks = {}

    def allow(self, slots, masks):
        self.masks |= zip(slots, map(unpack, masks), strict=True)

    def leave(self, slot):
        self.masks.pop(slot, None)

    def draw(self, row, tokens, seed):
        left = self.masks.get(self.rows[row].slot)
        if left == [] and self.rows[row].emits:
            self.flags[row] = ops.NO_TOKEN
        token = super().draw(row, tokens, seed)
        return token if not left else left[token % len(left)]


def alone(world, prompt, s, max_len=MAX_LEN):
    """(tokens, finish_reason) of a request that is served alone, on paper."""
    if s.allowed_tokens is None:
        return want(world, prompt, s, max_len)
    tokens, s = [*prompt], fresh(s)
    while True:
        output = tokens[len(prompt):]
        try:
            left = unpack(s.mask(output, VOCAB))
        except Exception as error:
            return output, f"error: allowed_tokens: {type(error).__name__}: {error}"
        if not left or UNLUCKY in tokens:
            return output, NONE_LEFT
        tokens.append(left[world.next_token(tuple(tokens), s) % len(left)])
        if tokens[-1] == EOS and not s.ignore_eos:
            return tokens[len(prompt):], "stop"
        if len(output) + 1 >= s.max_tokens or len(tokens) >= max_len:
            return tokens[len(prompt):], "length"


sets = st.lists(st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=3)
faults = st.sampled_from([planted, lambda _: pack([]), lambda _: pack(ODD)[1:]])
grammars = st.none() | st.builds(Grammar, sets, st.none() | st.integers(0, 4), faults)
options = st.builds(Sampling, max_tokens=st.integers(1, 8), seed=st.integers(0, 3), ignore_eos=st.booleans(), allowed_tokens=grammars)
arrivals = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30), options), min_size=1, max_size=7)


def check_arrivals(device, requests, options, num_pages, step=GuidedPaper, kind=Engine):
    world = type("World", (Paper,), {"step": step})(device)
    page_size = options["page_size"]
    engine = world.engine(kind, **options, num_pages=-(-MAX_LEN // page_size) + 1 + num_pages)
    requests = [(now, prompt, fresh(s)) for (now, _, s), prompt in zip(requests, prompts(*(n for _, n, _ in requests)), strict=True)]
    for now in range(7):
        for _, prompt, s in [r for r in requests if r[0] == now]:
            engine.add(prompt, s)
        engine.step()
        check_books(engine)
    drain(engine)
    for request in engine.requests.values():
        assert (request.output, request.finish_reason) == alone(world, request.prompt, request.sampling, engine.max_len)
        grammar = request.sampling.allowed_tokens
        if grammar is not None:
            count = len(request.output) + request.finish_reason.startswith("error")
            assert grammar.shown == [request.output[:n] for n in range(count)]
    return engine


@settings(max_examples=200)
@given(arrivals, engine_options, st.integers(0, 9))
def test_grammars_anywhere_change_no_other_token(device, requests, options, num_pages):
    check_arrivals(device, requests, options, num_pages)


OPTIONS = dict(max_tokens=16, page_size=1, loop=5)
BATCH = [(0, 12, guided(LONG, [20, 30], [40])), (0, 16, guided(LONG, [50, 60, 70])), (1, 18, LONG), (1, 9, guided(LONG, ODD, EVEN))]


class Remembering(GuidedPaper):
    def leave(self, slot):
        pass


class Crossed(GuidedPaper):
    def allow(self, slots, masks):
        super().allow(slots[::-1], masks)


class Hasty(Engine):
    """Takes many steps a launch with the masks of the first."""

    def _reserve_turns(self, batch, ahead):
        samplings = [request.sampling for request, _ in batch]
        for request, _ in batch:
            request.sampling = replace(request.sampling, allowed_tokens=None)
        turns = super()._reserve_turns(batch, ahead)
        for (request, _), s in zip(batch, samplings, strict=True):
            request.sampling = s
        return turns


def test_the_controls_case_is_good_and_preempts(device):
    assert check_arrivals(device, BATCH, OPTIONS, 0).preemptions > 0


def test_a_mask_that_is_not_copied_is_caught(device, monkeypatch):
    monkeypatch.setattr(Sampling, "mask", lambda self, output, _: self.allowed_tokens([*output]).numpy()[0])
    with pytest.raises(AssertionError):
        check_arrivals(device, BATCH, OPTIONS, 0)


@pytest.mark.parametrize("broken", [dict(step=Remembering), dict(step=Crossed), dict(kind=Hasty)], ids=str)
def test_a_broken_guide_is_caught(device, broken):
    with pytest.raises(AssertionError):
        check_arrivals(device, BATCH, OPTIONS, 0, **broken)
