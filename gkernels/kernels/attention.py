"""Paged attention for any mix of prefill chunks, decodes and speculative rows, in one launch of a fixed grid, or on Hopper in two.

out = softmax(scale * q k^T + mask) v over each request's pages, with grouped query heads (H = G * K, any G from 1 to 16).
q [T, H, D]; k_cache [N, P, K, D] and v_cache [N, P, K, DV] with any strides but a contiguous last dimension; block_table int32 [R, W];
`work` from `schedule`. -> out [T, H, DV], and lse [T, H] float32 (natural log of the sum of exponentials) where asked for.

A row's keys are cut at absolute positions: tiles of BLOCK_N, segments of SEGMENT, spans of SPAN tokens. Within a segment the softmax is
online (Dao 2023, arXiv 2307.08691); segments are folded into their span in order, spans into the row in order. Who computes which segment
is free, so a row's bits depend on its own request alone: not on the batch, the bucket, the chunking, the page layout or the number of programs.
Short requests (decode, verify) are runs of (head, segment) pairs streamed through one loop; where a run ends inside a span, the last program
to arrive there folds the parts. Tall ones (prefill) are tiles of BLOCK_M rows over all their keys, or over one span where those tiles are few.
Where a launch has both, some programs begin with runs while others take tall tiles: one streams memory while its neighbour computes. Of two
launches the second begins on the multiprocessors that the first leaves, at once or when its tall tiles are taken.
On Hopper there are kernels of two kinds of warps: for tall requests, which have a launch of their own from capacities of APART_FROM tokens on, not
for fp8 (`_attention_tall_hopper`), and for short ones where no tall ones are in their launch, not with a soft cap (`_attention_short_hopper`); for D
and DV of 64 or 128, strides of whole 16 bytes, and pages that the hardware copies, of 8, 16, 32 or multiples of 64 slots. Both launches are made
whatever the batch holds.
Products with a cache in fp8 are those of float16: q is rounded to it, see `as_operand`.
On Hopper and later a launch overlaps with the node before it, and waits for its end before it reads what counts or writes anything. The second of
two launches waits for the first at its own end alone: what the first waited for is there, and neither reads what the other writes. Decode may
fetch the keys of earlier steps before it waits (`ready`).
Pad rows are zeros with lse -inf; rows of a request with bad lengths or pages are NaN. Keys that are not live are never read; but a value of
the request's own that is not finite spoils every row of its tile, also rows before it (0 times NaN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from . import _check
from ._attention import _attention_kernel
from ._overlap import overlaps
from ._tile import MULTIPROCESSORS
from .schedule import RECORD, RUN_SPANS, Tiling, schedule

if HAS_GLUON := _check.HAS_GLUON:                    # else all is one launch
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ._attention_short_hopper import _attention_short_kernel
    from ._attention_tall_hopper import _attention_tall_kernel

LOG2_E = 1.4426950408889634
MAX_GROUP = 16
# Tokens of capacity from which tall requests have a launch of their own on Hopper. On the H200 it takes prefill of 2048 to 16384 tokens from 347 to
# 377 and from 366 to 473 TFLOP/s, and 0.1 ms from a step of 1B of 2048 mixed tokens; but steps of 129 and 513 last 0.1 ms longer with two launches.
APART_FROM = 2048
# Requests of decode alone up to which a program has a multiprocessor to itself: of 16 on the H200 it takes 8 to 11 % off, of 64 it adds 2 %. Heads of
# 64 columns and fp8, where the time is not the memory's, want two.
FEW_REQUESTS = 16


@dataclass(frozen=True)
class Config:
    """Tiles from the model's constants. BLOCK_N, SEGMENT and SPAN decide bits: the same for every launch of a model. All else is free."""

    SEGMENT: int
    SPAN: int
    BLOCK_N: int
    SHORT_M: int
    TALL_M: int              # in a launch of their own
    TALL_PART: int           # and beside short requests
    num_stages: int
    num_warps: int
    programs: int            # a multiprocessor
    STAGES: int = 0          # tiles of keys that the launch of `_attention_tall_hopper` keeps; 0: tall tiles have no launch of their own


