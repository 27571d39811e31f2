"""The torch.library face: every op registered once as `torch.ops.gkernels.<name>`, and callable here under its own name.

Eager callers reach the kernel directly, so they pay one test; under `torch.compile` the call becomes the registered, opaque op, so that
Dynamo traces it whole and Inductor copies no cache. Ops that write declare what they write and return nothing. The ops are for inference:
they have no derivatives.
"""

from __future__ import annotations

import functools
from dataclasses import fields

import torch

from .kernels import activation, kv_cache, sampling
from .kernels import adjust as _adjust
from .kernels import advance as _advance
from .kernels import attention as _attention
from .kernels import embedding as _embedding
from .kernels import expand as _expand
from .kernels import gate_up as _gate_up
from .kernels import head as _head
from .kernels import linear as _linear
from .kernels import linear_quantized as _linear_quantized
from .kernels import logprobs as _logprobs
from .kernels import merge as _merge
from .kernels import ngram as _ngram
from .kernels import qkv as _qkv
from .kernels import rmsnorm as _rmsnorm
from .kernels import rotary as _rotary
from .kernels import schedule as _schedule
from .kernels import verify as _verify
from .kernels.adjust import Adjustments, check_adjustments
from .kernels.advance import ERROR, LENGTH, STOP, State
from .kernels.attention import Workspace
from .kernels.attention import tiling as attention_tiling
from .kernels.expand import Rows
from .kernels.head import Workspace as HeadWorkspace
from .kernels.linear import MOST_TOKENS, Scaled
from .kernels.linear import Workspace as ProductWorkspace
from .kernels.linear_quantized import Quantized, check_fp8, pack_awq, pack_gptq
from .kernels.logprobs import Logprobs
from .kernels.logprobs import Workspace as LogprobsWorkspace
from .kernels.ngram import Workspace as NgramWorkspace
from .kernels.qkv import MAX_D as MOST_HEAD_DIM
from .kernels.rotary import cos_sin_table
from .kernels.sampling import BAD_OPTION, NO_TOKEN, check_options
from .kernels.sampling import Workspace as SamplingWorkspace
from .kernels.schedule import BAD_LENGTH, BAD_PAGE, MAX_R, Schedule, Tiling
from .kernels.verify import Probabilities
from .kernels.verify import Workspace as VerifyWorkspace

NAMESPACE = "gkernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")     # the registrations live as long as this object


def _register(schema, function, fake=lambda *args, **kwargs: None):
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default

    @functools.wraps(function)
    def op(*args, **kwargs):
        return (registered if torch.compiler.is_compiling() else function)(*args, **kwargs)
    return op


rmsnorm_out = _register(
    "rmsnorm_out(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor? num_tokens=None) -> ()", _rmsnorm.rmsnorm_out)
rmsnorm = _register(
    "rmsnorm(Tensor x, Tensor weight, float eps=1e-6, Tensor? num_tokens=None) -> Tensor", _rmsnorm.rmsnorm,
    lambda x, weight, eps=1e-6, num_tokens=None: torch.empty_like(x))
add_rmsnorm_out = _register(
    "add_rmsnorm_out(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out, Tensor? num_tokens=None) -> ()",
    _rmsnorm.add_rmsnorm_out)

rotary_out = _register(
    "rotary_out(Tensor q, Tensor k, Tensor positions, Tensor cos_sin, bool interleaved, Tensor(a!) q_out, Tensor(b!) k_out, "
    "Tensor? num_tokens=None) -> ()", _rotary.rotary_out)
rotary = _register(
    "rotary(Tensor q, Tensor k, Tensor positions, Tensor cos_sin, bool interleaved=False, Tensor? num_tokens=None) -> (Tensor, Tensor)",
    _rotary.rotary,
    lambda q, k, positions, cos_sin, interleaved=False, num_tokens=None: (q.new_empty(q.shape), k.new_empty(k.shape)))
rotary_kv_write = _register(
    "rotary_kv_write(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, Tensor slot_mapping, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor(c!) q_out, bool interleaved=False, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, "
    "Tensor? num_tokens=None) -> ()", _rotary.rotary_kv_write)
kv_write = _register(
    "kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()", kv_cache.kv_write)

