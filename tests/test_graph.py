"""The captured step on a GPU: one graph, any mix. Outputs are poisoned and inputs changed before every replay."""

import gc
from collections import Counter
from contextlib import contextmanager, suppress

import pytest
import torch
import triton
import triton.language as tl

from gkernels import ops
from gkernels.graph import Buckets, CompiledAfterWarmUp, GraphRunner, PiecewiseRunner, frozen
from gkernels.graph.memory import tensors_in
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step
from tests.close import assert_same

pytestmark = pytest.mark.gpu
PIECEWISE = {"unsafe": [(ops, "attention_out")]}
RUNNERS = [(GraphRunner, {}), (PiecewiseRunner, PIECEWISE)]
T, R, PAGE, PAGES, MAX_LEN = 160, 24, 16, 400, 512
SHAPES = dict(architectures=["LlamaForCausalLM"], vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
              num_attention_heads=8, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=MAX_LEN,
              tie_word_embeddings=False, eos_token_id=0, bos_token_id=0, hidden_act="silu", torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def step():
    with torch.random.fork_rng():
        config = LlamaConfig.from_dict(SHAPES)
        weights = random_weights(config, "cuda", torch.bfloat16, seed=0)
        cache = PagedCache.allocate(config.num_layers, PAGES, PAGE, config.num_kv_heads, config.head_dim, torch.bfloat16, "cuda")
        for t in (cache.keys, cache.values):
            t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(1)))
        return Step(Llama.build(config, weights, MAX_LEN), cache, T, R, MAX_LEN)


@pytest.fixture(scope="module")
def runner(step):
    runner = GraphRunner(step, Buckets([T]), "cuda", (step.buffers.check_addresses,))
    with eager_memory():
        runner.capture(progress=False)
    return runner


