"""The captured step on a GPU: one graph, any mix. Outputs are poisoned and inputs changed before every replay."""

import gc
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import triton

from gkernels.graph import Buckets, GraphRunner
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.step import Row, Step
from tests.close import assert_same

pytestmark = pytest.mark.gpu
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
            row = replace(row, temperature=0.5 + draw(0, 10) / 10, top_k=draw(0, 50), top_p=draw(5, 10) / 10, min_p=draw(0, 2) / 10,
                          seed=draw(0, 2**31))
        rows.append(row)
        tokens += n
    return rows


def poison(step, outputs):
    """NaN and junk over every output, and junk into what lies past the live values of the static inputs."""
    outputs.fill_(float("nan"))
    step.results.fill_(-77)
    for t in (step.plan(T).positions, step.plan(T).slot_mapping, step.plan(T).items):
        t.fill_(-123456)


def test_one_graph_equals_eager_over_a_thousand_random_batches(step, runner):
    outputs, keys, values = runner.graphs[T].outputs, step.cache.keys.clone(), step.cache.values.clone()
    mixes = set()
    for seed in range(1000):
        rows = random_rows(seed)
        mixes.add(tuple((len(row.token_ids), row.seq_len) for row in rows))
        step.stage(rows)
        poison(step, outputs)
        got = runner.replay(T)
        tokens, logits, cache = step.results.clone(), got.clone(), (step.cache.keys.clone(), step.cache.values.clone())
        step.cache.keys.copy_(keys)
        step.cache.values.copy_(values)
        poison(step, outputs)
        want = step(T)
        assert_same(logits, want)
        assert_same(tokens, step.results)
        assert_same(cache[0], step.cache.keys)
        assert_same(cache[1], step.cache.values)
        assert not step.results[1, :len(rows)].any() and (step.results[0, :len(rows)] >= 0).all()
        assert (step.results[0, len(rows):R] == -1).all() and not logits[len(rows):].any()
        step.cache.keys.copy_(keys)
        step.cache.values.copy_(values)
    assert len(mixes) > 900 and max(map(len, mixes)) > R // 2


def test_order_a_b_a_with_churn(step, runner):
    """The same batch again, after another one, allocator churn and a collection: the same bits; another batch: others."""
    seen = []
    for seed in (1, 2, 1):
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
    rows = [Row([5], 40, [1, 2, 3], seed=9, temperature=1.0), Row([7, 8, 9], 3, [4]), Row([1], 200, list(range(10, 23)))]
    results = []
    for bucket in runner.buckets:
        step.stage(rows)
        poison(step, runner.graphs[bucket].outputs)
        results.append((runner.replay(bucket)[:3].clone(), step.results[:, :3].clone()))
    for logits, tokens in results[1:]:
        assert_same(logits, results[0][0])
        assert_same(tokens, results[0][1])
    assert "nodes" in runner.report() and all(c.nodes > 20 for c in runner.graphs.values())


def test_quiet_after_warm_up(step, runner, monkeypatch):
    """No synchronisation, no allocation and no compilation between staging and reading."""
    def refuse(**kwargs):
        raise AssertionError(f"compiled after warm-up: {kwargs.get('repr')}")
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", refuse)
    rows = [random_rows(seed) for seed in range(50)]
    step.stage(rows[0])
    runner.replay(T)
    torch.cuda.synchronize()
    stats = lambda: {k: v for k, v in torch.cuda.memory_stats().items() if k.endswith(".allocated")}
    before = stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in rows:
            step.stage(batch)
            runner.replay(T)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats() == before


def test_eager_steps_compile_nothing_new_for_other_batches(step, runner, monkeypatch):
    def refuse(**kwargs):
        raise AssertionError(f"compiled after warm-up: {kwargs.get('repr')}")
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", refuse)
    for seed in range(20):
        step.stage(random_rows(seed))
        step(T)
    step.read(1)


def test_a_failed_capture_leaves_all_usable(step):
    """An exception at several places of a capture: eager steps go on, collection is as it was, and the next capture works."""
    calls = 0

    def faulty(bucket):
        nonlocal calls
        calls += 1
        step(bucket)
        if calls > GraphRunner.WARM_UPS:
            raise KeyError("planted")
        return step.results

    runner = GraphRunner(faulty, Buckets([16, 32]), "cuda")
    was_enabled = gc.isenabled()
    with eager_memory(), pytest.raises(KeyError, match="planted"):
        runner.capture(progress=False)
    assert gc.isenabled() == was_enabled and not runner.graphs and not runner.covers(16)
    rows = random_rows(5)[:4]
    step.stage([Row(row.token_ids[:2], row.seq_len, row.pages) for row in rows])
    want = step(16).clone()
    fresh = GraphRunner(step, Buckets([16]), "cuda")
    with eager_memory():
        fresh.capture(progress=False)
    fresh.graphs[16].outputs.fill_(float("nan"))
    assert_same(fresh.replay(16), want)


def test_control_a_host_decision_in_the_graph_is_seen(step, runner):
    """Negative control: a step that reads its row count on the host is frozen at capture, and the comparison sees it."""
    def frozen(bucket):
        step(bucket)
        return step.results[:, :frozen.rows] * 1

    frozen.rows = 2
    captured = GraphRunner(frozen, Buckets([T]), "cuda")
    with eager_memory():
        captured.capture(progress=False)
    frozen.rows = 3
    step.stage(random_rows(3))
    with pytest.raises(AssertionError):
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
