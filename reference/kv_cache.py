"""The paged KV cache's write in plain PyTorch. Twin of gkernels/kernels/kv_cache.py."""


def kv_write(k, v, k_cache, v_cache, slot_mapping):
    N, P = k_cache.shape[:2]
    live = (slot_mapping >= 0) & (slot_mapping < N * P)
    page, offset = slot_mapping[live] // P, slot_mapping[live] % P
    k_cache[page, offset] = k[live].to(k_cache.dtype)
    v_cache[page, offset] = v[live].to(v_cache.dtype)
