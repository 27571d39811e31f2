"""bench/decode_step.py and bench/ttft.py, as far as they need no GPU: what their cases are, what they count, and that every row is made of the right
tokens, on a stand-in for CUDA."""

from dataclasses import replace

import pytest
import torch

from bench import decode_step, harness, ttft
from gkernels.graph import GraphRunner
from gkernels.model.config import LlamaConfig
from gkernels.model.load import random_weights
from gkernels.model.quantized import product
from gkernels.model.sampling import Sampling
from gkernels.ops import Quantized
from tests.strategies_model import tiny_config
from tests.test_engine import Real

on_a_stand_in = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for CUDA; `python -m bench decode_step ttft` runs it on a GPU")
NUCLEUS = Sampling(temperature=1.0, top_k=50, top_p=0.9)


@pytest.fixture
def rows(monkeypatch):
    """The rows that are recorded, on a device with ceilings; everything is wanted, and each call takes 2 us."""
    for name, value in dict(ROWS=[], ONLY="", PROVIDERS=(), device=lambda: "h200").items():
        monkeypatch.setattr(harness, name, value)
    for room in (decode_step, ttft):
        monkeypatch.setattr(room, "eager_us", lambda call: (call(), 2.0)[1])
    monkeypatch.setattr(decode_step, "timed_graph", lambda call: (call(), 1.0)[1])
    return harness.ROWS


def tiny(**changes):
    """A configuration of two layers whose projections have a multiple of 256 columns."""
    return tiny_config(**dict(hidden_size=256, intermediate_size=256, num_attention_heads=16, num_key_value_heads=2) | changes)


def model(kind="", **changes):
    config = LlamaConfig.from_dict(tiny(**changes))
    weights = random_weights(config, "cpu", torch.float32)
    return decode_step.quantized(config, weights, kind) if kind else (config, weights)


def test_decode_step_has_its_cases():
    cases = {case.name: case for case in decode_step.CASES}
    shapes = [f"llama-3.2-1b {batch}x1024" for batch in (1, 16, 64)]
    packed = [f"llama-3.1-8b {kind} {batch}x1024" for kind in ("fp8", "int4") for batch in (1, 16)]
    larger = [f"llama-3.1-8b {shape}" for shape in ("1x1024", "16x1024", "16x4096", "64x1024")]
    assert list(cases) == [*shapes, "llama-3.2-1b 1x1024 top-k 50 top-p 0.9", *larger, *packed, "llama-3.1-8b fp8 float16 1x1024"]
    sampled = cases["llama-3.2-1b 1x1024 top-k 50 top-p 0.9"]
    assert sampled.sampling == NUCLEUS and replace(sampled, draw="", sampling=Sampling()) == cases["llama-3.2-1b 1x1024"]
    assert {case.providers for case in cases.values() if case.weights or case.draw} == {("gkernels",)}
    assert cases["llama-3.1-8b 1x1024"].providers == decode_step.PROVIDERS


