"""Verify: which drafts of a speculative step stand, and the token after them.

Row query_start_loc[r] + j of request r is where the target judges its draft j; the row after its last draft is judged by none. So a request with d
drafts has d + 1 rows, one without drafts one row, and an unused one none. draft, sampled int32 [T]: the draft at each row, and the token that
`sample` drew there from the target -> tokens int32 [R, K + 1], -1 beyond num_accepted + 1, and num_accepted int32 [R], -1 where there is no token.
  Alike   drafts stand as long as each is the token drawn at its row; then comes the token of the next row. `sample` draws the same token wherever
          a row stands, so these are the tokens of decoding without drafts, whatever the drafts and the options.
  Drawn   where probs.is_drawn: a draft x that was drawn from q stands with probability min(1, p(x) / q(x)), p the target's; in place of the first
          that does not comes a token drawn from max(p - q, 0), and after the last that of its next row (Leviathan et al. 2023, arXiv 2211.17192;
          Chen et al. 2023, arXiv 2302.01318). Both are exact in distribution, this one accepts more. Its random numbers depend on (seed, position)
          and the token id, as `sample`'s do, in a domain of their own: drafts may be drawn by `sample` with the same seed.
Where rounding leaves nothing of max(p - q, 0), p and q are equal and the draft stays.
Graph-safe: a fixed grid of vocabulary chunks and requests. A request's result depends on nothing around it; chunks merge by exact maxima. Only the
rows up to the first that falls are read. Fails closed: num_accepted -1 and no token, with status |= BAD_LENGTH for rows outside of T or more than
K + 1, and NO_TOKEN where the target drew none, or where p, q or a drawn draft that mattered is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._arrive import arrive
from ._noise import gumbel
from ._overlap import overlap, wait_for_node_before
from .sampling import MAX_V, NO_TOKEN
from .schedule import BAD_LENGTH

MAX_K = 1023
_INF = tl.constexpr(float("inf"))
_NO_TOKEN, _BAD_LENGTH = tl.constexpr(NO_TOKEN), tl.constexpr(BAD_LENGTH)


@triton.jit
def _random(seed, position):
    """A uniform of 64 bits in [0, 1), and a seed for noise: the words of Philox at counter (position, 1, 0, 0), where `sample` has 0 for the 1."""
    zero = tl.zeros_like(position)
    a, b, c, d = tl.philox(seed, position, zero + 1, zero, zero)
    uniform = a.to(tl.float64) * 2.3283064365386963e-10 + b.to(tl.float64) * 5.421010862427522e-20
    below_one = uniform - tl.where(uniform < 1.0, 0.0, 1.1102230246251565e-16)     # once in 2^54 the sum rounds to 1
    return below_one, (c.to(tl.uint64) << 32) | d.to(tl.uint64)


@triton.jit
def _best(score, ids, V: tl.constexpr):
    """The greatest score and the lowest id that has it."""
    top = tl.max(score, 0)
    return top, tl.min(tl.where(score == top, ids, V), 0)


@triton.jit
def _residual(target_ptr, proposal_ptr, seed, position, chunk, is_bad, V: tl.constexpr, CHUNK: tl.constexpr):
    """The best of a chunk in the draw from max(p - q, 0), by Gumbel's trick; score inf and id -1 where p or q is no probability or `is_bad`."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)                                     # [CHUNK]
    p, q = tl.load(target_ptr + ids, ids < V, other=0.0), tl.load(proposal_ptr + ids, ids < V, other=0.0)
    is_bad = is_bad | (tl.min(((p >= 0.0) & (p < _INF) & (q >= 0.0) & (q < _INF)).to(tl.int32), 0) == 0)         # NaN compares as bad
    _, own_seed = _random(seed, position)
    noise = gumbel(own_seed, position, ids)
    score = tl.log(tl.where(p > q, p - q, 1.0)).to(tl.float64) + noise.to(tl.float64)
    top, token = _best(tl.where(p > q, score, -_INF), ids, V)
    return tl.where(is_bad, _INF, top), tl.where(is_bad, -1, token)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=[
    "draft_ptr", "sampled_ptr", "query_start_loc_ptr", "status_ptr", "tokens_ptr", "num_accepted_ptr", "is_drawn_ptr", "seed_ptr", "position_ptr"])
