"""Noise that depends on (seed, position, token id) alone: a request draws the same tokens in any row, batch, bucket and graph.

A row's 64-bit key is Philox-4x32-10 (Salmon et al. 2011) of its seed at counter (position, 0, 0, 0); a token's 64 bits are the key's SplitMix64
stream (Steele, Lea and Flood 2014) at the token's id: 22 instructions an element where Philox itself takes 120.
"""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, position, ids):
    """Two words of 32 random bits for every token."""
    zero = tl.zeros_like(position)
    high, low, _, _ = tl.philox(seed, position, zero, zero, zero)
    key = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    x = key + (ids.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 32).to(tl.uint32), x.to(tl.uint32)


@triton.jit
def gumbel(seed, position, ids):
    """-log(E), E = -log(1 - v). v has the high word's 32 bits, and below 1/32, where E is small and the winners of large vocabularies are, all 64."""
    high, low = random_bits(seed, position, ids)
    v = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10
    w = ((high ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10                      # 1 - v, without its rounding
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * 0.2))))                     # of -log(1 - v): 2^-27 off at v = 2^-5
    return -tl.log(tl.where(high < 0x08000000, series, -tl.log(w)))
