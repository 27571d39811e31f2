"""Speculative steps bring the tokens of plain ones, in as many calls as a model in plain Python needs."""

import pytest
import torch

import reference.ngram as reference_ngram
from gkernels import ops
from gkernels.model.engine import Sampling
from gkernels.model.speculation import Speculation, SpeculativeStep
from tests.test_engine import EOS, MAX_LEN, VOCAB, Real, check_books, prompts, want

LOOPING = [(40 + i) % 80 + 14 for i in range(9)]            # a prompt after which the random model soon repeats itself


def serve(device, batch, options, speculation, **engine):
    world = Real(device)
    engine = world.engine(speculation=speculation, **dict(loop=6) | engine)
    got = engine.generate(batch, options)
    check_books(engine)
    assert got == [want(world, p, s)[0] for p, s in zip(batch, options, strict=True)]
    return engine


def calls(prompt, output, s, speculation, device):
    """How many speculative steps bring the output's tokens after the first."""
    tokens, known, count = prompt + output, len(prompt) + 1, 0
    while known < len(tokens):
        limit = min(s.max_tokens - (known - len(prompt)), MAX_LEN - known) - 1
        row = lambda value: torch.tensor([value], dtype=torch.int32, device=device)
        history = torch.tensor([tokens[:known]], dtype=torch.int32, device=device)
        draft, n = reference_ngram.ngram(history, row(known), row(limit), speculation.min_n, speculation.max_n, speculation.drafts)
        told = draft[0, :int(n[0])].tolist()
        stand = next((j for j, token in enumerate(told) if tokens[known + j] != token), len(told))
        known, count = known + stand + 1, count + 1
    return count


@pytest.mark.parametrize("mode, options", [("speculative burst", dict(loop=1, burst=1)), ("speculative loop", dict(loop=8))], ids=str)
@pytest.mark.parametrize("speculation", [Speculation(3, 1, 2), Speculation(1, 2, 3)], ids=str)
def test_greedy_equals_plain_in_fewer_steps(device, speculation, mode, options):
    s = Sampling(20, ignore_eos=True)
    engine = serve(device, [LOOPING], [s], speculation, **options)
    needed = calls(LOOPING, want(Real(device), LOOPING, s)[0], s, speculation, device)
    assert engine.modes == {"single": 1, mode: needed} and needed < 15, f"{engine.modes}, expected {needed}"


@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.gpu)])
def test_random_prompts_bring_the_tokens_of_single_steps(device, count):
    """Greedy, and byte for byte. Half of the prompts repeat themselves, so that drafts are found."""
    draw, world = torch.Generator().manual_seed(5), Real(device)
    some = lambda n: [token + (token >= EOS) for token in torch.randint(VOCAB - 1, (n,), generator=draw).tolist()]
    batch = [some(3) * 3 if i % 2 else some(1 + i % 12) for i in range(count)]

    def outputs(engine):
        ids = [engine.add(prompt, Sampling(8, ignore_eos=True)) for prompt in batch]
        for _ in engine.stream():
            pass
        return [(request.output, request.finish_reason) for request in map(engine.take, ids)]

    guessing = world.engine(speculation=Speculation(3, 1, 2), loop=6)
    assert outputs(guessing) == outputs(world.engine(loop=1, burst=1))
    assert any(mode.startswith("speculative") for mode in guessing.modes), guessing.modes


def test_drawn_and_stopped_requests_keep_their_tokens(device):
    """Ragged drafts of three requests, one drawn, one that stops amid its drafts, one that ends with its length."""
    tokens = want(Real(device), LOOPING, Sampling(20, ignore_eos=True))[0]
    options = [Sampling(14, 0.6, 20, seed=3, ignore_eos=True), Sampling(20, stop_token_ids=(tokens[15],), ignore_eos=True), Sampling(6)]
    serve(device, [prompts(4)[0], LOOPING, prompts(2)[0]], options, Speculation(3, 1, 2))


def test_requests_with_penalties_are_not_guessed_for(device):
    world = Real(device)
    engine = world.engine(speculation=Speculation(3, 1, 2))
    engine.generate([LOOPING], [Sampling(6, ignore_eos=True, frequency_penalty=9.0)])
    assert engine.modes == {"single": 1, "loop": 5}
    engine.generate([LOOPING], [Sampling(6, ignore_eos=True)])
    assert engine.modes["loop"] == 5 and engine.modes["speculative loop"] > 0


def test_drafts_that_are_believed_are_caught(device, monkeypatch):
    verify = ops.verify_out
    monkeypatch.setattr(ops, "verify_out", lambda draft, sampled, *rest: verify(draft, torch.where(draft >= 0, draft, sampled), *rest))
    with pytest.raises(AssertionError):
        serve(device, [LOOPING], [Sampling(20, ignore_eos=True)], Speculation(3, 1, 2))


def test_no_drafts_are_refused(device):
    with pytest.raises(ValueError, match="SpeculativeStep: drafts: got 0, expected at least 1"):
        SpeculativeStep(Real(device).engine(capture=False).step_fn, Speculation(0))
