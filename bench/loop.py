"""256 decode steps of Llama-3.2-1B with random bf16 weights: one replay each, bursts of 8, and one launch of a loop, of 1, 2 and 4 steps a turn.

us is a step's time on the device, launches queued one behind the other; host_us is the processor time a step where the host reads the tokens
after each launch, as the engine does. After a single step it spins until the tokens are there, after many it sleeps.
"""

import torch

from bench.harness import record, timed_launches, wanted
from gkernels.graph import Buckets, Burst, GraphRunner, Loop
from gkernels.model.cache import PagedCache
from gkernels.model.config import PRESETS, LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step

CONTEXT, STEPS, BURST, PAGE = 128, 256, 8, 16
CASES = [("llama-3.2-1b", 1), ("llama-3.2-1b", 16)]
TURNS = (1, 2, 4)
PROVIDERS = ("replay", f"burst{BURST}", "loop", *(f"loop{n}" for n in TURNS[1:]))


def decoding(config, weights, batch):
    """A Step, and `batch` rows that decode from CONTEXT tokens on for STEPS."""
    pages = (CONTEXT + STEPS) // PAGE
    cache = PagedCache.allocate(config.num_layers, batch * pages + 1, PAGE, config.num_kv_heads, config.head_dim, torch.bfloat16, "cuda")
    cache.keys.normal_()
    cache.values.normal_()
    step = Step(Llama.build(config, weights, CONTEXT + STEPS), cache, batch, batch, CONTEXT + STEPS, STEPS)
    order = (torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    return step, [Row([17 + i], CONTEXT, order[i * pages:(i + 1) * pages], Sampling(10**6), True, 0, 10**6, (), i) for i in range(batch)]


def runners(step, batch):
    """By provider: what runs many steps, and how many of its launches make STEPS."""
    buckets, b = Buckets([batch]), step.buffers
    loops = [Loop(step, b["turns"], b["running"], buckets, "cuda", steps=n) for n in TURNS]
    made = GraphRunner(step.single, buckets, "cuda"), Burst(step, BURST, buckets, "cuda"), *loops
    return dict(zip(PROVIDERS, zip(made, (STEPS, STEPS // BURST, *[1] * len(TURNS)), strict=True), strict=True))


def measure(case, config, batch, asked):
    """Records the rows of one case; all providers must bring the same tokens."""
    step, rows = decoding(config, random_weights(config, "cuda", torch.bfloat16), batch)
    read_all, tokens = lambda: step.read_ring(batch, batch), {}
    for provider, (runner, count) in runners(step, batch).items():
        if provider in asked:
            runner.capture(progress=False)
            read = read_all if count < STEPS else lambda: step.read(batch)
            us, host_us = timed_launches(lambda: step.stage(rows, STEPS), lambda runner=runner: runner.run(batch), read, count)
            tokens[provider], _ = read_all()
            record(bench="loop", case=case, provider=provider, us=round(us / STEPS, 3), host_us=round(host_us / STEPS, 3))
            runner.release()
    if any(lines != tokens[asked[0]] or len(lines) != STEPS for lines in tokens.values()):
        raise AssertionError(f"{case}: {', '.join(tokens)} do not bring the same tokens of {STEPS} steps")


def main(cases=CASES):
    for name, batch in cases:
        case = f"{name} {batch}x{CONTEXT}"
        asked = [provider for provider in PROVIDERS if wanted(case, provider)]
        if asked:
            measure(case, LlamaConfig.from_dict(PRESETS[name]), batch, asked)
