"""compute-sanitizer over the eager path, where CUDA's toolkit is installed: memory outside allocations, and races in shared memory."""

import os
import shutil
import subprocess
import sys

import pytest

CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.path.join(CUDA_HOME, "bin"))
FOUND = 9                                                                             # the exit code of a run in which it found something
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer, which comes with CUDA's toolkit")]


def sanitized(tool, program):
    command = [TOOL, f"--tool={tool}", f"--error-exitcode={FOUND}", sys.executable, "-m", "tests.sanitized", program]
    return subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_attention_is_clean(tool):
    run = sanitized(tool, "attention")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_control_a_store_past_the_end_is_caught():
    run = sanitized("memcheck", "past_the_end")
    assert run.returncode == FOUND and "Invalid __global__ write of size 4 bytes" in run.stdout
