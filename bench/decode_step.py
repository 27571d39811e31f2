"""One decode step, from embedding to sampled token, of Llama shapes with random weights in bf16, fp8 or int4.

gkernels is the engine's captured step, replayed; eager is the same step launched kernel by kernel, host time included; transformers-static
is `generate` with a static cache, which compiles the decode step into a CUDA graph: (time of 96 tokens - time of 32) / 64. A case is greedy unless
its name says how it draws; cases of quantised weights, and those that draw, are the captured step's alone.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from bench import harness, timeline
from bench.harness import record, timed_graph, wanted
from gkernels.graph import Buckets, GraphRunner
from gkernels.model.cache import PagedCache
from gkernels.model.config import PRESETS, LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights, views
from gkernels.model.quantized import Scheme
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step
from gkernels.ops import Quantized

PAGE, ROOM = 16, 128                     # tokens a page; tokens beyond the context
LEAST_GAIN = 5                           # what one graph must gain over launching its kernels one by one, for llama-3.2-1b 1x1024
PROVIDERS = ("gkernels", "eager", "transformers-static")
GROUP, ZERO = 128, 8                     # of int4: columns that share a scale, and the q that stands for 0
SCHEMES = {"fp8": Scheme("fp8"), "int4": Scheme("awq", GROUP)}
GREEDY = Sampling()
PROJECTIONS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    context: int
    weights: str = ""                    # "fp8": a scale a row, "int4": one a group of 128 columns; "": bf16
    draw: str = ""                       # how tokens are drawn, in words; "": greedy
    sampling: Sampling = GREEDY
    dtype: torch.dtype = torch.bfloat16  # of all that is not quantised

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.bfloat16 else str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, (self.model, self.weights, dtype, f"{self.batch}x{self.context}", self.draw)))

    @property
    def providers(self) -> tuple[str, ...]:
        return PROVIDERS[:1] if self.weights or self.draw else PROVIDERS


CASES = [Case("llama-3.2-1b", 1, 1024), Case("llama-3.2-1b", 16, 1024), Case("llama-3.2-1b", 64, 1024),
         Case("llama-3.2-1b", 1, 1024, "", "top-k 50 top-p 0.9", Sampling(temperature=1.0, top_k=50, top_p=0.9)), Case("llama-3.1-8b", 1, 1024),
         Case("llama-3.1-8b", 16, 1024), Case("llama-3.1-8b", 16, 4096), Case("llama-3.1-8b", 64, 1024),
         *(Case("llama-3.1-8b", batch, 1024, weights) for weights in SCHEMES for batch in (1, 16)),
         Case("llama-3.1-8b", 1, 1024, "fp8", dtype=torch.float16)]


def decode_step(weights, config, batch, context, sampling=GREEDY):
    """A Step staged with `batch` requests of one new token after `context` - 1 others, on pages in random order."""
    pages_each, device, dtype = -(-(context + ROOM) // PAGE), weights.embed.device, weights.embed.dtype
    cache = PagedCache.allocate(config.num_layers, batch * pages_each + 1, PAGE, config.num_kv_heads, config.head_dim, dtype, device)
    cache.keys.normal_()
    cache.values.normal_()
    step = Step(Llama.build(config, weights, context + ROOM), cache, batch, batch, context + ROOM)
    order = (torch.randperm(batch * pages_each, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    step.stage([Row([17 + i], context, order[i * pages_each:(i + 1) * pages_each], replace(sampling, seed=i)) for i in range(batch)])
    return step


def model_of(case, device="cuda"):
    """Configuration and random weights of a case."""
    config = LlamaConfig.from_dict(PRESETS[case.model])
    weights = random_weights(config, device, case.dtype)
    return quantized(config, weights, case.weights) if case.weights else (config, weights)


def quantized(config, weights, kind):
    """The same model with projections in fp8 or int4, which take the place of those in `weights` one by one. int4 ones are random with their
    deviation, so that activations stay near 1."""
    for layer in weights.layers:
        for name in PROJECTIONS:
            setattr(layer, name, (rounded if kind == "fp8" else drawn)(getattr(layer, name)))
    return replace(config, quantization=SCHEMES[kind]), weights


def rounded(weight):
    """[N, K] in fp8, a scale a row."""
    scale = weight.abs().amax(1).float() / torch.finfo(torch.float8_e4m3fn).max
    return Quantized((weight / scale[:, None].to(weight.dtype)).to(torch.float8_e4m3fn), scale)


def drawn(weight):
    """int4 weights, drawn evenly, of the shape and deviation of [N, K], a multiple of 256 columns; even numbers from 0 to 15 deviate by 4.61."""
    N, K = weight.shape
    words = torch.randint(-2**31, 2**31, (N, K // 8), dtype=torch.int32, device=weight.device)
    scale = (weight.float().std() / 4.61).bfloat16().float().expand(K // GROUP, N).contiguous()
    return Quantized(words, scale.view(torch.int32) | ZERO)


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
    tensors = [v for v in views(weights, config).values() if v.data_ptr() not in table]
    packed = [w for layer in weights.layers for name in PROJECTIONS if isinstance(w := getattr(layer, name), Quantized)]
    tensors += [t for w in packed for t in (w.weight, w.scale)]
    return sum(t.nbytes for t in tensors) + batch * context * config.num_layers * 2 * config.num_kv_heads * config.head_dim * weights.embed.itemsize


def transformers_model(config_dict, weights, config):
    """transformers' model of the same weights. ImportError where it is not installed."""
    import transformers
    peer = transformers.LlamaConfig(**{k: v for k, v in config_dict.items() if k not in ("architectures", "torch_dtype", "dtype")})
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(peer, dtype=torch.bfloat16).eval()
    model.load_state_dict(views(weights, config), strict=False)
    model.tie_weights()
    return model


