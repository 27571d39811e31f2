"""Fills Triton's cache for a GPU that is not there:  python -m gkernels precompile --config config.json --arch 90

The model's own step is called for every bucket on tensors that have shapes and strides but no memory. Its launches are bound for the target
as that GPU's driver would bind them, and compiled. A process on the GPU then finds every binary by its key, where all that is in the key is
the same: this package and Triton byte for byte, its ptxas, the architecture, TRITON_* variables that change code, the model's shapes and
dtype, the capacities, and the number of multiprocessors, which sizes attention's work list. Triton's index of the cache holds absolute
paths: the folder must stand at the same path there.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import jit
from triton.runtime.cache import get_cache_key, get_cache_manager

from .graph import Buckets, GraphRunner
from .kernels import _check
from .model.cache import PagedCache
from .model.config import LlamaConfig
from .model.llama import Llama
from .model.load import empty_projections, empty_weights
from .model.step import Step
from .progress import progress as bar

MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188, "gfx942": 304}     # A100, L40S, H100 SXM and H200, B200, RTX PRO 6000, MI300X


def target_of(arch: str) -> GPUTarget:
    """The target of "90", "sm_90" or "gfx942". Triton itself appends the "a" of sm_90a and later."""
    cuda = re.fullmatch(r"(?:sm_?)?(\d{2,3})", arch)
    if cuda:
        return GPUTarget("cuda", int(cuda[1]), 32)
    if re.fullmatch(r"gfx\d+[0-9a-f]*", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"gkernels.precompile: arch: got {arch!r}, expected a compute capability without its dot, such as 90 for an H100, or gfx942; "
                     "a suffix as in 90a is added by the compiler")


class Driver:
    """What Triton asks of a driver before it compiles. A target is a device of its own, so that no binary is taken for another's."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[None]:
    """While it lasts, Triton binds and compiles for the target."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(Driver(target))
    try:
        yield
    finally:
        config.set_active(before)


class Launch:
    """A launch, bound for the active driver's target: `key` names its binary among the kernel's."""

    def __init__(self, kernel: jit.JITFunction, args: tuple, kwargs: dict):
        _, keys, self.target, self.backend, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        self.kernel = kernel
        self.kwargs = dict(kwargs, debug=kwargs.get("debug", kernel.debug) or triton.knobs.runtime.debug,
                           instrumentation_mode=triton.knobs.compilation.instrumentation_mode)
        if self.target.backend == "hip":
            self.kwargs.pop("launch_pdl", None)                     # an option of the CUDA backend alone
        self.bound, self.specialization, self.options = binder(*args, **self.kwargs)
        self.key = jit.compute_cache_key(keys, self.specialization, self.options)

    def source(self) -> tuple[ASTSource, object]:
        """What the compiler is given: the kernel with its types and constants, and the options."""
        options, *source = self.kernel._pack_args(self.backend, self.kwargs, self.bound, self.specialization, self.options)
        return self.kernel.ASTSource(self.kernel, *source), options

    @property
    def hash(self) -> str:
        """Names the binary in Triton's cache folder."""
        source, options = self.source()
        return hashlib.sha256(get_cache_key(source, self.backend, options, get_cache_invalidating_env_vars()).encode()).hexdigest()

    @property
    def is_cached(self) -> bool:
        return bool(get_cache_manager(self.hash).get_group(f"{self.kernel.__name__[:150]}.json"))

    def compile(self) -> CompiledKernel:
        source, options = self.source()
        return triton.compile(source, self.target, options.__dict__)


def launches_of(function: Callable, *arguments) -> list[Launch]:
    """The launches of one call, none of which runs."""
    found: list[Launch] = []
    bind = lambda kernel, *args, grid, warmup, **kwargs: found.append(Launch(kernel, args, kwargs))
    with patch.object(jit.JITFunction, "run", bind), patch.object(_check, "can_run", lambda device: True):
        function(*arguments)
    return found


