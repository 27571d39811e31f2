"""Representative calls of every room: the shapes and options that its configurations distinguish.

One list serves the compiler test (every kernel for every target), the specialisation census, the launch record and the dispatcher's opcheck.
A room's function takes a device and a dtype and yields (case, function, arguments).
"""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

from gkernels.kernels import _check
from tests.strategies import Batch, Features, counter

ROOMS = {}
MANY = 528 if _check.INTERPRETED else 8448    # rows of a weight that give a program to each multiprocessor; the interpreter's tiles depend on none
MIXED = Batch([18, 1, 1], [0, 30, 7], 16, pads=4, spare_requests=1)                 # for attention: the first is tall, but for G1 and G7
DECODE = Batch([1, 1, 1], [4, 30, 7], 16, pads=1, spare_requests=1)                 # as many tokens as requests, so none
PLAIN, FEATURES = Features(), Features(window=(9, -1), tree=True, softcap=1.5, sinks=True, alibi=2, scales=2)


def room(calls):
    ROOMS[calls.__name__] = calls
    return calls


def all_calls(device, dtypes=(torch.float32, torch.float16, torch.bfloat16)):
    for name, calls in ROOMS.items():
        for dtype in dtypes:
            for case, function, arguments in calls(device, dtype):
                yield f"{name}.{case}.{str(dtype)[6:]}", function, arguments


@room
def rmsnorm(device, dtype):
    from gkernels.kernels import rmsnorm
    for T, D in ((3, 64), (3, 4096), (2, 16384)):
        x, weight = torch.zeros(T, D, dtype=dtype, device=device), torch.ones(D, dtype=dtype, device=device)
        yield f"rmsnorm D{D}", rmsnorm.rmsnorm_out, (x, weight, 1e-5, torch.empty_like(x), counter(2, device))
        yield f"add_rmsnorm D{D}", rmsnorm.add_rmsnorm_out, (x, x.clone(), weight, 1e-5, torch.empty_like(x), counter(2, device))
    q = torch.zeros(3, 6, 128, dtype=dtype, device=device)
    yield "scale", rmsnorm.scale, (torch.zeros(3, 2048, dtype=dtype, device=device), torch.ones(2048, dtype=dtype, device=device),
                                   scaled(3, 2048, dtype, device), counter(2, device))
    yield "heads", rmsnorm.rmsnorm_out, (q[:, :4], torch.ones(128, dtype=dtype, device=device), 1e-5, torch.empty_like(q[:, :4]))


@room
def schedule(device, dtype):
    from gkernels.kernels import attention, schedule
    if dtype == torch.float32:                       # integers only: one dtype tells it all
        for case, batch, window in (("mixed", MIXED, (-1, -1)), ("mixed window", MIXED, (9, -1)), ("decode", DECODE, (-1, -1))):
            tiling = attention.tiling(batch.T, batch.R, 8, 2, 64, 64, dtype, device, True, window, 4)
            out = schedule.Schedule.allocate(batch.T, batch.R, tiling, device)
            yield case, schedule.schedule_out, (*batch.metadata(device), 16, batch.N, tiling, out)


def attend(query_start_loc, seq_lens, block_table, tiling, plan, workspace, q, k_cache, v_cache, out, lse, options):
    """attention_out with what it may rely on: the schedule's own work list, and counters that are zeros."""
    from gkernels.kernels import attention, schedule
    schedule.schedule_out(query_start_loc, seq_lens, block_table, k_cache.shape[1], k_cache.shape[0], tiling, plan)
    workspace.counters.zero_()
    attention.attention_out(q, k_cache, v_cache, block_table, plan.work, workspace, out, lse, tiling=tiling, **options)


