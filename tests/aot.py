"""Compiles every kernel of tests/calls.py for GPUs that are not there:  python -m tests.aot sm_90:bfloat16,float32 gfx942:float32 ...

Each launch binds and compiles as it would at run time on the target (see gkernels.precompile), with its own specialisation, but does not run.
A room that has no call in the dtypes asked for is compiled in float32.
Prints JSON: {"kernels": [a row a target and binary], "census": {"configurations": [a row each, with its binaries], "resizes": by case}}.
Run it in a process of its own, without TRITON_INTERPRET: a kernel decides at import whether it is compiled or interpreted.
"""

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton.backends.nvidia.compiler import get_ptxas

from gkernels.graph.memory import tensors_in
from gkernels.precompile import Launch, compiling_for, in_workers, launches_of, target_of

CAPACITIES = (1, 3, 16, 17, 64)   # what Triton would tell apart: 1, multiples of 16, and the rest
WIDE = re.compile(r"(?:ld|st)\.global[.\w:]*\.(?:v4\.[bf]32|v2\.b64|v8\.b32|v4\.b64)"
                  r"|cp\.async\.\w+\.shared\.global[^;]* (?:16|0x10),|cp\.async\.bulk")
NARROW, NARROW_STORES = (re.compile(rf"{what}\.global[.\w:]*(?<!\.v[248])\.[bfsu]\d+\b") for what in ("ld", "st"))


def configuration(launch):
    """Kernel, constexprs, dtypes and options: launches that agree in these must share one binary."""
    values = {p.name: value if p.is_constexpr else str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
              for p, value in zip(launch.kernel.params, launch.bound.values(), strict=True)}
    return f"{launch.kernel.__name__} {values} {launch.options}"


def with_capacity(launch, n):
    """The same launch with n for every run-time integer that is no stride."""
    bound = {p.name: n if type(value) is int and not p.is_constexpr and not p.name.startswith("stride") else value
             for p, value in zip(launch.kernel.params, launch.bound.values(), strict=True)}
    return Launch(launch.kernel, (), launch.options | bound)


def report(launch):
    """What becomes of the kernel: registers, spilled bytes, shared memory, local memory and the width of its loads and stores."""
    compiled = launch.compile()
    streams = launch.kernel.__name__.endswith("_streamed_kernel")                  # whose first boxes are a weight's, which no node writes
    waits = launch.bound.get("WAITS") or getattr(launch.bound.get("C"), "WAITS", "first")
    check = {"first": functools.partial(early_accesses, copies_weights=streams), "between": early_in_fetching, "last": early_in_follower}[waits]
    early = {"early": check(compiled.asm["ptx"])} if launch.options.get("launch_pdl") else {}
    return {"shared": compiled.metadata.shared} | early | (hip_report if launch.target.backend == "hip" else cuda_report)(compiled.asm)


def early_accesses(ptx, copies_weights=False):
    """What a kernel that may start before the node ahead ends does too early: accesses of memory before griddepcontrol.wait, and a wait that
    does not stand in the entry block, so that a path may miss it. A prefetch brings nothing into the program; nor does a load past the L1 of which
    nothing is used after the wait. copies_weights: whether the first argument's boxes, which the hardware copies, are none that a node writes."""
    if "setmaxnreg" in ptx:
        return early_in_partitions(without_copies_of_first(ptx) if copies_weights else ptx)
    entry, wait, rest = ptx.partition("griddepcontrol.wait")
    branches = re.findall(r"^\s*(?:@!?%p\d+ )?(?:bra|ret|exit)\b.*|^\$L__BB\w+:", entry.partition("{")[2], re.MULTILINE)
    accesses = re.findall(r"\b(?:ld|st|atom|red|cp\.async|cp\.reduce)\.[\w.:]*global[\w.:]*", entry)
    early = [access for access in accesses if not access.startswith("ld.global.cg.")]
    early += [f"{register}, a hint that is used after," for register in sorted(hinted(entry) & set(re.findall(r"%\w+", rest)))]
    return (early + [line.strip() for line in branches]) if wait else ["no griddepcontrol.wait"]


