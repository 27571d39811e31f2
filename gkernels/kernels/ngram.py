"""N-gram drafts: the tokens that followed the last ones when they stood in the sequence before (prompt lookup, Saxena 2023).

history int32 [R, L], all tokens of each request, lengths int32 [R], max_draft int32 [R] -> draft int32 [R, K], -1 beyond draft_len int32 [R].
Of the suffixes of max_n down to min_n tokens, the longest that occurs earlier in the history is looked up, and its occurrences may overlap it. Of
several, the one with the most tokens after it counts, up to the row's limit of min(max_draft, K), and of these the most recent: in a text that
repeats itself, drafts are thus as long as they may be. A draft ends before a negative id. With `slots` int32 [R], a row's line in history is
slots[row], as in `advance`.
Graph-safe: the grid depends on R and L only. Programs past a row's length end at once, the others share its history in blocks; their places merge
by an integer maximum, which no order of arrival can move, and the last to arrive writes the draft. A row with length or limit 0 or without such an
occurrence gets no draft. Lengths past L count as L, negative ones as 0; a slot outside of the history has no draft. Ids are compared and copied,
never looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._arrive import arrive
from ._overlap import overlap, wait_for_node_before

MAX_N = 64
MAX_K = 1024                                          # a key has 15 bits for each of the two; 32 for a place


@triton.jit(do_not_specialize=["L", "lines", "stride_hl", "stride_dr"], do_not_specialize_on_alignment=[
    "history_ptr", "lengths_ptr", "max_draft_ptr", "slots_ptr", "draft_ptr", "draft_len_ptr"])
def _ngram_kernel(
    history_ptr,       # [lines, L]
    lengths_ptr,       # [R]
    max_draft_ptr,     # [R]
    slots_ptr,         # [R], or None
    keys_ptr,          # [R] int64, zeros between launches: the best place of the programs that arrived
    counts_ptr,        # [R] int32, zeros between launches: how many these are
    draft_ptr,         # [R, K]
    draft_len_ptr,     # [R]
    L, lines, stride_hl, stride_dr,
    MIN_N: tl.constexpr, MAX_N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SLOTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    block, row = tl.program_id(0), tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)                                                # [BLOCK_K]
    draft = draft_ptr + row.to(tl.int64) * stride_dr + offs_k
    length, limit = tl.minimum(tl.load(lengths_ptr + row), L), tl.minimum(tl.load(max_draft_ptr + row), K)
    slot = tl.load(slots_ptr + row) if HAS_SLOTS else row
    if (length <= MIN_N) | (limit <= 0) | (slot < 0) | (slot >= lines):
        if block == 0:
            tl.store(draft, tl.full((BLOCK_K,), -1, tl.int32), offs_k < K)
            tl.store(draft_len_ptr + row, 0)
        return
    if block * BLOCK >= length:
        return
    line = history_ptr + slot.to(tl.int64) * stride_hl
    after = block * BLOCK + tl.arange(0, BLOCK)                                   # [BLOCK]: where an occurrence has ended
    equal, size = after < length, tl.zeros((BLOCK,), tl.int32)
    for n in range(1, MAX_N + 1):                                                 # tokens alike before the two ends
        equal = equal & (after >= n)
        equal = equal & (tl.load(line + after - n, equal, other=0) == tl.load(line + tl.maximum(length - n, 0)))
        size += equal.to(tl.int32)
    key = (size.to(tl.int64) << 48) | (tl.minimum(length - after, limit).to(tl.int64) << 32) | after
    best = tl.max(tl.where(size >= MIN_N, key, 0), 0)
    if best > 0:
        tl.atomic_max(keys_ptr + row, best, sem="relaxed")
    if arrive(counts_ptr + row, tl.cdiv(length, BLOCK)):
        best = tl.atomic_xchg(keys_ptr + row, tl.zeros_like(best), sem="relaxed")
        tokens = tl.load(line + best.to(tl.int32) + offs_k, offs_k < (best >> 32).to(tl.int32) % 65536, other=-1)
        found = tl.min(tl.where(tokens < 0, offs_k, BLOCK_K), 0)
        tl.store(draft, tl.where(offs_k < found, tokens, -1), offs_k < K)
        tl.store(draft_len_ptr + row, found)


@dataclass(frozen=True)
class Config:
    BLOCK: int               # places that a program looks at
    num_warps: int


def config(L: int) -> Config:
    """8 places a thread: a history of 128 K tokens is 128 programs, one for each multiprocessor."""
    block = min(max(triton.next_power_of_2(L), 128), 1024)
    return Config(block, max(block // 256, 1))


@dataclass(frozen=True)
class Workspace:
    """What the programs of at most R rows leave each other; launches that follow each other in one stream may share it."""

    keys: torch.Tensor        # int64 [R], zeros between launches
    counts: torch.Tensor      # int32 [R], zeros between launches

    @classmethod
    def allocate(cls, R: int, device: torch.device | str) -> Workspace:
        return cls(torch.zeros(R, dtype=torch.int64, device=device), torch.zeros(R, dtype=torch.int32, device=device))


def ngram_out(history: torch.Tensor, lengths: torch.Tensor, max_draft: torch.Tensor, min_n: int, max_n: int, workspace: Workspace,
              draft: torch.Tensor, draft_len: torch.Tensor, slots: torch.Tensor | None = None) -> None:
    """Writes up to K tokens a row to `draft` [R, K] and how many they are to `draft_len` [R]. Shapes: see the module. Raises ValueError or
    TypeError on a misfit."""
    op, int32 = "ngram", (torch.int32,)
    _check.tensor(op, "history", history, (None, None), int32, aligned=False)
    (lines, L), device, R = history.shape, history.device, lengths.shape[0]
    _check.require(1 <= min_n <= max_n <= MAX_N, op, "min_n, max_n", f"{min_n}, {max_n}", f"1 <= min_n <= max_n <= {MAX_N}")
    for name, t in (("lengths", lengths), ("max_draft", max_draft), ("draft_len", draft_len)):
        _check.tensor(op, name, t, (R,), int32, device, aligned=False)
    if slots is not None:
        _check.tensor(op, "slots", slots, (R,), int32, device, aligned=False)
    _check.require(slots is not None or lines >= R, op, "history", f"{lines} lines", f"one for each of {R} rows, or slots")
    _check.tensor(op, "draft", draft, (R, None), int32, device, aligned=False, writes=True)
    _check.require(1 <= draft.shape[1] <= MAX_K, op, "draft", f"K = {draft.shape[1]}", f"1 to {MAX_K}")
    for name, dtype in (("keys", torch.int64), ("counts", torch.int32)):
        t = getattr(workspace, name)
        _check.tensor(op, f"workspace.{name}", t, (None,), (dtype,), device)
        _check.require(t.shape[0] >= R, op, f"workspace.{name}", f"{t.shape[0]} rows", f"at least {R}")
    if R == 0:
        return
    c, K = config(L), draft.shape[1]
    _ngram_kernel[(max(triton.cdiv(L, c.BLOCK), 1), R)](
        history, lengths, max_draft, slots, workspace.keys, workspace.counts, draft, draft_len, L, lines, history.stride(0), draft.stride(0),
        MIN_N=min_n, MAX_N=max_n, K=K, BLOCK=c.BLOCK, BLOCK_K=triton.next_power_of_2(K), HAS_SLOTS=slots is not None, num_warps=c.num_warps,
        **overlap())


def ngram(history: torch.Tensor, lengths: torch.Tensor, max_draft: torch.Tensor, min_n: int, max_n: int, K: int,
          slots: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns draft int32 [R, K], -1 beyond draft_len int32 [R]."""
    R, device = lengths.shape[0], history.device
    draft, draft_len = torch.empty(R, K, dtype=torch.int32, device=device), torch.empty(R, dtype=torch.int32, device=device)
    ngram_out(history, lengths, max_draft, min_n, max_n, Workspace.allocate(R, device), draft, draft_len, slots)
    return draft, draft_len