@pytest.mark.parametrize("kind, of_projections", [("", 4.0), ("fp8", 1 + 4 / 256), ("int4", 0.5 + 4 / 128)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_moves_the_bytes_of_its_weights(kind, of_projections, tied):
    """Bytes a weight of the projections, whose rows have 256 columns; norms, the head and the cache stay in float32."""
    config, weights = model(kind, tie_word_embeddings=tied)
    projections = 2 * 256 * ((16 + 2 * 2) * 16 + 256 + 2 * 256 + 256)
    others = 4 * (5 * 256 + 96 * 256)
    cache = 3 * 40 * 2 * 2 * 2 * 16 * 4
    assert decode_step.bytes_of(weights, config, 3, 40) == projections * of_projections + others + cache


@pytest.mark.parametrize("kind, most", [("fp8", 2**-4), ("int4", 1.5)])
def test_quantised_weights_are_as_large_as_the_others(device, kind, most):
    """fp8 ones are the others, rounded to 4 bits; int4 ones are others of the same deviation, so their products differ by all of it, not more."""
    config, weights = model()
    before = [getattr(layer, name).to(device, torch.float16) for layer in weights.layers for name in decode_step.PROJECTIONS]
    config, weights = decode_step.quantized(config, weights, kind)
    after = [getattr(layer, name) for layer in weights.layers for name in decode_step.PROJECTIONS]
    method, dtype = {"fp8": ("fp8", torch.float8_e4m3fn), "int4": ("awq", torch.int32)}[kind]
    assert config.quantization.method == method and {w.weight.dtype for w in after} == {dtype}
    # From a stream of its own: one seeded as random_weights' is would be rows of the weights
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    for old, new in zip(before, after, strict=True):
        want = x.float() @ old.float().T
        got = product(x, Quantized(*(t.to(device) for t in new))).float()
        assert 0 < (got - want).std() / want.std() < most and 0.8 < got.std() / want.std() < 1.25


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_another_size_of_weights_is_seen(device, kind):
    wrong = {"fp8": lambda w: w._replace(scale=w.scale * 2), "int4": lambda w: w._replace(scale=w.scale & -32)}[kind]
    right = {"fp8": decode_step.rounded, "int4": decode_step.drawn}[kind](torch.randn(64, 256, dtype=torch.float16, device=device))
    x = torch.randn(64, 256, dtype=torch.float16, device=device)       # what zeros of 0 add is one number a row
    assert product(x, wrong(right)).std() > 1.25 * product(x, right).std()


@on_a_stand_in
@pytest.mark.parametrize("kind", ["", "int4"])
def test_decode_step_makes_every_row(cuda, monkeypatch, rows, kind):
    staged, step_of = [], decode_step.decode_step
    small = dict(num_hidden_layers=1) | ({} if kind else dict(hidden_size=48, intermediate_size=64, num_attention_heads=4))
    monkeypatch.setattr(decode_step, "model_of", lambda case: model(case.weights, **small))
    monkeypatch.setattr(GraphRunner, "WARM_UPS", 1)
    monkeypatch.setattr(decode_step, "decode_step", lambda *args: staged.append(step_of(*args)) or staged[-1])
    monkeypatch.setattr(decode_step, "transformers_us", lambda *args: 3.0)
    monkeypatch.setattr(decode_step, "LEAST_GAIN", 2)
    case = decode_step.Case("llama-3.2-1b", 2, 20, kind)
    decode_step.main([case, replace(case, draw="top-k 50 top-p 0.9", sampling=NUCLEUS)])
    plain = [(case.name, provider) for provider in case.providers]
    assert [(r["case"], r["provider"]) for r in rows] == [*plain, (f"{case.name} top-k 50 top-p 0.9", "gkernels")]
    moved = decode_step.bytes_of(*reversed(model(kind, **small)), 2, 20)
    assert {(r["floor_us"], r["tbs"]) for r in rows if r["provider"] == "gkernels"} == {(round(moved / 4.44e6, 1), round(moved / 1e6, 3))}
    for step, s in zip((staged[0], staged[-1]), (Sampling(), NUCLEUS), strict=True):
        b = step.buffers
        assert b["top_k"].tolist() == [s.top_k] * 2 and b["temperature"].tolist() == [s.temperature] * 2 and b["seed"].tolist() == [0, 1]
        assert step.results[1, :2].tolist() == [0, 0] and all(0 <= token < 96 for token in step.results[0, :2].tolist())
    assert cuda.idle and not cuda.reserved


def test_a_graph_that_gains_too_little_is_told(monkeypatch, rows):
    monkeypatch.setattr(decode_step, "measure", lambda case, asked, peers: 4.9)
    decode_step.main([decode_step.Case("llama-3.2-1b", 16, 1024)])
    with pytest.raises(AssertionError, match=r"eager takes 4\.9 times as long as the graph, expected at least 5"):
        decode_step.main([decode_step.Case("llama-3.2-1b", 1, 1024)])


# ttft


def test_a_first_token_needs_the_operations_of_its_products():
    """Counted product by product, pair by pair."""
    config, weights = model(num_attention_heads=4)
    T, count = 7, 0
    for layer in weights.layers:
        for w in (layer.qkv, layer.o, layer.gate_up, layer.down):
            count += sum(2 * w.shape[1] for _ in range(T) for _ in range(w.shape[0]))
        count += sum(2 * 2 * 16 for t in range(T) for _ in range(4) for key in range(t + 1))           # q k and p v, of 16 each
    count += 2 * 96 * 256
    assert ttft.flops_of(config, weights, 3, T) == 3 * count
    assert ttft.bytes_of(config, weights) == decode_step.bytes_of(weights, config, 1, 0) - 4 * 5 * 256         # which counts the norms too


@pytest.mark.parametrize("bytes, flops, us", [(44_400_000, 0, 10.0), (44_400_000, 79_200_000_000, 100.0)])
def test_a_row_names_the_greater_floor(rows, bytes, flops, us):
    assert harness.floor_us(bytes, flops) == {"floor_us": us}


class Peer:
    """transformers' model, as far as the bench calls it, over the reference."""

    device = "cpu"

    def __init__(self, next_token):
        self.next_token = next_token

    def generate(self, ids, attention_mask, max_new_tokens, min_new_tokens, do_sample, pad_token_id):
        assert attention_mask.shape == ids.shape and (max_new_tokens, min_new_tokens, do_sample) == (1, 1, False)
        return torch.tensor([[*line, self.next_token(tuple(line), Sampling())] for line in ids.tolist()])


@pytest.fixture
def real(device, monkeypatch):
    """A tiny model of which the reference tells the next token; prompts keep clear of the one that is broken on purpose."""
    world = Real(device)
    prompts = [[[3, 5, 7, 11, 17], [9, 8, 7, 6, 5]], [[1, 1, 2, 3, 5], [90, 80, 70, 60, 50]]]
    monkeypatch.setattr(ttft, "prompts_of", lambda *args: iter(prompts))
    monkeypatch.setattr(ttft, "transformers_model", lambda *args: Peer(world.next_token))
    world.prompts = prompts
    return world


def captured(world, cuda, monkeypatch):
    """Engines of `ttft` capture, on the stand-in."""
    made = ttft.engine_of

    def engine_of(*args):
        engine = made(*args)
        engine.runner.device = torch.device("cuda")
        engine.capture()
        return engine
    monkeypatch.setattr(ttft, "engine_of", engine_of)


@on_a_stand_in
def test_ttft_times_the_first_token_of_each_prompt(real, cuda, monkeypatch, rows):
    captured(real, cuda, monkeypatch)
    told = []
    monkeypatch.setattr(ttft, "eager_us", lambda call: told.append(call()) or 2.0)
    config, weights = real.model.config, real.model.weights
    ttft.measure("tiny 2x5", {}, config, weights, 2, 5, ttft.PROVIDERS)
    assert told == [[[real.next_token(tuple(prompt), Sampling())] for prompt in prompts] for prompts in real.prompts]
    flops = ttft.flops_of(config, weights, 2, 5)
    floor = harness.floor_us(ttft.bytes_of(config, weights), flops)["floor_us"]
    assert [(r["bench"], r["case"], r["provider"], r["us"], r["tflops"]) for r in rows] == [
        ("ttft", "tiny 2x5", provider, 2.0, round(flops / 2e6, 2)) for provider in ttft.PROVIDERS]
    assert rows[0]["floor_us"] == floor and cuda.idle and not cuda.reserved


def test_an_engine_that_replays_nothing_is_told(real, monkeypatch, rows):
    made = ttft.engine_of

    def uncaptured(*args):
        engine = made(*args)
        engine.runner.release()
        return engine
    monkeypatch.setattr(ttft, "engine_of", uncaptured)
    with pytest.raises(AssertionError, match="0 replays and 1 eager steps, expected replays alone"):
        ttft.measure("tiny 2x5", {}, real.model.config, real.model.weights, 2, 5, ("gkernels",))
    assert not rows


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_ttft_goes_on_without_transformers(real, monkeypatch, rows, capsys):
    def absent(*args):
        raise ImportError("No module named 'transformers'")
    monkeypatch.setattr(ttft, "transformers_model", absent)
    ttft.measure("tiny 2x5", {}, real.model.config, real.model.weights, 2, 5, ("transformers",))
    assert not rows and "transformers is left out: No module named 'transformers'" in capsys.readouterr().out


def test_ttft_runs_the_cases_that_are_wanted(monkeypatch, rows):
    made = []
    monkeypatch.setattr(ttft, "measure", lambda case, *args: made.append((case, *args[2:])))
    monkeypatch.setattr(ttft, "random_weights", lambda config, device, dtype: dtype)
    ttft.main()
    monkeypatch.setattr(harness, "PROVIDERS", ("gkernels",))
    ttft.main()
    monkeypatch.setattr(harness, "ONLY", "8b")
    ttft.main()
    assert made == [("llama-3.2-1b 1x1024", torch.bfloat16, 1, 1024, asked) for asked in (["gkernels", "transformers"], ["gkernels"])]


def test_prompts_differ_and_come_again():
    config = LlamaConfig.from_dict(tiny())
    prompts = ttft.prompts_of(config, 2, 9)
    drawn = [next(prompts) for _ in range(ttft.PROMPTS + 1)]
    assert drawn[0] == drawn[-1] != drawn[1] and [len(ids) for ids in drawn[0]] == [9, 9]
    assert all(0 <= token < 96 for batch in drawn for ids in batch for token in ids)
