"""compute-sanitizer over the eager path, where CUDA's toolkit is installed: memory outside allocations, and races in shared memory."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from gkernels.kernels import _attention_short_hopper, _attention_tall_hopper

CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.path.join(CUDA_HOME, "bin"))
FOUND = 9                                                                             # the exit code of a run in which it found something
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer, which comes with CUDA's toolkit")]


def sanitized(tool, program):
    command = [TOOL, f"--tool={tool}", f"--error-exitcode={FOUND}", sys.executable, "-m", "tests.sanitized", program]
    return subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=1200)


def dispatch_lines():
    """Where the compiler tells warps which partition is theirs: in a byte a warp that is written before a barrier of the whole program and read
    behind it, which racecheck takes for a race. ("file", "line") of the kernels and of their warp_specialize."""
    found, told = set(), r"def _attention_(tall|short)_kernel|.*gl\.warp_specialize"
    for room in (_attention_tall_hopper, _attention_short_hopper):
        with open(room.__file__) as lines:
            found |= {(os.path.basename(room.__file__), str(i)) for i, line in enumerate(lines, 1) if re.match(told, line)}
    return found


def races(report):
    """Accesses of shared memory, as (file, line), of the hazards in racecheck's report, but those that hold dispatches alone."""
    hazards = [set(re.findall(r"access at \S+ in (\S+?):(\d+)", hazard)) for hazard in re.split(r"(?=Race reported)", report)[1:]]
    return [hazard for hazard in hazards if not hazard or hazard - dispatch_lines()]


def test_attention_touches_its_own_memory():
    run = sanitized("memcheck", "attention")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_attention_has_no_races():
    run = sanitized("racecheck", "attention")
    report = run.stdout + run.stderr
    assert run.returncode in (0, FOUND) and "RACECHECK SUMMARY" in report and not races(report), report[-4000:]


def test_control_a_race_beside_a_dispatch_is_caught():
    (file, kernel), (_, dispatch) = sorted((line for line in dispatch_lines() if "tall" in line[0]), key=lambda line: int(line[1]))
    report = "Error: Race reported between Read access at _kernel+0x180 in {}:{}\n    and Write access at _kernel+0xcd30 in {}:{}"
    assert not races(report.format(file, kernel, file, dispatch)) and not races("RACECHECK SUMMARY: 0 hazards displayed")
    assert races(report.format(file, kernel, file, int(kernel) + 1)) and races(report.format("_attention_tile.py", kernel, file, dispatch))
    assert races("Error: Potential RAW hazard. Race reported at an address")


def test_control_a_store_past_the_end_is_caught():
    run = sanitized("memcheck", "past_the_end")
    assert run.returncode == FOUND and "Invalid __global__ write of size 4 bytes" in run.stdout