class Elsewhere(TorchFunctionMode):
    """Under it, tensors for a GPU get no memory and nothing is computed, but they say that they lie there: code takes the paths it takes there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        nowhere = lambda value: "meta" if isinstance(value, torch.device) and value.type == "cuda" else value
        kwargs = {name: nowhere(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = nowhere(torch.device(kwargs["device"]))
        result = function(*map(nowhere, args), **kwargs)
        if function == torch.Tensor.device.__get__ and result.type == "meta":
            return torch.device("cuda", 0)
        return result or args[0].is_meta if function == torch.Tensor.is_cuda.__get__ else result


def step_launches(config: LlamaConfig, dtype: torch.dtype, target: GPUTarget, multiprocessors: int, max_tokens: int, max_requests: int,
                  page_size: int = 16, buckets: Buckets | None = None, invariant: bool = False) -> list[Launch]:
    """The launches of the model's step at every bucket (default: `Buckets.up_to(max_tokens)`), each binary once. One layer stands for all."""
    config, max_len = replace(config, num_layers=1), config.max_position_embeddings
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    found: dict[tuple[jit.JITFunction, str], Launch] = {}
    with compiling_for(target), Elsewhere(), patch.object(torch.cuda, "get_device_properties", lambda device: properties), \
            patch.object(torch.cuda, "Event"), patch.object(GraphRunner, "capture"), patch.object(GraphRunner, "run"):
        weights = empty_weights(config, "cuda", dtype, config.tie_word_embeddings)
        empty_projections(weights, config)
        cache = PagedCache.allocate(1, -(-max_len // page_size) + 1, page_size, config.num_kv_heads, config.head_dim, dtype, "cuda")
        step = Step(Llama.build(config, weights, max_len, invariant), cache, max_tokens, max_requests, max_len)
        for bucket in buckets or Buckets.up_to(max_tokens):
            for launch in launches_of(step, bucket):
                found.setdefault((launch.kernel, launch.key), launch)
    return list(found.values())


_work: Callable = Launch.compile
_jobs: list = []                       # what the workers do, theirs by fork, since a kernel does not pickle


def in_workers(work: Callable, jobs: Iterable, workers: int) -> Iterator[object]:
    """Yields work(job) for each job in order, done in forked processes. A RuntimeError in its place says what the job raised, or that its
    process was ended, as a compiler may do."""
    global _work
    _work, _jobs[:] = work, jobs
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        for future in [pool.submit(_do, i) for i in range(len(_jobs))]:
            try:
                yield future.result()
            except BrokenProcessPool:
                yield RuntimeError("the compiler ended a worker process")


def _do(i):
    try:
        return _work(_jobs[i])
    except Exception as error:         # as text, since a compiler's errors need not pickle
        return RuntimeError(f"{type(error).__name__}: {error}"[:2000])


@dataclass(frozen=True)
class Precompiled:
    """What `precompile` did. Its text is the account."""

    target: GPUTarget
    multiprocessors: int
    binaries: int
    compiled: int              # of them; the others stood in the cache
    seconds: float
    folder: str

    def __str__(self):
        name = f"sm_{self.target.arch}" if self.target.backend == "cuda" else self.target.arch
        return (f"{self.binaries} binaries for {name} with {self.multiprocessors} multiprocessors: {self.compiled} compiled in {self.seconds:.1f} s, "
                f"{self.binaries - self.compiled} in the cache before; {self.folder} must stand at the same path on the GPU's machine")


def precompile(config: LlamaConfig, arch: str, dtype: torch.dtype | None = None, max_tokens: int = 512, max_requests: int = 32,
               multiprocessors: int | None = None, page_size: int = 16, buckets: Buckets | None = None, workers: int = 2,
               progress: bool = False, invariant: bool = False) -> Precompiled:
    """Compiles every kernel that an `Engine` of this model launches at these capacities, into Triton's cache (TRITON_CACHE_DIR).

    `dtype` None is the configuration's; `multiprocessors` None is that of the data-center GPU of the architecture. Raises
    ValueError for what cannot be served, RuntimeError in a process that interprets kernels and where a kernel does not compile."""
    start, target = time.perf_counter(), target_of(arch)
    if _check.INTERPRETED:
        raise RuntimeError("gkernels.precompile: TRITON_INTERPRET: got a process that interprets kernels, expected one that compiles them; unset it")
    multiprocessors = multiprocessors or MULTIPROCESSORS.get(target.arch)
    if multiprocessors is None:
        raise ValueError(f"gkernels.precompile: multiprocessors: got none for {arch}, expected the number that the GPU has, which is known here for "
                         f"{', '.join(map(str, MULTIPROCESSORS))}; torch.cuda.get_device_properties tells it on the GPU's machine")
    if max_tokens < max_requests:
        raise ValueError(f"gkernels.precompile: max_tokens: got {max_tokens}, expected at least max_requests = {max_requests}, as for Engine")
    launches = step_launches(config, dtype or config.dtype, target, multiprocessors, max_tokens, max_requests, page_size, buckets, invariant)
    new = [launch for launch in launches if not launch.is_cached]
    done = list(bar(in_workers(compile_quietly, new, workers), progress, total=len(new), desc=f"compile for {arch}", unit="kernel"))
    failed = [f"{launch.kernel.__name__}: {error}" for launch, error in zip(new, done, strict=True) if isinstance(error, RuntimeError)]
    if failed:
        raise RuntimeError(f"gkernels.precompile: {len(failed)} of {len(launches)} kernels do not compile for {arch}: {'; '.join(failed)}")
    return Precompiled(target, multiprocessors, len(launches), len(new), time.perf_counter() - start, str(Path(triton.knobs.cache.dir).absolute()))


def compile_quietly(launch: Launch) -> None:
    """Leaves the binary in the cache; a worker has nobody to hand it to."""
    launch.compile()
