"""Paged attention: decode, prefill and mixed batches of 32 query heads on 8 KV heads in bf16, pages in random order; then each feature alone.

gkernels reads a schedule that a model makes once a step for all of its layers, and may fetch keys before the launch ahead ends, as it does in a
model. fa3 is FlashAttention-3 and flashinfer FlashInfer's tensor-core decode, each where its module can be imported; FlashInfer's host plan() is
made before, like the schedule. floor is not timed: the greater of bytes and operations over the device's ceilings. torch is
scaled_dot_product_attention, causal, over dense keys and values: for the prefills alone, whose requests are of one length and need no other mask.
Decode and mixed batches would have to be gathered and padded for it first, and the figure would be that of the copies.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from bench import harness, plot
from gkernels.kernels import attention, schedule

H, K = 32, 8
POOL = (1 << 18) + 64     # tokens of the pools that all cases view: 256 x 1024 and a null page; 538 MB for keys, as much for values
RAGGED = 32768            # longest of the ragged lengths, which are log-uniform from 1
TREE_ROWS = 8             # draft rows a request
WORKSPACE = 128 << 20     # bytes that FlashInfer asks for
PEERS = ("fa3", "flashinfer")
FEATURES = ("window 1024", "softcap", "sinks", "alibi", "tree", "fp8", "DV 64", "full", "lse")


@dataclass(frozen=True)
class Case:
    name: str
    query_lens: tuple[int, ...]
    lens: tuple[int, ...]             # of keys, after the step; requests of length 0 are unused
    D: int = 128
    DV: int = 128
    page: int = 16
    feature: str = ""
    capacity: int = 0                 # tokens; 0: as many as there are

    @property
    def T(self):
        return self.capacity or sum(self.query_lens)

    @property
    def causal(self):
        return self.feature != "full"

    @property
    def window(self):
        return (1023, -1) if self.feature == "window 1024" else (-1, -1)

    @property
    def is_plain(self):
        """Whether peers are timed on it too."""
        return not self.feature and not self.capacity


def ragged(count=64):
    """Lengths log-uniform over 1 to RAGGED, the same in every run."""
    return tuple((RAGGED ** torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).int().tolist())


def plain_cases():
    for R, n in ((1, 8192), (1, 32768), (1, 131072), (8, 4096), (32, 2048), (64, 2048), (128, 1024), (256, 1024)):
        yield Case(f"decode {R}x{n}", (1,) * R, (n,) * R)
    yield Case("decode ragged 64", (1,) * 64, ragged())
    for R, n in ((1, 2048), (4, 2048), (1, 8192), (1, 16384)):
        yield Case(f"prefill {R}x{n}", (n,) * R, (n,) * R)
    for R, n, m in ((31, 2048, 2048), (63, 2048, 512), (127, 1024, 1024)):
        yield Case(f"mixed {R}x{n}+{m}", (1,) * R + (m,), (n,) * R + (m,))


def cases():
    plain = list(plain_cases())
    yield from plain
    yield from (replace(case, name=f"{case.name}, D 64", D=64, DV=64) for case in plain)
    yield from (replace(case, name=f"{case.name}, page 64", page=64) for case in plain)
    for case in plain:
        if case.name in ("decode 64x2048", "prefill 1x8192"):
            yield from (featured(case, feature) for feature in FEATURES)
    yield Case("capacity 1 of 256 x1024", (1,) + (0,) * 255, (1024,) + (0,) * 255, capacity=256)
    yield Case("capacity 1 of 1 x1024", (1,), (1024,), capacity=1)


def featured(case, feature):
    drafts = feature == "tree" and case.T == len(case.lens)
    return replace(case, name=f"{case.name}, {feature}", feature=feature, DV=64 if feature == "DV 64" else case.DV,
                   query_lens=(TREE_ROWS,) * len(case.lens) if drafts else case.query_lens)


def traffic(case):
    """Bytes: q of the live rows, all of out, and once the keys and values that some row sees. Operations: two products over each row's keys."""
    left, item = case.window[0], 1 if case.feature == "fp8" else 2
    keys = pairs = 0
    for q, n in zip(case.query_lens, case.lens, strict=True):
        if q:
            keys += n if left < 0 else min(n, q + left)
            last = torch.arange(n - q + 1, n + 1) if case.causal else torch.full((q,), n)       # keys up to each row's last
            pairs += int((last if left < 0 else last.clamp(max=left + 1)).sum())
    moved = (sum(case.query_lens) * case.D + case.T * case.DV) * H * 2 + keys * K * (case.D + case.DV) * item
    if case.feature == "lse":
        moved += case.T * H * 4
    return moved, pairs * H * 2 * (case.D + case.DV)


@functools.cache
def pools(device):
    """Keys and values of every case. Each set of buffers of a case is another part of them, so what one reads the others do not warm."""
    return [torch.randn(POOL * K * 128, device=device, dtype=torch.bfloat16) for _ in range(2)]


@dataclass(frozen=True)
class Problem:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    table: torch.Tensor
    pages: torch.Tensor       # the table's live entries, one request after another
    out: torch.Tensor


