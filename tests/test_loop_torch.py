"""Loops by the methods of torch's CUDAGraph, where cuda.bindings is missing: the same turns, the same refusals. On a stand-in for torch 2.14, whose
WHILE nodes look at a truth on the device, and on a GPU where torch has them."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given

from gkernels.graph import Buckets, ChoosingRunner, Loop, conditional
from tests.test_loop import Restless, Rows, check_turns, limits, loop_of, on_a_stand_in, todos, turn_steps
from tests.test_piecewise import capture_with_a_fault

ON_GPU = torch.cuda.is_available() and hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")


@pytest.fixture
def torchs(cuda, monkeypatch):
    cuda.lose_bindings(monkeypatch)
    return cuda


def captured(rows, first=(), steps=1, kind=Loop, device="cuda"):
    loop = loop_of(rows, device, kind, steps)
    rows.stage(first, 3)
    loop.capture(progress=False)
    assert loop.by_torch and loop.why == "" and loop.path == "WHILE loops on the device (2 buckets)"
    return loop


def check_loop(device, first, todo, limit, steps):
    rows = Rows(device)
    loop = captured(rows, first, steps)
    check_turns(loop, rows, todo, limit)
    check_turns(loop, rows, todo[::-1], limit)
    rows.stage([2, 5], 3)
    loop.graphs[4].outputs.fill_(-7)
    assert loop.run(4)[:2].tolist() == [2 * (4 + 1), 2 * (25 + 16 + 9)]     # of whichever node made the last call
    assert (loop.eager_steps, loop.replays) == (0, 3)
    loop.release()
    check_turns(loop, rows, todo, limit)


@on_a_stand_in
@given(todos, todos, limits, turn_steps)
def test_turns_by_torchs_methods(torchs, first, todo, limit, steps):
    check_loop("cpu", first, todo, limit, steps)
    assert torchs.idle and torchs.reserved == 0 and not torchs.driver.executables


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="torch makes WHILE nodes from 2.14 on")
@given(todos, todos, limits, turn_steps)
def test_turns_by_torchs_methods_on_a_gpu(device, monkeypatch, first, todo, limit, steps):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    check_loop(device, first, todo, limit, steps)


@on_a_stand_in
@pytest.mark.parametrize("forgets, todo, limit, steps", [
    (lambda left, running, n: left[0] >= n, [2], 5, 1), (lambda left, running, n: (running[0] > 0) & (left[0] > -9), [5], 2, 1),
    (lambda left, running, n: (left[0] > 0) & (running[0] > 0), [9], 3, 2)], ids=["running", "left", "past the limit"])
def test_a_condition_that_forgets_a_part_is_caught(torchs, monkeypatch, forgets, todo, limit, steps):
    monkeypatch.setattr(conditional, "goes_on", forgets)
    rows = Rows("cpu")
    loop = captured(rows, steps=steps)
    with pytest.raises(AssertionError, match="another number of turns"):
        check_turns(loop, rows, todo, limit)


@on_a_stand_in
def test_a_step_that_does_not_end_ends_at_the_limit(torchs):
    rows = Restless("cpu")
    loop = captured(rows)
    rows.stage([3, 1], 7)
    loop.run(2)
    assert int(rows.turns) == 7 and int(rows.left) == 0


@on_a_stand_in
@pytest.mark.parametrize("spoils", [False, True])
def test_a_fault_anywhere_leaves_all_usable(torchs, spoils):
    """At every event of a capture, the beginning and the end of each body among them."""
    for at in itertools.count():
        rows = Rows("cpu", torchs.event)
        loop = loop_of(rows, "cuda", steps=2)
        if not capture_with_a_fault(torchs, loop, at, spoils, collecting=at % 2 == 0):
            break
        assert torchs.idle and not loop.graphs and torchs.reserved == 0
        check_turns(loop, rows, [4, 1], 3)
        loop.capture(progress=False)
        check_turns(loop, rows, [4, 1], 3)
        loop.release()
    assert at > 40


@on_a_stand_in
def test_bindings_come_first(cuda, monkeypatch):
    """Their turn is a kernel, not five."""
    torch.cuda.CUDAGraph.begin_capture_to_while_node = None
    rows = Rows("cpu")
    loop = loop_of(rows, "cuda")
    loop.capture(progress=False)
    assert not loop.by_torch and cuda.driver.executables
    check_turns(loop, rows, [3, 1], 5)


@on_a_stand_in
def test_an_old_driver_is_told(cuda, monkeypatch):
    cuda.lose_bindings(monkeypatch, 12030)
    loop = loop_of(Rows("cpu"), "cuda")
    with pytest.raises(RuntimeError, match=r"the driver is of CUDA 12\.3, WHILE nodes came with 12\.4; update it, or capture a Burst"):
        loop.capture()
    assert not loop.graphs and not loop.by_torch


@pytest.mark.gpu
def test_the_driver_is_asked_without_bindings(device):
    from cuda.bindings import driver
    assert conditional.driver_version() == driver.cuDriverGetVersion()[1] >= 12000


@on_a_stand_in
@pytest.mark.parametrize("error", [0, 999])
def test_the_drivers_own_library_answers(monkeypatch, error):
    def get_version(pointer):
        pointer._obj.value = 12080
        return error
    monkeypatch.setattr(conditional.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=get_version))
    if error:
        with pytest.raises(RuntimeError, match="the CUDA driver answered 999"):
            conditional.driver_version()
    else:
        assert conditional.driver_version() == 12080


@on_a_stand_in
def test_torch_makes_no_switch(torchs):
    live = torch.ones(1, dtype=torch.int32)
    runner = ChoosingRunner(lambda bucket: None, live, Buckets([4]), "cuda")
    assert runner.why == "SWITCH nodes are made through cuda.bindings, which is not installed; pip install 'gkernels[loop]'"
