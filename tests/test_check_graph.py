"""The capture-safety checker: every exhibit of the gallery by its right name and at its own line, and our own step clean."""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from gkernels import cli
from gkernels.graph.check import CASES, Case, Subject, check, examine, load
from gkernels.graph.examination import Examination
from gkernels.graph.findings import MENDS, NOTES
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step
from tests import gallery
from tests.gallery import GALLERY, Engine, N, R, _double_kernel
from tests.strategies_model import tiny_config

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).parent.parent
on_cpu = pytest.mark.skipif(CUDA, reason="looks at the CPU interpreter")
ON_CPU = [name for name, exhibit in GALLERY.items() if not exhibit.gpu]
NODES_ONLY = {"different-node", "forbidden-node"}      # shown by hand-made nodes, in test_check_parts


@on_cpu
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")     # NaN in pads, multiplied
@pytest.mark.parametrize("name", ON_CPU)
def test_each_exhibit_bears_its_name(name):
    """All its errors and no other; each at a line of the gallery."""
    report = examine(GALLERY[name].build())
    assert report.names == GALLERY[name].catches, report
    file, lines = inspect.getsourcefile(gallery), len(inspect.getsource(gallery).splitlines())
    for finding in report.errors:
        place, _, line = finding.place.rpartition(":")
        assert place == file and 1 <= int(line) <= lines and finding.cases, finding
        assert finding.mend == MENDS[finding.name] and finding.name in report.text() and finding.mend in report.text()


def test_the_gallery_holds_every_name():
    shown = set().union(*(exhibit.catches for exhibit in GALLERY.values()))
    assert shown | NODES_ONLY | NOTES == MENDS.keys() and len({e.bug_class for e in GALLERY.values()} - {"none"}) >= 20


@on_cpu
def test_places_are_the_lines_that_do_it():
    source = inspect.getsource(gallery).splitlines()
    for name, words in (("reads_an_item", ".item()"), ("uploads_a_list", "torch.tensor("), ("scales_by_the_host", "e.out.mul_(1.0 / max"),
                        ("launches_the_live_rows", "_double_kernel[(rows,)]"), ("draws_with_python", "random.random()")):
        found = [f for f in examine(GALLERY[name].build()).errors if f.name != "replay-differs"]
        assert [words in source[int(f.place.rpartition(":")[2]) - 1] for f in found] == [True], found


@on_cpu
def test_a_clean_report_says_what_was_proven_and_what_was_not():
    report = examine(GALLERY["clean"].build())
    assert report.clean and not report.findings and report.require_clean() is report
    for words in ("no wait", "the same in 5 cases", "no access outside", "no memory but", "no allocation", "held before: 10 calls",
                  r"\d\d poisoned pad elements", "10 replays", "programs in 2 random orders"):
        assert len([line for line in report.proven if re.search(words, line)]) == 1, words
    assert len(report.unproven) == 1 and "only a GPU" in report.unproven[0]
    undeclared = examine(replace(GALLERY["clean"].build(), pads=None, weights=None))
    assert "pads: none were declared" in undeclared.unproven and not any("memory but" in line for line in undeclared.proven)
    with pytest.raises(AssertionError, match="baked-scalar"):
        examine(GALLERY["passes_the_longest"].build()).require_clean()


@on_cpu
def test_a_result_made_inside_is_a_note():
    e = Engine()

    def fn(inputs):
        out = torch.empty(R, N)
        _double_kernel[(R,)](inputs["x"], inputs["lens"], out, N, N=N)
        return {"doubled": out}

    def lazy(inputs):
        out = torch.empty(R, N)
        _double_kernel[(R - 1,)](inputs["x"], inputs["lens"], out, N, N=N)
        return {"doubled": out}
    report = check(fn, e.stage)
    assert report.clean and [f.name for f in report.findings] == ["fresh-output"] and "result.doubled" in report.findings[0].what
    assert check(lazy, e.stage).names == {"unwritten-output"}
    live = lambda case: {"result.doubled": torch.arange(R)[:, None].expand(R, N) < R - 1}
    assert check(lazy, e.stage, live=live).clean