def without_copies_of_first(ptx):
    """The same without the copies of boxes that the first argument describes."""
    first = re.search(r"mov\.b64\s+(%rd\d+), \w+_param_0;", ptx)[1]
    described = re.search(rf"cvta\.param\.u64\s+(%rd\d+), {first};", ptx)[1]
    return re.sub(rf"cp\.async\.bulk\.tensor[^;]*\[{described}, [^;]*;", "nop;", ptx)


def early_in_partitions(ptx):
    """The same for a kernel of several kinds of warps, whose paths part at its first instruction: accesses of memory that some path reaches without a
    wait, hints that are used after one, and ends that a path reaches with neither a wait nor a barrier, where warps meet those that wait."""
    tables = dict(re.findall(r"(\$L_brx\w+): \.branchtargets\s+([^;]*);", ptx))
    lines = re.findall(r"^\s*(\$L__BB\w+:|(?:@!?%\w+\s+)?[a-z][\w.:]*\b[^;]*;)", ptx.partition("\n{")[2], re.MULTILINE)
    meet = lambda a, b: b if a is None else a if b is None else (a[0] and b[0], a[1] and b[1])
    states, before, found = {}, None, set()                # by label: whether every path there has waited, and whether it has met others or waited
    while states != before:
        before, found, state, lines_by_wait = dict(states), set(), (False, False), ([], [])
        for line in lines:
            op = re.sub(r"^@!?%\w+\s+", "", line)
            goes_on = line.startswith("@")
            if state is not None:
                lines_by_wait[state[0]].append(line)
            if line.startswith("$"):
                state = states[line[:-1]] = meet(states.get(line[:-1]), state)
            elif state is None:
                continue                                   # behind a jump, and no label yet
            elif op.startswith("griddepcontrol.wait"):
                state = (True, True)
            elif op.startswith("barrier.sync"):
                state = (state[0], True)
            elif re.match(r"(?!ld\.global\.cg\.)(?:ld|st|atom|red|cp)\.[\w.:]*global", op) and not state[0]:
                found.add(op.split()[0])
            elif re.match(r"(?:ret|exit)\b", op):
                found.update(set() if state[1] else {op})
                state = state if goes_on else None
            elif targets := re.findall(r"\$L__BB\w+", tables[op.split()[-1].rstrip(";")] if op.startswith("brx.idx") else op):
                states.update({label: meet(states.get(label), state) for label in targets})
                state = state if goes_on else None
    early, late = map("\n".join, lines_by_wait)
    found.update(f"{register}, a hint that is used after," for register in hinted(early) & set(re.findall(r"%\w+", late)))
    return sorted(found) if "griddepcontrol.wait" in ptx else ["no griddepcontrol.wait"]


def early_in_follower(ptx):
    """The same for a kernel that begins beside the node ahead, which has waited for all before it: what it does before its fence, and whether
    its end, a wait for the node ahead that alone lets the next one start, is missing."""
    found = early_in_partitions(ptx.replace("griddepcontrol.wait", "nop").replace("fence.acq_rel.gpu", "griddepcontrol.wait"))
    if not re.search(r"griddepcontrol\.wait;(?:\s*(?://|\.loc).*)*\s*griddepcontrol\.launch_dependents;", ptx):
        found.append("no wait at the end, or no griddepcontrol.launch_dependents behind it,")
    return found


def early_in_fetching(ptx):
    """The same for a kernel that loads, and lets the hardware copy, before it waits what the node ahead does not write: what else it does."""
    return early_in_partitions(re.sub(r"\b(?:ld\.global|cp\.async\.bulk\.tensor)[^;]*;", "nop;", ptx))


