"""bench/graph.py, as far as it needs no GPU: its trace, its batches, that every row is made, on a stand-in for CUDA, its plots and its bounds."""

import gc
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import graph, harness, plot
from gkernels import ops
from gkernels.graph import Buckets
from tests.fake_cuda import FakeCuda
from tests.test_bench import drawn


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

    def stage(self, rows, turns=1):
        self.staged = sum(len(row.token_ids) for row in rows)
        self.x[:self.staged] = 1

    def __call__(self, bucket):
        assert bucket >= 1
        ops.attention_out(self.x[:bucket])
        return self.x[:bucket] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for CUDA; `python -m bench graph` runs it on a GPU")
def test_every_row_is_made(monkeypatch, capsys, tmp_path):
    cuda = FakeCuda().install(monkeypatch)
    gc.freeze()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**20 - cuda.reserved, 100 * 2**20))
    monkeypatch.setattr(harness, "ROWS", [])
    monkeypatch.setattr(harness, "device", lambda: "h200")
    monkeypatch.setenv("OUT", str(tmp_path))
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
    said = capsys.readouterr().out
    assert cuda.idle and not cuda.driver.executables and "Buckets.from_histogram, 4 steps" in said
    assert {file.name for file in tmp_path.rglob("*.svg")} == {"graph_latency.svg", "graph_memory.svg"}
    pools = captures["monolithic"]["pools"]
    assert [*pools] == [str(size) for size in reversed(Buckets.up_to(64).sizes)] and captures["monolithic"]["pool_mib_largest"] == pools["64"]
    assert "  missed: llama-3.2-1b mixed 1: monolithic, us, beside" not in said                # each takes as long as the others


LATENCY = {"monolithic": 100.0, "exact": 96.0, "piecewise": 110.0, "eager": 400.0, "choosing": 101.0, "shared": 102.0}
POOLS = {"2048": 40.0, "1024": 0.5, "4": 0.0, "1": 0.25}


def saved(source="this"):
    """Rows of a run that keeps every bound."""
    row = lambda case, provider, us, **figures: dict(bench="graph", case=f"llama-3.2-1b {case}", provider=provider, us=us, source=source,
                                                     date="2026-11-27", **figures)
    rows = [row(f"mixed {n}", provider, us * (1 + n / 100)) for n in graph.LIVE for provider, us in LATENCY.items()]
    rows.append(row("capture, 4 buckets", "monolithic", 9e4, mib=3.0, seconds=3.0, pool_mib_largest=40.0, pool_mib_others=0.75, pools=POOLS))
    return [*rows, row("trace, 2000 steps", "monolithic", 900.0, host_us=50.0, eager_steps=0)]


def test_graphs_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "source", lambda: "this")
    path = tmp_path / "h200.json"
    path.write_text(json.dumps({"device": "h200", "rows": saved() + [saved("older")[0] | {"case": "llama-3.2-1b mixed 7", "us": 1.0}]}))
    latency, memory = plot.graphs(path)
    assert [file.name for file in (latency, memory)] == ["graph_latency.svg", "graph_memory.svg"] and latency.parent == tmp_path
    lines, words = drawn(latency)
    assert set(lines) == set(LATENCY) and {len(line) for line in lines.values()} == {len(graph.LIVE)}             # nothing of the older source
    assert {"live tokens (log scale)", "time, us (log scale)", "129", "2,048", "monolithic", "exact"} <= set(words)
    assert all(a[1] > b[1] for a, b in zip(lines["monolithic"], lines["eager"], strict=True))                      # slower is higher
    lines, words = drawn(memory)
    assert set(lines) == {"monolithic"} and len(lines["monolithic"]) == 4 and {"memory of the pool, MiB", "1,024", "45"} <= set(words)
    assert plot.held(POOLS) == [(2048, 40.0), (1024, 40.5), (4, 40.5), (1, 40.75)]
    heights = [y for _, y in lines["monolithic"]]
    assert heights == sorted(heights)                   # the smaller the bucket, the more is held already


def test_nothing_is_drawn_of_another_source(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "source", lambda: "this")
    path = tmp_path / "h200.json"
    path.write_text(json.dumps({"device": "h200", "rows": saved("older")}))
    assert plot.graphs(path) == [] and not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("case, provider, changes, words", [
    ("mixed 129", "exact", dict(us=200.0), "mixed 129: monolithic, us, beside exact: got 229, expected at most 210"),
    ("mixed 1", "piecewise", dict(us=90.0), "mixed 1: monolithic, us, beside piecewise: got 101, expected at most 90"),
    ("mixed 129", "eager", dict(us=600.0), "mixed 129: monolithic, us, beside eager: got 229, expected at most 200"),
    ("capture, 4 buckets", "monolithic", dict(us=2e5), "capture, 4 buckets: us: got 200000, expected at most 100000"),
    ("capture, 4 buckets", "monolithic", dict(mib=4.5), "capture, 4 buckets: mib: got 4.5, expected at most 4"),
    ("capture, 4 buckets", "monolithic", dict(seconds=6.0), "capture, 4 buckets: seconds: got 6, expected at most 5"),
    ("capture, 4 buckets", "monolithic", dict(pool_mib_others=4.5), "capture, 4 buckets: pool_mib_others: got 4.5, expected at most 4"),
    ("trace, 2000 steps", "monolithic", dict(eager_steps=1), "trace, 2000 steps: eager_steps: got 1, expected at most 0"),
    ("trace, 2000 steps", "monolithic", dict(host_us=61.0), "trace, 2000 steps: host_us: got 61, expected at most 60")])
def test_a_bound_that_is_missed_is_told(case, provider, changes, words):
    rows = saved()
    assert graph.missed(rows) == [] == graph.missed([])
    row = next(r for r in rows if (r["case"], r["provider"]) == (f"llama-3.2-1b {case}", provider))
    row |= changes
    assert graph.missed(rows) == [f"llama-3.2-1b {words}"]
    assert graph.missed([r for r in rows if r["case"] != row["case"]]) == []