class Decoder(torch.nn.Module):
    """One step of a small decoder in plain torch, as another engine may have it: a row writes its key and value, then attends to all of its own."""

    def __init__(self, rows, width, slots, clean_pads):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(32, width), torch.nn.LayerNorm(width)
        self.qkv, self.head, self.clean_pads = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, 32), clean_pads
        self.keys, self.values, self.rows = torch.randn(rows, slots, width), torch.randn(rows, slots, width), torch.arange(rows)
        self.tokens = torch.zeros(rows, dtype=torch.int64)

    @torch.inference_mode()
    def forward(self, inputs):
        lens = inputs["lens"]
        q, k, v = self.qkv(self.norm(self.embed(inputs["ids"]))).chunk(3, -1)
        last = self.rows, (lens - 1).clamp(min=0)
        self.keys[last], self.values[last] = k, v
        owned = torch.arange(self.keys.shape[1]) < lens[:, None]
        values = torch.where(owned[:, :, None], self.values, 0.0) if self.clean_pads else self.values
        keys = torch.where(owned[:, :, None], self.keys, 0.0)
        attended = torch.nn.functional.scaled_dot_product_attention(q[:, None], keys, values, owned[:, None])[:, 0]
        torch.argmax(self.head(torch.where(lens[:, None] > 0, attended, 0.0)), -1, out=self.tokens)


@on_cpu
@pytest.mark.parametrize("clean_pads, names", [(True, set()), (False, {"pad-leak"})])
def test_a_foreign_step_of_torch_alone(clean_pads, names):
    """Masked scores do not keep NaN out: a weight of 0 times a value of NaN is NaN."""
    step, rows, slots = Decoder(4, 16, 12, clean_pads), 4, 12
    lens = lambda case: torch.tensor((case.batch(rows, slots) + [0] * rows)[:rows])
    unowned = lambda case: (torch.arange(slots) >= lens(case)[:, None])[:, :, None].expand(rows, slots, 16)
    report = check(step, lambda case: {"lens": lens(case), "ids": torch.randint(0, 32, (rows,), generator=case.generator())},
                   outputs={"tokens": step.tokens}, state={"keys": step.keys, "values": step.values}, weights=(list(step.parameters()), step.rows),
                   pads=lambda case: {"keys": unowned(case), "values": unowned(case)})
    assert report.names == names and report.subject == "Decoder" and all(f.place.startswith(f"{__file__}:") for f in report.errors), report


@on_cpu
def test_inputs_come_in_three_ways():
    """In the engine's own tensors, in new ones of any length, or in constants that no case fills; a dataclass serves as well as a dict."""
    @dataclass
    class Inputs:
        x: torch.Tensor
        lens: torch.Tensor
        factor: torch.Tensor

    e, factor = Engine(), torch.full((1,), 3.0)
    cached = {}

    def make_inputs(case):
        if case not in cached:
            lengths, x = e.batch(case)
            cached[case] = Inputs(torch.cat([x, torch.zeros(R - len(x), N)]), torch.tensor((lengths + [0] * R)[:R], dtype=torch.int32), factor)
        return cached[case]
    seen = []

    def fn(inputs):
        seen.append((inputs.lens.clone(), inputs.factor.clone()))      # seen by the test, not by the callable
        _double_kernel[(R,)](inputs.x, inputs.lens, e.out, N, N=N)
        e.out.mul_(inputs.factor)
    report = check(fn, make_inputs, outputs={"out": e.out})
    assert report.clean, report
    assert {tuple(lens.tolist()) for lens, _ in seen} == {tuple(cached[case].lens.tolist()) for case in CASES}
    assert all(f.item() == 3 for _, f in seen) and cached[CASES[0]].lens.tolist() == [N] * R


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_draw_what_they_say(case):
    batch = case.batch(7, 50, 2)
    assert batch == case.batch(7, 50, 2) and 1 <= len(batch) <= 7 and all(2 <= n <= 50 for n in batch)
    assert {"all": len(batch) == 7, "one": len(batch) == 1}.get(case.requests, True)
    assert {"most": set(batch) == {50}, "least": set(batch) == {2}}.get(case.lengths, len(set(batch)) > 1 or len(batch) == 1)


@pytest.mark.parametrize("change, words", [
    (dict(cases=CASES[:1]), "cases: got 1, expected at least 2"),
    (dict(make_inputs=lambda case: {"n": 3}), "make_inputs: got no tensors"),
    (dict(cases=CASES[:1:-1]), "put the largest case first"),
    (dict(outputs={"x": torch.zeros(3)}), "x: got two tensors of this name"),
    (dict(pads=lambda case: {"y": torch.ones(3, dtype=torch.bool)}), "pads: got a mask for 'y', expected one of"),
    (dict(pads=lambda case: {"x": torch.ones(3, dtype=torch.bool)}), r"pads: got torch.bool \[3\] for x, expected torch.bool of its shape"),
    (dict(live=lambda case: {"x": torch.ones(3)}), r"live: got torch.float32 \[3\] for x"),
])
def test_contradictions_are_named(change, words):
    e, calls = Engine(), iter(range(99))
    grown = lambda case: {"x": torch.zeros(1 + next(calls), 2)}
    subject = replace(Subject(lambda inputs: None, grown if "largest" in words else e.stage), **change)
    with pytest.raises(ValueError, match=rf"gkernels\.graph\.check: .*{words}"):
        examine(subject)


