"""What graphs of whole steps cost: Llama-3.2-1B with random bf16 weights, mixed batches of up to 31 decodes and a chunk of a prompt.

  mixed n     a step of n live tokens. us on the device, launches queued one behind the other; launch_us is the host's time for one launch, from rest.
              monolithic takes the least of Buckets.up_to's capacities that holds n, exact a graph of n tokens, piecewise cuts at attention, choosing
              leaves the bucket to the device, shared replays one executable after an update to it, eager launches kernel by kernel, host included.
  capture     a bucket's capture, its kernels compiled before: us of the host, nodes, and MiB of the device that all buckets take beyond the largest's
              pool, cuBLAS's workspace and the driver's memory among them, shared out.
  trace       2,000 steps of a seeded server: arrivals, chunked prompts, ends. us a step, host_us the processor's time to stage and launch it.

bench/results/graph_latency.svg and graph_memory.svg show the first two; what misses one of the bounds of `missed` is told at the end.
"""

import gc
import random
import statistics
import time
from collections import Counter

import numpy as np
import torch

from bench import harness, plot
from bench.decode_step import eager_us
from bench.harness import record, timed_launches, wanted
from gkernels.graph import Buckets, ChoosingRunner, GraphRunner, PiecewiseRunner
from gkernels.model.cache import PagedCache
from gkernels.model.config import PRESETS, LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step

MODEL, PAGE, CONTEXT, REQUESTS, MOST, STEPS = "llama-3.2-1b", 16, 128, 32, 2048, 2000
LIVE = (1, 33, 129, 513, 2048)
LAUNCHES = 10
GREEDY = Sampling()


