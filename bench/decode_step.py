"""One decode step, from embedding to sampled token, of Llama shapes with random bf16 weights; and the time to a first token.

gkernels is the engine's captured step, replayed; eager is the same step launched kernel by kernel, host time included; transformers-static
is `generate` with a static cache, which compiles the decode step into a CUDA graph: (time of 96 tokens - time of 32) / 64.
"""

import statistics
import time

import torch

from bench import harness, timeline
from bench.harness import record, timed_graph, wanted
from gkernels.graph import Buckets, GraphRunner
from gkernels.model.cache import PagedCache
from gkernels.model.config import PRESETS, LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights, views
from gkernels.model.step import Row, Step

PAGE, ROOM = 16, 128                     # tokens a page; tokens beyond the context
LEAST_GAIN = 5                           # what one graph must gain over launching its kernels one by one, for llama-3.2-1b 1x1024
PROVIDERS = ("gkernels", "eager", "transformers-static")
CASES = [("llama-3.2-1b", 1, 1024), ("llama-3.2-1b", 16, 1024), ("llama-3.2-1b", 64, 1024), ("llama-3.1-8b", 1, 1024)]


def decode_step(weights, config, batch, context):
    """A Step staged with `batch` requests of one new token after `context` - 1 others, on pages in random order."""
    pages_each = -(-(context + ROOM) // PAGE)
    cache = PagedCache.allocate(config.num_layers, batch * pages_each + 1, PAGE, config.num_kv_heads, config.head_dim, torch.bfloat16, "cuda")
    cache.keys.normal_()
    cache.values.normal_()
    step = Step(Llama.build(config, weights, context + ROOM), cache, batch, batch, context + ROOM)
    order = (torch.randperm(batch * pages_each, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    step.stage([Row([17 + i], context, order[i * pages_each:(i + 1) * pages_each]) for i in range(batch)])
    return step


def eager_us(fn, times=20):
    """Median time of a call, from the host's launch to the device's end."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took) * 1e6


def bytes_of(weights, config, batch, context):
    """Read once a step: every weight but the embedding table, the batch's keys and values."""
    table = {weights.embed.data_ptr()} - {weights.lm_head.data_ptr()}
    weight_bytes = sum(v.numel() * v.element_size() for v in views(weights, config).values() if v.data_ptr() not in table)
    return weight_bytes + batch * context * config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2


@torch.no_grad()
def transformers_us(config_dict, weights, config, batch, context):
    import transformers
    peer = transformers.LlamaConfig(**{k: v for k, v in config_dict.items() if k not in ("architectures", "torch_dtype", "dtype")})
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(peer, dtype=torch.bfloat16).eval()
    model.load_state_dict(views(weights, config), strict=False)
    model.tie_weights()
    ids = torch.randint(0, config.vocab_size, (batch, context - ROOM // 2), device="cuda")

    def generate(n):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
                       cache_implementation="static")
        torch.cuda.synchronize()
        return time.perf_counter() - start

    generate(96)
    generate(96)
    return statistics.median(generate(96) - generate(32) for _ in range(3)) / 64 * 1e6


def main(cases=CASES, peers=True):
    gains = {}                           # by case: eager over captured
    for name, batch, context in cases:
        case = f"{name} {batch}x{context}"
        asked = [provider for provider in PROVIDERS if wanted(case, provider)]
        if not asked:
            continue
        config = LlamaConfig.from_dict(PRESETS[name])
        weights = random_weights(config, "cuda", torch.bfloat16)
        moved = bytes_of(weights, config, batch, context)
        if "gkernels" in asked:
            step = decode_step(weights, config, batch, context)
            runner = GraphRunner(step, Buckets([batch]), "cuda")
            runner.capture(progress=False)
            ours = timed_graph(lambda step=step, batch=batch: step(batch))
            record(bench="decode_step", case=case, provider="gkernels", us=ours, tbs=round(moved / ours / 1e6, 3),
                   nodes=runner.graphs[batch].nodes, **harness.floor_us(moved))
            if harness.TRACE:
                file = harness.results_file(f"decode_step_{case.replace(' ', '_')}.svg")
                timeline.show(f"{harness.device()}: {case}", lambda runner=runner, batch=batch: runner.replay(batch), file)
            del step, runner
        if "eager" in asked:
            step = decode_step(weights, config, batch, context)
            eager = eager_us(lambda step=step, batch=batch: step(batch))
            record(bench="decode_step", case=case, provider="eager", us=eager)
            del step
            gains |= {case: eager / ours} if "gkernels" in asked else {}
        if peers and "transformers-static" in asked:
            try:
                peer = transformers_us(PRESETS[name], weights, config, batch, context)
                record(bench="decode_step", case=case, provider="transformers-static", us=peer)
            except ImportError as error:
                print(f"  {'decode_step':<12} {case:<32} transformers-static is left out: {error}", flush=True)
            torch._dynamo.reset()
        del weights
        torch.cuda.empty_cache()
    gain = gains.get("llama-3.2-1b 1x1024", LEAST_GAIN)
    if gain < LEAST_GAIN:
        raise AssertionError(f"llama-3.2-1b 1x1024: eager takes {gain:.1f} times as long as the graph, expected at least {LEAST_GAIN}")
