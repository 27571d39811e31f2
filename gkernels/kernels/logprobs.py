"""Logprobs:  logprob = logit - log(sum(exp(logits)))  of each row's chosen token and of its top n, and the chosen token's rank.

logits [R, V] with any row stride, seq_lens int32 [R], token int32 [R] -> logsumexp, logprob float32 [R], rank int32 [R] (1 is the likeliest),
top_ids int32 [R, n], top_logprobs float32 [R, n], n from 0 to 20. Natural logarithms. Equal logits rank by lowest id, as in a stable sort. Tokens at
-inf, as which NaN counts, are in no top n: beyond the others top_ids are -1, top_logprobs -inf. Tokens at +inf share all of the mass.
Graph-safe: a fixed grid of vocabulary chunks and rows; the last of a row's programs to arrive merges its chunks in their order. Chunks depend on V
alone, so a row's bits depend on nothing around it. A row with seq_lens 0 is unused: zeros, and -1 as top_ids. A chosen token outside of the
vocabulary, as -1 where there is none, has logprob NaN and rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._arrive import arrive
from ._overlap import overlap, wait_for_node_before
from ._sampling_tokens import clean, key_of, logit_of

MAX_V = 262144
MAX_N = 20
_INF = tl.constexpr(float("inf"))
_NONE = tl.constexpr(-2**63)                          # the key of no token


@triton.jit
def _below(x, top):
    """x - top, also where both are infinite."""
    return tl.where(x == top, 0.0, x) - tl.where(x == top, 0.0, top)


@triton.jit
def _pop(keys):
    """The greatest key, and the others. All keys differ but those of no token."""
    best = tl.max(keys, 0)
    return best, tl.where(keys == best, _NONE, keys)


@triton.jit(do_not_specialize_on_alignment=["seq_lens_ptr", "token_ptr", "logsumexp_ptr", "logprob_ptr", "rank_ptr", "top_ids_ptr",
                                            "top_logprobs_ptr"])
def _logprobs_kernel(
    logits_ptr,        # [R, V]
    seq_lens_ptr,      # [R]
    token_ptr,         # [R]
    tops_ptr,          # [R, CHUNKS] float32: a chunk's greatest logit
    sums_ptr,          # [R, CHUNKS] float32: its sum of exp(logit - greatest)
    before_ptr,        # [R, CHUNKS] int32: how many of its tokens rank before the chosen one
    keys_ptr,          # [R, CHUNKS, N] int64: its best tokens; logit and id in one number that orders as they do
    counts_ptr,        # [R] int32, zeros between launches: chunks that arrived
    logsumexp_ptr,     # [R]
    logprob_ptr,       # [R]
    rank_ptr,          # [R]
    top_ids_ptr,       # [R, N]
    top_logprobs_ptr,  # [R, N]
    stride_lr,
    V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    chunk, row = tl.program_id(0), tl.program_id(1)
    if tl.load(seq_lens_ptr + row) <= 0:
        if chunk == 0:
            tl.store(logsumexp_ptr + row, 0.0)
            tl.store(logprob_ptr + row, 0.0)
            tl.store(rank_ptr + row, 0)
            for n in range(0, N):
                tl.store(top_ids_ptr + row * N + n, -1)
                tl.store(top_logprobs_ptr + row * N + n, 0.0)
        return
    ids, token = chunk * CHUNK + tl.arange(0, CHUNK), tl.load(token_ptr + row)    # [CHUNK]
    logits = logits_ptr + row.to(tl.int64) * stride_lr
    x, is_token = clean(tl.load(logits + ids, ids < V, other=-_INF)), (token >= 0) & (token < V)
    chosen = clean(tl.load(logits + tl.where(is_token, token, 0)))
    top, partial = tl.max(x, 0), row * CHUNKS + chunk
    tl.store(tops_ptr + partial, top)
    tl.store(sums_ptr + partial, tl.sum(tl.where(x > -_INF, tl.exp(_below(x, top)), 0.0), 0))
    tl.store(before_ptr + partial, tl.sum(((x > chosen) | ((x == chosen) & (ids < token))).to(tl.int32), 0))
    keys = tl.where(x > -_INF, (key_of(x).to(tl.int64) << 32) + (0x7FFFFFFF - ids), _NONE)
    for n in range(0, N):
        best, keys = _pop(keys)
        tl.store(keys_ptr + partial.to(tl.int64) * N + n, best)
    if arrive(counts_ptr + row, CHUNKS):
        offs_c = tl.arange(0, BLOCK_C)                                            # [BLOCK_C]
        at, mask = row * CHUNKS + offs_c, offs_c < CHUNKS
        tops = tl.load(tops_ptr + at, mask, other=-_INF, cache_modifier=".cg")
        sums = tl.load(sums_ptr + at, mask, other=0.0, cache_modifier=".cg")
        top = tl.max(tops, 0)
        total = tl.sum(tl.where(tops > -_INF, sums * tl.exp(_below(tops, top)), 0.0), 0)
        log_total = tl.log(tl.maximum(total, 1.0))                                # no less but in a row of -inf, whose logsumexp is top
        logprob = tl.where(chosen > -_INF, _below(chosen, top) - log_total, -_INF)
        rank = tl.sum(tl.load(before_ptr + at, mask, other=0, cache_modifier=".cg"), 0) + 1
        tl.store(logsumexp_ptr + row, top + log_total)
        tl.store(logprob_ptr + row, tl.where(is_token, logprob, float("nan")))
        tl.store(rank_ptr + row, tl.where(is_token, rank, 0))
        if N > 0:
            offs_m = tl.arange(0, BLOCK_M)                                        # [BLOCK_M]
            heads = tl.load(keys_ptr + row.to(tl.int64) * (CHUNKS * N) + offs_m, offs_m < CHUNKS * N, other=_NONE, cache_modifier=".cg")
            for n in range(0, N):
                best, heads = _pop(heads)
                logit = logit_of((best >> 32).to(tl.int32))
                tl.store(top_ids_ptr + row * N + n, tl.where(best == _NONE, -1, 0x7FFFFFFF - best.to(tl.int32)))
                tl.store(top_logprobs_ptr + row * N + n, tl.where(best == _NONE, -_INF, _below(logit, top) - log_total))


@dataclass(frozen=True)
class Config:
    CHUNK: int               # tokens a program reads
    num_warps: int

    def chunks(self, V: int) -> int:
        return triton.cdiv(V, self.CHUNK)


def config(V: int) -> Config:
    """8 elements a thread, 16 bytes in half precision; the best 20 of 128 chunks are 16 keys a thread for the last to arrive."""
    chunk = min(max(triton.next_power_of_2(V), 128), 2048)
    return Config(chunk, max(chunk // 256, 1))


@dataclass(frozen=True)
class Logprobs:
    logsumexp: torch.Tensor      # float32 [R]
    logprob: torch.Tensor        # float32 [R], of the chosen token
    rank: torch.Tensor           # int32 [R], of the chosen token
    top_ids: torch.Tensor        # int32 [R, n], the likeliest first
    top_logprobs: torch.Tensor   # float32 [R, n]

    @classmethod
    def allocate(cls, R: int, n: int, device: torch.device | str) -> Logprobs:
        make = lambda *shape, dtype=torch.float32: torch.empty(R, *shape, dtype=dtype, device=device)
        return cls(make(), make(), make(dtype=torch.int32), make(n, dtype=torch.int32), make(n))


@dataclass(frozen=True)
class Workspace:
    """What the programs of at most R rows leave each other; launches that follow each other in one stream may share it."""

    tops: torch.Tensor        # float32 [R, chunks]
    sums: torch.Tensor        # float32 [R, chunks]
    before: torch.Tensor      # int32 [R, chunks]
    keys: torch.Tensor        # int64 [R, chunks, n]
    counts: torch.Tensor      # int32 [R], zeros between launches

    @classmethod
    def allocate(cls, R: int, V: int, n: int, device: torch.device | str) -> Workspace:
        make = lambda *shape, dtype=torch.float32: torch.zeros(R, *shape, dtype=dtype, device=device)
        chunks = config(V).chunks(V)
        return cls(make(chunks), make(chunks), make(chunks, dtype=torch.int32), make(chunks, n, dtype=torch.int64), make(dtype=torch.int32))


def logprobs_out(logits: torch.Tensor, seq_lens: torch.Tensor, token: torch.Tensor, workspace: Workspace, out: Logprobs) -> None:
    """Fills `out`; n is that of its top_ids, and the workspace's. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    op, int32, float32 = "logprobs", torch.int32, torch.float32
    _check.tensor(op, "logits", logits, (None, None), _check.FLOATS)
    (R, V), device = logits.shape, logits.device
    _check.require(1 <= V <= MAX_V, op, "logits", f"V = {V}", f"1 to {MAX_V}")
    c = config(V)
    chunks = c.chunks(V)
    _check.tensor(op, "out.top_ids", out.top_ids, (R, None), (int32,), device, dense=0, aligned=False)
    n = out.top_ids.shape[1]
    _check.require(0 <= n <= MAX_N, op, "out.top_ids", f"n = {n}", f"0 to {MAX_N}")
    for name, t, size, dtype in (("seq_lens", seq_lens, (R,), int32), ("token", token, (R,), int32), ("out.logsumexp", out.logsumexp, (R,), float32),
                                  ("out.logprob", out.logprob, (R,), float32), ("out.rank", out.rank, (R,), int32),
                                  ("out.top_ids", out.top_ids, (R, n), int32), ("out.top_logprobs", out.top_logprobs, (R, n), float32)):
        _check.tensor(op, name, t, size, (dtype,), device, dense=0 if 0 in size else len(size), aligned=False)
    parts: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = (
        ("tops", (chunks,), float32), ("sums", (chunks,), float32), ("before", (chunks,), int32), ("keys", (chunks, n), torch.int64),
        ("counts", (), int32))
    for name, shape, dtype in parts:
        t = getattr(workspace, name)
        _check.tensor(op, f"workspace.{name}", t, (None, *shape), (dtype,), device, dense=0 if 0 in shape else 1 + len(shape))
        _check.require(t.shape[0] >= R, op, f"workspace.{name}", f"{t.shape[0]} rows", f"at least the {R} of logits")
    if R == 0:
        return
    _logprobs_kernel[(chunks, R)](
        logits, seq_lens, token, *vars(workspace).values(), *vars(out).values(), logits.stride(0), V=V, N=n, CHUNK=c.CHUNK, CHUNKS=chunks,
        BLOCK_C=triton.next_power_of_2(chunks), BLOCK_M=triton.next_power_of_2(max(chunks * n, 1)), num_warps=c.num_warps, **overlap())


def logprobs(logits: torch.Tensor, seq_lens: torch.Tensor, token: torch.Tensor, n: int) -> Logprobs:
    """Returns what `Logprobs` names, of the rows' chosen tokens and of their top n."""
    R, V = logits.shape
    out, workspace = Logprobs.allocate(R, n, logits.device), Workspace.allocate(R, V, n, logits.device)
    logprobs_out(logits, seq_lens, token, workspace, out)
    return out