def _verify_kernel(
    draft_ptr,             # [T]
    sampled_ptr,           # [T]
    query_start_loc_ptr,   # [R + 1]
    status_ptr,            # [R], read and written
    tokens_ptr,            # [R, K + 1]
    num_accepted_ptr,      # [R]
    target_ptr,            # [T, V]; as all that follows, None without probabilities
    proposal_ptr,          # [T, V]
    is_drawn_ptr,          # [R]
    seed_ptr,              # [R] int64
    position_ptr,          # [T]
    scores_ptr,            # [R, CHUNKS] float64: a chunk's greatest score
    ids_ptr,               # [R, CHUNKS] int32: its token
    counts_ptr,            # [R] int32, zeros between launches: chunks that arrived
    T, stride_tt, stride_pt,
    V: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_PROBS: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    chunk, request = tl.program_id(0), tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)                                                # [BLOCK_K]
    start, end = tl.load(query_start_loc_ptr + request), tl.load(query_start_loc_ptr + request + 1)
    num_drafts = end - start - 1
    is_good, settles = (start >= 0) & (end > start) & (end <= T) & (num_drafts <= K), chunk == 0
    num_drafts = tl.where(is_good, num_drafts, 0)
    is_draft = is_good & (offs_k < num_drafts)
    draft = tl.load(draft_ptr + start + offs_k, is_draft, other=-1)
    sampled = tl.load(sampled_ptr + start + offs_k, is_good & (offs_k <= num_drafts), other=-1)
    stands, is_drawn = is_draft & (draft == sampled) & (draft >= 0), False
    if HAS_PROBS:
        is_drawn = tl.load(is_drawn_ptr + request) == 1
        is_token = is_draft & is_drawn & (draft >= 0) & (draft < V)
        rows = (start + offs_k).to(tl.int64)
        p = tl.load(target_ptr + rows * stride_tt + draft, is_token, other=0.0)
        q = tl.load(proposal_ptr + rows * stride_pt + draft, is_token, other=0.0)
        seed, position = tl.load(seed_ptr + request), tl.load(position_ptr + start + offs_k, is_draft, other=0)
        uniform, _ = _random(seed, position)
        is_below = (uniform * q.to(tl.float64) < p.to(tl.float64)) & (q >= 0.0) & (p < _INF)
        stands = tl.where(is_drawn, is_token & is_below, stands)
    accepted = tl.min(tl.where(stands, BLOCK_K, offs_k), 0)
    is_next = offs_k == accepted
    token = tl.sum(tl.where(is_next, sampled, 0), 0)
    if HAS_PROBS:
        if is_drawn & (accepted < num_drafts):
            fallen, row = tl.sum(tl.where(is_next, draft, 0), 0), (start + accepted).to(tl.int64)
            score, best = _residual(target_ptr + row * stride_tt, proposal_ptr + row * stride_pt, seed, tl.load(position_ptr + row), chunk,
                                    (fallen < 0) | (fallen >= V), V, CHUNK)
            tl.store(scores_ptr + request * CHUNKS + chunk, score)
            tl.store(ids_ptr + request * CHUNKS + chunk, best)
            settles = arrive(counts_ptr + request, CHUNKS)
            if settles:
                offs_c = tl.arange(0, BLOCK_C)                                    # [BLOCK_C]
                at, mask = request * CHUNKS + offs_c, offs_c < CHUNKS
                score, token = _best(tl.load(scores_ptr + at, mask, other=-_INF, cache_modifier=".cg"),
                                     tl.load(ids_ptr + at, mask, other=V, cache_modifier=".cg"), V)
                stays = tl.max((is_next & (p > 0.0)).to(tl.int32), 0) == 1
                token = tl.where(score > -_INF, token, tl.where(stays, fallen, -1))
    if settles:
        out = tokens_ptr + request.to(tl.int64) * (K + 1) + offs_k
        has_token = token >= 0
        tl.store(out, tl.where(has_token & is_next, token, tl.where(has_token & (offs_k < accepted), draft, -1)), offs_k <= K)
        tl.store(num_accepted_ptr + request, tl.where(has_token, accepted, -1))
        flags = tl.where(is_good, tl.where(has_token, 0, _NO_TOKEN), tl.where(start == end, 0, _BAD_LENGTH))
        tl.store(status_ptr + request, tl.load(status_ptr + request) | flags)


@dataclass(frozen=True)
class Probabilities:
    """What drawn drafts are judged by: probabilities after all options, as `sample` gives them."""

    target: torch.Tensor       # float32 [T, V], rows of any stride, read at rows of drafts only
    draft: torch.Tensor        # float32 [T, V], likewise: at each row what its draft was drawn from
    is_drawn: torch.Tensor     # int32 [R]: 1 where drafts are judged by these probabilities, else they must be alike
    seed: torch.Tensor         # int64 [R]
    position: torch.Tensor     # int32 [T]: place in the sequence of the token to be drawn


@dataclass(frozen=True)
class Config:
    CHUNK: int               # tokens a program reads
    num_warps: int

    def chunks(self, V: int) -> int:
        return triton.cdiv(V, self.CHUNK)


