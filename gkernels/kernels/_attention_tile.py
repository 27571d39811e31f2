"""The device functions of attention: tiles, states and their folds. Every path through attention calls these, so that a row's bits cannot
depend on the path it took. `C` is the launch's Launch: everything that is static.

A state (m, l, acc) of some keys is the greatest logit (base 2), the sum of exp2(logit - m) and that sum weighted with the values. Rows with no
visible key have m = -inf, l = 0, acc = 0, and folding such a state in is the identity, bit for bit. Within a segment l is [M, BLOCK_N / 4, 1].
"""

import triton
import triton.language as tl


@triton.jit
def empty_state(M: tl.constexpr, C: tl.constexpr):
    DV: tl.constexpr = C.BLOCK_DV
    return tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, DV), tl.float32)


@triton.jit
def empty_tile(M: tl.constexpr, C: tl.constexpr):
    PAIRS: tl.constexpr = C.BLOCK_N // 4
    DV: tl.constexpr = C.BLOCK_DV
    return tl.full((M,), float("-inf"), tl.float32), tl.zeros((M, PAIRS, 1), tl.float32), tl.zeros((M, DV), tl.float32)


@triton.jit
def fold(m, l, acc, m_next, l_next, acc_next):
    """The state of some keys and of the keys after them. fma by name: two code sites contracted differently would differ in bits."""
    top = tl.maximum(m, m_next)
    safe = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp2(m - safe), tl.exp2(m_next - safe)
    return top, tl.fma(l, a, l_next * b), tl.fma(acc, tl.broadcast_to(a[:, None], acc.shape), acc_next * b[:, None])


