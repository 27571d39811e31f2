"""Compiles every kernel of tests/calls.py for GPUs that are not there:  python -m tests.aot sm_90:bfloat16,float32 gfx942:float32 ...

A fake driver names the target, and each launch binds and compiles as it would at run time, with its own specialisation, but does not run.
A room that has no call in the dtypes asked for is compiled in float32.
Prints JSON: {"kernels": [a row a target and binary], "census": {"configurations": [a row each, with its binaries], "resizes": by case}}.
Run it in a process of its own, without TRITON_INTERPRET: a kernel decides at import whether it is compiled or interpreted.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import jit

from tests.launches import tensors_in

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "sm_120": GPUTarget("cuda", 120, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
CAPACITIES = (1, 3, 16, 17, 64)   # what Triton would tell apart: 1, multiples of 16, and the rest
WIDE = re.compile(r"(?:ld|st)\.global[.\w:]*\.(?:v4\.[bf]32|v2\.b64|v8\.b32|v4\.b64)"
                  r"|cp\.async\.\w+\.shared\.global[^;]* (?:16|0x10),|cp\.async\.bulk")
NARROW = re.compile(r"ld\.global[.\w:]*(?<!\.v[248])\.[bfsu]\d+\b")


class Driver:
    """What JITFunction asks of a driver before it compiles. A target is a device of its own: no binary is taken for another's."""

    def __init__(self, name):
        self.name = name

    def get_current_target(self):
        return TARGETS[self.name]

    def get_current_device(self):
        return self.name


class Launch:
    """A launch, bound for the active driver's target: `key` names its binary."""

    def __init__(self, kernel, args, kwargs):
        _, keys, self.target, self.backend, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        self.kernel, self.kwargs = kernel, dict(kwargs, debug=False, instrumentation_mode="")
        if self.target.backend == "hip":
            self.kwargs.pop("launch_pdl", None)                     # an option of the CUDA backend alone
        self.bound, self.specialization, self.options = binder(*args, **self.kwargs)
        self.key = jit.compute_cache_key(keys, self.specialization, self.options)

    @property
    def configuration(self):
        """Kernel, constexprs, dtypes and options: launches that agree in these must share one binary."""
        values = {p.name: value if p.is_constexpr else str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
                  for p, value in zip(self.kernel.params, self.bound.values(), strict=True)}
        return f"{self.kernel.__name__} {values} {self.options}"

    def with_capacity(self, n):
        """The same launch with n for every run-time integer that is no stride."""
        bound = {p.name: n if type(value) is int and not p.is_constexpr and not p.name.startswith("stride") else value
                 for p, value in zip(self.kernel.params, self.bound.values(), strict=True)}
        return Launch(self.kernel, (), self.options | bound)

    def compile(self):
        """What became of the kernel: registers, spilled bytes, shared memory, local memory and the width of its loads."""
        options, *source = self.kernel._pack_args(self.backend, self.kwargs, self.bound, self.specialization, self.options)
        compiled = triton.compile(triton.compiler.ASTSource(self.kernel, *source), self.target, options.__dict__)
        report = hip_report if self.target.backend == "hip" else cuda_report
        return {"shared": compiled.metadata.shared} | report(compiled.asm)


def cuda_report(asm):
    """The assembler's own account, from a second run of it: Triton keeps no log."""
    ptx, arch = asm["ptx"], re.search(r"\.target (\w+)", asm["ptx"])[1]
    assembler = get_ptxas(int(re.search(r"\d+", arch)[0])).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={arch}", source, "-o", source.with_suffix(".o")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {"dropped": dropped_products(asm["cubin"]) if arch.startswith("sm_90") else 0,
            "registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
            "local": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
            "wide": len(WIDE.findall(ptx)), "narrow": len(NARROW.findall(ptx))}


def dropped_products(cubin):
    """Matrix products that the assembler replaced by empty ones, which ptxas 12.8 does where it wrongly takes their sums for constants."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        tool = Path(get_ptxas(90).path).with_name("cuobjdump")
        sass = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
        return len(re.findall(r"HGMMA\S* RZ, gdesc\[URZ\]", sass))


def hip_report(asm):
    """Vector registers only: a spilled scalar register goes to a lane of a vector register, not to memory."""
    count = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])[1])
    return {"registers": count("vgpr_count"), "spills": count("vgpr_spill_count")}


def launches_of(function, arguments):
    """The launches of one call, none of which runs."""
    found = []
    bind = lambda kernel, *args, grid, warmup, **kwargs: found.append(Launch(kernel, args, kwargs))
    with patch.object(jit.JITFunction, "run", bind), patch("gkernels.kernels._check.can_run", return_value=True):
        function(*arguments)
    return found


def resized(arguments, dim, old, new, prefix_sums):
    """The call's arguments with `new` for `old` as dimension `dim` of every tensor, and with `prefix_sums` new + 1 for old + 1. In
    dimension 1, where other tensors have model constants, only tables are resized."""
    def rebuild(value):
        if not isinstance(value, torch.Tensor) or value.dim() <= dim or value.numel() <= 1 or (dim and not is_table(value)):
            return value
        if value.shape[dim] != old and not (prefix_sums and value.shape[dim] == old + 1):
            return value
        shape = list(value.shape)
        shape[dim] += new - old
        return torch.empty_strided(shape, (shape[1], 1) if dim else value.stride(), dtype=value.dtype).zero_()
    return tuple(rebuild(value) for value in arguments)


def is_table(t):
    return t.dim() == 2 and t.dtype == torch.int32


def unaligned(arguments):
    """The call's arguments with each one-element counter four bytes further on."""
    counts = lambda value: isinstance(value, torch.Tensor) and value.shape == (1,) and value.dtype == torch.int32
    return tuple(torch.zeros(5, dtype=torch.int32)[1:2] if counts(value) else value for value in arguments)