def config(V: int) -> Config:
    """8 elements a thread, as where `sample` draws."""
    chunk = min(max(triton.next_power_of_2(V), 128), 2048)
    return Config(chunk, max(chunk // 256, 1))


@dataclass(frozen=True)
class Workspace:
    """What the programs of at most R requests leave each other; launches that follow each other in one stream may share it."""

    scores: torch.Tensor      # float64 [R, chunks]
    ids: torch.Tensor         # int32 [R, chunks]
    counts: torch.Tensor      # int32 [R], zeros between launches

    @classmethod
    def allocate(cls, R: int, V: int, device: torch.device | str) -> Workspace:
        make = lambda *shape, dtype: torch.zeros(R, *shape, dtype=dtype, device=device)
        chunks = config(V).chunks(V)
        return cls(make(chunks, dtype=torch.float64), make(chunks, dtype=torch.int32), make(dtype=torch.int32))


def verify_out(draft: torch.Tensor, sampled: torch.Tensor, query_start_loc: torch.Tensor, status: torch.Tensor, tokens: torch.Tensor,
               num_accepted: torch.Tensor, probs: Probabilities | None = None, workspace: Workspace | None = None) -> None:
    """Writes `tokens` and `num_accepted`, ors flags into `status`; K is that of `tokens`. `probs` need a workspace. Shapes: see the module. Raises
    ValueError or TypeError on a misfit."""
    op, int32, (R,) = "verify", (torch.int32,), status.shape
    _check.tensor(op, "draft", draft, (None,), int32, aligned=False)
    (T,), device, V = draft.shape, draft.device, 1
    _check.tensor(op, "tokens", tokens, (R, None), int32, device, dense=2, aligned=False)
    K = tokens.shape[1] - 1
    _check.require(0 <= K <= MAX_K, op, "tokens", f"K + 1 = {K + 1}", f"1 to {MAX_K + 1}")
    for name, t, size in (("sampled", sampled, T), ("query_start_loc", query_start_loc, R + 1), ("status", status, R),
                          ("num_accepted", num_accepted, R)):
        _check.tensor(op, name, t, (size,), int32, device, aligned=False)
    if probs is not None:
        for name, shape, dtype in (("target", (T, None), torch.float32), ("draft", (T, None), torch.float32), ("is_drawn", (R,), torch.int32),
                                   ("seed", (R,), torch.int64), ("position", (T,), torch.int32)):
            _check.tensor(op, f"probs.{name}", getattr(probs, name), shape, (dtype,), device, aligned=len(shape) == 2)
        V = probs.target.shape[1]
        _check.require(1 <= V <= MAX_V and probs.draft.shape[1] == V, op, "probs", f"V = {V} and {probs.draft.shape[1]}",
                       f"one vocabulary of 1 to {MAX_V}")
        _check.require(workspace is not None, op, "workspace", "None", "one, since there are probs: Workspace.allocate(R, V, device)")
    c = config(V)
    chunks = c.chunks(V)
    if workspace is not None:
        parts: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = (
            ("scores", (chunks,), torch.float64), ("ids", (chunks,), torch.int32), ("counts", (), torch.int32))
        for name, sizes, dtype in parts:
            t = getattr(workspace, name)
            _check.tensor(op, f"workspace.{name}", t, (None, *sizes), (dtype,), device, dense=1 + len(sizes))
            _check.require(t.shape[0] >= R, op, f"workspace.{name}", f"{t.shape[0]} rows", f"at least {R}")
    if R == 0:
        return
    p, w, stride = (*vars(probs).values(),) if probs else (None,) * 5, workspace, lambda t: 0 if t is None else t.stride(0)
    _verify_kernel[(chunks, R)](
        draft, sampled, query_start_loc, status, tokens, num_accepted, *p, *(vars(w).values() if w and probs else (None,) * 3), T,
        stride(p[0]), stride(p[1]), V=V, K=K, CHUNK=c.CHUNK, CHUNKS=chunks, BLOCK_C=triton.next_power_of_2(chunks),
        BLOCK_K=triton.next_power_of_2(K + 1), HAS_PROBS=probs is not None, num_warps=c.num_warps, **overlap())


def verify(draft: torch.Tensor, sampled: torch.Tensor, query_start_loc: torch.Tensor, status: torch.Tensor, K: int,
           probs: Probabilities | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (tokens int32 [R, K + 1], num_accepted int32 [R]) and ors flags into `status`; K is the greatest number of drafts."""
    R, device = status.shape[0], draft.device
    tokens, num_accepted = torch.empty(R, K + 1, dtype=torch.int32, device=device), torch.empty(R, dtype=torch.int32, device=device)
    workspace = None if probs is None else Workspace.allocate(R, probs.target.shape[1], device)
    verify_out(draft, sampled, query_start_loc, status, tokens, num_accepted, probs, workspace)
    return tokens, num_accepted