@contextmanager
def eager_memory():
    """torch.empty without its poison: inside a capture that would be a node, and its time would be measured."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def random_rows(seed):
    """Prefill chunks, decodes, short verify rows; greedy and sampled; random pages."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))
    rows, tokens, pages = [], 0, (torch.randperm(PAGES - 1, generator=g) + 1).tolist()
    for _ in range(draw(1, R)):
        n = min({0: 1, 1: draw(1, 5), 2: draw(1, 90)}[draw(0, 2)], T - tokens)
        if n == 0:
            break
        seq_len = n + draw(0, 200)
        own = [pages.pop() for _ in range(min(-(-seq_len // PAGE), len(pages)))]
        if len(own) * PAGE < seq_len:
            break
        row = Row(torch.randint(0, 1000, (n,), generator=g).tolist(), seq_len, own)
        if draw(0, 1):
            row = row._replace(sampling=Sampling(temperature=0.5 + draw(0, 10) / 10, top_k=draw(0, 50), top_p=draw(5, 10) / 10,
                                                 min_p=draw(0, 2) / 10, seed=draw(0, 2**31)))
        rows.append(row)
        tokens += n
    return rows


def poison(step, outputs, bucket=T):
    """NaN and junk over every output and over attention's scratch, and junk over the whole plan, which the schedule must fill again."""
    outputs.fill_(float("nan"))
    step.workspace(step.tiling(bucket)).states.fill_(float("nan"))
    for t in (*tensors_in(step.plan(bucket)), step.results):
        t.fill_(-123456)


def check_replay(step, outputs, replay, eager, rows):
    """A replay and an eager step, each over poison and from the same cache: the same bits, pads in their places, live rows alive."""
    tokens, plan, n = step.stage(rows), step.plan(T), len(rows)
    keys, values = step.cache.keys.clone(), step.cache.values.clone()
    poison(step, outputs)
    written = (step.results, step.cache.keys, step.cache.values, *tensors_in(plan))
    after = [t.clone() for t in (replay(), *written)]
    step.cache.keys.copy_(keys)
    step.cache.values.copy_(values)
    poison(step, outputs)
    logits = eager()
    for got, want in zip(after, (logits, *written), strict=True):
        assert_same(got, want)
    assert plan.num_tokens.item() == tokens and not plan.positions[tokens:].any()
    assert (plan.slot_mapping[tokens:] == -1).all() and (plan.token_to_request[tokens:] == -1).all()
    assert not step.results[1, :n].any() and (step.results[0, :n] >= 0).all() and (step.results[0, n:R] == -1).all()
    assert logits[:n].isfinite().all() and logits[:n].any(1).all(), "a live row's logits are all zero"
    assert not logits[n:].any()


def test_one_graph_equals_eager_over_a_thousand_random_batches(step, runner):
    keys, values, mixes = step.cache.keys.clone(), step.cache.values.clone(), set()
    for seed in range(1000):
        rows = random_rows(seed)
        mixes.add(tuple((len(row.token_ids), row.seq_len) for row in rows))
        check_replay(step, runner.graphs[T].outputs, lambda: runner.replay(T), lambda: step(T), rows)
        step.cache.keys.copy_(keys)
        step.cache.values.copy_(values)
    assert len(mixes) > 900 and max(map(len, mixes)) > R // 2


def test_control_a_replay_that_does_nothing_is_seen(step, runner):
    outputs = runner.graphs[T].outputs
    check_replay(step, outputs, lambda: runner.replay(T), lambda: step(T), random_rows(1))
    with pytest.raises(AssertionError, match="elements differ"):
        check_replay(step, outputs, lambda: outputs, lambda: step(T), random_rows(1))


def test_control_kernels_that_write_zeros_are_seen(step, runner):
    with pytest.raises(AssertionError, match="a live row's logits are all zero"):
        check_replay(step, runner.graphs[T].outputs, lambda: runner.replay(T).zero_(), lambda: step(T).zero_(), random_rows(1))


def test_order_a_b_a_with_churn(step, runner):
    """The same batch again, after another one, allocator churn and a collection: the same bits; another batch: others."""
    keys, values, seen = step.cache.keys.clone(), step.cache.values.clone(), []
    for seed in (1, 2, 1):
        step.cache.keys.copy_(keys)                                    # batches share pages
        step.cache.values.copy_(values)
        step.stage(random_rows(seed))
        poison(step, runner.graphs[T].outputs)
        seen.append((runner.replay(T).clone(), step.results.clone()))
        junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
        del junk
        gc.collect()
    for a, c in zip(seen[0], seen[2], strict=True):
        assert_same(a, c)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_every_bucket_gives_the_same_bits(step):
    """A batch of few tokens through each bucket that covers it, up to where linear hands over to torch's products."""
    runner = GraphRunner(step, Buckets([8, 16, 40, 64]), "cuda")
    with eager_memory():
        runner.capture(progress=False)
    rows = [Row([5], 40, [1, 2, 3], Sampling(seed=9, temperature=1.0)), Row([7, 8, 9], 3, [4]), Row([1], 200, list(range(10, 23)))]
    results = []
    for bucket in runner.buckets:
        step.stage(rows)
        poison(step, runner.graphs[bucket].outputs, bucket)
        results.append((runner.replay(bucket)[:3].clone(), step.results[:, :3].clone()))
    for logits, tokens in results[1:]:
        assert_same(logits, results[0][0])
        assert_same(tokens, results[0][1])
    assert "nodes" in runner.report() and all(c.nodes > 20 for c in runner.graphs.values())


@contextmanager
def traps():
    """RuntimeError where torch waits for the device by itself and for a compilation, AssertionError, at the end, for an allocation.
    Yields a Counter of the waits that are asked for by name, which torch's trap lets through."""
    stats = lambda: {k: v for k, v in torch.cuda.memory_stats().items() if k.endswith(".allocated")}
    waits = Counter()

    def counted(name, wait):
        def call(*args, **kwargs):
            waits[name] += 1
            return wait(*args, **kwargs)
        return call

    torch.cuda.synchronize()
    before = stats()
    with frozen(), pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch.cuda.Event, "synchronize", counted("event", torch.cuda.Event.synchronize))
        patches.setattr(torch.cuda.Stream, "synchronize", counted("stream", torch.cuda.Stream.synchronize))
        patches.setattr(torch.cuda, "synchronize", counted("device", torch.cuda.synchronize))
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert stats() == before, "allocated after warm-up"


def test_quiet_after_warm_up(step, runner):
    """Staging and replaying 50 batches compiles nothing, allocates no device memory, and makes no call that waits for the device: where all pinned
    blocks are under way, the host sleeps."""
    rows = [random_rows(seed) for seed in range(50)]
    step.stage(rows[0])
    runner.replay(T)
    with traps() as waits:
        for batch in rows:
            step.stage(batch)
            runner.replay(T)
    assert not waits


@triton.jit
def _fill_kernel(out_ptr, BLOCK: tl.constexpr):    # [BLOCK]
    tl.store(out_ptr + tl.arange(0, BLOCK), 1.0)


def test_control_the_traps_catch_a_read_an_allocation_and_a_compilation(step):
    out = torch.zeros(256, device="cuda")
    _fill_kernel[(1,)](out, BLOCK=128)
    with traps():
        _fill_kernel[(1,)](out, BLOCK=128)
    with pytest.raises(RuntimeError, match="synchronizing"), traps():
        step.results[0, 0].item()
    with pytest.raises(AssertionError, match="allocated after warm-up"), traps():
        torch.empty(1000, device="cuda")
    with pytest.raises(CompiledAfterWarmUp, match="_fill_kernel: would be compiled after warm-up: BLOCK is 256, was 128"), traps():
        _fill_kernel[(1,)](out, BLOCK=256)


def test_a_kernel_that_was_not_loaded_is_refused_and_then_loads():
    out = torch.zeros(64, device="cuda")
    _fill_kernel.warmup(out, BLOCK=64, grid=(1,))
    with pytest.raises(CompiledAfterWarmUp, match="_fill_kernel: would be loaded after warm-up"), frozen():
        _fill_kernel[(1,)](out, BLOCK=64)
    assert not out.any()
    _fill_kernel[(1,)](out, BLOCK=64)
    assert out.all()


def test_control_the_traps_count_every_wait(step):
    for name, wait in dict(event=torch.cuda.Event(), stream=torch.cuda.current_stream(), device=torch.cuda).items():
        with suppress(RuntimeError), traps() as waits:                 # torch's own trap may see it too
            wait.synchronize()
        assert waits == {name: 1}


def test_eager_steps_compile_nothing_new_for_other_batches(step, runner):
    with frozen():
        for seed in range(20):
            step.stage(random_rows(seed))
            step(T)
    torch.cuda.synchronize()


def fault(step):
    raise KeyError("planted")


def read(step):
    return step.results[0, 0].item()


@pytest.mark.parametrize("buckets", [1, 2])
@pytest.mark.parametrize("plant, error", [(fault, KeyError), (read, RuntimeError)])
@pytest.mark.parametrize("kind, options", RUNNERS)
def test_a_failed_capture_leaves_all_usable(step, kind, options, plant, error, buckets):
    """An exception of the step's and one of the driver's, which spoils the capture, in the first bucket and in the second: no memory is held,
    eager steps go on, collection is as it was, and the next capture works."""
    calls = 0

    def faulty(bucket):
        nonlocal calls
        calls += 1
        logits = step(bucket)
        if calls == (GraphRunner.WARM_UPS + 1) * buckets:
            plant(step)
        return logits

    runner = kind(faulty, Buckets([16, 32]), "cuda", **options)
    for bucket in runner.buckets:
        step.plan(bucket)                                # what the step keeps of its own
    was_enabled, before = gc.isenabled(), reserved()
    with eager_memory(), pytest.raises(error):
        runner.capture(progress=False)
    assert gc.isenabled() == was_enabled and not runner.graphs and not runner.covers(16)
    assert reserved() <= before, "a failed capture keeps its pool"
    rows = random_rows(5)[:4]
    step.stage([Row(row.token_ids[:2], row.seq_len, row.pages) for row in rows])
    want = step(16).clone()
    fresh = kind(step, Buckets([16]), "cuda", **options)
    with eager_memory():
        fresh.capture(progress=False)
    fresh.graphs[16].outputs.fill_(float("nan"))
    assert_same(fresh.replay(16), want)


def reserved():
    """Bytes that torch's allocator holds once it has given back what it can."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_pieces_equal_eager_steps(step):
    """Cut at attention, as engines do whose attention decides on the host."""
    runner = PiecewiseRunner(step, Buckets([T]), "cuda", (step.buffers.check_addresses,), **PIECEWISE)
    with eager_memory():
        runner.capture(progress=False)
    captured = runner.graphs[T]
    assert len(captured.graphs) == step.model.config.num_layers + 1 and len(captured.parts) == 2 * len(captured.graphs) - 1
    for seed in range(30):
        check_replay(step, captured.outputs, lambda: runner.replay(T), lambda: step(T), random_rows(seed))


@pytest.mark.parametrize("kind, options", RUNNERS)
def test_smaller_buckets_live_in_the_memory_of_the_largest(step, kind, options):
    """Outputs and what passes between pieces are at their place, and kept by nobody: the next capture has that memory."""
    places = {}

    def noted(bucket):
        logits = step(bucket)
        places[bucket] = logits.data_ptr()
        return logits

    runner = kind(noted, Buckets([40, 64, 96, 128, T]), "cuda", **options)
    with eager_memory():
        runner.capture(progress=False)
    assert {bucket: c.outputs.data_ptr() for bucket, c in runner.graphs.items()} == places
    largest, *others = (c.mib for c in runner.graphs.values())
    assert sum(others) <= largest / 10, runner.report()


def test_control_kept_outputs_take_memory(step):
    """The same, where every bucket's intermediate tensors are kept."""
    kept = []

    def keep(bucket):
        kept.append(torch.empty(1 << 22, device="cuda"))
        return step(bucket)

    runner = GraphRunner(keep, Buckets([64, T]), "cuda")
    with eager_memory():
        runner.capture(progress=False)
    largest, other = (c.mib for c in runner.graphs.values())
    assert other > largest / 10


def test_control_a_host_decision_in_the_graph_is_seen(step, runner):
    """Negative control: a step that multiplies by the row count, which it reads on the host, is frozen at capture; other counts show it."""
    def frozen(bucket):
        step(bucket)
        return step.results * int((step.buffers._host["seq_lens"] > 0).sum())

    captured, batch = GraphRunner(frozen, Buckets([T]), "cuda"), lambda n: [Row([5], 1, [1 + i]) for i in range(n)]
    step.stage(batch(2))
    with eager_memory():
        captured.capture(progress=False)
    assert_same(captured.replay(T).clone(), frozen(T))
    step.stage(batch(3))
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same(captured.replay(T).clone(), frozen(T))


def test_moved_buffer_is_refused(step, runner):
    name = "seq_lens"
    kept = step.buffers._views[name]
    step.buffers._views[name] = kept.clone()
    try:
        with pytest.raises(RuntimeError, match="seq_lens moved"):
            runner.replay(T)
    finally:
        step.buffers._views[name] = kept
