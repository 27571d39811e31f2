"""Adjust:  what a request's options do to its logits before a token is drawn.

logits [R, V] with any row stride -> out [R, V] in the same dtype or float32, which may be logits itself. For each token, in this order:
  x = logit + bias                                              of the row's pairs bias_ids, bias; equal ids add up
  x = x / repetition if x > 0 else x * repetition               where the token occurs in the prompt or was generated (Keskar et al. 2019)
  x = x - frequency * count - presence * (count > 0)            count: how often the token was generated
  x = -inf                                                      where its bit of `allowed` is 0, where it is one of banned_ids, and where it is one
                                                                of stop_ids while generated < min_tokens
Every option is a row's data, so any mix of them is one launch of a fixed grid; rows without options leave at once. A group of options that is None
does not exist in the launch. Rows with seq_lens 0 are left as they are, or zeros where out is another tensor. Options that make no sense (an id
outside of the vocabulary, a bias or a penalty that is NaN or infinite, a repetition that is not positive) are ignored, status |= BAD_OPTION.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before
from ._sampling import BAD_OPTION
from ._tile import MULTIPROCESSORS

_INF = tl.constexpr(float("inf"))
_BAD_OPTION = tl.constexpr(BAD_OPTION)


@triton.jit
def _bad_ids(ids, mask, V: tl.constexpr):
    """Whether one of the ids is neither a token nor -1, which means none."""
    return tl.max((mask & ((ids < -1) | (ids >= V))).to(tl.int32), 0) == 1


@triton.jit
def _meets(ids, first, COUNT: tl.constexpr):
    """Whether one of the ids is one of COUNT tokens from `first` on."""
    return tl.max(((ids >= first) & (ids < first + COUNT)).to(tl.int32), 0) == 1


@triton.jit
def _ban(x, offs_v, ids_ptr, N: tl.constexpr):
    """-inf for the tokens among N ids."""
    for i in range(0, N):
        x = tl.where(offs_v == tl.load(ids_ptr + i), -_INF, x)
    return x


@triton.jit
def _bits(words):
    """Of words [N, 1], whether each of their bits is set: [N, 32]."""
    return ((words >> tl.arange(0, 32)[None, :]) & 1) != 0


@triton.jit
def _good_penalty(value, off):
    """The penalty, or `off` where it is not finite; and whether it is."""
    good = tl.abs(value) < _INF                                                    # NaN compares as bad
    return tl.where(good, value, off), good


@triton.jit(do_not_specialize=["lines", "allowed_lines"], do_not_specialize_on_alignment=[
    "bias_ids_ptr", "bias_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr", "counts_ptr", "prompt_ptr", "allowed_ptr", "banned_ptr",
    "stop_ptr", "min_tokens_ptr", "generated_ptr", "slots_ptr", "seq_lens_ptr", "status_ptr"])
def _adjust_kernel(
    logits_ptr,        # [R, V]
    out_ptr,           # [R, V]
    bias_ids_ptr,      # [R, B] int32; as all that follows, None where the group is absent
    bias_ptr,          # [R, B]
    repetition_ptr,    # [R]
    presence_ptr,      # [R]
    frequency_ptr,     # [R]
    counts_ptr,        # [lines, V] int32
    prompt_ptr,        # [lines, V / 32] int32
    allowed_ptr,       # [allowed_lines, V / 32] int32
    banned_ptr,        # [R, W] int32
    stop_ptr,          # [R, S] int32
    min_tokens_ptr,    # [R] int32
    generated_ptr,     # [R] int32
    slots_ptr,         # [R] int32
    seq_lens_ptr,      # [R] int32
    status_ptr,        # [R] int32, read and written
    lines, allowed_lines, stride_lr, stride_or, stride_cr, stride_pr, stride_ar,
    V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, B: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PENALTIES: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    HAS_BANNED: tl.constexpr, HAS_STOP: tl.constexpr, HAS_SLOTS: tl.constexpr, IN_PLACE: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    first, row = tl.program_id(0) * CHUNK, tl.program_id(1)
    stop, row64 = tl.minimum(first + CHUNK, V), row.to(tl.int64)
    is_live = tl.load(seq_lens_ptr + row) > 0                                      # with all that a row says of itself, before a branch needs any
    line = tl.load(slots_ptr + row).to(tl.int64) if HAS_SLOTS else row64
    off = row < 0                                                                  # what a group that does not exist is
    is_bad, is_biased, is_penalised, is_masked, is_banned, is_stopped = off, off, off, off, off, off
    if HAS_BIAS:
        offs_b = tl.arange(0, BLOCK_B)
        bias_ids = tl.load(bias_ids_ptr + row * B + offs_b, offs_b < B, other=-1)
        bias = tl.load(bias_ptr + row * B + offs_b, offs_b < B, other=0.0)
        is_bad = is_bad | _bad_ids(bias_ids, offs_b < B, V) | (tl.max(((bias_ids >= 0) & ((tl.abs(bias) < _INF) == 0)).to(tl.int32), 0) == 1)
        is_biased = _meets(bias_ids, first, CHUNK)
    if HAS_PENALTIES:
        repetition, good_repetition = _good_penalty(tl.load(repetition_ptr + row), 1.0)
        presence, good_presence = _good_penalty(tl.load(presence_ptr + row), 0.0)
        frequency, good_frequency = _good_penalty(tl.load(frequency_ptr + row), 0.0)
        good_repetition = good_repetition & (repetition > 0.0)
        repetition = tl.where(repetition > 0.0, repetition, 1.0)
        is_bad = is_bad | ((good_repetition & good_presence & good_frequency) == 0)
        is_penalised = (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)
        has_counts = is_live & (line >= 0) & (line < lines)
    if HAS_ALLOWED:
        offs_w, has_mask = first // 32 + tl.arange(0, CHUNK // 32), (line >= 0) & (line < allowed_lines)               # [CHUNK / 32]
        allowed_ptr += line * stride_ar
        is_masked = tl.min((tl.load(allowed_ptr + offs_w, (offs_w * 32 < V) & has_mask, other=-1) == -1).to(tl.int32), 0) == 0
    if HAS_BANNED:
        offs_n = tl.arange(0, BLOCK_W)
        banned_ids = tl.load(banned_ptr + row * W + offs_n, offs_n < W, other=-1)
        is_bad = is_bad | _bad_ids(banned_ids, offs_n < W, V)
        is_banned = _meets(banned_ids, first, CHUNK)
    if HAS_STOP:
        offs_s = tl.arange(0, BLOCK_S)
        stop_ids = tl.load(stop_ptr + row * S + offs_s, offs_s < S, other=-1)
        is_bad = is_bad | _bad_ids(stop_ids, offs_s < S, V)
        is_stopped = (tl.load(generated_ptr + row) < tl.load(min_tokens_ptr + row)) & _meets(stop_ids, first, CHUNK)
    if (first == 0) & is_bad & is_live:
        tl.store(status_ptr + row, tl.load(status_ptr + row) | _BAD_OPTION)
    if IN_PLACE:                                                                   # most chunks of most rows, whose logits stay unread
        if (is_live == 0) | ((is_biased | is_penalised | is_masked | is_banned | is_stopped) == 0):
            return
    for at in range(first, stop, BLOCK):
        words = at // 32 + tl.arange(0, BLOCK // 32)[:, None]                      # [BLOCK / 32, 1]
        offs_v = words * 32 + tl.arange(0, 32)[None, :]                            # [BLOCK / 32, 32]: a word's tokens are a line
        mask, has_word = offs_v < V, words * 32 < V
        x = tl.load(logits_ptr + row64 * stride_lr + offs_v, mask & is_live, other=0.0).to(tl.float32)
        if HAS_BIAS:
            if is_biased & _meets(bias_ids, at, BLOCK):
                for i in range(0, B):
                    value, _ = _good_penalty(tl.load(bias_ptr + row * B + i), 0.0)
                    x = tl.where(offs_v == tl.load(bias_ids_ptr + row * B + i), x + value, x)
        if HAS_PENALTIES:
            if is_penalised:
                count = tl.maximum(tl.load(counts_ptr + line * stride_cr + offs_v, mask & has_counts, other=0), 0)
                prompt = tl.load(prompt_ptr + line * stride_pr + words, has_word & has_counts, other=0)
                x = tl.where((count > 0) | _bits(prompt), tl.where(x > 0.0, x / repetition, x * repetition), x)
                x = x - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
        if HAS_ALLOWED:
            if is_masked:
                x = tl.where(_bits(tl.load(allowed_ptr + words, has_word & has_mask, other=-1)), x, -_INF)
        if HAS_BANNED:
            if is_banned & _meets(banned_ids, at, BLOCK):
                x = _ban(x, offs_v, banned_ptr + row * W, W)
        if HAS_STOP:
            if is_stopped & _meets(stop_ids, at, BLOCK):
                x = _ban(x, offs_v, stop_ptr + row * S, S)
        tl.store(out_ptr + row64 * stride_or + offs_v, tl.where(is_live, x, 0.0).to(out_ptr.dtype.element_ty), mask)


@dataclass(frozen=True)
class Adjustments:
    """Groups of options, each given whole or left None: (bias_ids, bias), (repetition, presence, frequency, counts, prompt), allowed, banned_ids,
    (stop_ids, min_tokens, generated); and `slots` with the second and third."""

    bias_ids: torch.Tensor | None = None      # int32 [R, B], -1 for none
    bias: torch.Tensor | None = None          # float32 [R, B]
    repetition: torch.Tensor | None = None    # float32 [R], 1 is off
    presence: torch.Tensor | None = None      # float32 [R], 0 is off
    frequency: torch.Tensor | None = None     # float32 [R], 0 is off
    counts: torch.Tensor | None = None        # int32 [lines, V]: how often each token was generated
    prompt: torch.Tensor | None = None        # int32 [lines, ceil(V / 32)]: bit v % 32 of word v / 32 says whether token v is in the prompt
    allowed: torch.Tensor | None = None       # int32 [lines, ceil(V / 32)]: bits as in `prompt`, 1 for tokens that may be drawn (XGrammar's layout)
    banned_ids: torch.Tensor | None = None    # int32 [R, W], -1 for none
    stop_ids: torch.Tensor | None = None      # int32 [R, S], -1 for none
    min_tokens: torch.Tensor | None = None    # int32 [R]
    generated: torch.Tensor | None = None     # int32 [R]: tokens generated so far
    slots: torch.Tensor | None = None         # int32 [R]: a row's line in these tables, where it is not its own number; outside: nothing was
                                              # generated, nothing is in the prompt, all is allowed


@dataclass(frozen=True)
class Config:
    CHUNK: int               # tokens of a program, a power of two
    BLOCK: int               # of them it takes at a time
    num_warps: int


def config(R: int, V: int) -> Config:
    """A program asks its row's options once: it has four tiles where there are rows enough for 4 programs a multiprocessor."""
    block = min(max(triton.next_power_of_2(V), 128), 1024)
    enough = R * triton.cdiv(V, 4 * block) >= 4 * MULTIPROCESSORS
    return Config(4 * block if enough else block, block, max(block // 256, 1))


TABLES = ("counts", "prompt", "allowed")           # their lines are indexed by slots
GROUPS = (("bias_ids", "bias"), ("repetition", "presence", "frequency", "counts", "prompt"), ("allowed",), ("banned_ids",),
          ("stop_ids", "min_tokens", "generated"))


def check_adjustments(vocab_size: int, bias: dict[int, float] | None = None, repetition: float = 1.0, presence: float = 0.0,
                      frequency: float = 0.0, banned_ids: tuple[int, ...] = (), min_tokens: int = 0) -> None:
    """Raises ValueError on the options of one request, on the host, where the kernel would ignore them and flag the row."""
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    token = lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
    for name, ids in (("bias", bias or {}), ("banned_ids", banned_ids)):
        for i in ids:
            _check.require(token(i), "adjust", name, f"token {i}", f"token ids from 0 to {vocab_size - 1}")
    for i, value in (bias or {}).items():
        _check.require(number(value), "adjust", f"bias[{i}]", value, "a finite number")
    _check.require(number(repetition) and repetition > 0, "adjust", "repetition", repetition, "a positive number; 1 is off")
    for name, value in (("presence", presence), ("frequency", frequency)):
        _check.require(number(value), "adjust", name, value, "a finite number; 0 is off")
    _check.require(isinstance(min_tokens, int) and not isinstance(min_tokens, bool) and min_tokens >= 0, "adjust", "min_tokens", min_tokens,
                   "an integer, at least 0")


def adjust_out(logits: torch.Tensor, adjustments: Adjustments, seq_lens: torch.Tensor, status: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the adjusted logits to `out` and ors flags into `status`. Shapes: see the module and Adjustments. Raises ValueError or TypeError."""
    op, a = "adjust", adjustments
    _check.tensor(op, "logits", logits, (None, None), _check.FLOATS)
    (R, V), device = logits.shape, logits.device
    in_place = out.data_ptr() == logits.data_ptr()
    _check.tensor(op, "out", out, (R, V), (logits.dtype,) if in_place else tuple(dict.fromkeys((logits.dtype, torch.float32))), device, writes=True)
    _check.require(not in_place or out.stride() == logits.stride(), op, "out", f"strides {list(out.stride())}", "those of logits, where it begins")
    words = -(-V // 32)
    shapes = dict(bias_ids=(None,), bias=(None,), counts=(V,), prompt=(words,), allowed=(words,), banned_ids=(None,), stop_ids=(None,))
    real = ("bias", "repetition", "presence", "frequency")
    for group in GROUPS:
        given = [name for name in group if getattr(a, name) is not None]
        _check.require(len(given) in (0, len(group)), op, ", ".join(group), f"only {', '.join(given)}", "all of them or none")
        for name in given:
            rows = None if name in TABLES and a.slots is not None else R
            _check.tensor(op, name, getattr(a, name), (rows, *shapes.get(name, ())), (torch.float32 if name in real else torch.int32,), device,
                          dense=1 if name in TABLES else 1 + len(shapes.get(name, ())), aligned=False)
    if a.bias is not None and a.bias_ids is not None:
        _check.require(a.bias.shape == a.bias_ids.shape, op, "bias", list(a.bias.shape), "the shape of bias_ids")
    for name, t in (("seq_lens", seq_lens), ("status", status), ("slots", a.slots)):
        if t is not None:
            _check.tensor(op, name, t, (R,), (torch.int32,), device, aligned=False)
    if R == 0 or V == 0:
        return
    c, width = config(R, V), lambda t: 0 if t is None else t.shape[1]
    stride = lambda t: 0 if t is None else t.stride(0)
    B, W, S = width(a.bias_ids), width(a.banned_ids), width(a.stop_ids)
    block = lambda n: triton.next_power_of_2(max(n, 1))
    _adjust_kernel[(triton.cdiv(V, c.CHUNK), R)](
        logits, out, *(getattr(a, field.name) for field in fields(a)), seq_lens, status,
        0 if a.counts is None or a.prompt is None else min(len(a.counts), len(a.prompt)),
        0 if a.allowed is None else len(a.allowed), logits.stride(0), out.stride(0), stride(a.counts), stride(a.prompt), stride(a.allowed),
        V=V, CHUNK=c.CHUNK, BLOCK=c.BLOCK, B=B, W=W, S=S, BLOCK_B=block(B), BLOCK_W=block(W), BLOCK_S=block(S), HAS_BIAS=B > 0,
        HAS_PENALTIES=a.repetition is not None, HAS_ALLOWED=a.allowed is not None, HAS_BANNED=W > 0, HAS_STOP=S > 0,
        HAS_SLOTS=a.slots is not None, IN_PLACE=in_place, num_warps=c.num_warps, **overlap())


def adjust(logits: torch.Tensor, adjustments: Adjustments, seq_lens: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """Returns the adjusted logits in float32, and ors flags into `status`."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    adjust_out(logits, adjustments, seq_lens, status, out)
    return out
