"""Time to a first token: a prompt's token ids on the host, one step of the engine, its token on the host again. Llama-3.2-1B, random bf16 weights.

gkernels is `Engine.add` and `Engine.step`, with the graph of the prompt's length replayed; transformers is `generate` of one token, not compiled. us
is the median of 20 prompts, host included. The floor counts what a first token must compute: the projections for every token, the head for the last,
and causal attention.
"""

import itertools

import torch

from bench import harness
from bench.decode_step import eager_us, transformers_model
from bench.harness import record, wanted
from gkernels.graph import Buckets
from gkernels.model.config import PRESETS, LlamaConfig
from gkernels.model.engine import Engine
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import Sampling

PROVIDERS = ("gkernels", "transformers")
CASES = [("llama-3.2-1b", 1, 1024)]
PROMPTS = 4                              # that are taken in turn


def flops_of(config, weights, batch, context):
    """Floating-point operations of `batch` prompts of `context` tokens up to their first tokens."""
    projections = sum(w.numel() for layer in weights.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    pairs = context * (context + 1) // 2                          # of a query and a key that it sees
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return batch * (2 * projections * context + 2 * weights.lm_head.numel() + attention)


def bytes_of(config, weights):
    """Every weight that is read whole, once."""
    return sum(w.nbytes for layer in weights.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)) + weights.lm_head.nbytes


def prompts_of(config, batch, context):
    """Batches of prompts in turn, lists of token ids."""
    draw = torch.Generator().manual_seed(0)
    return itertools.cycle([torch.randint(0, config.vocab_size, (batch, context), generator=draw).tolist() for _ in range(PROMPTS)])


def engine_of(config, weights, batch, context):
    """An engine whose only graph holds the whole batch, and one token beyond each prompt."""
    return Engine(Llama.build(config, weights, context + 1), batch * context, batch, context + 1, buckets=Buckets([batch * context]), loop=1, burst=1)


def first_tokens(engine, prompts):
    """The first token of each prompt, by one step."""
    ids = [engine.add(prompt, Sampling(max_tokens=1)) for prompt in prompts]
    engine.step()
    return [engine.take(i).output for i in ids]


@torch.no_grad()
def peer_tokens(model, prompts):
    """The same by transformers."""
    ids = torch.tensor(prompts).to(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, min_new_tokens=1, do_sample=False, pad_token_id=0)
    return out[:, -1:].tolist()


def measure(case, preset, config, weights, batch, context, asked):
    """Records the rows of one case; `preset` is `config` as transformers reads it. AssertionError where the engine did not replay its graph."""
    flops, moved, prompts = flops_of(config, weights, batch, context), bytes_of(config, weights), prompts_of(config, batch, context)
    if "gkernels" in asked:
        engine = engine_of(config, weights, batch, context)
        us = eager_us(lambda: first_tokens(engine, next(prompts)))
        if engine.runner.eager_steps or not engine.runner.replays:
            raise AssertionError(f"{case}: {engine.runner.replays} replays and {engine.runner.eager_steps} eager steps, expected replays alone")
        record(bench="ttft", case=case, provider="gkernels", us=us, **harness.rates(us, moved, flops), **harness.floor_us(moved, flops))
        engine.runner.release()
    if "transformers" in asked:
        try:
            model = transformers_model(preset, weights, config)
        except ImportError as error:
            print(f"  {'ttft':<12} {case:<32} transformers is left out: {error}", flush=True)
            return
        us = eager_us(lambda: peer_tokens(model, next(prompts)))
        record(bench="ttft", case=case, provider="transformers", us=us, **harness.rates(us, moved, flops))


def main(cases=CASES):
    for name, batch, context in cases:
        case = f"{name} {batch}x{context}"
        asked = [provider for provider in PROVIDERS if wanted(case, provider)]
        if asked:
            config = LlamaConfig.from_dict(PRESETS[name])
            measure(case, PRESETS[name], config, random_weights(config, "cuda", torch.bfloat16), batch, context, asked)
            torch.cuda.empty_cache()
