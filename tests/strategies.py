"""What hypothesis draws: shapes, dtypes, strides and junk. Tensor contents come from a drawn seed, so that shrinking stays quick."""

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISON = [float("nan"), float("inf"), float("-inf"), 6e4]

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
poisons = st.sampled_from(POISON)


def randn(seed, *shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def strided(t, pad=16):
    """The same values with rows `pad` elements further apart than they need be (pad keeps fp16 rows 16-byte aligned at 16)."""
    roomy = torch.full((*t.shape[:-1], t.shape[-1] + pad), float("nan"), dtype=t.dtype, device=t.device)
    roomy[..., :t.shape[-1]] = t
    return roomy[..., :t.shape[-1]]


def counter(n, device):
    return torch.tensor([n], dtype=torch.int32, device=device)
