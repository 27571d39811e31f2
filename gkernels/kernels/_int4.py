"""int4 weights: our layout, and what brings the tensors of GPTQ and AWQ checkpoints into it, exactly. For loading: it reads tensors and allocates.

A row of K weights lies in blocks of 256 columns, a block in 32 words: nibble i of word j is q of the block's column 32 i + j. So the i-th nibbles
of a block are a tile of 32 neighbouring columns, one product with a slice of x, and a load of 16 bytes is 32 weights of one row. Columns past K
hold zeros that meet no x. A group's constant is the bits of its float32 scale, whose low 13 or 16 are zeros since it comes from fp16 or bf16,
with its zero point, 0 to 16, in the low five.
"""

from __future__ import annotations

import torch

from . import _check

WORDS = 32                                   # a block's
BLOCK = 8 * WORDS                            # columns
GROUPS = (32, 64, 128)                       # group sizes within a block
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)         # the column of eight whose q is in nibble i


def check_group(op: str, K: int, count: int, name: str = "scales") -> int:
    """The group size G of `count` groups of K columns."""
    _check.require(count >= 1 and K % count == 0, op, name, f"{count} groups for {K} columns", "a number of groups that divides the columns")
    G = K // count
    _check.require(count == 1 or G in GROUPS or G % BLOCK == 0, op, name, f"groups of {G} columns",
                   f"32, 64, 128, a multiple of {BLOCK}, or all {K}")
    return G


def pack_gptq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor,
              g_idx: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (weight, scales) for `linear_int4` from a layer of a GPTQ checkpoint of 4 bits: qweight int32 [K / 8, N], qzeros int32 [K / G, N / 8],
    which hold zero - 1, scales [K / G, N] in fp16, bf16 or float32, g_idx int32 [K]. Raises ValueError or TypeError."""
    op = "pack_gptq"
    _check_parts(op, qweight, qzeros, scales)
    K, N = qweight.shape[0] * 8, qweight.shape[1]
    G = _check_shapes(op, qzeros, scales, K, N)
    if g_idx is not None:
        _check.require(g_idx.shape == (K,), op, "g_idx", f"shape {list(g_idx.shape)}", f"[{K}]")
        in_order = torch.arange(K, device=g_idx.device) // G
        _check.require(torch.equal(g_idx.long(), in_order), op, "g_idx", "columns in another order than their groups",
                       "the order of the columns; quantise with desc_act=False")
    q = torch.stack([qweight >> 4 * i & 15 for i in range(8)], 1).view(K, N)
    zeros = torch.stack([qzeros >> 4 * i & 15 for i in range(8)], 2).view(-1, N) + 1
    return _pack(q), _constants(op, scales, zeros)


def pack_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (weight, scales) for `linear_int4` from a layer of an AWQ checkpoint of 4 bits (version "gemm"): qweight int32 [K, N / 8], qzeros
    int32 [K / G, N / 8], scales [K / G, N] in fp16, bf16 or float32. Raises ValueError or TypeError."""
    op = "pack_awq"
    _check_parts(op, qweight, qzeros, scales)
    K, N = qweight.shape[0], qweight.shape[1] * 8
    _check_shapes(op, qzeros, scales, K, N)
    columns = [AWQ_ORDER.index(i) for i in range(8)]
    q, zeros = (torch.stack([t >> 4 * i & 15 for i in columns], 2).view(-1, N) for t in (qweight, qzeros))
    return _pack(q), _constants(op, scales, zeros)


def _check_parts(op, qweight, qzeros, scales):
    for name, t, dtypes in (("qweight", qweight, (torch.int32,)), ("qzeros", qzeros, (torch.int32,)), ("scales", scales, _check.FLOATS)):
        _check.require(isinstance(t, torch.Tensor), op, name, t, "a tensor of the checkpoint", TypeError)
        _check.require(t.dim() == 2, op, name, f"{t.dim()} dimensions", "2")
        _check.require(t.dtype in dtypes, op, name, t.dtype, " or ".join(map(str, dtypes)), TypeError)
        _check.require(t.device == qweight.device, op, name, f"device {t.device}", f"{qweight.device} like qweight; move it with .to()")
    _check.require(qweight.numel() > 0, op, "qweight", f"shape {list(qweight.shape)}", "at least one row and one column")
    _check.require(bool(scales.isfinite().all()), op, "scales", "NaN or infinity", "finite numbers; quantise the checkpoint again")


def _check_shapes(op, qzeros, scales, K, N):
    """The group size."""
    G = check_group(op, K, scales.shape[0])
    _check.require(scales.shape[1] == N, op, "scales", f"shape {list(scales.shape)}", f"[{K // G}, {N}]")
    _check.require(qzeros.shape == (K // G, N // 8) and N % 8 == 0, op, "qzeros", f"shape {list(qzeros.shape)}", f"[{K // G}, {N / 8:g}]")
    return G


def _pack(q):
    """[K, N] of 0 to 15 -> int32 [N, ceil(K / 256) * 32]."""
    K, N = q.shape
    padded = torch.nn.functional.pad(q, (0, 0, 0, -K % BLOCK)).view(-1, 8, WORDS, N)
    words = padded[:, 0].clone()
    for i in range(1, 8):
        words |= padded[:, i] << 4 * i
    return words.reshape(-1, N).T.contiguous()


def _constants(op, scales, zeros):
    bits = scales.float().view(torch.int32)
    _check.require(bool((bits & 31 == 0).all()), op, "scales", "more digits than fp16 or bf16 hold", "values of those; convert with .half()")
    return (bits | zeros).contiguous()