@room
def attention(device, dtype):
    from gkernels.kernels import attention, schedule

    def call(batch, G, D, has_lse, drawn=PLAIN, apart_from=attention.APART_FROM, between=0, programs=4, ready=False):
        H, K, DV = G * 2, 2, drawn.DV or D
        with patch.object(attention, "APART_FROM", apart_from):
            tiling = attention.tiling(batch.T, batch.R, H, K, D, DV, dtype, device, drawn.causal, drawn.window, programs)
        q, caches = torch.zeros(batch.T, H, D + between, dtype=dtype, device=device)[..., :D], batch.caches(K, D, dtype, device, 0.0, DV)
        if drawn.scales:
            caches = [cache.to(torch.float8_e4m3fn) for cache in caches]
        plan, workspace = schedule.Schedule.allocate(batch.T, batch.R, tiling, device), attention.Workspace.allocate(tiling, device)
        lse = torch.zeros(batch.T, H, device=device) if has_lse else None
        return attend, (*batch.metadata(device), tiling, plan, workspace, q, *caches, q.new_empty(batch.T, H, DV), lse,
                        drawn.options(batch, H, K, device) | {"ready": ready})

    if dtype == torch.float32:                       # its tiles are small whatever the heads
        yield "G4 D64 mixed", *call(MIXED, 4, 64, has_lse=True)
        yield "G4 D64 decode", *call(DECODE, 4, 64, has_lse=False)
        return
    yield "G4 D128 mixed", *call(MIXED, 4, 128, has_lse=False)
    yield "G4 D128 decode", *call(DECODE, 4, 128, has_lse=True)
    yield "G4 D128 decode by many", *call(DECODE, 4, 128, has_lse=True, programs=264)
    yield "G4 D64 decode by many, features", *call(DECODE, 4, 64, True, replace(FEATURES, scales=0, softcap=0.0), programs=264)
    for programs in (4, 264):
        yield f"G4 D128 fp8 decode by {programs}", *call(DECODE, 4, 128, False, Features(scales=2), programs=programs, ready=programs == 4)
        yield f"G4 D128 ready decode by {programs}", *call(DECODE, 4, 128, has_lse=False, programs=programs, ready=True)
    yield "G16 D256 mixed", *call(MIXED, 16, 256, has_lse=True)
    yield "G7 D80 decode", *call(DECODE, 7, 80, has_lse=False)
    yield "G4 D64 features", *call(MIXED, 4, 64, True, FEATURES)
    yield "G4 D128 tall", *call(MIXED, 4, 128, has_lse=False, apart_from=0)
    for between in (8, 1):                           # columns between heads: copied 16 bytes at a time, and, since they are off, in the other launch
        yield f"G4 D64 tall {between} apart", *call(MIXED, 4, 64, has_lse=False, apart_from=0, between=between)
    yield "G4 D64 tall features", *call(MIXED, 4, 64, True, replace(FEATURES, scales=0), apart_from=0)


@room
def merge(device, dtype):
    from gkernels.kernels import merge
    for H, D in ((1, 80), (32, 128), (7, 576)):
        a, b, out = (torch.zeros(3, H, D, dtype=dtype, device=device) for _ in range(3))
        a_lse, b_lse, lse = torch.zeros(3, 3, H, device=device)
        yield f"H{H} D{D}", merge.merge_out, (a, a_lse, b, b_lse, out)
        yield f"H{H} D{D} lse", merge.merge_out, (a, a_lse, b, b_lse, out, lse, counter(2, device))
    a_lse = torch.zeros(32, 3, device=device).T
    a = torch.zeros(3, 32, 128, dtype=dtype, device=device)
    yield "heads first", merge.merge_out, (a, a_lse, a.clone(), a_lse.clone(), torch.empty_like(a))


