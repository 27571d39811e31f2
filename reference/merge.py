"""The merge of two attentions in plain PyTorch. Twin of gkernels/kernels/merge.py."""

import torch

from .rmsnorm import zero_pads


def merge(a, a_lse, b, b_lse, num_tokens=None):
    """Returns out [T, H, D] and lse [T, H]; a side with lse -inf has no keys, and what its row holds does not count."""
    wide, sides = torch.promote_types(a.dtype, torch.float32), ((a, a_lse), (b, b_lse))
    greatest = torch.maximum(a_lse, b_lse).to(wide)
    greatest = torch.where(greatest == float("-inf"), 0, greatest)
    weights = [(lse.to(wide) - greatest).exp()[..., None] for _, lse in sides]
    rows = [x.to(wide).masked_fill((lse == float("-inf"))[..., None], 0) for x, lse in sides]
    total = weights[0] + weights[1]
    out = ((rows[0] * weights[0] + rows[1] * weights[1]) / torch.where(total == 0, 1, total)).to(a.dtype)
    lse = greatest + total[..., 0].log()
    if num_tokens is None:
        return out, lse
    live = torch.arange(a.shape[0], device=a.device)[:, None] < num_tokens
    return zero_pads(out, num_tokens), torch.where(live, lse, float("-inf"))