T, REQUESTS, PAGE, PAGES, MAX_LEN, VOCAB = 4, 2, 2, 9, 8, 96
LENGTHS = ("query_start_loc", "seq_lens")                               # what tells a pad from a live row is none
ADVANCED = ("token_ids", "seq_lens", "generated", "ended", "running")


def step_subject(kind=Step, **changes):
    """One layer of random weights in a Step, with pads of every kind: tokens, table entries, options, slots and pages that nobody owns."""
    device = torch.device("cuda" if CUDA else "cpu")
    config = LlamaConfig.from_dict(tiny_config("Qwen3ForCausalLM", num_hidden_layers=1, **changes))
    cache = PagedCache.allocate(config.num_layers, PAGES, PAGE, config.num_kv_heads, config.head_dim, torch.float32, device)
    for seed, t in enumerate((cache.keys, cache.values)):
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)))
    step = kind(Llama.build(config, random_weights(config, device, torch.float32), MAX_LEN), cache, T, REQUESTS, MAX_LEN)

    def rows(case):
        """Half of a request's length was computed before; the last page that it owns is filled in part; the second request samples."""
        made = []
        for i, length in enumerate(case.batch(REQUESTS, 3)):
            ids = torch.randint(0, VOCAB, (-(-length // 2),), generator=case.generator()).tolist()
            first = 1 + 4 * i
            made.append(Row(ids, length, list(range(first, first + -(-length // PAGE))), Sampling(64, 0.8, 20, 0.9, seed=i) if i else Sampling(),
                            emits=True, max_len=MAX_LEN, slot=i))
        return made

    def make_inputs(case):
        step.stage(rows(case))
        return {name: step.buffers[name] for name in step.buffers.fields}

    def pads(case):
        batch = rows(case)
        masks = {name: torch.ones(field.shape, dtype=torch.bool) for name, field in step.buffers.fields.items()
                 if name not in LENGTHS and field.shape[0] in (T, REQUESTS)}
        for name, mask in masks.items():
            live = sum(len(row.token_ids) for row in batch) if name == "token_ids" else 0 if name == "block_table" else len(batch)
            mask[:live] = False
        unowned = torch.ones(PAGES, PAGE, dtype=torch.bool)
        for i, row in enumerate(batch):
            masks["block_table"][i, :len(row.pages)] = False
            for at in range(row.seq_len):
                unowned[row.pages[at // PAGE], at % PAGE] = False
        masks |= {name: unowned[None, :, :, None, None].expand(getattr(cache, name).shape) for name in ("keys", "values")}
        return {name: mask.to(device) for name, mask in masks.items()}

    own = {name: value for name, value in vars(step).items() if name in ("_news", "counts", "prompt", "allowed", "_sampling")}
    return Subject(
        lambda inputs: step(T), make_inputs, (CASES[0], Case("one of length 1", "one", "least")), outputs={"results": step.results[:, :REQUESTS]},
        state={"keys": cache.keys, "values": cache.values, **own, **{name: step.buffers[name] for name in ADVANCED},
               "arrived": step.model.scratch.counters, "attended": step._workspace.counters},
        scratch={"states": step._workspace.states, "plan": {name: t for name, t in vars(step.plan(T)).items() if name != "status"},
                 "products": step.model.scratch.partials},
        weights=(step.model.weights, step.model.cos_sin), pads=pads, name=kind.__name__)


@pytest.mark.parametrize("changes", [{}, dict(head_dim=136)], ids=["five nodes a layer", "nine"])
def test_our_step_is_clean(changes):
    report = examine(step_subject(**changes))
    assert report.clean, report
    assert [f.name for f in report.findings] == ["fresh-output"]        # the logits, which its caller reads before the next replay
    if not CUDA:
        assert report.unproven == [line for line in report.unproven if "only a GPU" in line] and len(report.proven) == 9, report


class LiveTokens(Step):
    """Computes the batch's own number of tokens."""

    def stage(self, rows, turns=1):
        self.live = super().stage(rows, turns)
        return self.live

    def __call__(self, bucket):
        return super().__call__(self.live)


def test_a_step_that_looks_at_its_batch_is_caught():
    examination = Examination(step_subject(LiveTokens))
    examination.watch_cases()
    assert "kernel-by-data" in examination.report.names, examination.report


def broken():
    return GALLERY["passes_the_longest"].build()


def sound():
    return GALLERY["clean"].build()


@on_cpu
@pytest.mark.parametrize("target, code", [("sound", 0), ("broken", 1)])
def test_the_command_line_answers_by_its_exit_code(capsys, target, code):
    assert cli.main(["check", f"{__name__}:{target}", "--device", "cpu"]) == code
    assert re.match(r"(clean|passes_the_longest) on the CPU interpreter: (clean|2 errors); 5 cases: ", capsys.readouterr().out)
    assert cli.main(["check", f"{__name__}:{target}", "--device", "cpu", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["clean"] == (code == 0) and told["cases"] == [str(case) for case in CASES] and told["proven"] and told["unproven"]
    assert {f["name"] for f in told["findings"]} == GALLERY[told["subject"]].catches and all(f["mend"] == MENDS[f["name"]] for f in told["findings"])


@pytest.mark.parametrize("target, words", [
    ("nowhere:step", "got 'nowhere:step': No module named 'nowhere'"), ("tests", "got 'tests', expected module:function"),
    ("tests.gallery:nothing", "has no attribute 'nothing'"), ("tests.gallery:Engine", "got Engine from tests.gallery:Engine, expected a gkernels")])
def test_a_bad_target_is_told_in_one_line(capsys, device, target, words):
    assert cli.main(["check", target, "--device", device.type]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gkernels: graph.check: target: ") and err.count("\n") == 1 and words in err


def test_a_module_that_lacks_a_package_says_so(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        load("needy:step")


PLUGGED = """
import pytest
from tests.gallery import GALLERY

sound, broken = GALLERY["clean"].build(), GALLERY["passes_the_longest"].build()

@pytest.mark.capture_safe(sound)
def test_marked_sound(): pass

@pytest.mark.capture_safe(broken)
def test_marked_broken(): pass

@pytest.mark.capture_safe(sound.fn, sound.make_inputs, outputs=sound.outputs)
def test_marked_by_parts(): pass

@pytest.mark.capture_safe
def test_alone_and_silent(): pass

@pytest.mark.capture_safe
def test_alone_sound(capture_check):
    assert capture_check(sound).clean

def test_fixture_broken(capture_check):
    capture_check(broken.fn, broken.make_inputs, outputs=broken.outputs)
"""


@on_cpu
def test_the_pytest_plugin(tmp_path):
    (tmp_path / "conftest.py").write_text("from gkernels import interpret\ninterpret.enable()\n")
    (tmp_path / "test_plugged.py").write_text(PLUGGED)
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-m", "pytest", "-p", "gkernels.pytest_plugin", "-p", "no:cacheprovider", "--strict-markers", "-rA", "-q",
                          str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    for kind, names in (("PASSED", {"marked_sound", "marked_by_parts", "alone_sound"}),
                        ("FAILED", {"marked_broken", "alone_and_silent", "fixture_broken"})):
        assert set(re.findall(rf"^{kind} .*::test_(\w+)", out, re.M)) == names, out
    failures = out.partition("short test summary info")[0]           # which tells them again, cut short or, where CI is set, whole
    assert failures.count("error: baked-scalar at ") == 2 and "the test called capture_check never" in failures
    entry = re.search(r"\[project\.entry-points\.pytest11\]\ngkernels = \"(.*)\"", (ROOT / "pyproject.toml").read_text())
    assert entry and entry[1] == "gkernels.pytest_plugin"


ON_GPU = ["reads_an_item", "launches_the_live_rows", "passes_the_longest", "takes_the_short_way", "replaces_a_buffer", "masks_too_late"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ON_GPU, *(name for name, exhibit in GALLERY.items() if exhibit.gpu)])
def test_each_exhibit_bears_its_name_on_a_gpu(name):
    report = examine(GALLERY[name].build())
    assert GALLERY[name].catches <= report.names, report


@pytest.mark.gpu
def test_a_clean_report_of_a_gpu():
    report = examine(GALLERY["clean"].build())
    assert report.clean, report
    for words in ("nothing is compiled", "1 nodes, all safe, are the same in 7 captures of 5 cases", "10 replays of 5 graphs", "no memory behind"):
        assert any(words in line for line in report.proven), report