silu_and_mul_out = _register("silu_and_mul_out(Tensor x, Tensor(a!) out, Tensor? num_tokens=None) -> ()", activation.silu_and_mul_out)
silu_and_mul = _register(
    "silu_and_mul(Tensor x, Tensor? num_tokens=None) -> Tensor", activation.silu_and_mul,
    lambda x, num_tokens=None: x.new_empty(x.shape[0], x.shape[1] // 2))
linear_out = _register(
    "linear_out(Tensor x, Tensor weight, Tensor(a!) out, Tensor? bias=None, Tensor? num_tokens=None, *, bool invariant=False, "
    "bool ready=False) -> ()",
    _linear.linear_out)
linear = _register(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? num_tokens=None, ScalarType? dtype=None, *, bool invariant=False, "
    "bool ready=False) -> Tensor",
    _linear.linear,
    lambda x, weight, bias=None, num_tokens=None, dtype=None, **options: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype))


def _scale_tensors(x, weight, scaled_x, squares, num_tokens=None):
    _rmsnorm.scale(x, weight, Scaled(scaled_x, squares), num_tokens)


def _norm_linear_tensors(x, squares, weight, eps, out, bias=None, num_tokens=None, partials=None, counters=None, index=None, weight_scale=None):
    _linear.norm_linear_out(Scaled(x, squares), _weight(weight, weight_scale), eps, out, bias, num_tokens, _products(partials, counters), index)


def _linear_residual_tensors(x, weight, residual, bias=None, num_tokens=None, partials=None, counters=None, norm=None, scaled_x=None, squares=None,
                             weight_scale=None):
    scaled = None if scaled_x is None else Scaled(scaled_x, squares)
    _linear.linear_residual(x, _weight(weight, weight_scale), residual, bias, num_tokens, _products(partials, counters), norm, scaled)


def _norm_qkv_tensors(x, squares, weight, eps, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, bias=None, q_norm=None, k_norm=None,
                      num_tokens=None, partials=None, counters=None, weight_scale=None):
    _qkv.norm_qkv(Scaled(x, squares), _weight(weight, weight_scale), eps, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, bias, q_norm,
                  k_norm, num_tokens, _products(partials, counters))


def _norm_gate_up_tensors(x, squares, weight, eps, out, bias=None, num_tokens=None, weight_scale=None):
    _gate_up.norm_gate_up_out(Scaled(x, squares), _weight(weight, weight_scale), eps, out, bias, num_tokens)


def _weight(weight, scale):
    return weight if scale is None else Quantized(weight, scale)


def _products(partials, counters):
    return None if partials is None else ProductWorkspace(partials, counters)


_scale_op = _register("scale(Tensor x, Tensor weight, Tensor(a!) scaled_x, Tensor(b!) squares, Tensor? num_tokens=None) -> ()", _scale_tensors)
_norm_linear_op = _register(
    "norm_linear_out(Tensor x, Tensor squares, Tensor weight, float eps, Tensor(a!) out, Tensor? bias=None, Tensor? num_tokens=None, "
    "Tensor(b!)? partials=None, Tensor(c!)? counters=None, Tensor? index=None, Tensor? weight_scale=None) -> ()", _norm_linear_tensors)
_linear_residual_op = _register(
    "linear_residual(Tensor x, Tensor weight, Tensor(a!) residual, Tensor? bias=None, Tensor? num_tokens=None, Tensor(b!)? partials=None, "
    "Tensor(c!)? counters=None, Tensor? norm=None, Tensor(d!)? scaled_x=None, Tensor(e!)? squares=None, Tensor? weight_scale=None) -> ()",
    _linear_residual_tensors)
_norm_qkv_op = _register(
    "norm_qkv(Tensor x, Tensor squares, Tensor weight, float eps, Tensor positions, Tensor cos_sin, Tensor slot_mapping, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor(c!) q_out, Tensor? bias=None, Tensor? q_norm=None, Tensor? k_norm=None, Tensor? num_tokens=None, "
    "Tensor(d!)? partials=None, Tensor(e!)? counters=None, Tensor? weight_scale=None) -> ()", _norm_qkv_tensors)
_norm_gate_up_op = _register(
    "norm_gate_up_out(Tensor x, Tensor squares, Tensor weight, float eps, Tensor(a!) out, Tensor? bias=None, Tensor? num_tokens=None, "
    "Tensor? weight_scale=None) -> ()", _norm_gate_up_tensors)


def scale(x: torch.Tensor, weight: torch.Tensor, scaled: Scaled, num_tokens: torch.Tensor | None = None) -> None:
    """Fills `scaled` with half an RMSNorm of x: see gkernels.kernels.rmsnorm. The registered op takes the fields of `scaled`."""
    _scale_op(x, weight, *scaled, num_tokens)


def norm_linear_out(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, out: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None, workspace: ProductWorkspace | None = None, index: torch.Tensor | None = None) -> None:
    """Writes rmsnorm(row, norm, eps) @ weight.T + bias: see gkernels.kernels.linear. The registered op takes the fields of `scaled`, of the
    workspace and of a quantised weight."""
    stored, weight_scale = _stored(weight)
    _norm_linear_op(*scaled, stored, eps, out, bias, num_tokens, *_fields(workspace), index, weight_scale)


def linear_residual(x: torch.Tensor, weight: torch.Tensor | Quantized, residual: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None, workspace: ProductWorkspace | None = None, norm: torch.Tensor | None = None,
                    scaled: Scaled | None = None) -> None:
    """residual += x @ weight.T + bias in place, and `scaled` for the norm after it: see gkernels.kernels.linear. The registered op takes the fields
    of `scaled`, of the workspace and of a quantised weight."""
    stored, weight_scale = _stored(weight)
    _linear_residual_op(x, stored, residual, bias, num_tokens, *_fields(workspace), norm, *(scaled or (None, None)), weight_scale)


def norm_qkv(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, positions: torch.Tensor, cos_sin: torch.Tensor, slot_mapping: torch.Tensor,
             k_cache: torch.Tensor, v_cache: torch.Tensor, q_out: torch.Tensor, bias: torch.Tensor | None = None,
             q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None,
             workspace: ProductWorkspace | None = None) -> None:
    """Writes q to `q_out`, k and v to their slots: see gkernels.kernels.qkv. The registered op takes the fields of `scaled`, of the workspace
    and of a quantised weight."""
    stored, weight_scale = _stored(weight)
    _norm_qkv_op(*scaled, stored, eps, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, bias, q_norm, k_norm, num_tokens,
                 *_fields(workspace), weight_scale)


def norm_gate_up_out(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, out: torch.Tensor, bias: torch.Tensor | None = None,
                     num_tokens: torch.Tensor | None = None) -> None:
    """Writes silu(g) * u, [g, u] = rmsnorm(row, norm, eps) @ weight.T + bias: see gkernels.kernels.gate_up. The registered op takes the fields of
    `scaled` and of a quantised weight."""
    stored, weight_scale = _stored(weight)
    _norm_gate_up_op(*scaled, stored, eps, out, bias, num_tokens, weight_scale)


def norm_gate_up(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float = 1e-6, bias: torch.Tensor | None = None,
                 num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Returns silu(g) * u, [g, u] = rmsnorm(row, norm, eps) @ weight.T + bias."""
    out = scaled.x.new_empty(scaled.x.shape[0], weight.shape[0] // 2)
    norm_gate_up_out(scaled, weight, eps, out, bias, num_tokens)
    return out


def _stored(weight):
    return weight if isinstance(weight, Quantized) else (weight, None)


def _fields(workspace):
    return vars(workspace).values() if workspace else (None, None)


linear_fp8_out = _register(
    "linear_fp8_out(Tensor x, Tensor weight, Tensor scale, Tensor(a!) out, Tensor? bias=None, Tensor? num_tokens=None) -> ()",
    _linear_quantized.linear_fp8_out)
linear_int4_out = _register(
    "linear_int4_out(Tensor x, Tensor weight, Tensor scales, Tensor(a!) out, Tensor? bias=None, Tensor? num_tokens=None) -> ()",
    _linear_quantized.linear_int4_out)
linear_fp8 = _register(
    "linear_fp8(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? num_tokens=None, ScalarType? dtype=None) -> Tensor",
    _linear_quantized.linear_fp8,
    lambda x, weight, scale, bias=None, num_tokens=None, dtype=None: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype))
linear_int4 = _register(
    "linear_int4(Tensor x, Tensor weight, Tensor scales, Tensor? bias=None, Tensor? num_tokens=None, ScalarType? dtype=None) -> Tensor",
    _linear_quantized.linear_int4,
    lambda x, weight, scales, bias=None, num_tokens=None, dtype=None: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype))
embedding_out = _register(
    "embedding_out(Tensor ids, Tensor weight, Tensor(a!) out, Tensor? num_tokens=None, int? padding_index=None) -> ()",
    _embedding.embedding_out)
embedding = _register(
    "embedding(Tensor ids, Tensor weight, Tensor? num_tokens=None, int? padding_index=None) -> Tensor", _embedding.embedding,
    lambda ids, weight, num_tokens=None, padding_index=None: weight.new_empty(ids.shape[0], weight.shape[1]))

_OPTIONS = ("bool causal=True, int[2] window=[-1, -1], float softcap=0.0, Tensor? sinks=None, Tensor? alibi_slopes=None, "
            "Tensor? tree_mask=None, Tensor? k_scale=None, Tensor? v_scale=None")
attention = _register(
    "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, float? scale=None, *, "
    f"{_OPTIONS}, int? programs=None) -> (Tensor, Tensor)", _attention.attention,
    lambda q, k_cache, v_cache, *args, **kwargs: (
        q.new_empty(*q.shape[:2], v_cache.shape[3]), q.new_empty(q.shape[:2], dtype=torch.float32)))
merge_out = _register(
    "merge_out(Tensor a, Tensor a_lse, Tensor b, Tensor b_lse, Tensor(a!) out, Tensor(b!)? lse=None, Tensor? num_tokens=None) -> ()",
    _merge.merge_out)
merge = _register(
    "merge(Tensor a, Tensor a_lse, Tensor b, Tensor b_lse, Tensor? num_tokens=None) -> (Tensor, Tensor)", _merge.merge,
    lambda a, a_lse, b, b_lse, num_tokens=None: (a.new_empty(a.shape), a_lse.new_empty(a_lse.shape)))

def add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6,
                num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """residual += x in place, then returns rmsnorm(residual)."""
    out = torch.empty_like(x)
    add_rmsnorm_out(x, residual, weight, eps, out, num_tokens)
    return out


def _sample_tensors(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, scores, partials, counts, state, list_x, list_ids,
                    groups, out, typical_p=None, probs=None, keeps=None):
    workspace = SamplingWorkspace(scores, partials, counts, state, list_x, list_ids, groups)
    sampling.sample_out(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, workspace, out, typical_p, probs, keeps)


_sample_op = _register(
    "sample_out(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position, Tensor seq_lens, "
    "Tensor(a!) status, Tensor(b!) scores, Tensor(c!) partials, Tensor(d!) counts, Tensor(e!) state, Tensor(f!) list_x, Tensor(g!) list_ids, "
    "Tensor(h!) groups, Tensor(i!) out, Tensor? typical_p=None, Tensor(j!)? probs=None, Tensor? keeps=None) -> ()", _sample_tensors)


def sample_out(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
               seed: torch.Tensor, position: torch.Tensor, seq_lens: torch.Tensor, status: torch.Tensor, workspace: SamplingWorkspace,
               out: torch.Tensor, typical_p: torch.Tensor | None = None, probs: torch.Tensor | None = None,
               keeps: torch.Tensor | None = None) -> None:
    """Writes one token a row to `out` and ors flags into `status`: see gkernels.kernels.sampling. The registered op takes the workspace's tensors."""
    w = workspace
    _sample_op(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, w.scores, w.partials, w.counts, w.state, w.list_x,
               w.list_ids, w.groups, out, typical_p, probs, keeps)


def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, seed: torch.Tensor,
           position: torch.Tensor, seq_lens: torch.Tensor, status: torch.Tensor, typical_p: torch.Tensor | None = None) -> torch.Tensor:
    """Returns one token a row, int32 [R], and ors flags into `status`: see gkernels.kernels.sampling."""
    R, V = logits.shape
    out, workspace = torch.empty(R, dtype=torch.int32, device=logits.device), SamplingWorkspace.allocate(R, V, logits.device)
    sample_out(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, workspace, out, typical_p)
    return out


def _draw_tensors(x, squares, weight, eps, temperature, seed, position, seq_lens, status, tops, top_ids, scores, score_ids, out, bias=None,
                  index=None, keeps=None, logits=None, weight_scale=None):
    _head.draw_out(Scaled(x, squares), _weight(weight, weight_scale), eps, temperature, seed, position, seq_lens, status,
                   HeadWorkspace(tops, top_ids, scores, score_ids), out, bias, index, keeps, logits)


_draw_op = _register(
    "draw_out(Tensor x, Tensor squares, Tensor weight, float eps, Tensor temperature, Tensor seed, Tensor position, Tensor seq_lens, "
    "Tensor(a!) status, Tensor(b!) tops, Tensor(c!) top_ids, Tensor(d!) scores, Tensor(e!) score_ids, Tensor(f!) out, Tensor? bias=None, "
    "Tensor? index=None, Tensor? keeps=None, Tensor(g!)? logits=None, Tensor? weight_scale=None) -> ()", _draw_tensors)


def draw_out(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, temperature: torch.Tensor, seed: torch.Tensor, position: torch.Tensor,
             seq_lens: torch.Tensor, status: torch.Tensor, workspace: HeadWorkspace, out: torch.Tensor, bias: torch.Tensor | None = None,
             index: torch.Tensor | None = None, keeps: torch.Tensor | None = None, logits: torch.Tensor | None = None) -> None:
    """Writes one token a row, and the logits of rows that keep them: see gkernels.kernels.head. The registered op takes the fields of `scaled`, of
    the workspace and of a quantised weight."""
    stored, weight_scale = _stored(weight)
    _draw_op(*scaled, stored, eps, temperature, seed, position, seq_lens, status, *vars(workspace).values(), out, bias, index, keeps, logits,
             weight_scale)


def _adjust_tensors(logits, seq_lens, status, out, *adjustments):
    _adjust.adjust_out(logits, Adjustments(*adjustments), seq_lens, status, out)


_ADJUSTMENTS = ", ".join(f"Tensor? {field.name}=None" for field in fields(Adjustments))
_adjust_op = _register(f"adjust_out(Tensor logits, Tensor seq_lens, Tensor(a!) status, Tensor(b!) out, {_ADJUSTMENTS}) -> ()", _adjust_tensors)
_adjust_in_place_op = _register(
    f"adjust_(Tensor(a!) logits, Tensor seq_lens, Tensor(b!) status, {_ADJUSTMENTS}) -> ()",
    lambda logits, seq_lens, status, *adjustments: _adjust_tensors(logits, seq_lens, status, logits, *adjustments))


def adjust_out(logits: torch.Tensor, adjustments: Adjustments, seq_lens: torch.Tensor, status: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the adjusted logits to `out`, another tensor: see gkernels.kernels.adjust. The registered op takes the adjustments one by one."""
    _adjust_op(logits, seq_lens, status, out, *vars(adjustments).values())


def adjust_(logits: torch.Tensor, adjustments: Adjustments, seq_lens: torch.Tensor, status: torch.Tensor) -> None:
    """Adjusts the logits in place: see gkernels.kernels.adjust. The registered op takes the adjustments one by one."""
    _adjust_in_place_op(logits, seq_lens, status, *vars(adjustments).values())


_WRITTEN = ("token_ids", "seq_lens", "generated", "ended", "flags", "ring", "step", "running", "counts", "history")


def _declared(field):
    alias = f"({'abcdefghij'[_WRITTEN.index(field.name)]}!)" if field.name in _WRITTEN else ""
    return f"Tensor{alias}? {field.name}=None" if field.default is None else f"Tensor{alias} {field.name}"


_advance_op = _register(
    f"advance(Tensor tokens, Tensor status, int vocab_size, {', '.join(_declared(field) for field in fields(State))}) -> ()",
    lambda tokens, status, vocab_size, *state: _advance.advance(tokens, status, State(*state), vocab_size))


def advance(tokens: torch.Tensor, status: torch.Tensor, state: State, vocab_size: int) -> None:
    """Advances `state` in place by a step: see gkernels.kernels.advance. The registered op takes the state's tensors one by one."""
    _advance_op(tokens, status, vocab_size, *vars(state).values())


def _ngram_tensors(history, lengths, max_draft, min_n, max_n, keys, counts, draft, draft_len, slots=None):
    _ngram.ngram_out(history, lengths, max_draft, min_n, max_n, NgramWorkspace(keys, counts), draft, draft_len, slots)


_ngram_op = _register(
    "ngram_out(Tensor history, Tensor lengths, Tensor max_draft, int min_n, int max_n, Tensor(a!) keys, Tensor(b!) counts, Tensor(c!) draft, "
    "Tensor(d!) draft_len, Tensor? slots=None) -> ()", _ngram_tensors)


def ngram_out(history: torch.Tensor, lengths: torch.Tensor, max_draft: torch.Tensor, min_n: int, max_n: int, workspace: NgramWorkspace,
              draft: torch.Tensor, draft_len: torch.Tensor, slots: torch.Tensor | None = None) -> None:
    """Writes drafts by prompt lookup: see gkernels.kernels.ngram. The registered op takes the workspace's tensors."""
    _ngram_op(history, lengths, max_draft, min_n, max_n, workspace.keys, workspace.counts, draft, draft_len, slots)


_expand_op = _register(
    "expand_out(Tensor token_ids, Tensor seq_lens, Tensor draft, Tensor draft_len, Tensor limits, Tensor(a!) rows_token_ids, Tensor(b!) rows_draft, "
    "Tensor(c!) request, Tensor(d!) position, Tensor(e!) query_start_loc, Tensor(f!) rows_seq_lens) -> ()",
    lambda token_ids, seq_lens, draft, draft_len, limits, *rows: _expand.expand_out(token_ids, seq_lens, draft, draft_len, limits, Rows(*rows)))


def expand_out(token_ids: torch.Tensor, seq_lens: torch.Tensor, draft: torch.Tensor, draft_len: torch.Tensor, limits: torch.Tensor,
               out: Rows) -> None:
    """Writes the rows of a speculative step: see gkernels.kernels.expand. The registered op takes the fields of `out`."""
    _expand_op(token_ids, seq_lens, draft, draft_len, limits, *vars(out).values())


def _verify_tensors(draft, sampled, query_start_loc, status, tokens, num_accepted, target=None, proposal=None, is_drawn=None, seed=None,
                    position=None, scores=None, ids=None, counts=None):
    probs = None if target is None else Probabilities(target, proposal, is_drawn, seed, position)
    workspace = None if scores is None else VerifyWorkspace(scores, ids, counts)
    _verify.verify_out(draft, sampled, query_start_loc, status, tokens, num_accepted, probs, workspace)


_verify_op = _register(
    "verify_out(Tensor draft, Tensor sampled, Tensor query_start_loc, Tensor(a!) status, Tensor(b!) tokens, Tensor(c!) num_accepted, "
    "Tensor? target=None, Tensor? proposal=None, Tensor? is_drawn=None, Tensor? seed=None, Tensor? position=None, Tensor(d!)? scores=None, "
    "Tensor(e!)? ids=None, Tensor(f!)? counts=None) -> ()", _verify_tensors)


def verify_out(draft: torch.Tensor, sampled: torch.Tensor, query_start_loc: torch.Tensor, status: torch.Tensor, tokens: torch.Tensor,
               num_accepted: torch.Tensor, probs: Probabilities | None = None, workspace: VerifyWorkspace | None = None) -> None:
    """Judges drafts: see gkernels.kernels.verify. The registered op takes the tensors of `probs` and of the workspace."""
    _verify_op(draft, sampled, query_start_loc, status, tokens, num_accepted, *(vars(probs).values() if probs else (None,) * 5),
               *(vars(workspace).values() if workspace else (None,) * 3))


def _logprobs_tensors(logits, seq_lens, token, tops, sums, before, keys, counts, *out):
    _logprobs.logprobs_out(logits, seq_lens, token, LogprobsWorkspace(tops, sums, before, keys, counts), Logprobs(*out))


_logprobs_op = _register(
    "logprobs_out(Tensor logits, Tensor seq_lens, Tensor token, Tensor(a!) tops, Tensor(b!) sums, Tensor(c!) before, Tensor(d!) keys, "
    "Tensor(e!) counts, Tensor(f!) logsumexp, Tensor(g!) logprob, Tensor(h!) rank, Tensor(i!) top_ids, Tensor(j!) top_logprobs) -> ()",
    _logprobs_tensors)


def logprobs_out(logits: torch.Tensor, seq_lens: torch.Tensor, token: torch.Tensor, workspace: LogprobsWorkspace, out: Logprobs) -> None:
    """Writes log-probabilities and ranks: see gkernels.kernels.logprobs. The registered op takes the fields of the workspace and of `out`."""
    _logprobs_op(logits, seq_lens, token, *vars(workspace).values(), *vars(out).values())


_TILING = [(field.name, bool if field.type == "bool" else int) for field in fields(Tiling)]


def _to_ints(tiling):
    return None if tiling is None else [int(getattr(tiling, name)) for name, _ in _TILING]


def _from_ints(ints):
    return None if ints is None else Tiling(**{name: kind(value) for (name, kind), value in zip(_TILING, ints, strict=True)})


def _schedule_tensors(query_start_loc, seq_lens, block_table, page_size, num_pages, tiling, *out):
    _schedule.schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, _from_ints(tiling), Schedule(*out))


_schedule_op = _register(
    "schedule_out(Tensor query_start_loc, Tensor seq_lens, Tensor block_table, int page_size, int num_pages, int[] tiling, "
    "Tensor(a!) positions, Tensor(b!) slot_mapping, Tensor(c!) token_to_request, Tensor(d!) last_token, Tensor(e!) num_tokens, "
    "Tensor(f!) status, Tensor(g!) work) -> ()", _schedule_tensors)


def schedule_out(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int,
                 tiling: Tiling, out: Schedule) -> None:
    """Fills `out` for the batch: see gkernels.kernels.schedule. The registered op takes the fields of `tiling` as integers and those of `out`
    one by one."""
    _schedule_op(query_start_loc, seq_lens, block_table, page_size, num_pages, _to_ints(tiling), out.positions, out.slot_mapping,
                 out.token_to_request, out.last_token, out.num_tokens, out.status, out.work)


def schedule(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int, T: int,
             tiling: Tiling) -> Schedule:
    """Returns the `Schedule` of the batch for a capacity of T tokens."""
    out = Schedule.allocate(T, seq_lens.shape[0], tiling, query_start_loc.device)
    schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, tiling, out)
    return out


