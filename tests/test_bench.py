"""The parts of bench/ that need no GPU: which code a figure belongs to, how figures merge and are printed, which rows are wanted, what a floor
is, what attention's closures compute, and its plots."""

import functools
import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

import reference.attention as twin
from bench import __main__ as command
from bench import attention, harness, plot, timeline
from tests.close import assert_close

SVG = "{http://www.w3.org/2000/svg}"
CASES = ["decode 1x8192", "decode 1x32768", "decode 1x131072", "decode 8x4096", "decode 32x2048", "decode 64x2048", "decode 128x1024",
         "decode 256x1024", "decode ragged 64", "prefill 1x2048", "prefill 4x2048", "prefill 1x8192", "prefill 1x16384", "mixed 31x2048+2048",
         "mixed 63x2048+512", "mixed 127x1024+1024"]
FEATURES = ["window 1024", "softcap", "sinks", "alibi", "tree", "fp8", "DV 64", "full", "lse"]


def row(bench, case, provider, us, **figures):
    return dict(bench=bench, case=case, provider=provider, us=us, **figures)


@pytest.fixture
def h200(monkeypatch):
    """No rows yet and no filter, on a device with ceilings."""
    monkeypatch.setattr(harness, "ROWS", [])
    monkeypatch.setattr(harness, "ONLY", "")
    monkeypatch.setattr(harness, "PROVIDERS", ())
    monkeypatch.setattr(harness, "device", lambda: "h200")


def test_source_is_the_stated_rule(tmp_path):
    package = tmp_path / "gkernels" / "kernels"
    package.mkdir(parents=True)
    (package / "b.py").write_bytes(b"two")
    (tmp_path / "gkernels" / "a.py").write_bytes(b"one")
    (tmp_path / "gkernels" / "notes.txt").write_bytes(b"left out")
    assert harness.source(tmp_path) == hashlib.sha256(b"gkernels/a.py\0onegkernels/kernels/b.py\0two").hexdigest()[:16]
    (package / "b.py").write_bytes(b"two!")
    assert harness.source(tmp_path) == hashlib.sha256(b"gkernels/a.py\0onegkernels/kernels/b.py\0two!").hexdigest()[:16]


def test_save_replaces_equal_rows_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    kept = tmp_path / "bench" / "results" / "h200.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"tests": {"passed": 3}, "rows": [row("a", "1", "torch", 2.0), row("a", "1", "gkernels", 1.0)]}))
    assert harness.save([row("a", "1", "gkernels", 0.5), row("b", "1", "torch", 9.0)], "h200") == kept
    results = json.loads(kept.read_text())
    assert list(results) == ["device", "torch", "triton", "tests", "rows"] and results["tests"] == {"passed": 3}
    assert [tuple(r.values()) for r in results["rows"]] == [("a", "1", "torch", 2.0), ("a", "1", "gkernels", 0.5), ("b", "1", "torch", 9.0)]
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    path = harness.save([row("c", "1", "torch", 4.0)], "h200")
    assert path == tmp_path / "out" / "bench" / "results" / "h200.json"
    assert [len(json.loads(p.read_text())["rows"]) for p in (path, kept)] == [4, 3]


def test_table_aligns_and_shares(capsys):
    rows = [row("a", "long case", "gkernels", 10.0, tbs=2.22), row("a", "b", "torch", 1000.5, tflops=396.0), row("a", "c", "torch", 1.0)]
    harness.table(rows, harness.CEILINGS["h200"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["bench", "case", "provider", "us", "rate", "of", "ceiling"]
    assert lines[0].split() == ["a", "long", "case", "gkernels", "10.00", "2.22", "TB/s", "50", "%"]
    assert lines[1].split() == ["a", "b", "torch", "1000.50", "396.00", "TFLOP/s", "50", "%"]
    assert lines[0].index("10.00") + 5 == lines[1].index("1000.50") + 7 == lines[2].index("1.00") + 4


def test_table_shows_the_rate_nearer_to_its_ceiling(capsys):
    harness.table([row("a", "b", "c", 1.0, tbs=1.11, tflops=396.0), row("a", "b", "c", 1.0, tbs=2.22, tflops=79.2)], harness.CEILINGS["h200"])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4:] for line in lines] == [["396.00", "TFLOP/s", "50", "%"], ["2.22", "TB/s", "50", "%"]]