@torch.no_grad()
def transformers_us(config_dict, weights, config, batch, context):
    model = transformers_model(config_dict, weights, config)
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


def measure(case, asked, peers):
    """Records the rows of a case and returns what the graph gains over eager; None where not both were asked for."""
    batch, context = case.batch, case.context
    config, weights = model_of(case)
    moved, ours, gain = bytes_of(weights, config, batch, context), None, None
    if "gkernels" in asked:
        step = decode_step(weights, config, batch, context, case.sampling)
        runner = GraphRunner(step, Buckets([batch]), "cuda")
        runner.capture(progress=False)
        ours = timed_graph(lambda: step(batch))
        record(bench="decode_step", case=case.name, provider="gkernels", us=ours, tbs=round(moved / ours / 1e6, 3), nodes=runner.graphs[batch].nodes,
               **harness.floor_us(moved))
        if harness.TRACE:
            file = harness.results_file(f"decode_step_{case.name.replace(' ', '_')}.svg")
            timeline.show(f"{harness.device()}: {case.name}", lambda: runner.replay(batch), file)
        runner.release()
    if "eager" in asked:
        step = decode_step(weights, config, batch, context, case.sampling)
        eager = eager_us(lambda: step(batch))
        record(bench="decode_step", case=case.name, provider="eager", us=eager)
        gain = eager / ours if ours else None
    if peers and "transformers-static" in asked:
        try:
            peer = transformers_us(PRESETS[case.model], weights, config, batch, context)
            record(bench="decode_step", case=case.name, provider="transformers-static", us=peer)
        except ImportError as error:
            print(f"  {'decode_step':<12} {case.name:<32} transformers-static is left out: {error}", flush=True)
        torch._dynamo.reset()
    return gain


def main(cases=CASES, peers=True):
    gains = {}                           # by case: eager over captured
    for case in cases:
        asked = [provider for provider in case.providers if wanted(case.name, provider)]
        if asked:
            gains[case.name] = measure(case, asked, peers)
            torch.cuda.empty_cache()
    gain = gains.get("llama-3.2-1b 1x1024") or LEAST_GAIN
    if gain < LEAST_GAIN:
        raise AssertionError(f"llama-3.2-1b 1x1024: eager takes {gain:.1f} times as long as the graph, expected at least {LEAST_GAIN}")
