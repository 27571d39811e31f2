"""The messages of gkernels/kernels/_check.py: each names the op, the argument, what came, what was expected and how to mend it."""

import os
import subprocess
import sys

import pytest
import torch

from gkernels.kernels import _check

INTS = (torch.int32,)


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
    """These tensors lie on the CPU, which compiled kernels refuse."""
    monkeypatch.setattr(_check, "can_run", lambda device: True)


def test_compiled_kernels_refuse_the_cpu():
    """Without a GPU and without the interpreter, a call says what is missing and how to mend it."""
    call = ("import torch; from gkernels.kernels import rmsnorm\ntry: rmsnorm.rmsnorm(torch.ones(2, 8), torch.ones(8))\n"
            "except ValueError as error: print(error)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True, check=True).stdout
    assert said == ("gkernels.rmsnorm: x: got a CPU tensor, expected one on a GPU, or kernels that are interpreted; move it with "
                    ".to('cuda'), or call gkernels.interpret.enable() before a kernel is imported\n")


@pytest.mark.parametrize("t, shape, dtypes, options, error, message", [
    ([1.0], (1,), _check.FLOATS, {}, TypeError, "gkernels.op: x: got list, expected a torch.Tensor"),
    (None, (1,), _check.FLOATS, {}, TypeError, "gkernels.op: x: got NoneType, expected a torch.Tensor"),
    (torch.ones(2, 3), (2, None, 3), _check.FLOATS, {}, ValueError, "gkernels.op: x: got shape [2, 3], expected [2, any, 3]"),
    (torch.ones(2, 3), (None, 4), _check.FLOATS, {}, ValueError, "gkernels.op: x: got shape [2, 3], expected [any, 4]"),
    (torch.ones(3), (3,), INTS, {}, TypeError, "gkernels.op: x: got torch.float32, expected torch.int32; convert with .to()"),
    (torch.ones(3, dtype=torch.float64), (3,), _check.FLOATS, {}, TypeError,
     "gkernels.op: x: got torch.float64, expected torch.float16 or torch.bfloat16 or torch.float32; convert with .to()"),
    (torch.ones(3, device="meta"), (3,), _check.FLOATS, dict(device=torch.device("cpu")), ValueError,
     "gkernels.op: x: got device meta, expected cpu like the other arguments; move it with .to()"),
    (torch.ones(4, 8).T, (8, 4), _check.FLOATS, {}, ValueError,
     "gkernels.op: x: got strides [1, 8], expected the last 1 dimension(s) contiguous; call .contiguous()"),
    (torch.ones(2, 4, 8)[:, :2], (2, 2, 8), _check.FLOATS, dict(dense=3), ValueError,
     "gkernels.op: x: got strides [32, 8, 1], expected the last 3 dimension(s) contiguous; call .contiguous()"),
    (torch.ones(9)[1:], (8,), _check.FLOATS, {}, ValueError,
     "gkernels.op: x: got an address that is not a multiple of 16 bytes, expected an aligned one; call .clone()"),
])
def test_tensor_says_what_came_and_what_was_expected(t, shape, dtypes, options, error, message):
    with pytest.raises(error) as caught:
        _check.tensor("op", "x", t, shape, dtypes, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("t, shape, options", [
    (torch.ones(2, 3), (2, 3), {}),
    (torch.ones(2, 3), (None, None), dict(device=torch.device("cpu"), dense=2)),
    (torch.ones(2, 4, 8)[:, :2], (2, 2, 8), dict(dense=2)),
    (torch.ones(8, 4).T[:, :1], (4, 1), {}),                       # a dimension of size 1 has no stride worth a name
    (torch.ones(9)[1:], (8,), dict(aligned=False)),
    (torch.ones(0, 8), (0, 8), {}),
])
def test_tensor_lets_good_arguments_pass(t, shape, options):
    assert _check.tensor("op", "x", t, shape, _check.FLOATS, **options) is None


def test_counter_is_absent_or_one_int32():
    cpu = torch.device("cpu")
    assert _check.counter("op", "num_tokens", None, cpu) is None
    assert _check.counter("op", "num_tokens", torch.ones(5, dtype=torch.int32)[1:2], cpu) is None
    with pytest.raises(ValueError, match=r"gkernels\.op: num_tokens: got shape \[2\], expected \[1\]"):
        _check.counter("op", "num_tokens", torch.ones(2, dtype=torch.int32), cpu)
    with pytest.raises(TypeError, match=r"gkernels\.op: num_tokens: got torch\.int64, expected torch\.int32"):
        _check.counter("op", "num_tokens", torch.ones(1, dtype=torch.int64), cpu)
    with pytest.raises(ValueError, match="num_tokens: got device meta, expected cpu"):
        _check.counter("op", "num_tokens", torch.ones(1, dtype=torch.int32, device="meta"), cpu)


def test_require_raises_what_it_is_told():
    assert _check.require(True, "op", "x", 1, "2") is None
    with pytest.raises(ValueError, match=r"^gkernels\.op: x: got 1, expected 2$"):
        _check.require(False, "op", "x", 1, "2")
    with pytest.raises(TypeError, match=r"^gkernels\.op: x: got 1, expected 2$"):
        _check.require(False, "op", "x", 1, "2", TypeError)
