"""Head: the last product of a step and the draw in one:  token = argmax over V of  logit / temperature + Gumbel noise,  or the plain argmax at
temperature 0, where  logits = rmsnorm(row, norm) @ weight.T + bias  are never stored.

scaled as for `norm_linear`, weight [V, K], plain or Quantized, bias [V] or None; index int32 [R], rows of scaled, or None for all of them;
temperature float32 [R], seed int64 [R], position, seq_lens, status int32 [R] as for `sample` -> out int32 [R].
Rows whose options need more of their logits than the greatest (top-k, penalties, ...) say so in `keeps`, int32 [R]: where it is not 0, the row's
logits are written to `logits`, float32 [R, V], out and status stay as they are, and `adjust_` and `sample` go on from there; `sample_out(keeps=)`
leaves the others alone. Those rows of `logits` stay as they are.
Each token, and each logit that is written, is bit for bit what norm_linear and sample make of the row.
Graph-safe: two launches of fixed grids, whatever the rows ask for. A program has a tile of the vocabulary for all rows; it leaves the tile's greatest
logit and greatest score, of which a second launch takes the first best. All merges are exact, so no order of arrival moves a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check, _product, _tile, linear
from ._noise import key_at
from ._overlap import overlap, wait_for_node_before
from ._product import Scaled
from ._quantized import PLAIN, Kind, Quantized, check_weight
from ._sampling import BAD_OPTION, NO_TOKEN
from ._sampling_contest import least_of, most_of
from ._sampling_tokens import better, clean, first_best, scores
from ._tile import Tile
from .sampling import MAX_V

_INF = tl.constexpr(float("inf"))
_BAD_OPTION, _NO_TOKEN = tl.constexpr(BAD_OPTION), tl.constexpr(NO_TOKEN)


@triton.jit
def _contest(x, ids, top, draws, temperature, seed, position, N: tl.constexpr):
    """The greatest scores of the columns of x [BLOCK_N, BLOCK_M] that draw, and their ids. As in _sampling_contest, only tokens whose bound passes
    the best score are scored, here one a column and turn, from registers."""
    reference, key = tl.where(draws, top, 0.0), key_at(seed, position)
    offs = ids[:, None] + tl.zeros_like(seed)[None, :].to(tl.int32)                # [BLOCK_N, BLOCK_M]
    best = most_of(x, offs, (x > -_INF) & draws[None, :], reference[None, :], temperature[None, :], (key[0][None, :], key[1][None, :]))
    score, token = tl.full(top.shape, -_INF, tl.float64), tl.full(top.shape, N, tl.int32)
    most, least = tl.max(best, 0), tl.full(top.shape, -_INF, tl.float32)
    while tl.max((most > least).to(tl.int32), 0) > 0:
        id = tl.min(tl.where(best == most[None, :], offs, N), 0)
        is_it = offs == id[None, :]
        logit = tl.max(tl.where(is_it, x, -_INF), 0)
        score, token = better(score, token, scores(logit, id, most > least, temperature, seed, position), id)
        best = tl.where(is_it, -_INF, best)
        most, least = tl.max(best, 0), least_of(score, reference, temperature)
    return score, token


@triton.jit(do_not_specialize=["T", "X"], do_not_specialize_on_alignment=["index_ptr", "temperature_ptr", "seed_ptr", "position_ptr", "keeps_ptr"])
def _head_kernel(
    x_ptr,             # [X, K]
    squares_ptr,       # [X, PARTS]
    index_ptr,         # [T] int32, rows of x; None where row i is that of x
    weight_ptr,        # [N, K], or as _quantized describes it
    scale_ptr,         # of a quantised weight; None for a plain one
    bias_ptr,          # [N]; None without a bias
    temperature_ptr,   # [T]
    seed_ptr,          # [T] int64
    position_ptr,      # [T] int32
    keeps_ptr,         # [T] int32; None where no row's logits are kept
    logits_ptr,        # [T, N] float32; None where no row's logits are kept
    tops_ptr,          # [T, TILES] float32: the tile's greatest logit
    top_ids_ptr,       # [T, TILES] int32
    scores_ptr,        # [T, TILES] float64: the tile's greatest score
    score_ids_ptr,     # [T, TILES] int32
    T, X, stride_xt, stride_lt, eps,
    PARTS: tl.constexpr, C: tl.constexpr,
):
    pid_m, pid_n, split, _ = _product.place(T, C)
    offs_m, offs_n = pid_m * C.BLOCK_M + tl.arange(0, C.BLOCK_M), pid_n * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    _product.enter(weight_ptr, scale_ptr, offs_n.to(tl.int64), split, C)
    mask_row, rows_x = offs_m < T, offs_m
    mask_live = mask_row
    if index_ptr is not None:
        rows_x = tl.load(index_ptr + offs_m, mask_row, other=-1)
        mask_live = (rows_x >= 0) & (rows_x < X)
    squares = _product.load_squares(squares_ptr, rows_x, mask_live, PARTS)
    acc = _product.sums(x_ptr, weight_ptr, scale_ptr, offs_n.to(tl.int64), rows_x, mask_live, stride_xt, split, (T >> 31).to(tl.float32), C)
    acc = tl.where(mask_live[None, :], _product.normed(acc, _product.inverse_rms(squares, eps, C), bias_ptr, offs_n, C), 0.0)
    if index_ptr is not None:
        acc = tl.where((rows_x >= X)[None, :], float("nan"), acc)
    in_vocabulary, drops = (offs_n < C.N)[:, None], mask_row
    if keeps_ptr is not None:
        keeps = tl.load(keeps_ptr + offs_m, mask_row, other=0) != 0
        drops = mask_row & (keeps == 0)
        tl.store(logits_ptr + offs_m.to(tl.int64)[None, :] * stride_lt + offs_n[:, None], acc, in_vocabulary & keeps[None, :])
    x = tl.where(in_vocabulary, clean(acc), -_INF)
    top = tl.max(x, 0)
    top_id = tl.min(tl.where(x == top[None, :], offs_n[:, None], C.N), 0)
    temperature = tl.load(temperature_ptr + offs_m, mask_row, other=0.0)
    draws = drops & (temperature > 0.0) & (temperature < _INF) & (tl.abs(top) < _INF)
    seed, position = tl.load(seed_ptr + offs_m, mask_row, other=0), tl.load(position_ptr + offs_m, mask_row, other=0)
    score, token = _contest(x, offs_n, top, draws, tl.where(draws, temperature, 1.0), seed, position, C.N)
    at = offs_m.to(tl.int64) * C.TILES + pid_n
    tl.store(tops_ptr + at, top, drops)
    tl.store(top_ids_ptr + at, top_id, drops)
    tl.store(scores_ptr + at, score, drops)
    tl.store(score_ids_ptr + at, token, drops)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "keeps_ptr", "seq_lens_ptr", "status_ptr", "out_ptr"])
def _settle_kernel(
    tops_ptr, top_ids_ptr, scores_ptr, score_ids_ptr,                              # as in _head_kernel
    temperature_ptr,   # [R]
    keeps_ptr,         # [R] int32; None where no row's logits are kept
    seq_lens_ptr,      # [R] int32
    status_ptr,        # [R] int32, read and written
    out_ptr,           # [R] int32
    V: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    row = tl.program_id(0)
    if keeps_ptr is not None:
        if tl.load(keeps_ptr + row) != 0:
            return
    if tl.load(seq_lens_ptr + row) <= 0:
        tl.store(out_ptr + row, -1)
        return
    offs = tl.arange(0, BLOCK)
    at, mask = row.to(tl.int64) * TILES + offs, offs < TILES
    top, top_id = first_best(tl.load(tops_ptr + at, mask, other=-_INF), tl.load(top_ids_ptr + at, mask, other=V), V)
    _, drawn = first_best(tl.load(scores_ptr + at, mask, other=-_INF), tl.load(score_ids_ptr + at, mask, other=V), V)
    temperature = tl.load(temperature_ptr + row)
    good, none = (temperature >= 0.0) & (temperature < _INF), top == -_INF         # NaN compares as bad
    token = tl.where(good & (temperature > 0.0) & (tl.abs(top) < _INF), drawn, top_id)
    tl.store(out_ptr + row, tl.where(none, -1, token))
    tl.store(status_ptr + row, tl.load(status_ptr + row) | tl.where(none, _NO_TOKEN, 0) | tl.where(good, 0, _BAD_OPTION))


@dataclass(frozen=True)
class Workspace:
    """What the tiles of the vocabulary leave, for at most R rows."""

    tops: torch.Tensor         # float32 [R, tiles]
    top_ids: torch.Tensor      # int32 [R, tiles]
    scores: torch.Tensor       # float64 [R, tiles]
    score_ids: torch.Tensor    # int32 [R, tiles]

    @classmethod
    def allocate(cls, R: int, V: int, dtype: torch.dtype, device: torch.device | str) -> Workspace:
        """dtype: that of the rows."""
        tiles = _tile.parts(V, dtype, splits=False)
        return cls(*(torch.empty(R, tiles, dtype=kind, device=device) for kind in (torch.float32, torch.int32, torch.float64, torch.int32)))


def config(R: int, V: int, K: int, dtype: torch.dtype, kind: Kind = PLAIN) -> Tile:
    """norm_linear's, but for what no bit depends on. Beside the sums the contest holds two more tiles: with 4 warps 32 rows spilled 972 bytes on
    sm_100, 64 rows 904 on Hopper, and gfx942 spills at 32 with any. Weights that Hopper converts stay at 16 rows, whose 2 warps 8 would change for
    another instruction, with other bits."""
    c, arch = linear.config(R, V, K, dtype, kind=kind, streams=False), _check.capability()
    BLOCK_M = min(c.BLOCK_M, 16 if not arch or (arch // 10 == 9 and kind != PLAIN) else 64)
    return c._replace(BLOCK_M=BLOCK_M, num_warps=8 if BLOCK_M > 16 else c.num_warps)


def draw_out(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, temperature: torch.Tensor, seed: torch.Tensor, position: torch.Tensor,
             seq_lens: torch.Tensor, status: torch.Tensor, workspace: Workspace, out: torch.Tensor, bias: torch.Tensor | None = None,
             index: torch.Tensor | None = None, keeps: torch.Tensor | None = None, logits: torch.Tensor | None = None) -> None:
    """Writes a token to each row of `out`, -1 where there is none, and ors flags into `status`; where `keeps` is not 0 it writes the row's `logits`
    instead. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    op, x = "draw", scaled.x
    parts = _product.check_scaled(op, "scaled", scaled, None, None, _check.FLOATS, None)
    (X, K), device = x.shape, x.device
    if index is not None:
        _check.tensor(op, "index", index, (None,), (torch.int32,), device, aligned=False)
    stored, weight_scale, kind = check_weight(op, weight, None, K, x)
    R, V = X if index is None else index.shape[0], stored.shape[0]
    _check.require(K >= 1 and 1 <= V <= MAX_V, op, "weight", f"shape [{V}, {K}]", f"1 to {MAX_V} rows of at least one column")
    if bias is not None:
        _check.tensor(op, "bias", bias, (V,), (x.dtype,), device)
    for name, t, dtype in (("temperature", temperature, torch.float32), ("seed", seed, torch.int64), ("position", position, torch.int32),
                           ("seq_lens", seq_lens, torch.int32), ("status", status, torch.int32), ("out", out, torch.int32),
                           ("keeps", keeps, torch.int32)):
        if t is not None:
            _check.tensor(op, name, t, (R,), (dtype,), device, aligned=False)
    _check.require((keeps is None) == (logits is None), op, "keeps", "one of keeps and logits", "both or none")
    if logits is not None:
        _check.tensor(op, "logits", logits, (R, V), (torch.float32,), device, writes=True)
    c = config(R, V, K, x.dtype, kind)
    for name, t, dtype in (("tops", workspace.tops, torch.float32), ("top_ids", workspace.top_ids, torch.int32),
                           ("scores", workspace.scores, torch.float64), ("score_ids", workspace.score_ids, torch.int32)):
        _check.tensor(op, f"workspace.{name}", t, (None, c.TILES), (dtype,), device, dense=2)
        _check.require(t.shape[0] >= R, op, f"workspace.{name}", f"{t.shape[0]} rows", f"at least {R}; Workspace.allocate makes them")
    if R == 0:
        return
    w = (workspace.tops, workspace.top_ids, workspace.scores, workspace.score_ids)
    _head_kernel[c.grid(R)](x, scaled.squares, index, stored, weight_scale, bias, temperature, seed, position, keeps, logits, *w, R, X, x.stride(0),
                            0 if logits is None else logits.stride(0), eps, PARTS=parts, C=c, **c.options())
    _settle_kernel[(R,)](*w, temperature, keeps, seq_lens, status, out, V=V, TILES=c.TILES, BLOCK=triton.next_power_of_2(c.TILES), num_warps=4,
                         **overlap())


def draw(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, temperature: torch.Tensor, seed: torch.Tensor, position: torch.Tensor,
         seq_lens: torch.Tensor, status: torch.Tensor, bias: torch.Tensor | None = None, index: torch.Tensor | None = None) -> torch.Tensor:
    """Returns one token a row, int32 [R], -1 where there is none, and ors flags into `status`."""
    R, x = temperature.shape[0], scaled.x
    out, workspace = torch.empty(R, dtype=torch.int32, device=x.device), Workspace.allocate(R, weight.shape[0], x.dtype, x.device)
    draw_out(scaled, weight, eps, temperature, seed, position, seq_lens, status, workspace, out, bias, index)
    return out
