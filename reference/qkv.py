"""The rest of an RMSNorm, q, k and v projections, the heads' norms, rotation and the cache write in plain PyTorch.

Twin of gkernels/kernels/qkv.py."""

from .linear import norm_linear
from .rotary import rotary_kv_write


def norm_qkv(scaled, weight, eps, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, bias=None, q_norm=None, k_norm=None,
             num_tokens=None):
    (T, H, D), KV = q_out.shape, k_cache.shape[2]
    q, k, v = norm_linear(scaled, weight, eps, bias).view(T, H + 2 * KV, D).split([H, KV, KV], 1)
    rotary_kv_write(q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, False, q_norm, k_norm, eps, num_tokens)
