"""Noise that depends on (seed, position, token id) alone: a request draws the same tokens in any row, batch, bucket and graph.

A row's key is the four words of Philox-4x32-10 (Salmon et al. 2011) of its seed at counter (position, 0, 0, 0). A token has two words, each a mix of
its id with two of the key's: three products of 32 bits and three shifts (the constants of Wellons' low-bias hash), 9 instructions a word where
Philox itself takes 120. The second word of the key enters between the products, so that no two rows' words are shifts of each other.
"""

import triton
import triton.language as tl


@triton.jit
def key_at(seed, position):
    """The four words of a row's key."""
    zero = tl.zeros_like(position)
    return tl.philox(seed, position, zero, zero, zero)


@triton.jit
def word_of(ids, first, second):
    """32 random bits for every token."""
    x = ids.to(tl.uint32) * 0x9E3779B1 + first.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD + second.to(tl.uint32)
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def gumbel(seed, position, ids):
    """-log(E), E = -log(1 - v). v has the first word's 32 bits, and below 1/32, where E is small and the winners of large vocabularies are, both."""
    key = key_at(seed, position)
    high, low = word_of(ids, key[0], key[1]), word_of(ids, key[2], key[3])
    v = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10
    w = ((high ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10                      # 1 - v, without its rounding
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * 0.2))))                     # of -log(1 - v): 2^-27 off at v = 2^-5
    return -tl.log(tl.where(high < 0x08000000, series, -tl.log(w)))