def resizes(function, arguments):
    """The launches of a call at other capacities, a list a resize. A resize that the op's own checks refuse was of no capacity."""
    sizes = {(0, t.shape[0]) for t in tensors_in(arguments) if t.dim()} | {(1, t.shape[1]) for t in tensors_in(arguments) if is_table(t)}
    others = [resized(arguments, dim, size, n, prefix_sums) for dim, size in sorted(sizes) if size > 1 for n in CAPACITIES
              for prefix_sums in ((False,) if dim else (False, True))]
    for other in [*others, unaligned(arguments)]:
        try:
            yield launches_of(function, other)
        except (ValueError, TypeError, IndexError, RuntimeError):
            continue


def census(named_calls):
    """How many binaries a configuration takes over all capacities, what tells them apart, and how many resizes each case stood."""
    found, stood = {}, {}
    for case, function, arguments in named_calls:
        launches = launches_of(function, arguments)
        others = list(resizes(function, arguments))
        stood[case] = len(others)
        for launch in sum(others, launches + [launch.with_capacity(n) for launch in launches for n in CAPACITIES]):
            found.setdefault(launch.configuration, {}).setdefault(launch.key, (case, launch))
    rows = []
    for configuration, binaries in found.items():
        launches = [launch for _, launch in binaries.values()]
        columns = zip(launches[0].kernel.params, *(launch.specialization for launch in launches), strict=True)
        rows.append({"configuration": configuration, "kernel": launches[0].kernel.__name__, "case": next(iter(binaries.values()))[0],
                     "binaries": len(binaries), "told apart by": {p.name: seen for p, *seen in columns if len(set(map(str, seen))) > 1}})
    return {"configurations": rows, "resizes": stood}


JOBS = []   # (target, case, launch): filled before the workers fork, since a kernel does not pickle


def compile_job(i):
    target, case, launch = JOBS[i]
    row = {"target": target, "case": case, "kernel": launch.kernel.__name__}
    try:
        return row | launch.compile()
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}


def plan(target, named_calls):
    """Adds the target's binaries to JOBS, each once."""
    triton.runtime.driver.set_active(Driver(target))
    seen = set()
    for case, function, arguments in named_calls:
        for launch in launches_of(function, arguments):
            if (launch.kernel.__name__, launch.key) not in seen:
                seen.add((launch.kernel.__name__, launch.key))
                JOBS.append((target, case, launch))


def compile_all(workers):
    """One row a job. A compiler that ends its process fails the jobs that were under way, by name."""
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        futures = [pool.submit(compile_job, i) for i in range(len(JOBS))]
        for (target, case, launch), future in zip(JOBS, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield {"target": target, "case": case, "kernel": launch.kernel.__name__, "error": "the compiler ended a worker process"}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="+", metavar="TARGET:DTYPE,DTYPE")
    parser.add_argument("--calls", default="tests.calls", help="the module with all_calls(device, dtypes)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("python -m tests.aot: TRITON_INTERPRET is set, so kernels would be interpreted; run it without")
    all_calls = importlib.import_module(options.calls).all_calls
    for word in options.targets:
        target, _, dtypes = word.partition(":")
        triton.runtime.driver.set_active(Driver(target))                # before the calls are made: tiles may depend on the target
        named_calls = list(all_calls("cpu", [getattr(torch, dtype) for dtype in dtypes.split(",")]))
        rooms = {case.split(".")[0] for case, *_ in named_calls}
        # first, so that a kernel which another room launches too is counted to its own
        plan(target, [call for call in all_calls("cpu", [torch.float32]) if call[0].split(".")[0] not in rooms] + named_calls)
    rows = list(compile_all(options.workers))
    triton.runtime.driver.set_active(Driver("sm_90"))
    print(json.dumps({"kernels": rows, "census": census(all_calls("cpu"))}))


if __name__ == "__main__":
    main()