@room
def kv_cache(device, dtype):
    from gkernels.kernels import kv_cache
    slots = torch.tensor([5, -1, 40], device=device)
    for K, D, DV in ((8, 128, 128), (2, 80, 80), (1, 576, 512), (70, 128, 128)):
        k, v = torch.zeros(3, K, D, dtype=dtype, device=device), torch.zeros(3, K, DV, dtype=dtype, device=device)
        k_cache, v_cache = (torch.zeros(4, 16, K, width, dtype=dtype, device=device) for width in (D, DV))
        yield f"NHD K{K} D{D}", kv_cache.kv_write, (k, v, k_cache, v_cache, slots)
    k, both = torch.zeros(3, 8, 128, dtype=dtype, device=device), torch.zeros(4, 8, 16, 256, dtype=dtype, device=device)
    yield "HND halves", kv_cache.kv_write, (k, k.clone(), both[..., :128].transpose(1, 2), both[..., 128:].transpose(1, 2), slots)


@room
def rotary(device, dtype):
    from gkernels.kernels import rotary
    positions, slots = torch.tensor([5, 0, 31], dtype=torch.int32, device=device), torch.tensor([5, -1, 40], device=device)
    for H, K, D, rotary_dim in ((8, 2, 128, 128), (16, 1, 256, 256), (71, 1, 64, 64), (4, 4, 80, 32), (6, 2, 96, 96)):
        q, k, v = torch.zeros(3, H + 2 * K, D, dtype=dtype, device=device).split([H, K, K], 1)
        k_cache, v_cache, weight = *torch.zeros(2, 4, 16, K, D, dtype=dtype, device=device), torch.ones(D, dtype=dtype, device=device)
        q_out, k_out, cos_sin = q.new_zeros(q.shape), k.new_zeros(k.shape), rotary.cos_sin_table(rotary_dim, 32, device=device)
        for interleaved in (False, True):
            case = f"H{H} K{K} D{D} rotary_dim {rotary_dim}{' interleaved' * interleaved}"
            yield case, rotary.rotary_out, (q, k, positions, cos_sin, interleaved, q_out, k_out, counter(2, device))
            fused = (q, k, v, positions, cos_sin, slots, k_cache, v_cache, q_out, interleaved)
            yield f"{case} kv_write", rotary.rotary_kv_write, (*fused, None, None, 1e-6, counter(2, device))
            yield f"{case} norm kv_write", rotary.rotary_kv_write, (*fused, weight, weight, 1e-6, counter(2, device))


@room
def activation(device, dtype):
    from gkernels.kernels import activation
    for F in (48, 1000, 14336):
        x, out = torch.zeros(3, 2 * F, dtype=dtype, device=device), torch.empty(3, F, dtype=dtype, device=device)
        yield f"silu_and_mul F{F}", activation.silu_and_mul_out, (x, out, counter(2, device))


@room
def embedding(device, dtype):
    from gkernels.kernels import embedding
    for D, ids_dtype, padding_index in ((80, torch.int64, None), (4096, torch.int32, None), (4096, torch.int32, -1)):
        weight, out = torch.zeros(7, D, dtype=dtype, device=device), torch.empty(3, D, dtype=dtype, device=device)
        ids = torch.tensor([6, -1, 9], dtype=ids_dtype, device=device)
        case = f"D{D} {str(ids_dtype)[6:]} padding {padding_index}"
        yield case, embedding.embedding_out, (ids, weight, out, counter(2, device), padding_index)