@triton.jit
def pair_sums(x, M: tl.constexpr, N: tl.constexpr):
    """[M, N] -> [M, N / 2, 1]: neighbours added. A sum of two has no order, so its bits do not depend on how threads share the tile."""
    return tl.sum(tl.reshape(x, (M, N // 2, 2)), 2, keep_dims=True)


@triton.jit
def quad_sums(x, M: tl.constexpr, N: tl.constexpr):
    """[M, N] -> [M, N / 4, 1]: halves added, then neighbours, which one thread holds in every layout that a tile of logits has."""
    return pair_sums(tl.sum(tl.reshape(x, (M, 2, N // 2)), 1), M, N // 2)


@triton.jit
def row_sums(x, M: tl.constexpr, N: tl.constexpr):
    """[M, N, 1] -> [M] as a tree of pairs, N a power of two."""
    if N == 1:
        total = tl.reshape(x, (M,))
    else:
        total = row_sums(pair_sums(x, M, N), M, N // 2)
    return total


@triton.jit
def rows_of(row0, offs_m, query_len, first_token, kv_head, C: tl.constexpr):
    """A tile's rows, the heads of a group side by side, all [M]: token, head, live."""
    row, member = row0 + offs_m // C.GROUP, offs_m % C.GROUP
    token, head = first_token.to(tl.int64) + row, (kv_head * C.G + member).to(tl.int64)
    return token, head, (row < query_len) & (member < C.G)


@triton.jit
def sight_of(row0, offs_m, query_len, kv_len, request, first_token, kv_head, inputs, strides, extents, C: tl.constexpr):
    """What decides which keys a tile's rows see, and how, [M]: position, first key, end of keys, tree bits, slope."""
    left, right = extents[4], extents[5]
    token, head, live = rows_of(row0, offs_m, query_len, first_token, kv_head, C)
    position = kv_len - query_len + row0 + offs_m // C.GROUP
    first = position - left if C.HAS_LEFT else position
    stop = tl.minimum(position + right + 1, kv_len) if C.HAS_RIGHT else kv_len + offs_m * 0
    tree = tl.load(inputs[11] + token, live, other=-1) if C.HAS_TREE else position
    slope = position.to(tl.float32)
    if C.HAS_ALIBI:
        slope = tl.load(inputs[10] + request.to(tl.int64) * strides[12] + head, live, other=0.0) * 1.4426950408889634
    return position, first, stop, tree, slope


@triton.jit
def as_operand(q, C: tl.constexpr):
    """q in the dtype that products with its cache take: beside fp8 it is float16, which holds fp8 exactly and costs a quarter of bfloat16's
    instructions. What of a bfloat16 exceeds 65504 becomes that, what is below 2^-14 is rounded to a multiple of 2^-24."""
    if C.HAS_SCALE and q.dtype == tl.bfloat16:
        return tl.clamp(q.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    else:
        return q


@triton.jit
def load_queries(row0, query_len, first_token, kv_head, q_ptr, strides, M: tl.constexpr, C: tl.constexpr):
    """[M, BLOCK_D] of q, as an operand, zeros in rows that are not live."""
    offs_d = tl.arange(0, C.BLOCK_D)
    token, head, live = rows_of(row0, tl.arange(0, M), query_len, first_token, kv_head, C)
    q = q_ptr + token[:, None] * strides[0] + head[:, None] * strides[1] + offs_d[None, :]
    return as_operand(tl.load(q, live[:, None] & (offs_d < C.D)[None, :], other=0.0), C)


@triton.jit
def load_pages(table_ptr, n, limit, C: tl.constexpr):
    """What the table says of the keys from n on: [BLOCK_N / P] where pages tile the block, else [BLOCK_N]; 0 for keys past the limit. Loops read it
    two tiles ahead: what is read one ahead, the pipeline loads right before its use, and each tile waits for memory."""
    PAGES: tl.constexpr = C.BLOCK_N // C.P if C.BLOCK_N % C.P == 0 else C.BLOCK_N
    STEP: tl.constexpr = C.BLOCK_N // PAGES
    key = n + tl.arange(0, PAGES) * STEP
    return tl.load(table_ptr + key // C.P, key < limit, other=0)


@triton.jit
def pages_of(entries, N):
    """Pages that exist: entries that are none become the last, by a minimum, since a select would keep the compiler from a 32 by 32 bit product in
    the address."""
    return tl.minimum(entries.to(tl.uint32), (N - 1).to(tl.uint32)).to(tl.int32)


@triton.jit
def lanes_of(cache_ptr, stride_p, BLOCK_D: tl.constexpr, C: tl.constexpr):
    """Pointers [BLOCK_N, BLOCK_D] to the first page's rows and columns: what of an address does not change from tile to tile."""
    slot = tl.arange(0, C.BLOCK_N) % C.P if C.BLOCK_N % C.P == 0 else tl.arange(0, C.BLOCK_N) * 0
    return cache_ptr + (slot.to(tl.int64) if C.WIDE else slot)[:, None] * stride_p + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _offsets(pages, kv_head, n, stride_n, stride_p, stride_h, C: tl.constexpr):
    """[BLOCK_N] int64: from the first page's row to that of the page and head."""
    N: tl.constexpr = C.BLOCK_N
    ALIGN: tl.constexpr = C.ALIGN
    offsets = pages.to(tl.int64) * stride_n + kv_head.to(tl.int64) * stride_h
    if N % C.P == 0:
        PAGES: tl.constexpr = N // C.P
        P: tl.constexpr = C.P
        offsets = tl.reshape(tl.broadcast_to(offsets[:, None], (PAGES, P)), (N,))
    else:
        offsets += ((n + tl.arange(0, N)) % C.P).to(tl.int64) * stride_p
    return tl.multiple_of(offsets, ALIGN)                                         # which the reshape forgets, and 16-byte loads need


@triton.jit
def _load(lanes, offsets, n, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr):
    mask = (n + tl.arange(0, C.BLOCK_N) < limit)[:, None]
    if BLOCK_D != D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(lanes + offsets[:, None], mask, other=0.0)


@triton.jit
def load_tile(k_lanes, v_lanes, pages, kv_head, n, limit, strides, C: tl.constexpr):
    """Keys [BLOCK_N, BLOCK_D] and values [BLOCK_N, BLOCK_DV] of one head at these pages; dead ones are zeros and are not read."""
    k_offsets = _offsets(pages, kv_head, n, strides[2], strides[3], strides[4], C)
    v_offsets = k_offsets if C.TWINS else _offsets(pages, kv_head, n, strides[5], strides[6], strides[7], C)
    return _load(k_lanes, k_offsets, n, limit, C.D, C.BLOCK_D, C), _load(v_lanes, v_offsets, n, limit, C.DV, C.BLOCK_DV, C)


@triton.jit
def visibility(key, first, stop, tree, context, C: tl.constexpr):
    """[M, BLOCK_N]: first <= key < stop of the row, and of the request's own first 64 query tokens those whose bit is set."""
    seen = key[None, :] < stop[:, None]
    if C.HAS_LEFT:
        seen = seen & (key[None, :] >= first[:, None])
    if C.HAS_TREE:
        new = key - context
        bit = (tree[:, None] >> tl.minimum(tl.maximum(new, 0), 63).to(tl.int64)[None, :]) & 1
        seen = seen & ((bit != 0) | ((new < 0) | (new > 63))[None, :])
    return seen


@triton.jit
def _tanh(x):
    """1 - 2 / (exp 2x + 1), and below 0.2, where that cancels, its series up to x^7 (next term: 6e-8 of the sum)."""
    y = x * x
    series = x * (1.0 + y * (-0.3333333333 + y * (0.1333333333 + y * -0.0539682540)))
    return tl.where(tl.abs(x) < 0.2, series, 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))


@triton.jit
def operand(x, dtype: tl.constexpr, C: tl.constexpr):
    """x as an operand of q's dtype, exactly. Not from fp8 at once: that is one element an instruction, at a sixteenth of the rate."""
    if C.HAS_SCALE:
        if C.PACKED:
            # Four at a time, by name: a conversion that Triton knows it puts behind the change of layout, which then goes byte by byte, and products
            # of 16 rows take columns in another order than those of 64, so that their bits would differ.
            x = tl.inline_asm_elementwise("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }", "=r,=r,r",
                                          [x], dtype=tl.float16, is_pure=False, pack=4)
        else:
            x = x.to(tl.float16)
        if dtype != tl.float16:
            x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def products(q, k, C: tl.constexpr):
    """q k^T [M, N]; q [M, D], k [N, D]."""
    return tl.dot(q, operand(k, q.dtype, C).T, input_precision=C.PRECISION)


@triton.jit
def weigh(s, seen, masked: tl.constexpr, key, position, slope, scale, cap, m, C: tl.constexpr):
    """What one more tile of keys makes of m [M]; alpha [M], by which the weights of the keys before are multiplied; and the tile's weights [M, N].
    s [M, N] from `products`. `scale` makes logits base 2; with a cap it makes them multiples of the cap, which is base 2 itself. Where not `masked`,
    keys that are not seen are -inf already."""
    if C.HAS_CAP or C.HAS_ALIBI:
        s = s * scale
        if C.HAS_CAP:
            s = cap * _tanh(s)
        if C.HAS_ALIBI:
            s = s - slope[:, None] * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - safe[:, None])
    else:
        if masked:
            s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1) * scale)
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(tl.fma(s, 0.0 + scale, -safe[:, None]))                # a sum, and so in a register: else sm_90 spills 8 bytes more
    return top, tl.exp2(m - safe), p


@triton.jit
def step(s, v, seen, masked: tl.constexpr, key, position, slope, scale, cap, m, l, acc, dtype: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """The state after one more tile of keys: see `weigh`; v [N, DV], l [M, N / 4, 1], acc [M, DV]."""
    m, alpha, p = weigh(s, seen, masked, key, position, slope, scale, cap, m, C)
    l = tl.fma(l, alpha[:, None, None], quad_sums(p, M, C.BLOCK_N))
    return m, l, tl.dot(p.to(dtype), operand(v, dtype, C), acc * alpha[:, None], input_precision=C.PRECISION)


@triton.jit
def finish(m, l, acc, poisoned, token, head, live, offs_d, kv_head, inputs, strides, C: tl.constexpr):
    """Writes the rows of a finished state to out and lse."""
    v_scale = tl.load(inputs[13] + kv_head * strides[14]) if C.HAS_SCALE else 1.0
    out_ptr, lse_ptr, sinks_ptr = inputs[7], inputs[8], inputs[9]
    if C.HAS_SINK:                                                                # one more key, without a value
        sink = tl.load(sinks_ptr + head, live, other=float("-inf")) * 1.4426950408889634
        top = tl.maximum(m, sink)
        safe = tl.where(top == float("-inf"), 0.0, top)
        alpha = tl.exp2(m - safe)
        l, acc, m = tl.fma(l, alpha, tl.exp2(sink - safe)), acc * alpha[:, None], top
    poison = tl.where(poisoned != 0, float("nan"), 0.0)                           # and its 0.0 makes one path's -0.0 the other's 0.0
    acc = acc * (v_scale / tl.where(l == 0.0, 1.0, l))[:, None] + poison
    out = out_ptr + token[:, None] * strides[9] + head[:, None] * strides[10] + offs_d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), live[:, None] & (offs_d < C.DV)[None, :])
    if C.HAS_LSE:
        tl.store(lse_ptr + token * strides[11] + head, (m + tl.log2(tl.where(l == 0.0, 1.0, l))) * 0.6931471805599453 + poison, live)


@triton.jit
def put_state(state_ptr, rows, offs_d, m, l, acc, live, M: tl.constexpr, C: tl.constexpr):
    """Stores rows of a state of M rows, as float32: acc [M, BLOCK_DV], m [M], l [M]."""
    tl.store(state_ptr + rows[:, None] * C.BLOCK_DV + offs_d[None, :], acc, live[:, None])
    tl.store(state_ptr + M * C.BLOCK_DV + rows, m, live)
    tl.store(state_ptr + M * (C.BLOCK_DV + 1) + rows, l, live)


@triton.jit
def get_state(state_ptr, rows, offs_d, live, M: tl.constexpr, C: tl.constexpr):
    """Loads rows of a state that another program may have stored, hence past the L1; empty where not `live`, one for all or one a row."""
    live = live & (rows >= 0)
    acc = tl.load(state_ptr + rows[:, None] * C.BLOCK_DV + offs_d[None, :], live[:, None], other=0.0, cache_modifier=".cg")
    m = tl.load(state_ptr + M * C.BLOCK_DV + rows, live, other=float("-inf"), cache_modifier=".cg")
    return m, tl.load(state_ptr + M * (C.BLOCK_DV + 1) + rows, live, other=0.0, cache_modifier=".cg"), acc


@triton.jit
def count_in(counter_ptr, count, total):
    """Counts `count` of `total` as stored. True for the last to arrive, who finds all of it there and the counter at zero for the next launch."""
    tl.debug_barrier()                                                            # every thread's stores are out before the count says so
    is_last = tl.atomic_add(counter_ptr, count, sem="acq_rel", scope="gpu") + count == total
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last