def hinted(block):
    """Registers of a block without branches that depend on its loads past the L1."""
    found = set()
    for predicate, op, to, sources in re.findall(r"(?:@!?(%p\d+)\s+)?([\w.:]+)\s+(\{[^{};]*\}|%\w+)\s*,([^;]*);", block):
        if op.startswith("ld.global.cg.") or found & {predicate, *re.findall(r"%\w+", sources)}:
            found.update(re.findall(r"%\w+", to))
    return found


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
            "wgmma": ptx.count("wgmma.mma_async"), "wide": len(WIDE.findall(ptx)), "narrow": len(NARROW.findall(ptx)),
            "narrow stores": len(NARROW_STORES.findall(ptx))}


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


def resized(arguments, dim, old, new, prefix_sums):
    """The call's arguments with `new` for `old` as dimension `dim` of every tensor, and with `prefix_sums` new + 1 for old + 1. In
    dimension 1, where other tensors have model constants, only tables are resized."""
    def rebuild(value):
        if isinstance(value, tuple):
            return type(value)(*map(rebuild, value))
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
            yield launches_of(function, *other)
        except (ValueError, TypeError, IndexError, RuntimeError):
            continue


def census(named_calls):
    """How many binaries a configuration takes over all capacities, what tells them apart, and how many resizes each case stood."""
    found, stood = {}, {}
    for case, function, arguments in named_calls:
        launches = launches_of(function, *arguments)
        others = list(resizes(function, arguments))
        stood[case] = len(others)
        for launch in sum(others, launches + [with_capacity(launch, n) for launch in launches for n in CAPACITIES]):
            found.setdefault(configuration(launch), {}).setdefault(launch.key, (case, launch))
    rows = []
    for words, binaries in found.items():
        launches = [launch for _, launch in binaries.values()]
        columns = zip(launches[0].kernel.params, *(launch.specialization for launch in launches), strict=True)
        rows.append({"configuration": words, "kernel": launches[0].kernel.__name__, "case": next(iter(binaries.values()))[0],
                     "binaries": len(binaries), "told apart by": {p.name: seen for p, *seen in columns if len(set(map(str, seen))) > 1}})
    return {"configurations": rows, "resizes": stood}


def plan(target, named_calls):
    """The target's binaries as (target, case, launch), each once."""
    jobs = {}
    for case, function, arguments in named_calls:
        for launch in launches_of(function, *arguments):
            jobs.setdefault((launch.kernel.__name__, launch.key), (target, case, launch))
    return list(jobs.values())


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="+", metavar="TARGET:DTYPE,DTYPE")
    parser.add_argument("--calls", default="tests.calls", help="the module with all_calls(device, dtypes)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("python -m tests.aot: TRITON_INTERPRET is set, so kernels would be interpreted; run it without")
    all_calls, jobs = importlib.import_module(options.calls).all_calls, []
    for word in options.targets:
        target, _, dtypes = word.partition(":")
        with compiling_for(target_of(target)):                          # before the calls are made: tiles may depend on the target
            named_calls = list(all_calls("cpu", [getattr(torch, dtype) for dtype in dtypes.split(",")]))
            rooms = {case.split(".")[0] for case, *_ in named_calls}
            # first, so that a kernel which another room launches too is counted to its own
            jobs += plan(target, [call for call in all_calls("cpu", [torch.float32]) if call[0].split(".")[0] not in rooms] + named_calls)
    rows = []
    for (target, case, launch), found in zip(jobs, in_workers(report, [launch for *_, launch in jobs], options.workers), strict=True):
        found = found if isinstance(found, dict) else {"error": str(found)}
        rows.append({"target": target, "case": case, "kernel": launch.kernel.__name__} | found)
    with compiling_for(target_of("sm_90")):
        print(json.dumps({"kernels": rows, "census": census(all_calls("cpu"))}))


if __name__ == "__main__":
    main()
