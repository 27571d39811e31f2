"""The parts of bench/harness.py that need no GPU: which code a figure belongs to, how figures merge, and how they are printed."""

import hashlib
import json

import pytest
import torch

from bench import __main__ as command
from bench import harness


def row(bench, case, provider, us, **figures):
    return dict(bench=bench, case=case, provider=provider, us=us, **figures)


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