def problem(case, i, device):
    """The i-th set of buffers; pages in random order."""
    counts = torch.tensor([-(-n // case.page) for n in case.lens])
    N = int(counts.sum()) + 1
    caches = []
    for pool, width in zip(pools(device), (case.D, case.DV), strict=True):
        size = N * case.page * K * width
        cache = pool[i * size:(i + 1) * size].view(N, case.page, K, width)
        caches.append(cache.to(torch.float8_e4m3fn) if case.feature == "fp8" else cache)
    pages = torch.randperm(N - 1, device=device).int() + 1
    live = (torch.arange(max(counts))[None, :] < counts[:, None]).to(device)
    table = torch.zeros(live.shape, dtype=torch.int32, device=device).masked_scatter_(live, pages)
    starts = torch.tensor([0, *case.query_lens]).cumsum(0).to(device, torch.int32)
    lens = torch.tensor(case.lens, dtype=torch.int32, device=device)
    q = torch.randn(case.T, H, case.D, device=device, dtype=torch.bfloat16)
    return Problem(q, *caches, starts, lens, table, pages, q.new_empty(case.T, H, case.DV))


def options(case, device):
    """Keyword arguments of the case's feature."""
    match case.feature:
        case "softcap":
            return {"softcap": 30.0}
        case "sinks":
            return {"sinks": torch.randn(H, device=device)}
        case "alibi":
            return {"alibi_slopes": 2 ** (-8 * torch.arange(1, H + 1, device=device) / H)}
        case "tree":
            return {"tree_mask": torch.cat([tree(n) for n in case.query_lens]).to(device)}
        case "fp8":
            return {name: torch.ones(1, device=device) for name in ("k_scale", "v_scale")}
        case "lse":
            return {"lse": torch.empty(case.T, H, device=device)}
    return {}


def tree(rows):
    """Bits of a binary tree: row i sees itself and what row (i - 1) // 2 sees. Rows of a chunk longer than 64 tokens are plain."""
    if rows > 64:
        return torch.full((rows,), -1)
    bits = [1]
    for i in range(1, rows):
        bits.append(bits[(i - 1) // 2] | 1 << i)
    return torch.tensor(bits[:rows], dtype=torch.int64)


def ours(case, device="cuda"):
    tiling = attention.tiling(case.T, len(case.lens), H, K, case.D, case.DV, torch.bfloat16, device, causal=case.causal, window=case.window)
    workspace = attention.Workspace.allocate(tiling, device)      # shared: the launches follow each other
    extra = options(case, device)

    def make(i):
        p = problem(case, i, device)
        work = schedule.schedule(p.starts, p.lens, p.table, case.page, p.k_cache.shape[0], case.T, tiling).work
        return lambda: attention.attention_out(p.q, p.k_cache, p.v_cache, p.table, work, workspace, p.out, causal=case.causal, window=case.window,
                                               tiling=tiling, ready=True, **extra)
    return make


def torch_sdpa(case, device="cuda"):
    R, n, D = len(case.lens), case.lens[0], case.D

    def make(i):
        q, k, v = (torch.randn(R, heads, n, D, device=device, dtype=torch.bfloat16) for heads in (H, K, K))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return make


def fa3(case, device="cuda"):
    peer, longest = importlib.import_module("fa3"), (max(case.query_lens), max(case.lens))

    def make(i):
        p = problem(case, i, device)
        return lambda: peer.paged_attention(p.q, p.k_cache, p.v_cache, p.starts, p.lens, p.table, *longest, p.out)
    return make


@functools.cache
def float_workspace(device):
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def flashinfer(case, device="cuda"):
    peer = importlib.import_module("flashinfer")
    lens = torch.tensor(case.lens)
    pages = (lens + case.page - 1) // case.page
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), pages.cumsum(0)]).int()
    last_page_len = (lens - (pages - 1) * case.page).int()

    def make(i):
        p = problem(case, i, device)
        wrapper = peer.BatchDecodeWithPagedKVCacheWrapper(float_workspace(device), "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, p.pages, last_page_len, H, K, case.D, case.page, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        return lambda: wrapper.run(p.q, (p.k_cache, p.v_cache), out=p.out)
    return make


PROVIDERS: dict[str, tuple[Callable, Callable]] = {      # how, and on which cases; FlashInfer last, since it compiles for minutes
    "gkernels": (ours, lambda case: True),
    "fa3": (fa3, lambda case: case.is_plain),
    "torch": (torch_sdpa, lambda case: case.is_plain and case.page == 16 and case.name.startswith("prefill")),
    "flashinfer": (flashinfer, lambda case: case.is_plain and case.name.startswith("decode")),
}


def compile_ours(chosen, device="cuda"):
    """Compiles every kernel that the cases launch, some twenty, on all cores. What fails here fails again, and is told, where it is timed."""
    kernels = {(case.D, case.DV, case.page, case.T > len(case.lens), case.feature): case for case in reversed(chosen)}
    first, *rest = reversed(kernels.values())
    launch = lambda case: ours(case, device)(0)()
    with ThreadPoolExecutor() as threads:
        threads.submit(launch, first).exception()                # alone: it loads the driver and makes the caches that threads share
        for case in rest:
            threads.submit(launch, case)


def missing(peer):
    """Why a peer cannot be imported; None if it can."""
    try:
        importlib.import_module(peer)
    except (ImportError, OSError) as error:
        return str(error)
    return None


def main():
    everything, failed = list(cases()), []
    for case in everything:
        if harness.wanted(case.name, "floor"):
            harness.floor("attention", case.name, *traffic(case))
    for provider, (how, takes) in PROVIDERS.items():
        chosen = [case for case in everything if takes(case) and harness.wanted(case.name, provider)]
        if not chosen:
            continue
        if provider in PEERS and (why := missing(provider)):
            print(f"  {'attention':<12} {provider} is left out: {why}", flush=True)
            continue
        if provider == "gkernels":
            compile_ours(chosen)
        for case in chosen:
            moved, flops = traffic(case)
            try:
                harness.bench("attention", case.name, provider, how(case), bytes=moved, flops=flops)
            except Exception as error:                           # the other rows are worth their time
                failed.append(f"{case.name} by {provider}: {type(error).__name__}: {error}")
        plot.attention(harness.save())
    if failed:
        raise RuntimeError("; ".join(failed))