@room
def linear(device, dtype):
    from gkernels.kernels import linear
    for T, N, K in ((1, 16, 256), (60, 16, 256), (1, 3072, 128), (1, MANY, 128), (60, MANY, 128), (60, 64, 64), (3, 5, 100), (300, 20, 64)):
        x, weight, bias = (torch.zeros(*shape, dtype=dtype, device=device) for shape in ((T, K), (N, K), (N,)))
        yield f"T{T} N{N} K{K}", linear.linear_out, (x, weight, torch.empty(T, N, dtype=dtype, device=device), bias, counter(1, device))
        yield f"T{T} N{N} K{K} logits", linear.linear_out, (x, weight, torch.empty(T, N, device=device), None, counter(1, device))
    for T, N, K in ((1, 1024, 512), (60, 1024, 512), (300, 1024, 512), (3, 5, 100)):
        x, weight, bias, norm = (torch.zeros(*shape, dtype=dtype, device=device) for shape in ((T, K), (N, K), (N,), (N,)))
        out, workspace, left = torch.empty(T, N, dtype=dtype, device=device), linear.Workspace.allocate(device), scaled(T, N, dtype, device)
        given = (scaled(T, K, dtype, device), weight, 1e-5, out, bias, counter(1, device))
        yield f"norm T{T} N{N} K{K}", split, (linear.norm_linear_out, workspace, *given)
        yield f"residual T{T} N{N} K{K}", split, (linear.linear_residual, workspace, x, weight, out, None, counter(1, device))
        yield f"residual norm T{T} N{N} K{K}", split, (partial(linear.linear_residual, norm=norm, scaled=left), workspace, x, weight, out, None,
                                                       counter(1, device))
    weight, index = torch.zeros(MANY, 128, dtype=dtype, device=device), torch.zeros(60, dtype=torch.int32, device=device)
    logits = partial(linear.norm_linear_out, index=index)
    yield "norm logits", logits, (scaled(64, 128, dtype, device), weight, 1e-5, torch.empty(60, MANY, device=device))
    if _check.capability() // 10 == 9 and dtype != torch.float32:
        for T, D in ((1, 128), (17, 128), (60, 64), (64, 128)):
            yield from streamed("plain", T, D, device, dtype)


