"""The dispatcher face: schemas that tell the truth, fakes that match, and torch.compile that changes no bit."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.optests import OpCheckError
from torch.utils._pytree import tree_map_only

from gkernels import ops
from gkernels.kernels import embedding as embedding_room
from gkernels.kernels.rotary import cos_sin_table
from tests.close import assert_same
from tests.strategies import Batch, counter, randn, strided

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
FACE_SECONDS = 5e-6     # what a call of the face may cost above the kernel's own launcher
H, K, D, HIDDEN, V, PAGE = 4, 2, 16, 32, 50, 4
BATCH = Batch([3, 1, 1], [0, 5, 2], PAGE, pads=2, spare_requests=1)
T, R = BATCH.T, BATCH.R
TILING = ops.attention_tiling(T, R, H, K, D, D, torch.float32, "cpu", programs=4)
INTS = ops._to_ints(TILING)


def inputs(device):
    """Fresh tensors of one mixed step, some of them with strided rows."""
    x = SimpleNamespace(
        ids=torch.arange(T, dtype=torch.int32, device=device), n=counter(BATCH.num_tokens, device), embed=randn(0, V, HIDDEN, device=device),
        x=strided(randn(1, T, HIDDEN, device=device)), residual=randn(2, T, HIDDEN, device=device), norm=randn(3, HIDDEN, device=device),
        head_norm=randn(4, D, device=device), qkv=randn(5, T, H + 2 * K, D, device=device), head=randn(6, V, HIDDEN, device=device),
        bias=randn(7, V, device=device), cos_sin=cos_sin_table(D, 32, device=device), logits=randn(8, R, V, device=device),
        wide=randn(9, T, 2 * HIDDEN, device=device), seed=torch.arange(R, device=device),
        temperature=torch.tensor([0.0, 0.8, 1.0, 1.0], device=device), top_k=torch.tensor([0, 5, 0, 1], dtype=torch.int32, device=device),
        top_p=torch.tensor([1.0, 0.9, 0.5, 1.0], device=device), min_p=torch.tensor([0.0, 0.0, 0.1, 0.0], device=device))
    x.query_start_loc, x.seq_lens, x.table = BATCH.metadata(device)
    x.k_cache, x.v_cache = BATCH.caches(K, D, torch.float32, device)
    x.q, x.k, x.v = x.qkv.split([H, K, K], 1)
    x.lse = randn(10, T, 2, H, device=device)
    x.plan = ops.schedule(x.query_start_loc, x.seq_lens, x.table, PAGE, BATCH.N, T, TILING)
    x.workspace = ops.Workspace.allocate(TILING, device)
    x.options = (x.temperature, x.top_k, x.top_p, x.min_p, x.seed, x.seq_lens, x.seq_lens)
    x.out = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=device)
    return x


def options(x):
    return dict(window=(3, -1), softcap=1.5, sinks=x.head_norm[:H], alibi_slopes=x.out(R, H) + 0.1, tree_mask=x.out(T, dtype=torch.int64) - 2)


def fp8(x):
    return x.k_cache.to(torch.float8_e4m3fn), x.v_cache.to(torch.float8_e4m3fn)


def scales(x):
    return dict(k_scale=x.head_norm[:1].abs(), v_scale=x.head_norm[:K].abs())


def attention_arguments(x, *caches):
    return x.q, *(caches or (x.k_cache, x.v_cache)), x.table, x.plan.work, *vars(x.workspace).values(), x.out(T, H, D)


def products(x):
    return vars(ops.ProductWorkspace.allocate(x.ids.device))


def qkv_arguments(x, dtype=torch.float32):
    weight = randn(11, (H + 2 * K) * D, HIDDEN, dtype=dtype, device=x.ids.device)
    return *halves(x), weight, 1e-5, x.plan.positions, x.cos_sin, x.plan.slot_mapping, x.k_cache, x.v_cache, x.out(T, H, D)


def left(x, K):
    """Room for half a norm."""
    return ops.Scaled.empty(T, K, x.x.dtype, x.ids.device, splits=True)


def halves(x):
    scaled = left(x, HIDDEN)
    ops.scale(x.x, x.norm, scaled)
    return scaled


def drawing(x, rows=None, weight=None):
    """The head over all tokens, or over so many rows."""
    rows, weight = rows or T, x.head if weight is None else weight
    ints, workspace = (lambda value: x.out(rows, dtype=torch.int32) + value), ops.HeadWorkspace.allocate(rows, len(weight), x.x.dtype, x.ids.device)
    for t in vars(workspace).values():
        t.zero_()                                              # of rows that keep their logits nothing is written
    return *halves(x), weight, 1e-5, x.out(rows) + 0.8, ints(3).long(), ints(5), ints(5), ints(0), *vars(workspace).values(), ints(0)


def adjustments(x):
    ints = lambda *shape: x.out(*shape, dtype=torch.int32)
    return ops.Adjustments(ints(R, 2) + 3, x.out(R, 2) + 1.5, x.out(R) + 2.0, x.out(R) + 0.5, x.out(R) + 0.5, ints(9, V) + 1, ints(9, 2),
                           ints(9, 2) - 2, ints(R, 1) + 7, ints(R, 1) + 9, ints(R) + 3, ints(R) + 1, ints(R) + 8)


def state(x):
    ints = lambda *shape: x.out(*shape, dtype=torch.int32)
    return ops.State(ints(R) + 1, ints(R, 2) - 1, ints(R) + 5, ints(R) + 30, ints(R), x.seq_lens.clone(), ints(R) + 1, ints(R), ints(R), ints(2, R),
                     ints(1), ints(1), torch.arange(R, dtype=torch.int32, device=x.ids.device).flip(0), ints(R, V), ints(R, 40))


def drafts(x):
    history = (torch.arange(R * 30, dtype=torch.int32, device=x.ids.device) % 4).view(R, 30)
    return history, x.seq_lens, x.seq_lens + 2, 1, 3, *vars(ops.NgramWorkspace.allocate(R, x.ids.device)).values()


def expanded(x):
    ints = lambda *shape: x.out(*shape, dtype=torch.int32)
    return x.seq_lens, x.seq_lens, ints(R, 2) + 7, ints(R) + 2, ints(R) + 1, *vars(ops.Rows.allocate(R, 2, x.ids.device)).values()


def judged(x):
    ints = lambda *shape: x.out(*shape, dtype=torch.int32)
    return ints(T) + 3, ints(T) + 3, x.query_start_loc, x.plan.status, ints(R, 4), ints(R)


def believed(x):
    workspace = ops.VerifyWorkspace.allocate(R, V, x.ids.device)
    probs = torch.softmax(x.wide[:, :V], -1)
    return dict(target=probs, proposal=probs.flip(1).contiguous(), is_drawn=x.out(R, dtype=torch.int32) + 1, seed=x.seed,
                position=x.plan.positions, **vars(workspace))


def ranked(x):
    workspace, out = ops.LogprobsWorkspace.allocate(R, V, 3, x.ids.device), ops.Logprobs.allocate(R, 3, x.ids.device)
    return x.logits, x.seq_lens, x.seq_lens, *vars(workspace).values(), *vars(out).values()


def packed(x):
    """Weights in 4 bits, as a GPTQ checkpoint has them."""
    ints = lambda seed, *shape: torch.randint(-2**31, 2**31, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    weight, scales = ops.pack_gptq(ints(0, HIDDEN // 8, 48), ints(1, 1, 6), torch.ones(1, 48, dtype=torch.float16))
    return x.x, weight.to(x.ids.device), scales.to(x.ids.device), x.out(T, 48)


def sampling_workspace(x):
    return vars(ops.SamplingWorkspace.allocate(*x.logits.shape, x.logits.device)).values()


CASES = {   # case: the inputs -> the positional and the keyword arguments of the registered op that the case is named after
    "rmsnorm": lambda x: ((x.x, x.norm), {}),
    "rmsnorm pads": lambda x: ((x.x, x.norm, 1e-5, x.n), {}),
    "rmsnorm heads": lambda x: ((x.q, x.head_norm), dict(num_tokens=x.n)),
    "rmsnorm empty": lambda x: ((x.x[:0], x.norm), {}),
    "rmsnorm_out": lambda x: ((x.x, x.norm, 1e-5, x.out(T, HIDDEN)), dict(num_tokens=x.n)),
    "add_rmsnorm_out pads": lambda x: ((x.x, x.residual, x.norm, 1e-5, x.out(T, HIDDEN)), dict(num_tokens=x.n)),
    "add_rmsnorm_out": lambda x: ((x.x, x.residual, x.norm, 1e-5, x.out(T, HIDDEN), x.n), {}),
    "rotary": lambda x: ((x.q, x.k, x.plan.positions, x.cos_sin), {}),
    "rotary pads": lambda x: ((x.q, x.k, x.plan.positions, x.cos_sin, True, x.n), {}),
    "rotary_out": lambda x: ((x.q, x.k, x.plan.positions, x.cos_sin, False, x.out(T, H, D), x.out(T, K, D)), dict(num_tokens=x.n)),
    "rotary_kv_write": lambda x: ((x.q, x.k, x.v, x.plan.positions, x.cos_sin, x.plan.slot_mapping, x.k_cache, x.v_cache, x.out(T, H, D)), {}),
    "rotary_kv_write norms": lambda x: (
        (x.q, x.k, x.v, x.plan.positions, x.cos_sin, x.plan.slot_mapping, x.k_cache, x.v_cache, x.out(T, H, D)),
        dict(q_norm=x.head_norm, k_norm=x.head_norm, eps=1e-5, num_tokens=x.n)),
    "kv_write": lambda x: ((x.k, x.v, x.k_cache, x.v_cache, x.plan.slot_mapping), {}),
    "silu_and_mul": lambda x: ((strided(x.wide),), dict(num_tokens=x.n)),
    "silu_and_mul empty": lambda x: ((x.wide[:0],), {}),
    "silu_and_mul_out": lambda x: ((x.wide, x.out(T, HIDDEN)), {}),
    "linear": lambda x: ((x.x, x.head), {}),
    "linear bias": lambda x: ((x.x, x.head, x.bias, x.n), {}),
    "linear half": lambda x: ((x.x.half(), x.head.half()), dict(dtype=torch.float32)),
    "linear empty": lambda x: ((x.x[:0], x.head), {}),
    "linear_out": lambda x: ((x.x, x.head, x.out(T, V)), dict(bias=x.bias, num_tokens=x.n)),
    "scale": lambda x: ((x.x, x.norm, *left(x, HIDDEN)), {}),
    "scale pads": lambda x: ((x.x, x.norm, *left(x, HIDDEN), x.n), {}),
    "norm_linear_out": lambda x: ((*halves(x), x.head, 1e-5, x.out(T, V)), {}),
    "norm_linear_out split": lambda x: ((*halves(x), x.head, 1e-5, x.out(T, V), x.bias, x.n), products(x)),
    "norm_linear_out gather": lambda x: ((*halves(x), x.head, 1e-5, x.out(R, V)), dict(index=x.plan.last_token)),
    "draw_out": lambda x: (drawing(x), {}),
    "draw_out keeps": lambda x: (drawing(x), dict(keeps=x.ids % 2, logits=x.out(T, V))),
    "draw_out gather int4": lambda x: (drawing(x, R, packed(x)[1]), dict(index=x.plan.last_token, weight_scale=packed(x)[2])),
    "linear_residual": lambda x: ((x.x, x.head[:HIDDEN], x.residual), {}),
    "linear_residual split": lambda x: ((x.x, x.head[:HIDDEN], x.residual, x.bias[:HIDDEN], x.n), products(x)),
    "linear_residual norm": lambda x: ((x.x, x.head[:HIDDEN], x.residual), dict(
        num_tokens=x.n, norm=x.norm, **dict(zip(("scaled_x", "squares"), left(x, HIDDEN), strict=True)), **products(x))),
    "norm_gate_up_out": lambda x: ((*halves(x), x.head, 1e-5, x.out(T, V // 2)), dict(num_tokens=x.n)),
    "norm_gate_up_out bias": lambda x: ((*halves(x), x.head, 1e-5, x.out(T, V // 2), x.bias), {}),
    "norm_qkv": lambda x: (qkv_arguments(x), {}),
    "norm_qkv split norms": lambda x: ((*qkv_arguments(x), None, x.head_norm, x.head_norm, x.n), products(x)),
    "norm_linear_out int4": lambda x: ((*halves(x), packed(x)[1], 1e-5, x.out(T, 48)), dict(weight_scale=packed(x)[2])),
    "linear_residual fp8": lambda x: ((x.x, x.head[:HIDDEN].to(torch.float8_e4m3fn), x.residual), dict(weight_scale=x.bias[:HIDDEN].abs())),
    "norm_gate_up_out int4": lambda x: ((*halves(x), packed(x)[1], 1e-5, x.out(T, 24)), dict(weight_scale=packed(x)[2])),
    "norm_qkv fp8": lambda x: (qkv_arguments(x, torch.float8_e4m3fn), dict(weight_scale=randn(5, (H + 2 * K) * D, device=x.ids.device))),
    "embedding": lambda x: ((x.ids, x.embed, x.n), {}),
    "embedding last": lambda x: ((x.plan.last_token, x.x), dict(padding_index=-1)),
    "embedding_out": lambda x: ((x.ids, x.embed, x.out(T, HIDDEN)), {}),
    "attention": lambda x: ((x.q, x.k_cache, x.v_cache, x.query_start_loc, x.seq_lens, x.table), {}),
    "attention scale": lambda x: ((x.q.contiguous(), x.k_cache, x.v_cache, x.query_start_loc, x.seq_lens, x.table, 0.5), {}),
    "attention options": lambda x: ((x.q, x.k_cache, x.v_cache, x.query_start_loc, x.seq_lens, x.table), dict(**options(x), programs=2)),
    "attention fp8": lambda x: ((x.q, *fp8(x), x.query_start_loc, x.seq_lens, x.table), scales(x)),
    "attention not causal": lambda x: ((x.q, x.k_cache, x.v_cache, x.query_start_loc, x.seq_lens, x.table), dict(causal=False, window=(3, 2))),
    "attention empty": lambda x: ((x.out(0, H, D), x.k_cache, x.v_cache, x.query_start_loc, x.seq_lens, x.table), {}),
    "attention_out": lambda x: (attention_arguments(x), dict(tiling=INTS)),
    "attention_out lse": lambda x: ((*attention_arguments(x), x.out(T, H)), dict(scale=0.5, tiling=INTS)),
    "attention_out options": lambda x: ((*attention_arguments(x), x.out(T, H)), dict(**options(x), tiling=INTS)),
    "attention_out fp8": lambda x: (attention_arguments(x, *fp8(x)), dict(**scales(x), tiling=INTS)),
    "merge": lambda x: ((x.q, x.lse[:, 0], x.qkv[:, :H], x.lse[:, 1]), {}),
    "merge pads": lambda x: ((x.q, x.lse[:, 0], x.qkv[:, :H], x.lse[:, 1], x.n), {}),
    "merge_out": lambda x: ((x.q, x.lse[:, 0], x.qkv[:, :H], x.lse[:, 1], x.out(T, H, D)), {}),
    "merge_out lse": lambda x: ((x.q, x.lse[:, 0], x.qkv[:, :H], x.lse[:, 1], x.out(T, H, D), x.out(T, H)), dict(num_tokens=x.n)),
    "sample_out": lambda x: ((x.logits, *x.options, x.plan.status, *sampling_workspace(x), x.out(R, dtype=torch.int32)), {}),
    "sample_out named": lambda x: ((x.logits, *x.options, x.plan.status, *sampling_workspace(x)), dict(out=x.out(R, dtype=torch.int32))),
    "sample_out typical probs": lambda x: ((x.logits, *x.options, x.plan.status, *sampling_workspace(x), x.out(R, dtype=torch.int32)),
                                           dict(typical_p=torch.full_like(x.lse[:R, 0, 0], 0.9), probs=x.out(*x.logits.shape))),
    "sample_out keeps": lambda x: ((x.logits, *x.options, x.plan.status, *sampling_workspace(x), x.out(R, dtype=torch.int32)),
                                   dict(keeps=x.seq_lens % 2)),
    "adjust_out": lambda x: ((x.logits, x.seq_lens, x.plan.status, x.out(*x.logits.shape), *vars(adjustments(x)).values()), {}),
    "adjust_out banned": lambda x: ((x.logits.half(), x.seq_lens, x.plan.status, x.out(*x.logits.shape)), dict(banned_ids=x.seq_lens[:, None])),
    "adjust_": lambda x: ((x.logits, x.seq_lens, x.plan.status, *vars(adjustments(x)).values()), {}),
    "advance": lambda x: ((x.seq_lens + 1, x.plan.status, V, *vars(state(x)).values()), {}),
    "advance plain": lambda x: ((x.seq_lens + 1, x.plan.status, V, *list(vars(state(x)).values())[:12]), {}),
    "ngram_out": lambda x: ((*drafts(x), x.out(R, 4, dtype=torch.int32), x.out(R, dtype=torch.int32)), {}),
    "expand_out": lambda x: (expanded(x), {}),
    "verify_out": lambda x: (judged(x), {}),
    "verify_out drawn": lambda x: (judged(x), believed(x)),
    "logprobs_out": lambda x: (ranked(x), {}),
    "linear_fp8_out": lambda x: ((x.x, x.head.to(torch.float8_e4m3fn), x.bias.abs(), x.out(T, V), x.bias, x.n), {}),
    "linear_fp8": lambda x: ((x.x, x.head.to(torch.float8_e4m3fn), x.bias.abs(), x.bias, x.n), {}),
    "linear_int4": lambda x: (packed(x)[:3], dict(num_tokens=x.n)),
    "linear_int4_out": lambda x: (packed(x), dict(num_tokens=x.n)),
    "schedule_out": lambda x: ((x.query_start_loc, x.seq_lens, x.table, PAGE, BATCH.N, INTS, *vars(x.plan).values()), {}),
}


def registered(name):
    return getattr(torch.ops.gkernels, name).default


def arguments(case, device):
    return registered(case.split()[0]), *CASES[case](inputs(device))


def test_every_registered_op_has_a_case():
    assert {case.split()[0] for case in CASES} == {name.removeprefix("gkernels::") for name in ops._library._op_defs}


def test_the_face_names_every_registered_op():
    assert {case.split()[0] for case in CASES} <= set(ops.__all__) and all(hasattr(ops, name) for name in ops.__all__)


@pytest.mark.parametrize("case", [case for case in CASES if "fp8" not in case])     # torch's check multiplies its inputs, and has no such product
def test_opcheck(device, case):
    op, args, kwargs = arguments(case, device)
    torch.library.opcheck(op, args, kwargs)


def outputs(result):
    return result if isinstance(result, tuple) else () if result is None else (result,)


def check_fake(op, args, kwargs):
    """Runs the op on fakes of its arguments: what it returns there has the shapes, dtypes, strides and devices of the real outputs."""
    with FakeTensorMode() as mode:
        fakes = outputs(op(*tree_map_only(torch.Tensor, mode.from_tensor, args), **tree_map_only(torch.Tensor, mode.from_tensor, kwargs)))
    reals = outputs(op(*args, **kwargs))
    facts = lambda t: (t.shape, t.dtype, t.numel() and t.stride(), t.device)
    assert [facts(t) for t in fakes] == [facts(t) for t in reals]
    return reals


@pytest.mark.parametrize("case", CASES)
def test_fakes_equal_real_outputs(device, case):
    op, args, kwargs = arguments(case, device)
    reals = check_fake(op, args, kwargs)
    writes_to_out = op._schema.name.endswith(("_out", "write", "adjust_", "advance", "scale", "linear_residual", "norm_qkv"))
    assert (not reals) == writes_to_out == (not op._schema.returns)


WITH_RECORDS = ("schedule_out", "attention_out", "sample_out", "adjust_out", "adjust_", "advance", "ngram_out", "expand_out", "verify_out",
                "logprobs_out", "scale", "norm_linear_out", "draw_out", "linear_residual", "norm_gate_up_out",
                "norm_qkv")                                                              # their faces take dataclasses: see below


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] not in WITH_RECORDS])
def test_face_equals_registered_op(device, case):
    """The eager face and the dispatcher run the same kernel: the same returns, and the same bits left in every argument."""
    op, args, kwargs = arguments(case, device)
    _, same_args, same_kwargs = arguments(case, device)
    got, want = getattr(ops, case.split()[0])(*args, **kwargs), op(*same_args, **same_kwargs)
    for a, b in zip((*outputs(got), *args, *kwargs.values()), (*outputs(want), *same_args, *same_kwargs.values()), strict=True):
        if isinstance(a, torch.Tensor):
            assert_same(a, b)


def test_schedule_face_equals_registered_op(device):
    op, args, _ = arguments("schedule_out", device)
    op(*args)
    plan = ops.schedule(*args[:5], T, TILING)
    for got, want in zip(vars(plan).values(), args[6:], strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("case", ["attention_out", "attention_out lse", "attention_out options", "attention_out fp8"])
def test_attention_face_equals_registered_op(device, case):
    """Its face takes Workspace and Tiling whole, and without a tiling that of the capacities."""
    op, args, kwargs = arguments(case, device)
    _, (*same, states, counters, out), _ = arguments(case.replace(" lse", "").replace(" options", ""), device)
    lse = [torch.zeros_like(t) for t in args[8:]]
    op(*args, **kwargs)
    ops.attention_out(*same, ops.Workspace(states, counters), out, *lse, **kwargs | dict(tiling=TILING))
    for got, want in zip((out, *lse), args[7:], strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("case", ["scale pads", "norm_linear_out", "norm_linear_out split", "norm_linear_out gather", "draw_out keeps",
                                  "draw_out gather int4", "linear_residual split",
                                  "linear_residual norm", "norm_gate_up_out bias", "norm_qkv split norms", "norm_linear_out int4",
                                  "linear_residual fp8", "norm_gate_up_out int4", "norm_qkv fp8"])
def test_product_faces_equal_registered_ops(device, case):
    """Their faces take the workspace, both halves of a norm and a quantised weight whole."""
    (op, args, kwargs), (_, same, same_kwargs) = arguments(case, device), arguments(case, device)
    op(*args, **kwargs)
    name, given, options = case.split()[0], list(same), dict(same_kwargs)
    if name == "scale":
        given[2:4] = [ops.Scaled(*given[2:4])]
    elif name != "linear_residual":
        given[:2] = [ops.Scaled(*given[:2])]
    elif "scaled_x" in options:
        options["scaled"] = ops.Scaled(options.pop("scaled_x"), options.pop("squares"))
    if name == "draw_out":
        given[8:12] = [ops.HeadWorkspace(*given[8:12])]
    if "partials" in options:
        options["workspace"] = ops.ProductWorkspace(options.pop("partials"), options.pop("counters"))
    if "weight_scale" in options:                            # the weight comes second
        given[1] = ops.Quantized(given[1], options.pop("weight_scale"))
    getattr(ops, name)(*given, **options)
    for got, want in zip((*same, *same_kwargs.values()), (*args, *kwargs.values()), strict=True):
        if isinstance(got, torch.Tensor) and got is not same_kwargs.get("partials"):
            assert_same(got, want)


def test_gate_up_returns_what_its_other_face_writes(device):
    (_, (x, squares, weight, eps, out), options) = arguments("norm_gate_up_out", device)
    ops.norm_gate_up_out(ops.Scaled(x, squares), weight, eps, out, **options)
    assert_same(ops.norm_gate_up(ops.Scaled(x, squares), weight, eps, **options), out)


def test_sampling_face_equals_registered_op(device):
    op, args, kwargs = arguments("sample_out typical probs", device)
    _, same, same_kwargs = arguments("sample_out typical probs", device)
    op(*args, **kwargs)
    ops.sample_out(*same[:9], ops.SamplingWorkspace(*same[9:16]), same[16], **same_kwargs)
    for got, want in zip((*same, *same_kwargs.values()), (*args, *kwargs.values()), strict=True):
        assert_same(got, want)


def test_adjusting_and_advancing_faces_equal_registered_ops(device):
    for name, call in (("adjust_out", lambda a: ops.adjust_out(a[0], ops.Adjustments(*a[4:]), *a[1:4])),
                       ("adjust_", lambda a: ops.adjust_(a[0], ops.Adjustments(*a[3:]), *a[1:3])),
                       ("advance", lambda a: ops.advance(*a[:2], ops.State(*a[3:]), a[2]))):
        op, args, _ = arguments(name, device)
        _, same, _ = arguments(name, device)
        op(*args)
        call(same)
        for got, want in zip(same, args, strict=True):
            assert not isinstance(got, torch.Tensor) or torch.equal(got, want)


def test_speculating_faces_equal_registered_ops(device):
    faces = {"ngram_out": lambda a, k: ops.ngram_out(*a[:5], ops.NgramWorkspace(*a[5:7]), *a[7:]),
             "expand_out": lambda a, k: ops.expand_out(*a[:5], ops.Rows(*a[5:])),
             "verify_out": lambda a, k: ops.verify_out(*a),
             "verify_out drawn": lambda a, k: ops.verify_out(*a, ops.Probabilities(*[*k.values()][:5]), ops.VerifyWorkspace(*[*k.values()][5:])),
             "logprobs_out": lambda a, k: ops.logprobs_out(*a[:3], ops.LogprobsWorkspace(*a[3:8]), ops.Logprobs(*a[8:]))}
    for case, face in faces.items():
        op, args, kwargs = arguments(case, device)
        _, same, same_kwargs = arguments(case, device)
        op(*args, **kwargs)
        face(same, same_kwargs)
        for got, want in zip((*same, *same_kwargs.values()), (*args, *kwargs.values()), strict=True):
            if isinstance(got, torch.Tensor):
                assert_same(got, want)


def test_tilings_survive_as_integers():
    for tiling in (TILING, replace(TILING, has_tall=False, causal=False, left=3)):
        assert ops._from_ints(ops._to_ints(tiling)) == tiling and repr(ops._from_ints(ops._to_ints(tiling))) == repr(tiling)


@pytest.fixture
def scratch(monkeypatch):
    """ops._register, but into a namespace that ends with the test."""
    with torch.library._scoped_library("gkernels_test", "FRAGMENT") as library:
        monkeypatch.setattr(ops, "NAMESPACE", "gkernels_test")
        monkeypatch.setattr(ops, "_library", library)
        yield ops._register


def write(*tensors):
    for t in tensors:
        t.add_(1)


def pair(device):
    return torch.ones(2, 3, device=device), torch.zeros(2, 3, device=device)


@pytest.mark.parametrize("broken", [
    ("bad(Tensor x, Tensor out) -> ()", lambda x, out: write(out)),                                 # writes what it calls read-only
    ("bad(Tensor x, Tensor(a!) out) -> ()", lambda x, out: write(out, x)),                              # writes more than it declares
    ("bad(Tensor x, Tensor out) -> Tensor", lambda x, out: out, lambda x, out: out),                    # returns what it was given
], ids=["undeclared write", "second write", "alias"])
def test_a_lying_schema_is_caught(device, scratch, broken):
    scratch(*broken)
    with pytest.raises(OpCheckError):
        torch.library.opcheck(torch.ops.gkernels_test.bad.default, pair(device))


@pytest.mark.parametrize("real", [
    lambda x, out: x[:1].clone(), lambda x, out: x.half(), lambda x, out: x.new_zeros(3, 2).T], ids=["shape", "dtype", "strides"])
def test_a_lying_fake_is_caught(device, scratch, real):
    scratch("bad(Tensor x, Tensor out) -> Tensor", real, lambda x, out: torch.empty_like(x))
    with pytest.raises(AssertionError):
        check_fake(torch.ops.gkernels_test.bad.default, pair(device), {})


def test_the_face_costs_little(scratch):
    """A stub behind the face against the stub alone: the least of many repeats, which a busy machine disturbs least."""
    stub = lambda x, weight, eps=1e-6, num_tokens=None: None
    face = scratch("stub(Tensor x, Tensor weight, float eps=1e-6, Tensor? num_tokens=None) -> ()", stub)
    x = torch.zeros(1)

    def seconds(function, calls=1000):
        start = time.perf_counter()
        for _ in range(calls):
            function(x, x, 1e-5, num_tokens=x)
        return (time.perf_counter() - start) / calls

    assert min(seconds(face) for _ in range(20)) - min(seconds(stub) for _ in range(20)) < FACE_SECONDS


def layer(ids, embed, norm, qkv_weight, o_weight, head, table, query_start_loc, seq_lens, cos_sin, k_cache, v_cache, workspace, status,
          options):
    """A layer of the model from ids to tokens: keys are written, then attended; residual and status change in place, values are returned."""
    plan = ops.schedule(query_start_loc, seq_lens, table, PAGE, k_cache.shape[0], ids.shape[0], TILING)
    residual = ops.embedding(ids, embed, plan.num_tokens)
    x = ops.rmsnorm(residual, norm, 1e-5, plan.num_tokens)
    qkv = ops.linear(x, qkv_weight, num_tokens=plan.num_tokens).view(ids.shape[0], H + 2 * K, D)
    q, k, v = qkv.split([H, K, K], 1)
    rotated, attended = torch.empty_like(q.contiguous()), torch.empty_like(q.contiguous())
    ops.rotary_kv_write(q, k, v, plan.positions, cos_sin, plan.slot_mapping, k_cache, v_cache, rotated, num_tokens=plan.num_tokens)
    ops.attention_out(rotated, k_cache, v_cache, table, plan.work, workspace, attended, tiling=TILING)
    x = ops.linear(attended.view(ids.shape[0], H * D), o_weight, num_tokens=plan.num_tokens)
    x = ops.add_rmsnorm(x, residual, norm, 1e-5, plan.num_tokens)
    ops.rmsnorm_out(residual, norm, 1e-5, residual)
    last = ops.embedding(plan.last_token, x + residual, padding_index=-1)
    logits = ops.linear(last, head)
    return ops.sample(logits, *options, status), logits, residual


def layer_arguments(device):
    x = inputs(device)
    return dict(ids=x.ids, embed=x.embed, norm=x.norm, qkv_weight=randn(11, (H + 2 * K) * D, HIDDEN, device=device),
                o_weight=randn(12, HIDDEN, H * D, device=device), head=x.head, table=x.table, query_start_loc=x.query_start_loc,
                seq_lens=x.seq_lens, cos_sin=x.cos_sin, k_cache=x.k_cache, v_cache=x.v_cache, workspace=x.workspace,
                status=torch.full_like(x.seq_lens, 64), options=x.options)


def check_compiled(compiled, plain, make, device):
    got_args, want_args = make(device), make(device)
    got, want = compiled(**got_args), plain(**want_args)
    for a, b in zip((*got, *got_args.values()), (*want, *want_args.values()), strict=True):
        if isinstance(a, torch.Tensor):
            assert_same(a, b)
    before = make(device)
    return [name for name, t in before.items() if isinstance(t, torch.Tensor) and not torch.equal(t, got_args[name])]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_changes_no_bit(device, backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    assert check_compiled(compiled, layer, layer_arguments, device) == ["k_cache", "v_cache"]


def test_a_forgotten_write_is_caught(device, scratch):
    """An op that does not say that it writes runs against its caller's idea of the tensor: compiled, the read after it comes too early."""
    bad = scratch("bump(Tensor x) -> ()", lambda x: write(x))
    eager = lambda x: (bad(x), x * 2)[1:]
    torch._dynamo.reset()
    with pytest.raises(AssertionError):
        check_compiled(torch.compile(eager, fullgraph=True, backend="aot_eager"), eager, lambda device: dict(x=torch.zeros(4, device=device)), device)


def test_compiled_graph_holds_the_registered_ops(device):
    """Dynamo sees one opaque call an op: nothing of a kernel's launcher is traced."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(**layer_arguments(device))
    ours = [t.split(".")[1] for t in targets if t.startswith("gkernels.")]
    assert ours == ["schedule_out", "embedding", "rmsnorm", "linear", "rotary_kv_write", "attention_out", "linear", "add_rmsnorm_out", "rmsnorm_out",
                    "embedding", "linear", "sample_out"]


def test_metadata_of_the_face():
    assert ops.embedding.__doc__ == embedding_room.embedding.__doc__ and ops.embedding.__name__ == "embedding"
