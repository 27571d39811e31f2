"""Advance: what a step's tokens do to the state of their requests, so that the next step needs no host.

tokens int32 [R], one drawn for each request, -1 for none; status int32 [R] of the step; `State` -> the state after the step.
A row takes part where seq_lens > 0 and emits = 1 (its prompt is complete). Its token goes into the ring, to `token_ids` as the next step's input
and, where there are such tables, into counts and history; its length and the number of its tokens grow by one. Then it ends, in this order, with
  ERROR    token -1 or a status other than 0: nothing of it is appended, and its flags |= status
  STOP     the token is one of its stop_ids
  LENGTH   it has max_tokens tokens, or max_lens tokens are in its sequence, the prompt's among them
An ended row has seq_lens 0 from then on: attention, sampling and this op pass it by, and the ring has -1. Rows of one step may end at different
times: the others go on unharmed. `step` counts the steps, `running` the rows that have not ended.
Graph-safe: one program. Bad data stays in its row: a token outside of the vocabulary ends it with ERROR, a slot outside of the tables notes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before

STOP, LENGTH, ERROR = 1, 2, 4
MAX_R = 4096
_STOP, _LENGTH, _ERROR = tl.constexpr(STOP), tl.constexpr(LENGTH), tl.constexpr(ERROR)


@triton.jit(do_not_specialize=["R", "depth", "lines", "L", "stride_cs", "stride_hs"], do_not_specialize_on_alignment=[
    "tokens_ptr", "status_ptr", "emits_ptr", "stop_ids_ptr", "max_tokens_ptr", "max_lens_ptr", "token_ids_ptr", "seq_lens_ptr", "generated_ptr",
    "ended_ptr", "flags_ptr", "ring_ptr", "step_ptr", "running_ptr", "slots_ptr", "counts_ptr", "history_ptr"])
def _advance_kernel(
    tokens_ptr,        # [R]
    status_ptr,        # [R]
    emits_ptr,         # [R]
    stop_ids_ptr,      # [R, S]
    max_tokens_ptr,    # [R]
    max_lens_ptr,      # [R]
    token_ids_ptr,     # [R], written
    seq_lens_ptr,      # [R], read and written, as all that follows up to `running`
    generated_ptr,     # [R]
    ended_ptr,         # [R]
    flags_ptr,         # [R]
    ring_ptr,          # [depth, R]
    step_ptr,          # [1]
    running_ptr,       # [1]
    slots_ptr,         # [R], or None: a row's line in the tables
    counts_ptr,        # [lines, V], or None
    history_ptr,       # [lines, L], or None
    R, depth, lines, L, stride_cs, stride_hs,
    V: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_COUNTS: tl.constexpr, HAS_HISTORY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    offs_r = tl.arange(0, BLOCK_R)                                                 # [BLOCK_R]
    mask = offs_r < R
    step = tl.load(step_ptr)
    length, generated = tl.load(seq_lens_ptr + offs_r, mask, other=0), tl.load(generated_ptr + offs_r, mask, other=0)
    token, status = tl.load(tokens_ptr + offs_r, mask, other=-1), tl.load(status_ptr + offs_r, mask, other=0)
    live = mask & (length > 0)
    emits = live & (tl.load(emits_ptr + offs_r, mask, other=0) == 1)
    failed = live & ((status != 0) | (emits & ((token < 0) | (token >= V))))
    brings = emits & (failed == 0)
    is_stop = offs_r < 0
    for i in range(0, S):
        is_stop = is_stop | (token == tl.load(stop_ids_ptr + offs_r * S + i, mask, other=-1))
    is_full = (generated + 1 >= tl.load(max_tokens_ptr + offs_r, mask, other=0)) | (length + 1 >= tl.load(max_lens_ptr + offs_r, mask, other=0))
    ending = tl.where(failed, _ERROR, tl.where(brings & is_stop, _STOP, tl.where(brings & is_full, _LENGTH, 0)))
    goes_on = brings & (ending == 0)
    tl.store(ring_ptr + (tl.maximum(step, 0) % depth).to(tl.int64) * R + offs_r, tl.where(brings, token, -1), mask)
    tl.store(generated_ptr + offs_r, generated + 1, brings)
    tl.store(token_ids_ptr + offs_r, token, goes_on)
    tl.store(seq_lens_ptr + offs_r, tl.where(goes_on, length + 1, 0), goes_on | (ending != 0))
    tl.store(ended_ptr + offs_r, ending, ending != 0)
    tl.store(flags_ptr + offs_r, tl.load(flags_ptr + offs_r, mask, other=0) | status, failed)
    if HAS_COUNTS or HAS_HISTORY:
        slot = (tl.load(slots_ptr + offs_r, mask, other=0) if HAS_SLOTS else offs_r).to(tl.int64)
        notes = brings & (slot >= 0) & (slot < lines)
        if HAS_COUNTS:
            count = counts_ptr + slot * stride_cs + token
            tl.store(count, tl.load(count, notes, other=0) + 1, notes)
        if HAS_HISTORY:
            tl.store(history_ptr + slot * stride_hs + length, token, notes & (length < L))
    tl.store(step_ptr, step + 1)
    tl.store(running_ptr, tl.sum((live & (ending == 0)).to(tl.int32), 0))


@dataclass(frozen=True)
class State:
    """What a decode loop knows of its requests: int32 on the device, all [R] but where said. The first group is the host's to set, the second is read
    and written, the third are tables that may be left out."""

    emits: torch.Tensor          # 1 where the step completes what is known of the sequence, so that its token is the next
    stop_ids: torch.Tensor       # [R, S], -1 for none
    max_tokens: torch.Tensor
    max_lens: torch.Tensor       # tokens that the row's pages, its tables and the model leave room for
    token_ids: torch.Tensor      # the next step's input: one token a row
    seq_lens: torch.Tensor       # 0 for unused and for ended rows
    generated: torch.Tensor      # tokens so far
    ended: torch.Tensor          # STOP, LENGTH or ERROR, where a row has ended
    flags: torch.Tensor          # of rows that ended with ERROR, the status
    ring: torch.Tensor           # [depth, R]: tokens of the last `depth` steps, that of step i in line i % depth
    step: torch.Tensor           # [1]
    running: torch.Tensor        # [1]
    slots: torch.Tensor | None = None       # a row's line in the tables, where it is not the row's own number; no two rows share one
    counts: torch.Tensor | None = None      # [lines, V]: how often each token was generated
    history: torch.Tensor | None = None     # [lines, L]: all tokens of a sequence, the prompt's first


def advance(tokens: torch.Tensor, status: torch.Tensor, state: State, vocab_size: int) -> None:
    """Advances `state` in place by the step that drew `tokens` and left `status`. Shapes: see the module. Raises ValueError or TypeError."""
    op, (R,), device, s = "advance", tokens.shape, tokens.device, state
    _check.require(1 <= R <= MAX_R, op, "tokens", f"R = {R}", f"1 to {MAX_R} requests")
    _check.require(1 <= vocab_size < 2**31, op, "vocab_size", vocab_size, "a positive 32-bit integer")
    int32 = (torch.int32,)
    for name, t in (("tokens", tokens), ("status", status)):
        _check.tensor(op, name, t, (R,), int32, device, aligned=False)
    shapes = dict(stop_ids=(R, None), ring=(None, R), step=(1,), running=(1,), counts=(None, vocab_size), history=(None, None))
    for name, t in vars(s).items():
        if t is not None:
            shape = shapes.get(name, (R,))
            _check.tensor(op, f"state.{name}", t, shape, int32, device, dense=1 if name in ("counts", "history") else len(shape), aligned=False)
    _check.require(s.ring.shape[0] >= 1, op, "state.ring", "no lines", "at least one")
    tables = {name: t for name, t in (("counts", s.counts), ("history", s.history)) if t is not None}
    lines = min((len(t) for t in tables.values()), default=R)
    _check.require(s.slots is not None or lines >= R, op, f"state.{', state.'.join(tables)}", f"{lines} lines", f"one for each of {R} rows, or slots")
    stride = lambda t: 0 if t is None else t.stride(0)
    _advance_kernel[(1,)](
        tokens, status, s.emits, s.stop_ids, s.max_tokens, s.max_lens, s.token_ids, s.seq_lens, s.generated, s.ended, s.flags, s.ring, s.step,
        s.running, s.slots, s.counts, s.history, R, s.ring.shape[0], lines, 0 if s.history is None else s.history.shape[1], stride(s.counts),
        stride(s.history), V=vocab_size, S=s.stop_ids.shape[1], BLOCK_R=triton.next_power_of_2(R), HAS_SLOTS=s.slots is not None,
        HAS_COUNTS=s.counts is not None, HAS_HISTORY=s.history is not None, num_warps=4, **overlap())