def batch(n, context=CONTEXT, requests=REQUESTS):
    """Rows of n tokens in all: as many decodes of `context` tokens as there are places but one, and all else as one chunk of a prompt."""
    lens = [1] * min(n - 1, requests - 1)
    lens.append(n - len(lens))
    pages = iter(range(1, 1 + sum(-(-max(context, tokens) // PAGE) for tokens in lens)))
    own = [tuple(next(pages) for _ in range(-(-max(context, tokens) // PAGE))) for tokens in lens]
    ids = lambda i, tokens: [17 + i] if tokens == 1 else np.full(tokens, 17 + i, np.int32)       # as an engine has them
    return [Row(ids(i, tokens), max(context, tokens), its, GREEDY) for i, (tokens, its) in enumerate(zip(lens, own, strict=True))]


def trace(steps=STEPS, most=MOST, requests=REQUESTS, seed=0):
    """The number of live tokens of each step of a server: requests come at random, prompts of 16 to 2,048 tokens enter in chunks as the budget of
    `most` tokens allows, 16 to 256 tokens are decoded one a step. Half of the steps bring no request."""
    draw, lengths, waiting, running = random.Random(seed), [], [], []
    log_uniform = lambda low, high: round(low * (high / low) ** draw.random())
    while len(lengths) < steps:
        if draw.random() < 0.5 and len(waiting) < requests:
            waiting.append(log_uniform(16, 2048))
        running = [left - 1 for left in running if left > 1]
        live = len(running)
        while waiting and live < most and len(running) < requests:
            chunk = min(waiting[0], most - live)
            waiting[0], live = waiting[0] - chunk, live + chunk
            if waiting[0]:
                break
            waiting.pop(0)
            running.append(log_uniform(16, 256))
        if live:
            lengths.append(live)
    return lengths


def report(lengths, most=MOST):
    """How the fixed buckets, and those made for the trace, would serve it."""
    made = {"Buckets.up_to": Buckets.up_to(most), "Buckets.from_histogram": Buckets.from_histogram(Counter(lengths), most)}
    return "\n".join(f"{name}, {len(lengths)} steps\n{buckets.report(lengths)}" for name, buckets in made.items())


def runners(step, live, buckets, device):
    """By provider: a runner of the same step."""
    return {"monolithic": GraphRunner(step, buckets, device), "choosing": ChoosingRunner(step, live, buckets, device),
            "piecewise": PiecewiseRunner(step, buckets, device),
            "shared": GraphRunner(step, buckets, device, share=True)}


def held_mib():
    """What this process, alone on its device, holds there."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def launch_us(call, before=lambda: None, times=20):
    """Median time of the host in a call that finds the device at rest; `before` comes before each, and is not timed."""
    took = []
    for _ in range(times):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(statistics.median(took) * 1e6, 2)


def measure_replays(case, provider, step, runner, live, n):
    """Records a runner's row of n live tokens."""
    rows, call = batch(n), lambda: runner.run(n)
    step.stage(rows)
    live.fill_(n)
    other = next((size for size in runner.buckets if size != runner.capacity(n)), None)
    before = (lambda: runner.run(other)) if runner.share and other else lambda: None           # another bucket, so that there is something to update
    us, _ = timed_launches(lambda: None, call, lambda: None, LAUNCHES, times=3)
    record(bench="graph", case=case, provider=provider, us=round(us / LAUNCHES, 2), launch_us=launch_us(call, before), bucket=runner.capacity(n))


def measure_capture(name, provider, runner):
    """Captures, and records what a bucket took."""
    before = held_mib()
    start = time.perf_counter()
    runner.capture(progress=False)
    torch.cuda.synchronize()
    seconds, count, held = time.perf_counter() - start, len(runner.graphs), held_mib() - before
    pools = {str(bucket): round(captured.mib, 3) for bucket, captured in runner.graphs.items()}
    largest, *others = pools.values()
    record(bench="graph", case=f"{name} capture, {count} buckets", provider=provider, us=round(seconds * 1e6 / count, 1),
           mib=round((held - largest) / count, 3), seconds=round(seconds, 3), pool_mib_largest=largest, pool_mib_others=round(sum(others), 3),
           pools=pools, nodes=max(c.nodes for c in runner.graphs.values()),
           executables=len(runner.executables) or count if provider != "choosing" else 1)


def measure_trace(name, step, runner, lengths):
    """Records a step of the trace, staged and launched; the device is waited for by staging alone, as in an engine."""
    batches = {n: batch(n) for n in set(lengths)}
    eager_steps, host, start = runner.eager_steps, time.process_time(), time.perf_counter()
    for n in lengths:
        step.stage(batches[n], 0)
        runner.run(n)
    host = time.process_time() - host
    torch.cuda.synchronize()
    us, host_us = ((spent * 1e6) / len(lengths) for spent in (time.perf_counter() - start, host))
    record(bench="graph", case=f"{name} trace, {len(lengths)} steps", provider="monolithic", us=round(us, 1), host_us=round(host_us, 2),
           eager_steps=runner.eager_steps - eager_steps)


def missed(rows):
    """Bounds that rows of this bench do not keep, in words; what was not measured is left out."""
    us = {(row["case"], row["provider"]): row["us"] for row in rows if row["bench"] == "graph"}
    bounds = []                                         # (what, got, the most that it may be)
    for n in LIVE:
        case = f"{MODEL} mixed {n}"
        ours, shares = us.get((case, "monolithic")), {"exact": 1.05, "piecewise": 1.0} | ({"eager": 1 / 3} if n == 129 else {})
        others = {other: share * us[case, other] for other, share in shares.items() if ours and (case, other) in us}
        bounds += [(f"{case}: monolithic, us, beside {other}", ours, most) for other, most in others.items()]
    for row in rows:
        if row["bench"] == "graph" and row["provider"] == "monolithic":
            case, most = row["case"], dict(eager_steps=0, host_us=60.0) if "trace" in row["case"] else {}
            if "capture" in case:
                most = dict(us=1e5, mib=4.0, seconds=5.0, pool_mib_others=0.1 * row["pool_mib_largest"])
            bounds += [(f"{case}: {name}", row[name], bound) for name, bound in most.items()]
    return [f"{what}: got {got:g}, expected at most {most:g}" for what, got, most in bounds if got > most]


def model_step(config, device, most=MOST, requests=REQUESTS):
    pages = 1 + sum(len(row.pages) for row in batch(most, requests=requests))
    cache = PagedCache.allocate(config.num_layers, pages, PAGE, config.num_kv_heads, config.head_dim, torch.bfloat16, device)
    for t in (cache.keys, cache.values):
        t.normal_()
    return Step(Llama.build(config, random_weights(config, device, torch.bfloat16), max(CONTEXT, most)), cache, most, requests, max(CONTEXT, most))


def main():
    lengths = trace()
    print(report(lengths))
    step, buckets = model_step(LlamaConfig.from_dict(PRESETS[MODEL]), "cuda"), Buckets.up_to(MOST)
    live = torch.ones(1, dtype=torch.int32, device=step.device)
    for n in (*buckets, *LIVE):                         # what compiles is no part of a capture
        step.stage(batch(n))
        step(n)
    cases = {n: f"{MODEL} mixed {n}" for n in LIVE}
    for provider, runner in runners(step, live, buckets, "cuda").items():
        asked = [n for n in LIVE if wanted(cases[n], provider)]
        if asked or wanted(f"{MODEL} capture", provider):
            measure_capture(MODEL, provider, runner)
            for n in asked:
                measure_replays(cases[n], provider, step, runner, live, n)
            if provider == "monolithic" and wanted(f"{MODEL} trace", provider):
                measure_trace(MODEL, step, runner, lengths)
            runner.release()
    for n, case in cases.items():
        step.stage(batch(n))
        if wanted(case, "exact"):
            runner = GraphRunner(step, Buckets([n]), "cuda")
            runner.capture(progress=False)
            measure_replays(case, "exact", step, runner, live, n)
            runner.release()
        if wanted(case, "eager"):
            record(bench="graph", case=case, provider="eager", us=round(eager_us(lambda n=n: step(n)), 1))
    plot.graphs(harness.save())
    for words in missed(harness.ROWS):
        print(f"  missed: {words}", flush=True)
