"""Bins of distance from a row's greatest logit, counted where many tokens are near the end of the kept prefix. They lie where the end may be: a bin
is the whole part of -z times the row's scale, less its offset; tokens above bin 0 are surely kept. Products only, which no compiler fuses into a
sum, so that the pass which counts and the pass which draws see the same bins."""

import triton
import triton.language as tl

BINS = 256                                            # histograms count by ballots: a bin costs an eighth of an instruction a token, and POPC at that
LINEAR = 192                                          # of them as wide as each other; the others 4 an octave, which holds any temperature
_BINS, _LINEAR = tl.constexpr(BINS), tl.constexpr(LINEAR)
_INF = tl.constexpr(float("inf"))


@triton.jit
def bin_of(z, scale, offset):
    """The bin of z = (x - top) / temperature, which never falls as x falls; below 0 above the first."""
    y = z * (-scale / (offset + _LINEAR))                                          # 1 where the linear bins end
    linear = tl.minimum((tl.where(y < 1.0, z, 0.0) * -scale).to(tl.int32) - offset, _LINEAR - 1)
    far = (y.to(tl.int32, bitcast=True) - 0x3F800000 >> 21) + _LINEAR
    return tl.where(y < 1.0, linear, tl.minimum(far, _BINS - 1))


@triton.jit
def _edge(bins, scale, offset):
    """How far from 0 z begins in a bin."""
    far = (((bins - _LINEAR) << 21) + 0x3F800000).to(tl.float32, bitcast=True) * ((offset + _LINEAR) / scale)
    return tl.where(bins >= _BINS, _INF, tl.where(bins < _LINEAR, (bins + offset).to(tl.float32) / scale, far))


@triton.jit
def bounds_of(counts, above, below, total, scale, offset, top_k, top_p, is_typical):
    """Where the kept prefix may end: first and last bin of the mass's end, bin of the count's end, how many listed tokens the count leaves, and how
    many are listed, those of all these bins. `above` is the mass above bin 0, `below` that of the far, wide bins. A bin's edges bound its mass, so
    the prefix up to a bin is known from its head and, with the total, from its tail: to a bin's width of the smaller of the two. 2e-5 covers the
    rounding of masses and sums."""
    bins = tl.arange(0, _BINS)                                                     # [BINS]
    through = tl.cumsum(counts, 0)
    k_bin = tl.min(tl.where(through >= top_k, bins, _BINS), 0)
    head_most = above + tl.cumsum(counts.to(tl.float32) * tl.exp(-_edge(bins, scale, offset)), 0)
    head_least = above + tl.cumsum(counts.to(tl.float32) * tl.exp(-_edge(bins + 1, scale, offset)), 0)
    is_far = bins >= _LINEAR
    end_least, end_most = tl.max(tl.where(is_far, 0.0, head_least), 0), tl.max(tl.where(is_far, 0.0, head_most), 0)
    most = tl.minimum(head_most, tl.where(is_far, total - (tl.max(head_least, 0) - head_least), total - below - (end_least - head_least)))
    least = tl.maximum(head_least, tl.where(is_far, total - (tl.max(head_most, 0) - head_most), total - below - (end_most - head_most)))
    slack = 2e-5 * total + 1e-4
    need_least = top_p * tl.maximum(tl.max(tl.where(bins < k_bin, least, 0.0), 0), 1.0) - slack    # the greatest token alone has mass 1
    need_most = top_p * tl.max(tl.where(bins <= k_bin, most, 0.0), 0) + slack
    has_p = top_p < 1.0
    first = tl.where(is_typical, 0, tl.where(has_p, tl.min(tl.where(most >= need_least, bins, k_bin), 0), k_bin))
    last = tl.where(has_p, tl.min(tl.where(least >= need_most, bins, k_bin), 0), k_bin)
    first, last = tl.minimum(first, k_bin), tl.minimum(last, k_bin)
    listed = ((bins >= first) & (bins <= last)) | (bins == k_bin)
    before = tl.sum(tl.where((bins < k_bin) & (listed == 0), counts, 0), 0)
    return first, last, k_bin, top_k - before, tl.sum(tl.where(listed, counts, 0), 0)
