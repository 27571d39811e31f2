"""python -m gkernels doctor: what `generate` needs, whether it is here, and the command that mends it where it is not.

Works where torch or triton are missing. The two trial kernels run in child processes: whether a kernel is interpreted or compiled is
decided when it is imported, and a compiler may end its process.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from . import __version__
from .cli import CHECKPOINT

ROOT = Path(__file__).parent.parent
EXTRA = ("safetensors", "tokenizers", "jinja2", "tqdm")
TRIAL_SECONDS = 120

Finding = tuple[bool, str, str]            # is it there, what was found, the mend


def main() -> int:
    """Prints the table, a line as soon as it is known; 0 if `generate` can run on a GPU or on the CPU."""
    good = {}
    for name, look in CHECKS.items():
        good[name], found, mend = look()
        hint = f"  ->  {mend}" if mend and not good[name] else ""
        print(f"{'ok' if good[name] else 'missing':<8} {name:<22} {found}{hint}", flush=True)
    packages = all(good[name] for name in ("python", "torch", "triton", "numpy", "extra: model"))
    ways = [words for words, runs in (("captured graphs on the GPU", good["CUDA device"] and good["C compiler"]),
                                      ("the CPU interpreter", good["interpreter"])) if packages and runs]
    print(f"\ngenerate runs on: {' or '.join(ways)}" if ways else "\ngenerate cannot run here: mend the lines marked missing")
    return 0 if ways else 1


def python() -> Finding:
    return sys.version_info >= (3, 10), platform.python_version(), "install Python 3.10 or later"


def package(name: str, mend: str) -> Callable[[], Finding]:
    def look():
        try:
            return True, import_module(name).__version__, ""
        except Exception as error:           # a broken installation fails in any way
            return False, brief(error), mend
    return look


def brief(error: object) -> str:
    """The last line of a message, cut to a table's width."""
    lines = str(error).strip().splitlines()
    return lines[-1][:160] if lines else type(error).__name__


def cuda() -> Finding:
    try:
        import torch
    except Exception:
        return False, "unknown without torch", ""
    if torch.cuda.is_available():
        return True, f"{torch.cuda.get_device_name()}, driver {driver()}, CUDA {torch.version.cuda}", ""
    if driver() and torch.version.cuda is None:
        return False, f"driver {driver()} is there, but this torch is built for the CPU", "pip install torch==2.11.0"
    though = f", though driver {driver()} is there" if driver() else ""
    return False, f"torch sees none{though}", "install an NVIDIA driver, or use the CPU"


def driver() -> str:
    """The NVIDIA driver's version, "" without one."""
    if not shutil.which("nvidia-smi"):
        return ""
    run = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return run.stdout.split()[0] if run.returncode == 0 and run.stdout.strip() else ""


def compiler() -> Finding:
    """Triton compiles a launcher in C for every kernel that it runs on a GPU."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if found and header.is_file():
        return True, f"{found}, {header}", ""
    lack = f"no {header}" if found else "neither gcc nor clang"
    return False, lack, "apt-get install gcc python3-dev (a GPU needs it, the CPU does not)"


def trial(function: str, mend: str) -> Callable[[], Finding]:
    """Calls a function of this module in a child process; it prints what it found."""
    def look():
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        code = f"from gkernels import doctor; print(doctor.{function}())"
        with tempfile.TemporaryDirectory() as cache:
            try:
                run = subprocess.run([sys.executable, "-c", code], env=environment | {"TRITON_CACHE_DIR": cache}, timeout=TRIAL_SECONDS,
                                     capture_output=True, text=True)
            except subprocess.TimeoutExpired:
                return False, f"no answer in {TRIAL_SECONDS} s", mend
        return (False, brief(run.stderr), mend) if run.returncode else (True, brief(run.stdout), "")
    return look


def interpret_kernel() -> str:
    """Runs rmsnorm in the interpreter on a row whose result is exact."""
    from . import interpret
    interpret.enable()
    import torch

    from .kernels.rmsnorm import rmsnorm
    got, want = rmsnorm(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([1.0, 1.0, 3.0]), 0.0), torch.tensor([[1.0, -1.0, 3.0]])
    if not torch.equal(got, want):
        raise RuntimeError(f"rmsnorm gave {got.tolist()}, expected {want.tolist()}")
    return "rmsnorm runs on the CPU, and right"


class Target:
    """Stands in for a driver, so that Triton compiles for a GPU that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_kernel() -> str:
    """Compiles rmsnorm for sm_90."""
    import torch
    import triton

    from .kernels._overlap import overlap
    from .kernels.rmsnorm import _rmsnorm_kernel, config
    triton.runtime.driver.set_active(Target())
    c, bf16 = config(4096), torch.bfloat16
    compiled = _rmsnorm_kernel.warmup(bf16, None, bf16, bf16, torch.int32, 4096, 0, 0, 4096, 0, 1e-6, H=1, D=4096, BLOCK_D=c.BLOCK_D,
                                      HAS_RESIDUAL=False, HAS_NUM_TOKENS=True, num_warps=c.num_warps, **overlap(), grid=(1,))
    return f"rmsnorm compiles to {len(compiled.asm['cubin'])} bytes of machine code"


def extra() -> Finding:
    lacking = [name for name in EXTRA if not package(name, "")()[0]]
    return not lacking, f"lacks {', '.join(lacking)}" if lacking else ", ".join(EXTRA), f"pip install {' '.join(lacking)}"


def loop() -> Finding:
    """Whether many steps can be one launch on a GPU; without it there are bursts."""
    try:
        from .graph.conditional import unavailable
        found, _, mend = unavailable().partition("; ")
    except Exception as error:
        return False, brief(error), ""
    return not found, found or "WHILE nodes can hold a captured step", mend


def checkpoint() -> Finding:
    lacking = [name for name in ("config.json", "tokenizer.json", "model.safetensors") if not (CHECKPOINT / name).is_file()]
    size = sum(file.stat().st_size for file in CHECKPOINT.glob("*"))
    return (not lacking, f"{CHECKPOINT} lacks {', '.join(lacking)}" if lacking else f"{CHECKPOINT} ({size / 1e6:.1f} MB)",
            "install the whole package again, or pass --model DIR")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": python,
    "gkernels": lambda: (True, f"{__version__}, {Path(__file__).parent}", ""),
    "torch": package("torch", "pip install torch==2.11.0"),
    "triton": package("triton", "pip install triton==3.6.0"),
    "numpy": package("numpy", "pip install 'numpy<2.4'"),
    "einops": package("einops", "pip install einops (only --verify needs it)"),
    "CUDA device": cuda,
    "C compiler": compiler,
    "interpreter": trial("interpret_kernel", "pip install triton==3.6.0 'numpy<2.4'"),
    "compiler for sm_90": trial("compile_kernel", "pip install triton==3.6.0"),
    "extra: model": extra,
    "extra: loop": loop,
    "packaged checkpoint": checkpoint,
}