def quantised(kind, N, K, device):
    """Zeros of a kind of weight."""
    from gkernels.kernels._quantized import Quantized
    tensor, (name, _, detail) = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=device), kind.partition(" ")
    if name == "int4":
        return Quantized(tensor(N, -(-K // 256) * 32, dtype=torch.int32), tensor(K // int(detail), N, dtype=torch.int32))
    shape = (N,) if detail == "row" else (-(-N // 128), -(-K // 128))
    return Quantized(tensor(N, K, dtype=torch.uint8).view(torch.float8_e4m3fn), tensor(*shape, dtype=torch.float32))


def scaled(T, K, dtype, device):
    """What a split product leaves to the next."""
    from gkernels.kernels import linear
    halves = linear.Scaled.empty(T, K, dtype, device, splits=True)
    for t in halves:
        t.zero_()
    return halves


@room
def linear_quantized(device, dtype):
    """The ops of the room, and the fused ones of others with these weights: what a GPU without fp8 cannot compile has it in its name."""
    from gkernels.kernels import gate_up, linear, linear_quantized, qkv
    tensor = lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype, device=device)
    for T, N, K, fp8, int4 in ((1, MANY, 512, "row", 128), (60, MANY, 512, "block", 32), (1, 3072, 512, "block", 256), (60, 3072, 512, "row", 128),
                               (1, 64, 256, "row", 256), (300, 24, 384, "block", 128), (3, 5, 40, "row", 40)):
        rest = tensor(T, N), tensor(N), counter(1, device)
        yield f"fp8 T{T} N{N} K{K // 2}", linear_quantized.linear_fp8_out, (tensor(T, K // 2), *quantised(f"fp8 {fp8}", N, K // 2, device), *rest)
        yield f"int4 T{T} N{N} K{K}", linear_quantized.linear_int4_out, (tensor(T, K), *quantised(f"int4 {int4}", N, K, device), *rest)
    workspace, n = linear.Workspace.allocate(device), counter(1, device)
    for kind, T in (("fp8 row", 60), ("fp8 block", 60), ("int4 32", 1), ("int4 128", 60)):
        norm, left = tensor(1024), scaled(T, 1024, dtype, device)
        yield f"{kind} residual T{T}", split, (partial(linear.linear_residual, norm=norm, scaled=left), workspace, tensor(T, 2048),
                                               quantised(kind, 1024, 2048, device), tensor(T, 1024), None, n)
        yield f"{kind} gate_up T{T}", gate_up.norm_gate_up_out, (scaled(T, 512, dtype, device), quantised(kind, MANY, 512, device), 1e-5,
                                                                 tensor(T, MANY // 2), None, n)
        places = tensor(T, dtype=torch.int32), tensor(33, 128, dtype=torch.float32), torch.arange(T, device=device)
        given = scaled(T, 2048, dtype, device), quantised(kind, 512, 2048, device), 1e-5, *places, *tensor(2, 4, 16, 1, 128), tensor(T, 2, 128)
        yield f"{kind} qkv T{T}", split, (qkv.norm_qkv, workspace, *given, None, norm[:128], norm[:128], n)
    if _check.capability() // 10 == 9 and dtype != torch.float32:
        for kind, T in (("fp8 row", 1), ("fp8 block", 16), ("int4 128", 1), ("int4 128", 16), ("int4 256", 2)):
            yield from streamed(kind, T, 128, device, dtype)


def streamed(kind, T, D, device, dtype):
    """Nodes whose weight a warp of its own streams on Hopper; D: of the heads."""
    from gkernels.kernels import gate_up, linear, qkv
    tensor, heads = lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype, device=device), 3072 // D
    workspace, n = linear.Workspace.allocate(device), counter(1, device)
    weight = (lambda N, K: tensor(N, K)) if kind == "plain" else lambda N, K: quantised(kind, N, K, device)
    norm, left = tensor(4096), scaled(T, 4096, dtype, device)
    yield f"streamed {kind} residual T{T}", split, (partial(linear.linear_residual, norm=norm, scaled=left), workspace, tensor(T, 2048),
                                                    weight(4096, 2048), tensor(T, 4096), tensor(4096), n)
    yield f"streamed {kind} gate_up T{T}", gate_up.norm_gate_up_out, (scaled(T, 5120, dtype, device), weight(17408, 5120), 1e-5, tensor(T, 8704),
                                                                      None, n)
    places = tensor(T, dtype=torch.int32), tensor(33, D, dtype=torch.float32), torch.arange(T, device=device)
    given = scaled(T, 2048, dtype, device), weight(3072, 2048), 1e-5, *places, *tensor(2, 4, 16, 2, D), tensor(T, heads - 4, D)
    yield f"streamed {kind} qkv D{D} T{T}", split, (qkv.norm_qkv, workspace, *given, None, None, None, n)


def split(function, workspace, *arguments):
    """A product with what it may rely on: counters that are zeros."""
    workspace.counters.zero_()
    function(*arguments, workspace=workspace)


@room
def gate_up(device, dtype):
    from gkernels.kernels import gate_up
    for T, F, K in ((1, 4224, 256), (60, 4224, 256), (300, 4224, 256), (3, 5, 100), (60, 64, 64)):
        weight, bias = (torch.zeros(*shape, dtype=dtype, device=device) for shape in ((2 * F, K), (2 * F,)))
        for case, b in (("", None), (" bias", bias)):
            out = torch.empty(T, F, dtype=dtype, device=device)
            yield f"T{T} F{F} K{K}{case}", gate_up.norm_gate_up_out, (scaled(T, K, dtype, device), weight, 1e-5, out, b, counter(1, device))


@room
def qkv(device, dtype):
    from gkernels.kernels import linear, qkv
    for T, H, KV, D, rotary_dim, K in ((1, 2, 1, 64, 64, 512), (60, 2, 1, 64, 64, 512), (1, 2, 1, 128, 128, 512), (60, 2, 1, 128, 128, 512),
                                       (300, 2, 1, 64, 64, 512), (300, 2, 1, 128, 128, 512), (3, 2, 1, 80, 32, 256)):
        weight, bias, head_norm = (torch.zeros(*shape, dtype=dtype, device=device) for shape in (((H + 2 * KV) * D, K), ((H + 2 * KV) * D,), (D,)))
        places = torch.zeros(T, dtype=torch.int32, device=device), torch.zeros(33, rotary_dim, device=device), torch.arange(T, device=device)
        caches, q_out = torch.zeros(2, 4, 16, KV, D, dtype=dtype, device=device), torch.empty(T, H, D, dtype=dtype, device=device)
        workspace, given = linear.Workspace.allocate(device), (scaled(T, K, dtype, device), weight, 1e-5, *places, *caches, q_out)
        for case, options in (("", (None, None, None)), (" norms", (bias, head_norm, head_norm))):
            yield f"T{T} H{H} D{D} K{K}{case}", split, (qkv.norm_qkv, workspace, *given, *options, counter(1, device))


@room
def sampling(device, dtype):
    from gkernels.kernels import sampling
    for V in (1, 300, 5008):
        logits, ints = torch.zeros(2, V, dtype=dtype, device=device), torch.ones(6, 2, dtype=torch.int32, device=device)
        temperature, top_p, min_p, typical_p = torch.tensor([[0.0, 0.8], [1.0, 0.9], [0.0, 0.1], [1.0, 0.9]], device=device)
        workspace, probs = sampling.Workspace.allocate(2, V, device), torch.empty(2, V, device=device)
        options = logits, temperature, ints[0], top_p, min_p, ints[1].long(), *ints[2:5]
        yield f"V{V}", sample, (*options, workspace, ints[5])
        yield f"V{V} typical probs", sample, (*options, workspace, ints[5], typical_p, probs)


def sample(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, workspace, *outputs):
    """sample_out with what it may rely on: counts that are zeros."""
    from gkernels.kernels import sampling
    workspace.counts.zero_()
    sampling.sample_out(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, workspace, *outputs)


@room
def head(device, dtype):
    from gkernels.kernels import head, linear
    for R, V, K, kind in ((1, 300, 100, None), (1, MANY, 128, None), (60, MANY, 128, None), (60, 3072, 256, "int4 128"),
                          (60, MANY, 256, "fp8 row"), (300, 528, 128, None)):
        weight = torch.zeros(V, K, dtype=dtype, device=device) if kind is None else quantised(kind, V, K, device)
        rows, ints = linear.Scaled.empty(R, K, dtype, device, splits=True), torch.ones(4, R, dtype=torch.int32, device=device)
        workspace, zeros = head.Workspace.allocate(R, V, dtype, device), torch.zeros(2, R, dtype=torch.int32, device=device)
        given = torch.ones(R, device=device), zeros[0].long(), *ints[:3], workspace
        case = f"{kind or ''} R{R} V{V} K{K}".strip()
        yield case, head.draw_out, (rows, weight, 1e-5, *given, ints[3])
        yield f"{case} keeps", head.draw_out, (rows, weight, 1e-5, *given, ints[3], None, *zeros, torch.empty(R, V, device=device))


@room
def adjust(device, dtype):
    from gkernels.kernels import adjust
    for V in (300, 5008):
        logits, full = torch.zeros(2, V, dtype=dtype, device=device), lambda *shape: torch.zeros(2, *shape, dtype=torch.int32, device=device)
        lens, words, one = full() + 1, -(-V // 32), torch.ones(2, device=device)
        every = adjust.Adjustments(full(5), torch.zeros(2, 5, device=device), one, one, one, full(V), full(words), full(words) - 1, full(3), full(2),
                                   full(), full(), full())
        yield f"V{V}", adjust.adjust_out, (logits, every, lens, full(), torch.empty(2, V, device=device))
        masks = adjust.Adjustments(allowed=full(words) - 1, banned_ids=full(3))
        yield f"V{V} in place", adjust.adjust_out, (logits, masks, lens, full(), logits)


@room
def advance(device, dtype):
    from gkernels.kernels import advance
    if dtype == torch.float32:                       # integers only: one dtype tells it all
        for R in (3, 17):
            ints = lambda *shape, R=R: torch.ones(*(shape or (R,)), dtype=torch.int32, device=device)
            rows = ints(), ints(R, 2), ints(), ints(), ints(), ints(), ints(), ints(), ints(), ints(4, R), ints(1), ints(1)
            slots = torch.arange(R, dtype=torch.int32, device=device)
            yield f"R{R}", advance.advance, (ints(), ints(), advance.State(*rows), 50)
            yield f"R{R} tables", advance.advance, (ints(), ints(), advance.State(*rows, slots, ints(R, 50), ints(R, 40)), 50)


@room
def ngram(device, dtype):
    from gkernels.kernels import ngram
    if dtype == torch.float32:                       # integers only: one dtype tells it all
        for L, K, max_n in ((50, 1, 2), (3000, 5, 4)):
            history, ints = torch.zeros(4, L, dtype=torch.int32, device=device), torch.ones(4, 3, dtype=torch.int32, device=device)
            workspace, draft = ngram.Workspace.allocate(3, device), torch.zeros(3, K, dtype=torch.int32, device=device)
            yield f"L{L} K{K}", look_up, (history, *ints[:2], 1, max_n, workspace, draft, ints[2])
            yield f"L{L} K{K} slots", look_up, (history, *ints[:2], 1, max_n, workspace, draft, ints[2], ints[3])


def look_up(history, lengths, max_draft, min_n, max_n, workspace, draft, draft_len, slots=None):
    """ngram_out with what it may rely on: a workspace of zeros."""
    from gkernels.kernels import ngram
    workspace.keys.zero_()
    workspace.counts.zero_()
    ngram.ngram_out(history, lengths, max_draft, min_n, max_n, workspace, draft, draft_len, slots)


@room
def verify(device, dtype):
    from gkernels.kernels import verify
    if dtype == torch.float32:                       # integers and probabilities: one dtype tells it all
        ints = torch.ones(4, 7, dtype=torch.int32, device=device)
        starts, requests = torch.tensor([0, 3, 4, 6], dtype=torch.int32, device=device), torch.ones(3, 3, dtype=torch.int32, device=device)
        for K in (2, 7):
            yield f"K{K}", verify.verify_out, (*ints[:2], starts, requests[0], requests.new_empty(3, K + 1), requests[1])
        for V in (300, 5008):
            target, proposal = torch.zeros(2, 7, V, device=device)
            probs = verify.Probabilities(target, proposal, requests[2], requests[2].long(), ints[3])
            workspace = verify.Workspace.allocate(3, V, device)
            yield f"V{V}", judge, (*ints[:2], starts, requests[0], requests.new_empty(3, 3), requests[1], probs, workspace)


def judge(draft, sampled, query_start_loc, status, tokens, num_accepted, probs, workspace):
    """verify_out with what it may rely on: counts that are zeros."""
    from gkernels.kernels import verify
    workspace.counts.zero_()
    verify.verify_out(draft, sampled, query_start_loc, status, tokens, num_accepted, probs, workspace)


@room
def logprobs(device, dtype):
    from gkernels.kernels import logprobs
    for V, n in ((1, 0), (300, 5), (5008, 20)):
        logits, ints = torch.zeros(2, V, dtype=dtype, device=device), torch.ones(2, 2, dtype=torch.int32, device=device)
        workspace, out = logprobs.Workspace.allocate(2, V, n, device), logprobs.Logprobs.allocate(2, n, device)
        yield f"V{V} n{n}", rank, (logits, *ints, workspace, out)


def rank(logits, seq_lens, token, workspace, out):
    """logprobs_out with what it may rely on: counts that are zeros."""
    from gkernels.kernels import logprobs
    workspace.counts.zero_()
    logprobs.logprobs_out(logits, seq_lens, token, workspace, out)


@room
def expand(device, dtype):
    from gkernels.kernels import expand
    if dtype == torch.float32:                       # integers only: one dtype tells it all
        for R, K in ((3, 4), (17, 1)):
            ints = lambda *shape: torch.ones(shape, dtype=torch.int32, device=device)
            yield f"R{R} K{K}", expand.expand_out, (ints(R), ints(R), ints(R, K), ints(R), ints(R), expand.Rows.allocate(R, K, device))
