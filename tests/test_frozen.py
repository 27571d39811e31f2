"""frozen(): a compilation after warm-up is an error that names the kernel and what is new; what is warm runs. In a child process that compiles."""

import json
import os
import re
import subprocess
import sys

import pytest

from gkernels.graph.frozen import explain, key_of

pytestmark = pytest.mark.aot
NEAREST = r"in the nearest of 2 binaries; launch it so before frozen\(\), or list run-time integers in do_not_specialize"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    run = subprocess.run([sys.executable, "-m", "tests.frozen_kernels"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["warm", "warm too", "thawed", "loaded at last", "after an error"])
def test_what_is_warm_or_thawed_runs(said, case):
    assert said[case] == ""


@pytest.mark.parametrize("case, words", [
    ("one", r"n is 1, was i32 \(a multiple of 16\), " + NEAREST),
    ("odd", r"n is i32, was i32 \(a multiple of 16\), " + NEAREST),
    ("wide", r"n is i64 \(a multiple of 16\), was i32 \(a multiple of 16\), " + NEAREST),
    ("dtype", r"out_ptr is \*i32 \(a multiple of 16\), was \*fp32 \(a multiple of 16\), " + NEAREST),
    ("address", r"out_ptr is \*fp32, was \*fp32 \(a multiple of 16\), " + NEAREST),
    ("constant", r"BLOCK is 128, was 64, " + NEAREST),
    ("field", r"C.RUNS is 4, was 3, " + NEAREST),
    ("option", r"num_stages is 5, was 3, " + NEAREST),
    ("two", r"n is i32, was i32 \(a multiple of 16\); C.SPAN is 8, was 16, " + NEAREST),
    ("none", r"value is None, was fp32, " + NEAREST),
    ("thread", r"n is 1, was i32 \(a multiple of 16\)"),
    ("nested", r"BLOCK is 32, was 64"),
    ("still", r"BLOCK is 32, was 64"),
])
def test_the_part_of_the_key_that_is_new_is_named(said, case, words):
    assert re.search(rf"gkernels.graph.frozen: __main__._fill_kernel: would be compiled after warm-up: {words}", said[case])


def test_a_kernel_without_a_binary_is_named(said):
    assert "_other_kernel: would be compiled after warm-up: it has no binary for this device; launch it once before frozen()" in said["new"]


def test_a_first_launch_is_named(said):
    assert "_fill_kernel: would be loaded after warm-up: it was compiled but never launched; launch it once" in said["unloaded"]


def test_keys_inside_tuples():
    """(1, 1) is the second item of the second argument."""
    key = key_of({"x": "*fp16", "shape": ("i32", "constexpr")}, {(1, 1): 7}, {(0,): [["tt.divisibility", 16]], (1, 0): []}, {"num_warps": 4})
    assert key == {"x": "*fp16 (a multiple of 16)", "shape": "('i32', 'constexpr') (7 at (1,))", "num_warps": "4"}
    other = key_of({"x": "*fp16"}, {}, {(0,): []}, {"num_warps": 4})
    assert explain(key, [other, key | {"x": "*fp16", "num_warps": "8", "shape": "i32"}]).startswith(
        "x is *fp16 (a multiple of 16), was *fp16; shape is ('i32', 'constexpr') (7 at (1,)), was absent, in the nearest of 2 binaries;")
