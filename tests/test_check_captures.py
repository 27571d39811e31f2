"""The checker's captures, over a stand-in for the device: what they find, prove and leave behind. test_check_graph has the same on a GPU."""

import gc
import inspect
import sys
from contextlib import contextmanager

import pytest
import torch

from gkernels.graph import captures
from gkernels.graph.captures import Captures
from gkernels.graph.check import CASES
from gkernels.graph.examination import Examination
from gkernels.graph.nodes import Node
from tests import gallery
from tests.fake_cuda import FakeCuda, Graph
from tests.gallery import GALLERY, Engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


def nodes_of(tape):
    """A node for each call that a graph holds; numbers among the arguments of a kernel are its parameters."""
    for call in tape:
        if call.func.__name__ in ("__call__", "launch_afresh"):
            executor, *arguments = call.args
            numbers = [a for a in (*arguments, *call.keywords.values()) if isinstance(a, int)]
            yield Node("kernel", executor.fn.__name__, tuple(executor.grid), (32, 1, 1), 0, tuple(n.to_bytes(8, "little") for n in numbers))
        else:
            yield Node("memcpy")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda().install(monkeypatch)
    fake.held = [1 << 30] * captures.AGAIN
    monkeypatch.setattr(gc, "collect", lambda: 0)                       # 30 of them a test, 0.1 s each

    @contextmanager
    def graph(captured, stream, capture_error_mode):
        with torch.cuda.stream(stream):
            captured.capture_begin(pool=(0, len(fake.pools) + 1))
            try:
                yield
            finally:
                captured.capture_end()

    modes = ["default"]
    for name, here in dict(graph=graph, get_sync_debug_mode=lambda: modes[-1], set_sync_debug_mode=modes.append,
                           memory_reserved=lambda: fake.held.pop(0)).items():
        monkeypatch.setattr(torch.cuda, name, here)
    monkeypatch.setattr(Graph, "raw_cuda_graph", lambda self: self.tape, raising=False)
    monkeypatch.setattr(captures, "read_nodes", lambda tape: list(nodes_of(tape)))
    yield fake
    assert modes[-1] == "default" and fake.capturing is None


def captured(subject):
    """The report of the captures alone, after the calls that they are compared with."""
    examination = Examination(subject)
    for case in examination.cases[:1] * 2:
        examination.setting.prepare(case)
        examination.call(case)
    examination.watch_cases()
    report = examination.report
    report.findings.clear()
    report.proven.clear()
    Captures(examination).run_all()
    return report


@pytest.mark.parametrize("name, names", [
    ("passes_the_longest", {"baked-scalar", "replay-differs"}), ("launches_the_live_rows", {"data-dependent-grid", "replay-differs"}),
    ("takes_the_short_way", {"kernel-by-data", "replay-differs"}), ("replaces_a_buffer", {"replay-differs"}),
    ("works_beside_the_device", {"replay-differs"}), ("reads_an_item", {"capture-fails"}), ("clean", set())])
def test_captures_find(cuda, name, names):
    enabled = gc.isenabled()
    report = captured(GALLERY[name].build())
    assert report.names == names and gc.isenabled() == enabled, report
    source = inspect.getsource(gallery).splitlines()
    for finding in report.errors if name != "reads_an_item" else ():     # whose line is the stand-in's own
        line = source[int(finding.place.rpartition(":")[2]) - 1]
        assert ("def fn" if finding.name == "replay-differs" else "_kernel[(") in line, (finding, line)


def test_clean_captures_say_what_they_prove(cuda):
    report = captured(GALLERY["clean"].build())
    assert report.proven == ["1 nodes, all safe, are the same in 7 captures of 5 cases",
                             "10 replays of 5 graphs on the data of other cases equal calls bit for bit",
                             "6 captures of one case leave no memory behind"] and not report.unproven


def test_without_bindings_replays_are_compared_and_nodes_are_not(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    report = captured(GALLERY["passes_the_longest"].build())
    assert report.names == {"replay-differs"}
    assert report.unproven == ["the nodes of captures: cuda.bindings, which reads them, is not installed; pip install 'gkernels[loop]'"]
    cuda.held = [1 << 30] * captures.AGAIN
    report = captured(GALLERY["clean"].build())
    assert report.clean and len(report.proven) == 2 and not any("nodes" in line for line in report.proven)


def test_a_launch_beside_the_capture_is_missed(cuda):
    e = Engine()

    def fn(inputs):
        e.double()
        capturing, cuda.capturing = cuda.capturing, None                # as on a stream that does not capture
        e.double()
        cuda.capturing = capturing
    report = captured(e.subject(fn))
    assert "uncaptured-launch" in report.names and "1 launches of _double_kernel are not in the graph" in report.text()


def test_a_replay_that_does_nothing_is_seen(cuda, monkeypatch):
    monkeypatch.setattr(Graph, "replay", lambda self: None)
    assert captured(GALLERY["clean"].build()).names == {"replay-differs"}


def test_memory_that_grows_is_seen(cuda):
    cuda.held = [(i + 1) * captures.GROWTH for i in range(captures.AGAIN)]
    report = captured(GALLERY["clean"].build())
    assert report.names == {"pool-growth"} and f"leave {3 * captures.GROWTH} more bytes held" in report.text()


def test_unsafe_nodes_and_conditional_bodies_are_told(cuda, monkeypatch):
    more = [Node("host"), Node("conditional")]
    monkeypatch.setattr(captures, "read_nodes", lambda tape: [*nodes_of(tape), *more])
    report = captured(GALLERY["clean"].build())
    assert report.names == {"forbidden-node"} and report.unproven == [
        "the bodies of 1 conditional nodes, which drivers before CUDA 13.2 do not tell"]


def test_a_failed_capture_ends_the_captures_alone(cuda):
    e = Engine()

    def fn(inputs):
        e.double()
        if cuda.capturing and len(e.lengths) == 1:
            raise RuntimeError("called a synchronizing CUDA operation")
    report = captured(e.subject(fn))
    (finding,) = report.errors
    assert finding.name == "hidden-sync" and finding.cases == ("one longest",) and report.unproven == ["captures: one failed"]
    e.out.zero_()
    e.stage(CASES[0])
    e.double()
    assert e.out.any()