def config(D: int, DV: int, dtype: torch.dtype) -> Config:
    wide, target = max(D, DV), None if _check.INTERPRETED else triton.runtime.driver.active.get_current_target()
    if dtype == torch.float32:                       # exact products run on the scalar units: small tiles keep registers free
        return Config(512, 16, 32 if wide <= 64 else 16, 16, 16, 16, 1, 4 if wide <= 64 else 8, 1)
    if wide > 128:
        return Config(512, 16, 32, 16, 16, 16, 2, 4, 2)
    # Hopper's 64-row products take keys and values from shared memory; elsewhere they pass through registers, and a tall tile has to leave room.
    # Two programs of 3 stages fill the shared memory of a data-center GPU (228 KiB), one the 99 KiB of others; AMD's has 64 KiB.
    hopper = target is None or (target.backend == "cuda" and target.arch // 10 == 9)
    small = target is not None and (target.backend != "cuda" or target.arch not in (80, 90, 100, 103))
    # A lone program takes 0.8 us for 64 keys of D 64, 1.2 of D 128. Segments of 256 keys halve how many follow each other and double the folds: they
    # spare a context of 1024 keys 2.5 us at D 64; at D 128 they would cost 8x4096 5 %.
    segment, span = (256, 32) if wide <= 64 else (512, 16)
    if HAS_GLUON and hopper and target is not None and D in (64, 128) and DV in (64, 128):
        return Config(segment, span, 64, 16, 128, 64, 3, 4, 2, STAGES=4)
    part = 64 if hopper else 16
    return Config(segment, span, 64, 16, part, part, 2 if small else 3, 4, 2)


class Launch(NamedTuple):
    """All that is static about a launch of the kernel, as one constant: a tuple, since Triton's hooks are told of constants as JSON."""

    K: int
    G: int
    GROUP: int               # G padded to a power of two
    TWINS: bool              # k_cache and v_cache have the same strides: one address calculation serves both
    WIDE: bool               # offsets within a page pass 32 bits
    ALIGN: int               # divides every stride of the caches, up to 16
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    P: int
    RECORD: int
    RUN_SEGMENTS: int        # states of segments that a run may leave: of the span that it begins in, and of the one that it ends in
    RUN_SPANS: int
    RUNS: int
    SHORT_M: int
    SHORT_STATE: int         # float32 of a short tile's state
    TALL_M: int
    TALL_STATE: int
    TALL_PART: int           # rows of a tall tile that a program takes at a time
    FEW: int                 # and that it folds at a time
    TALL_SLOTS: int
    STAGES: int              # tiles of keys and values that the launch of tall tiles keeps
    FILL_H: int
    SEGMENT: int
    SPAN: int
    BLOCK_N: int
    WAITS: str               # for the node ahead: first, between what it does not write and what it does, or, if it took the tall tiles, last
    IS_ALONE: bool           # whether a program has a multiprocessor to itself
    AHEAD: int               # keys of a run that a program asks the L2 for before it waits for the node before; 0 where nodes do not overlap
    PRECISION: str
    HAS_TALL: bool
    HAS_LEFT: bool
    HAS_RIGHT: bool
    HAS_CAP: bool
    HAS_SINK: bool
    HAS_ALIBI: bool
    HAS_TREE: bool
    HAS_SCALE: bool
    PACKED: bool             # whether fp8 becomes operands by an instruction of NVIDIA's
    HAS_LSE: bool


def _block(D: int) -> int:
    return max(triton.next_power_of_2(D), 16)


def _check_ranks(q, k_cache, v_cache):
    _check.require(q.dim() == 3 and k_cache.dim() == 4 and v_cache.dim() == 4, "attention", "q, k_cache, v_cache",
                   f"{q.dim()}, {k_cache.dim()} and {v_cache.dim()} dimensions", "[T, H, D], [N, P, K, D] and [N, P, K, DV]")


def _group(H: int, K: int) -> int:
    _check.require(K >= 1 and H % K == 0 and 1 <= H // K <= MAX_GROUP, "attention", "q", f"{H} query heads for {K} KV heads",
                   f"a multiple of the KV heads, at most {MAX_GROUP} times as many")
    return H // K


def tiling(T: int, R: int, H: int, K: int, D: int, DV: int, dtype: torch.dtype, device: torch.device | str, causal: bool = True,
           window: tuple[int, int] = (-1, -1), programs: int | None = None, cache_dtype: torch.dtype | None = None, page_size: int = 16,
           softcap: float = 0.0) -> Tiling:
    """How `schedule` is to cut requests for this op at these capacities. `programs` is the launch's grid, by default what suits the device and the
    kernel that cache_dtype (by default `dtype`, that of q), page_size and softcap lead to; no result depends on any of these. `window` only spares
    work: a work list made without it serves too."""
    group, has_tall = triton.next_power_of_2(_group(H, K)), T > R
    c = config(D, DV, dtype)
    if programs is None:
        device = torch.device(device)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        has_boxes = c.STAGES > 0 and _fits_boxes(page_size) and softcap == 0
        is_alone = not has_tall and R <= FEW_REQUESTS and has_boxes and max(D, DV) > 64 and cache_dtype in (None, dtype)
        programs = multiprocessors * (1 if is_alone else c.programs)
    tall_programs = max(programs // c.programs, 1) if has_tall and c.STAGES and T >= APART_FROM else 0
    tall_m = c.TALL_M if tall_programs else c.TALL_PART
    runs = 2 * programs if has_tall and not tall_programs else programs
    tall_slots = 0 if not has_tall else 2 * tall_programs or 2 * programs
    row = _block(DV) + 2                             # float32 of a state's row: acc, m, l
    states = runs * (2 * c.SPAN + RUN_SPANS) * c.SHORT_M * row + (tall_slots + 2 * programs if has_tall else 0) * tall_m * row
    return Tiling(K, c.SHORT_M // group, tall_m // group, 64 // group, has_tall, c.SEGMENT, c.SPAN, programs, runs, tall_slots,
                  states, 4 + 2 * runs + tall_slots * (tall_m // c.TALL_PART), causal, window[0], tall_programs)


_tiling = tiling                                     # for functions with an argument of that name


def _fits_boxes(page_size: int) -> bool:
    """Whether the hardware copies such pages, or parts of 64 slots of them, as whole rows of a tile of 64."""
    return page_size >= 8 and (64 % page_size == 0 or page_size % 64 == 0)


def _boxes(cache: torch.Tensor) -> TensorDescriptor | None:
    """The cache [N, P, K, D] as rows, one a slot, or a slot and head, of which the hardware copies a page, or 64 slots of one, by up to 128 bytes at
    once. None where pages or strides do not allow it."""
    size = cache.element_size()
    (N, P, K, D), (stride_n, stride_p, stride_h, _) = cache.shape, cache.stride()
    if not _fits_boxes(P) or min(stride_n, stride_p, stride_h) <= 0 or stride_n % stride_p or (stride_h > stride_p and stride_h % stride_p):
        return None
    rows, columns = (N - 1) * (stride_n // stride_p) + (K - 1) * (stride_h // stride_p) + P, (K - 1) * (stride_h % stride_p) + D
    if stride_p * size % 16 or stride_h * size % 16 or max(rows, columns) >= 2**31:
        return None
    width = min(D * size, 128)
    layout = NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * size, rank=2)
    return TensorDescriptor(cache, [rows, columns], [stride_p, 1], [min(P, 64), width // size], layout)


@dataclass(frozen=True)
class Workspace:
    """Scratch of launches that follow each other in one stream. It grows with the launch's programs, not with the longest context."""

    states: torch.Tensor      # float32: states of what several programs compute
    counters: torch.Tensor    # int32, zeros between launches

    @classmethod
    def allocate(cls, tiling: Tiling, device: torch.device | str, *others: Tiling) -> Workspace:
        """For launches of this tiling; with others, for launches of any of them, each of which takes its part by `of`."""
        states, counters = (max(sizes) for sizes in zip(*((cut.states, cut.counters) for cut in (tiling, *others)), strict=True))
        return cls(torch.empty(states, dtype=torch.float32, device=device), torch.zeros(counters, dtype=torch.int32, device=device))

    def of(self, tiling: Tiling) -> Workspace:
        """The part of a tiling: the front, which all share."""
        return Workspace(self.states[:tiling.states], self.counters[:tiling.counters])


def attention_out(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, work: torch.Tensor,
                  workspace: Workspace, out: torch.Tensor, lse: torch.Tensor | None = None, scale: float | None = None, *,
                  causal: bool = True, window: tuple[int, int] = (-1, -1), softcap: float = 0.0, sinks: torch.Tensor | None = None,
                  alibi_slopes: torch.Tensor | None = None, tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None,
                  v_scale: torch.Tensor | None = None, tiling: Tiling | None = None, ready: bool = False) -> None:
    """Writes attention to `out` and, where given, log-sum-exp to `lse`; shapes as in the module. `work` comes from `schedule` with this `tiling`,
    by default that of the capacities.

    Row i of a request of n keys and m rows has position p = n - m + i and sees the keys j with p - window[0] <= j <= p + window[1], a negative
    bound meaning none; causal is window[1] = 0. scale defaults to D ** -0.5. softcap c > 0: logits become c tanh(logit / c).
    sinks float32 [H]: one more logit a head, without a value. alibi_slopes float32 [H] or [R, H]: logit - slope |p - j|.
    tree_mask int64 [T], causal only: bit j of a row says whether it sees its request's query token j < 64. k_scale, v_scale float32 [1] or [K]
    multiply keys and values, for caches in float8_e4m3fn. ready: the node ahead of this one, which has to wait before it lets this one start as all
    here do, writes no work, no block_table, and no keys and values but those of this step's rows; decode on Hopper then fetches beside it.
    Raises ValueError or TypeError on what does not fit."""
    _check_ranks(q, k_cache, v_cache)
    (T, H, D), (N, P, K, _), R, DV, device = q.shape, k_cache.shape, block_table.shape[0], v_cache.shape[3], q.device
    _check.require(N >= 1, "attention", "k_cache", "no pages", "at least the null page")
    _check.require(1 <= D <= 256 and 1 <= DV <= 256, "attention", "q, v_cache", f"D = {D}, DV = {DV}", "1 to 256")
    _check.require(1 <= P <= 256, "attention", "k_cache", f"page size {P}", "1 to 256")
    G = _group(H, K)
    tiling = _tiling(T, R, H, K, D, DV, q.dtype, device, causal, window, None, k_cache.dtype, P, softcap) if tiling is None else tiling
    is_scaled = k_scale is not None or v_scale is not None
    caches = (torch.float8_e4m3fn,) if is_scaled else (q.dtype,)
    _check.tensor("attention", "q", q, (T, H, D), _check.FLOATS)
    _check.tensor("attention", "k_cache", k_cache, (N, P, K, D), caches, device)
    _check.tensor("attention", "v_cache", v_cache, (N, P, K, DV), caches, device)
    _check.tensor("attention", "block_table", block_table, (R, None), (torch.int32,), device)
    *sections, rows = tiling.sections(T, R)
    _check.tensor("attention", "work", work, (rows, RECORD), (torch.int32,), device, dense=2)
    _check.tensor("attention", "workspace.states", workspace.states, (tiling.states,), (torch.float32,), device, writes=True)
    _check.tensor("attention", "workspace.counters", workspace.counters, (tiling.counters,), (torch.int32,), device, writes=True)
    _check.tensor("attention", "out", out, (T, H, DV), (q.dtype,), device, writes=True)
    float32 = (torch.float32,)
    if lse is not None:
        _check.tensor("attention", "lse", lse, (T, H), float32, device, writes=True)
    if sinks is not None:
        _check.tensor("attention", "sinks", sinks, (H,), float32, device)
    if alibi_slopes is not None:
        _check.tensor("attention", "alibi_slopes", alibi_slopes, (R, H) if alibi_slopes.dim() == 2 else (H,), float32, device)
    if tree_mask is not None:
        _check.require(causal, "attention", "tree_mask", "causal=False", "causal=True")
        _check.tensor("attention", "tree_mask", tree_mask, (T,), (torch.int64,), device)
    if is_scaled:
        for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
            _check.require(isinstance(value, torch.Tensor), "attention", name, value, "both k_scale and v_scale", TypeError)
            assert value is not None
            _check.tensor("attention", name, value, (1,) if value.shape == (1,) else (K,), float32, device, aligned=False)
    scale = D ** -0.5 if scale is None else scale
    _check.require(scale > 0, "attention", "scale", scale, "a positive number")
    _check.require(softcap >= 0, "attention", "softcap", softcap, "a positive number, or 0 for none")
    if T == 0:
        return
    left, right = window[0], 0 if causal else window[1]
    c, wide = config(D, DV, q.dtype), lambda t, dim: 0 if t is None or t.shape[dim] == 1 else t.stride(dim)
    tall_m = tiling.tall_rows * triton.next_power_of_2(G)
    short_state, tall_state = (m * (_block(DV) + 2) for m in (c.SHORT_M, tall_m))
    launch = Launch(
        K=K, G=G, GROUP=triton.next_power_of_2(G), D=D, DV=DV, BLOCK_D=_block(D), BLOCK_DV=_block(DV), P=P,
        TWINS=k_cache.stride() == v_cache.stride() and D == DV, WIDE=max(k_cache.stride(1), v_cache.stride(1)) * P >= 2**31,
        ALIGN=math.gcd(16, *k_cache.stride()[:3], *v_cache.stride()[:3]), RECORD=RECORD, RUN_SEGMENTS=2 * c.SPAN, RUN_SPANS=RUN_SPANS,
        RUNS=tiling.runs, SHORT_M=c.SHORT_M, SHORT_STATE=short_state, TALL_M=tall_m, TALL_STATE=tall_state, TALL_PART=c.TALL_PART,
        FEW=min(c.TALL_PART, 16), TALL_SLOTS=tiling.tall_slots, STAGES=c.STAGES, FILL_H=min(triton.next_power_of_2(H), 16), SEGMENT=c.SEGMENT,
        SPAN=c.SPAN, BLOCK_N=c.BLOCK_N, WAITS="first", IS_ALONE=tiling.programs <= MULTIPROCESSORS,
        AHEAD=min(c.SEGMENT, (1 << 17) // (_block(max(D, DV)) * k_cache.element_size())) if overlaps() else 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", HAS_TALL=tiling.has_tall, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0,
        HAS_CAP=softcap > 0, HAS_SINK=sinks is not None, HAS_ALIBI=alibi_slopes is not None, HAS_TREE=tree_mask is not None, HAS_SCALE=is_scaled,
        PACKED=is_scaled and _check.capability() >= 89, HAS_LSE=lse is not None)
    tensors = (q, k_cache, v_cache, block_table, work, workspace.states, workspace.counters, out, lse, sinks, alibi_slopes, tree_mask)
    factors = scale / softcap if softcap else scale * LOG2_E, softcap * LOG2_E
    strides = (q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0), out.stride(0), out.stride(1),
               0 if lse is None else lse.stride(0), alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0)
    extents = T, R, block_table.shape[1], N, left, right
    overlapping: dict = {"launch_pdl": True} if launch.AHEAD else {}
    takes_vectors = q.stride(0) % 8 == q.stride(1) % 8 == 0
    takes_boxes = c.STAGES and takes_vectors and (tiling.tall_programs or not tiling.has_tall)
    boxes = [_boxes(cache) for cache in (k_cache, v_cache)] if takes_boxes else [None]
    if None not in boxes and tiling.tall_programs and not is_scaled:
        _attention_tall_kernel[(tiling.tall_programs,)](
            *boxes, *tensors, *factors, *strides, *extents, sections[-1], C=launch, num_warps=4, **overlapping)
        launch = launch._replace(HAS_TALL=False)
    arguments = *tensors, k_scale, v_scale, *factors, *strides, wide(k_scale, 0), wide(v_scale, 0), *extents, *sections
    if None not in boxes and not launch.HAS_TALL and not launch.HAS_CAP:         # whose tanh costs the 48 dead rows of a tile more than it spares
        registers = 136 if launch.IS_ALONE else 128          # with 128 two programs may share a multiprocessor while others idle
        launch = launch._replace(WAITS="last" if tiling.has_tall else "between" if ready else "first")
        _attention_short_kernel[(tiling.programs,)](*boxes, *arguments, C=launch, num_warps=4, maxnreg=registers, **overlapping)
        return
    _attention_kernel[(tiling.programs,)](
        *arguments, C=launch, num_warps=c.num_warps, num_stages=c.num_stages,
        **overlapping, **_check.registers(255))              # else sm_120 spills 670 bytes for a third program


def attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor,
              block_table: torch.Tensor, scale: float | None = None, *, causal: bool = True, window: tuple[int, int] = (-1, -1),
              softcap: float = 0.0, sinks: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None,
              tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
              programs: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes the schedule and the workspace, then returns (out [T, H, DV], lse [T, H]): see `attention_out`. In a model, `schedule` runs once and
    `attention_out` in every layer. Not causal, a request may have more query rows than keys."""
    _check_ranks(q, k_cache, v_cache)
    (T, H, D), (N, P, K, _), DV = q.shape, k_cache.shape, v_cache.shape[3]
    cut = tiling(T, seq_lens.shape[0], H, K, D, DV, q.dtype, q.device, causal, window, programs, k_cache.dtype, P, softcap)
    plan = schedule(query_start_loc, seq_lens, block_table, P, N, T, cut)
    out, lse = q.new_empty(T, H, DV), torch.empty(T, H, dtype=torch.float32, device=q.device)
    attention_out(q, k_cache, v_cache, block_table, plan.work, Workspace.allocate(cut, q.device), out, lse, scale, causal=causal, window=window,
                  softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, tree_mask=tree_mask, k_scale=k_scale, v_scale=v_scale, tiling=cut)
    return out, lse