@pytest.mark.parametrize("bytes, count", [(0, 8), (1, 64), (10**7, 13), (10**9, 1)])
def test_enough_buffers_to_leave_the_cache_cold(bytes, count):
    assert harness.closures(bytes) == count
    assert count == harness.MOST_CLOSURES or not bytes or count * bytes > harness.COLD_BYTES


def test_command_names_what_it_cannot_do(monkeypatch):
    with pytest.raises(SystemExit, match=r"got nonsense, expected some of .*rmsnorm"):
        command.main(["nonsense"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        command.main(["rmsnorm"])


@pytest.mark.parametrize("us, times, count", [(10.0, 20, 20), (7_500.0, 20, 20), (10_000.0, 20, 15), (40_000.0, 20, 5), (40_000.0, 3, 3)])
def test_long_graphs_are_replayed_less_often(us, times, count):
    assert harness.replays(us, times) == count


def test_launches_are_timed_queued_and_read_one_by_one(monkeypatch):
    """A warm-up and `times` rounds: queued launches between two events, then launches with a read behind each, and the medians of both."""
    calls, device, host = [], iter([9.0, 0.003, 0.001, 0.002]), iter([0, 9, 10, 10 + 4e-6, 20, 20 + 6e-6, 30, 30 + 5e-6])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def elapsed_time(self, end):
            return next(device)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    monkeypatch.setattr(harness.time, "process_time", lambda: next(host))
    us = harness.timed_launches(*(functools.partial(calls.append, name) for name in ("prepare", "launch", "read")), 2, times=3)
    assert [round(figure, 3) for figure in us] == [2.0, 5.0]
    assert calls == ["prepare", "sleep", "event", "launch", "launch", "event", "prepare", "launch", "read", "launch", "read"] * 4


def test_a_row_says_what_the_host_spent(h200, capsys):
    harness.record(bench="loop", case="case", provider="loop", us=3.0, host_us=0.25)
    harness.record(bench="loop", case="case", provider="replay", us=3.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" 3.00 us, 0.25 us of the host's") and second.endswith(" 3.00 us")
    assert harness.ROWS[0]["host_us"] == 0.25 and "host_us" not in harness.ROWS[1]


@pytest.mark.parametrize("only, providers, kept", [
    ("", (), {"a 1 x", "a 1 y", "b 1 x", "b 1 y"}), ("^a", (), {"a 1 x", "a 1 y"}), ("1$", ("y",), {"a 1 y", "b 1 y"}), ("c", (), set())])
def test_only_the_wanted_rows_are_made(h200, monkeypatch, only, providers, kept):
    made = set()
    monkeypatch.setattr(harness, "timed_graph", lambda fn: 1.0)
    monkeypatch.setattr(harness, "ONLY", only)
    monkeypatch.setattr(harness, "PROVIDERS", providers)
    for case in ("a 1", "b 1"):
        for provider in ("x", "y"):
            us = harness.bench("room", case, provider, lambda i, name=f"{case} {provider}": made.add(name), bytes=10**8)
            assert (us is not None) == (f"{case} {provider}" in kept)
    assert made == kept == {f"{r['case']} {r['provider']}" for r in harness.ROWS}


@pytest.mark.parametrize("arguments, wrong", [
    (["rmsnorm", "--only", "("], r"--only: got '\(', expected a regular expression"), (["nonsense", "--only", "a"], "got nonsense")])
def test_command_names_a_wrong_argument(arguments, wrong):
    with pytest.raises(SystemExit, match=wrong):
        command.main(arguments)


@pytest.mark.parametrize("arguments, code, told", [
    ([], 0, ""), (["--only", "ca.e", "--providers", "ours"], 0, ""), (["--providers", "ours,thiers"], 0, "no row by thiers\n"),
    (["--only", "csae"], 1, "FAILED no row: --only 'csae' and --providers '' leave nothing\n")])
def test_command_hands_its_filters_on(h200, monkeypatch, capsys, tmp_path, arguments, code, told):
    room = type("room", (), {"main": staticmethod(lambda: harness.bench("rmsnorm", "case", "ours", lambda i: None))})
    monkeypatch.setattr(command, "import_module", {"bench.rmsnorm": room}.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "timed_graph", lambda fn: 1.0)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert command.main(["rmsnorm", *arguments]) == code
    assert capsys.readouterr().err == told and len(harness.ROWS) == 1 - code


@pytest.mark.parametrize("bytes, flops, us", [(44_400_000, 0, 10.0), (44_400_000, 792_000_000, 10.0), (44_400_000, 79_200_000_000, 100.0)])
def test_floor_is_the_greater_bound(h200, monkeypatch, bytes, flops, us):
    assert round(harness.floor("room", "case", bytes, flops), 3) == us
    monkeypatch.setattr(harness, "timed_graph", lambda fn: us)
    harness.bench("room", "case", "ours", lambda i: None, bytes=bytes, flops=flops)
    floor, timed = harness.ROWS
    assert floor["us"] == us and floor["provider"] == "floor" and list(floor) == list(timed)


def test_no_floor_without_ceilings_or_unasked(h200, monkeypatch):
    monkeypatch.setattr(harness, "PROVIDERS", ("ours",))
    assert harness.floor("room", "case", 1) is None
    monkeypatch.setattr(harness, "PROVIDERS", ())
    monkeypatch.setattr(harness, "device", lambda: "gb10")
    assert harness.floor("room", "case", 1) is None and not harness.ROWS


def test_attention_has_its_cases():
    cases = {case.name: case for case in attention.cases()}
    featured = [f"{name}, {feature}" for name in ("decode 64x2048", "prefill 1x8192") for feature in FEATURES]
    assert list(cases) == [*CASES, *(f"{name}, D 64" for name in CASES), *(f"{name}, page 64" for name in CASES), *featured,
                           "capacity 1 of 256 x1024", "capacity 1 of 1 x1024"]
    lens = cases["decode ragged 64"].lens
    assert lens == attention.ragged() and len(lens) == 64 and 1 <= min(lens) < 100 and 10_000 < max(lens) <= attention.RAGGED
    assert cases["decode 64x2048, tree"].query_lens == (8,) * 64 and cases["decode 64x2048, tree"].lens == (2048,) * 64
    assert cases["mixed 31x2048+2048, D 64"].query_lens == (1,) * 31 + (2048,) and cases["mixed 31x2048+2048, D 64"].D == 64
    assert (cases["capacity 1 of 256 x1024"].T, sum(cases["capacity 1 of 256 x1024"].query_lens)) == (256, 1)


def fits(case):
    """Whether enough sets of the case's buffers to be cold lie beside each other in the pools."""
    moved, _ = attention.traffic(case)
    pages = 1 + sum(-(-n // case.page) for n in case.lens)
    sets = harness.closures(moved)
    return sets * moved > harness.COLD_BYTES and sets * pages * case.page * max(case.D, case.DV) <= attention.POOL * 128


@pytest.mark.parametrize("case", [*attention.cases()], ids=lambda case: case.name)
def test_every_case_is_cold(case):
    assert fits(case)


@pytest.mark.parametrize("n", [16, 1 << 19])
def test_too_short_or_too_long_a_case_is_seen(n):
    assert not fits(attention.Case("decode", (1,), (n,)))


@pytest.mark.parametrize("name, floor", [("1x8192", 7.6), ("1x32768", 30.2), ("1x131072", 121), ("32x2048", 60.4), ("256x1024", 242)])
def test_decode_floors_are_those_of_the_keys_and_values(h200, name, floor):
    case = next(case for case in attention.cases() if case.name == f"decode {name}")
    assert floor <= round(harness.floor("attention", case.name, *attention.traffic(case)), 1 if floor < 100 else 0) < floor * 1.01 + 0.1


@pytest.mark.parametrize("feature", ["", "window 1024", "tree", "fp8", "DV 64", "full", "lse"])
def test_traffic_counts_every_visible_key(feature):
    case = attention.Case("", (3, 1, 0), (1100, 1030, 0), page=16)
    case = attention.featured(case, feature) if feature else case
    seen, pairs = set(), 0
    for r, (q, n) in enumerate(zip(case.query_lens, case.lens, strict=True)):
        for p in range(n - q, n):
            keys = [j for j in range(n) if (not case.causal or j <= p) and (case.window[0] < 0 or j >= p - case.window[0])]
            seen, pairs = seen | {(r, j) for j in keys}, pairs + len(keys)
    width = case.D + case.DV
    moved = len(seen) * 8 * width * (1 if feature == "fp8" else 2) + 4 * 32 * width * 2 + (4 * 32 * 4 if feature == "lse" else 0)
    assert attention.traffic(case) == (moved, pairs * 32 * width * 2)


@pytest.fixture
def small(monkeypatch):
    """Four query heads on two KV heads; yields the (problem, options) of each closure made."""
    made = []
    problem, options = attention.problem, attention.options
    for name, value in (("H", 4), ("K", 2), ("POOL", 1 << 11), ("pools", functools.cache(attention.pools.__wrapped__))):
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(attention, "options", lambda *args: made.append([options(*args)]) or made[-1][0])
    monkeypatch.setattr(attention, "problem", lambda *args: made[-1].append(problem(*args)) or made[-1][-1])
    return made


def attended(case, device, made):
    """What the second closure of the case writes, and the twin's answer in float64 and in the case's dtypes."""
    call = attention.ours(case, device)(1)
    call()
    features, p = made[-1]

    def want(dtype):
        return twin.attention(p.q.to(dtype), p.k_cache, p.v_cache, p.starts, p.lens, p.table, causal=case.causal, window=case.window,
                              **{name: value for name, value in features.items() if name != "lse"})[0]
    return p.out, want(torch.float64), want(torch.bfloat16)


def small_case(feature):
    case = attention.Case("", (3, 1), (1100 if feature == "window 1024" else 40, 17), D=16, DV=16)
    return attention.featured(case, feature) if feature else case


@pytest.mark.parametrize("feature", ["", *FEATURES])
def test_attention_times_what_it_names(device, small, feature):
    assert_close(*attended(small_case(feature), device, small))


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature not in ("DV 64", "lse")])
def test_a_feature_left_out_is_seen(device, small, monkeypatch, feature):
    torch.manual_seed(0)
    _, want, plain = attended(small_case(feature), device, small)
    torch.manual_seed(0)
    attention.ours(replace(small_case(feature), feature=""), device)(1)()
    with pytest.raises(AssertionError):
        assert_close(small[-1][1].out, want, plain)


def test_a_capacity_keeps_its_pads(device, small):
    case = attention.Case("", (1, 0, 0), (40, 0, 0), D=16, DV=16, capacity=3)
    got, want, plain = attended(case, device, small)
    assert_close(got, want, plain)
    assert got.shape[0] == 3 and not got[1:].any()


def test_sets_of_buffers_share_no_page(device, small):
    case = attention.Case("", (1, 1), (40, 33), D=16, DV=16)
    one, other = (problem.k_cache.flatten() for problem in (attention.ours(case, device)(i) and small[-1][1] for i in range(2)))
    assert one.data_ptr() + 2 * one.numel() <= other.data_ptr()
    pages = small[-1][1].table
    assert sorted(pages[pages > 0].tolist()) == list(range(1, 7)) and pages[1, :3].tolist() == small[-1][1].pages[3:].tolist()


class Wrapper:
    """FlashInfer's decode wrapper, as far as the bench calls it."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert workspace.numel() == attention.WORKSPACE and layout == "NHD" and use_tensor_cores

    def plan(self, indptr, indices, last_page_len, *shape, q_data_type, kv_data_type):
        assert shape == (4, 2, 16, 16) and q_data_type == kv_data_type == torch.bfloat16
        self.pages, self.lens = indices.split(indptr.diff().tolist()), (indptr.diff() - 1) * 16 + last_page_len

    def run(self, q, caches, out):
        R = len(self.pages)
        table = torch.nn.utils.rnn.pad_sequence(list(self.pages), batch_first=True)
        out.copy_(twin.attention(q, *caches, torch.arange(R + 1), self.lens, table)[0])


def paged_attention(q, k_cache, v_cache, query_start_loc, seq_lens, block_table, max_query_len, max_seq_len, out):
    """FlashAttention-3's, of which fa3.py names the parameters so."""
    assert (max_query_len, max_seq_len) == (1, 40)
    out.copy_(twin.attention(q, k_cache, v_cache, query_start_loc, seq_lens, block_table)[0])


@pytest.mark.parametrize("provider", ["fa3", "flashinfer"])
@pytest.mark.parametrize("lens, same", [((40, 33, 1), True), ((40, 33, 2), False)])
def test_peers_are_given_our_problem(device, small, monkeypatch, provider, lens, same):
    """By stand-ins that compute the twin's answer from what the bench gives them; an answer to other lengths is told apart."""
    stand_in = type("peer", (), {"BatchDecodeWithPagedKVCacheWrapper": Wrapper, "paged_attention": staticmethod(paged_attention)})
    monkeypatch.setattr(attention.importlib, "import_module", {provider: stand_in}.__getitem__)
    small.append([{}])
    getattr(attention, provider)(attention.Case("", (1, 1, 1), (40, 33, 1), D=16, DV=16), device)(1)()
    p = small[-1][1]
    want = twin.attention(p.q, p.k_cache, p.v_cache, p.starts, torch.tensor(lens, dtype=torch.int32, device=device), p.table)[0]
    assert torch.equal(p.out, want) == same


def test_attention_saves_each_provider_and_tells_what_fails(h200, monkeypatch, capsys):
    log = []

    def bench(room, case, provider, make, **figures):
        if (provider, case) == ("fa3", "prefill 4x2048"):
            raise ValueError("no such case")
        log.append((provider, case))
    monkeypatch.setattr(attention, "PROVIDERS", {name: (lambda case: None, takes) for name, (_, takes) in attention.PROVIDERS.items()})
    monkeypatch.setattr(attention, "missing", {"fa3": None, "flashinfer": "No module named 'flashinfer'"}.get)
    monkeypatch.setattr(attention, "compile_ours", lambda chosen: log.append(("compile", len(chosen))))
    monkeypatch.setattr(harness, "bench", bench)
    monkeypatch.setattr(harness, "save", lambda: log.append(("save", "")))
    monkeypatch.setattr(plot, "attention", lambda path: log.append(("plot", "")))
    monkeypatch.setattr(harness, "ONLY", "2048$")
    with pytest.raises(RuntimeError, match=r"^prefill 4x2048 by fa3: ValueError: no such case$"):
        attention.main()
    chosen = [name for name in CASES if name.endswith("2048")]
    prefills = [name for name in chosen if name.startswith("prefill")]
    assert [r["case"] for r in harness.ROWS] == chosen and {r["provider"] for r in harness.ROWS} == {"floor"}
    saved = [("save", ""), ("plot", "")]
    assert log == [("compile", len(chosen)), *(("gkernels", name) for name in chosen), *saved,
                   *(("fa3", name) for name in chosen if name != "prefill 4x2048"), *saved, *(("torch", name) for name in prefills), *saved]
    assert "flashinfer is left out: No module named 'flashinfer'\n" in capsys.readouterr().out


def test_peers_are_timed_on_plain_cases_alone():
    takes = {name: {case.name for case in attention.cases() if takes(case)} for name, (_, takes) in attention.PROVIDERS.items()}
    plain = {f"{name}{suffix}" for name in CASES for suffix in ("", ", D 64", ", page 64")}
    assert takes["fa3"] == plain and takes["flashinfer"] == {name for name in plain if name.startswith("decode")}
    assert len(takes["gkernels"]) == len(list(attention.cases())) and list(takes)[-1] == "flashinfer"


def saved_rows(tmp_path, providers):
    """A results file with made-up times for every decode case."""
    rows = []
    for name in CASES[:8]:
        R, n = map(int, re.findall(r"\d+", name))
        for i, provider in enumerate(providers):
            us = R * n * 4096 / 4.44e6 * (1 + i / 4)
            rows.append(row("attention", name, provider, us, tbs=R * n * 4096 / us / 1e6, source=harness.source(), date=f"2026-11-{20 + i}"))
    path = tmp_path / "h200.json"
    path.write_text(json.dumps({"device": "h200", "rows": rows}))
    return path


def drawn(path):
    """{provider: its points as pixels} and every text of a plot."""
    root = ElementTree.parse(path).getroot()
    width, height = (float(n) for n in root.get("viewBox").split()[2:])
    lines = {}
    for group in root.iter(f"{SVG}g"):
        if group.get("id"):
            lines[group.get("id")] = [tuple(map(float, at.split())) for at in group.find(f"{SVG}path").get("d")[1:].split("L")]
    assert all(plot.LEFT <= x <= width - plot.RIGHT and plot.TOP <= y <= height - plot.BOTTOM for line in lines.values() for x, y in line)
    return lines, [text.text for text in root.iter(f"{SVG}text")]


def test_plots_draw_every_provider(tmp_path):
    providers = ("floor", "gkernels", "fa3", "flashinfer")
    context, batch = plot.attention(saved_rows(tmp_path, providers))
    assert [path.name for path in (context, batch)] == ["attention_context.svg", "attention_batch.svg"] and context.parent == tmp_path
    for path, count, labels in ((context, 3, ["context, tokens (log scale)", "time, us (log scale)", "8,192", "131,072"]),
                                (batch, 5, ["requests x context, tokens (log scale)", "share of the read ceiling, %", "8 x 4096", "100"])):
        lines, texts = drawn(path)
        assert set(lines) == set(providers) and {len(line) for line in lines.values()} == {count}
        assert {*labels, "gkernels", "FlashAttention-3", "FlashInfer", "floor: read at 4.44 TB/s"} <= set(texts)
        assert any(text.startswith("NVIDIA H200, 2026-11-20 to 2026-11-23; ") for text in texts)
        slower = [lines[name] for name in providers]     # each slower than the one before: drawn higher, or lower where shares are drawn
        rising = [a[1] - b[1] for one, other in pairwise(slower) for a, b in zip(one, other, strict=True)]
        assert all(rise > 0 for rise in rising) if path == context else all(rise < 0 for rise in rising)


def test_a_missing_provider_is_seen(tmp_path):
    for path in plot.attention(saved_rows(tmp_path, ("gkernels", "flashinfer"))):
        lines, texts = drawn(path)
        assert set(lines) == {"gkernels", "flashinfer"} and "FlashAttention-3" not in texts


def test_stale_rows_of_ours_are_not_drawn(tmp_path, monkeypatch):
    path = saved_rows(tmp_path, ("gkernels", "fa3"))
    monkeypatch.setattr(harness, "source", lambda: "0" * 16)
    assert plot.attention(path) == []


NODES = [timeline.Node("a", 0.0, 4.0), timeline.Node("b", 5.0, 9.0), timeline.Node("a", 7.0, 12.0), timeline.Node("c<", 8.0, 12.5)]


def test_shares_add_up_to_the_step():
    """Nodes that overlap count for what they end later; a gap counts for the node after it."""
    assert timeline.shares(NODES) == [timeline.Share("a", 2, 7.0, 0.0), timeline.Share("b", 1, 5.0, 1.0), timeline.Share("c<", 1, 0.5, 0.0)]
    _, *lines, step = (line.split() for line in timeline.table(NODES).splitlines())
    assert lines[0] == ["a", "2", "7.0", "3.50", "0.0"] and step == ["the", "step", "4", "12.5", "1.0"] and len(lines) == 3


def test_a_timeline_draws_every_node():
    figure = timeline.svg("a & b", NODES)
    root = ElementTree.fromstring(figure)
    boxes = root.findall(f"{SVG}rect")
    words = [text.text for text in root.findall(f"{SVG}text")]
    assert len(boxes) == len(NODES) and {"a", "b", "c<", "a & b", "0 us", "12 us"} <= {*words}
    ends = [float(box.get("x")) + float(box.get("width")) for box in boxes]
    assert ends == sorted(ends) and max(ends) <= timeline.WIDTH and len({box.get("y") for box in boxes}) == 3


@pytest.mark.gpu
def test_a_trace_sees_the_kernels_of_a_replay(device):
    """Twice: the profiler's own start must not hide what is asked for."""
    x, graph = torch.ones(1 << 20, device=device), torch.cuda.CUDAGraph()
    x.mul_(1)
    with torch.cuda.graph(graph):
        x.mul_(2)
        x.add_(1)
    for _ in range(2):
        nodes = timeline.trace(graph.replay)
        assert len(nodes) == 2 and nodes[0].start == 0.0 and all(node.end > node.start for node in nodes)