def _attention_tensors(q, k_cache, v_cache, block_table, work, states, counters, out, lse=None, scale=None, *, tiling=None, **options):
    _attention.attention_out(q, k_cache, v_cache, block_table, work, Workspace(states, counters), out, lse, scale,
                             tiling=_from_ints(tiling), **options)


_attention_op = _register(
    "attention_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor work, Tensor(a!) states, Tensor(b!) counters, "
    f"Tensor(c!) out, Tensor(d!)? lse=None, float? scale=None, *, {_OPTIONS}, int[]? tiling=None, bool ready=False) -> ()", _attention_tensors)


def attention_out(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, work: torch.Tensor,
                  workspace: Workspace, out: torch.Tensor, lse: torch.Tensor | None = None, scale: float | None = None, *,
                  tiling: Tiling | None = None, **options) -> None:
    """Writes attention to `out` and, where given, log-sum-exp to `lse`; `options` are those of gkernels.kernels.attention. The registered op takes
    the workspace's two tensors and the fields of `tiling` as integers."""
    _attention_op(q, k_cache, v_cache, block_table, work, workspace.states, workspace.counters, out, lse, scale, tiling=_to_ints(tiling), **options)


__all__ = ["BAD_LENGTH", "BAD_OPTION", "BAD_PAGE", "ERROR", "LENGTH", "MAX_R", "MOST_HEAD_DIM", "MOST_TOKENS", "NO_TOKEN", "STOP", "Adjustments",
           "HeadWorkspace", "Logprobs", "LogprobsWorkspace", "NgramWorkspace", "Probabilities", "ProductWorkspace", "Quantized", "Rows",
           "SamplingWorkspace", "Scaled", "Schedule", "State", "Tiling", "VerifyWorkspace", "Workspace", "add_rmsnorm", "add_rmsnorm_out", "adjust_",
           "adjust_out", "advance", "attention", "attention_out", "attention_tiling", "check_adjustments", "check_fp8", "check_options",
           "cos_sin_table", "draw_out", "embedding", "embedding_out", "expand_out", "kv_write", "linear", "linear_fp8", "linear_fp8_out",
           "linear_int4", "linear_int4_out", "linear_out", "linear_residual", "logprobs_out", "merge", "merge_out", "ngram_out", "norm_gate_up",
           "norm_gate_up_out", "norm_linear_out", "norm_qkv", "pack_awq", "pack_gptq", "rmsnorm", "rmsnorm_out", "rotary", "rotary_kv_write",
           "rotary_out", "sample", "sample_out", "scale", "schedule", "schedule_out", "silu_and_mul", "silu_and_mul_out", "verify_out"]
