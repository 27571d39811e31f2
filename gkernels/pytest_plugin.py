"""pytest's side of the capture-safety checker: a marker and a fixture.

    @pytest.mark.capture_safe(fn, make_inputs, outputs={"out": out})      # checked before the test's body runs
    def test_step(): ...

    def test_other_step(capture_check):
        report = capture_check(fn, make_inputs, outputs={"out": out})     # fails the test with the report unless it is clean

Both take one Subject as well. The marker may stand alone over a test that calls `capture_check` itself, and then must. To check on a CPU,
call `gkernels.interpret.enable()` in conftest.py before any kernel is imported. Nothing of torch is imported until a check runs.
"""

from __future__ import annotations

import pytest

CALLS = pytest.StashKey[int]()


def pytest_configure(config):
    config.addinivalue_line("markers", "capture_safe(fn, make_inputs, **options): what the test names must be safe in a CUDA graph")


@pytest.fixture
def capture_check(request):
    """A function with the arguments of gkernels.graph.check.check, or one Subject: returns the report, or fails the test with it."""
    def checked(fn, make_inputs=None, **options):
        request.node.stash[CALLS] = request.node.stash.get(CALLS, 0) + 1
        return require_clean(fn, make_inputs, **options)
    return checked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    markers = list(item.iter_markers("capture_safe"))
    for marker in markers:
        if marker.args or marker.kwargs:
            require_clean(*marker.args, **marker.kwargs)
    result = yield
    if any(not (marker.args or marker.kwargs) for marker in markers) and not item.stash.get(CALLS, 0):
        pytest.fail("capture_safe: the marker names nothing, and the test called capture_check never; give it fn and make_inputs", pytrace=False)
    return result


def require_clean(fn, make_inputs=None, **options):
    from .graph.check import Subject, check, examine
    report = examine(fn) if isinstance(fn, Subject) else check(fn, make_inputs, **options)
    if not report.clean:
        pytest.fail(report.text(), pytrace=False)
    return report
