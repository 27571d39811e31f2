"""bench/graph.py, as far as it needs no GPU: its trace, its batches, and that every row is made, on a stand-in for CUDA."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import graph, harness
from gkernels import ops
from gkernels.graph import Buckets
from tests.fake_cuda import FakeCuda


@given(st.integers(1, 99), st.integers(1, 40), st.sampled_from([1, 2, 5]), st.integers(1, 9))
def test_a_batch_has_its_tokens(n, context, requests, seed):
    rows = graph.batch(n, context, requests)
    lens = [len(row.token_ids) for row in rows]
    assert sum(lens) == n and len(rows) == min(n, requests) and lens[:-1] == [1] * (len(rows) - 1)
    assert all(len(row.pages) * graph.PAGE >= row.seq_len >= max(context, len(row.token_ids)) for row in rows)
    pages = [page for row in rows for page in row.pages]
    assert len(set(pages)) == len(pages) and min(pages) == 1


def is_mixed(lengths, most, requests):
    """Whether there are steps of decodes alone, of both, and full ones."""
    return min(lengths) >= 1 and max(lengths) == most and {n <= requests for n in lengths} == {True, False} and len(set(lengths)) > 100


def test_the_trace_is_a_mix_and_always_the_same():
    lengths = graph.trace()
    assert len(lengths) == 2000 and lengths == graph.trace() != graph.trace(seed=1)
    assert is_mixed(lengths, graph.MOST, graph.REQUESTS)
    assert not is_mixed([1, graph.MOST], graph.MOST, graph.REQUESTS)


def test_the_report_shows_both_sets_of_buckets():
    lengths = graph.trace(steps=300, most=256)
    fixed, made = Buckets.up_to(256).report(lengths), str(graph.report(lengths, 256))
    assert str(fixed) in made and made.count("100.0% of the steps in a bucket, 0 in none") == 2 and "Buckets.from_histogram, 300 steps" in made
    wastes = [float(line.rpartition("; ")[2].partition("%")[0]) for line in made.splitlines() if "in none" in line]
    assert wastes[1] < wastes[0] == round(100 * fixed.waste, 1)


class PaperStep:
    """A step's methods over a handful of numbers."""

    device = "cpu"

    def __init__(self):
        self.x, self.staged = torch.zeros(64), 0

    def stage(self, rows):
        self.staged = sum(len(row.token_ids) for row in rows)
        self.x[:self.staged] = 1

    def __call__(self, bucket):
        assert bucket >= 1
        ops.attention_out(self.x[:bucket])
        return self.x[:bucket] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for CUDA; `python -m bench graph` runs it on a GPU")
def test_every_row_is_made(monkeypatch, capsys):
    cuda = FakeCuda().install(monkeypatch)
    gc.freeze()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**20 - cuda.reserved, 100 * 2**20))
    monkeypatch.setattr(harness, "ROWS", [])
    monkeypatch.setattr(ops, "attention_out", lambda x: x.add_(1))
    for name, value in dict(MOST=64, LIVE=(1, 33), STEPS=50, model_step=lambda config, device: PaperStep(), eager_us=lambda call: call() is not None,
                            timed_launches=lambda prepare, launch, read, count, times: [launch() is not None, 0.0]).items():
        monkeypatch.setattr(graph, name, value)
    monkeypatch.setattr(graph, "trace", lambda: [1, 40, 33, 64])
    graph.main()
    gc.unfreeze()
    rows = {(r["case"].removeprefix("llama-3.2-1b "), r["provider"]): r for r in harness.ROWS}
    count = len(Buckets.up_to(64))
    captures = {provider: rows.pop((f"capture, {count} buckets", provider)) for provider in ("monolithic", "choosing", "piecewise", "shared")}
    assert [captures[p]["executables"] for p in captures] == [count, 1, count, 1] and captures["monolithic"]["nodes"] == 2
    assert rows.pop(("trace, 4 steps", "monolithic"))["eager_steps"] == 0
    providers = ("monolithic", "choosing", "piecewise", "shared", "exact", "eager")
    assert rows.keys() == {(f"mixed {n}", provider) for n in (1, 33) for provider in providers}
    assert {rows[f"mixed {n}", p]["bucket"] for n in (1, 33) for p in providers[:4]} == {1, 40} and rows["mixed 33", "exact"]["bucket"] == 33
    assert cuda.idle and not cuda.driver.executables and "Buckets.from_histogram, 4 steps" in capsys.readouterr().out
