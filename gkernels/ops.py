"""The torch.library face: every op registered once as `torch.ops.gkernels.<name>`, and callable here under its own name.

Eager callers reach the kernel directly, so they pay one test; under `torch.compile` the call becomes the registered, opaque op, so that
Dynamo traces it whole and Inductor copies no cache. Ops that write declare what they write and return nothing. The ops are for inference:
they have no derivatives.
"""

from __future__ import annotations

import functools

import torch

from .kernels import activation, kv_cache, sampling
from .kernels import attention as _attention
from .kernels import embedding as _embedding
from .kernels import linear as _linear
from .kernels import rmsnorm as _rmsnorm
from .kernels import rotary as _rotary
from .kernels import schedule as _schedule
from .kernels.attention import config as attention_config
from .kernels.rotary import cos_sin_table
from .kernels.sampling import BAD_OPTION, NO_TOKEN, check_options
from .kernels.schedule import BAD_LENGTH, BAD_PAGE, MAX_R, Schedule

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
    "linear_out(Tensor x, Tensor weight, Tensor(a!) out, Tensor? bias=None, Tensor? num_tokens=None) -> ()", _linear.linear_out)
linear = _register(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? num_tokens=None, ScalarType? dtype=None) -> Tensor", _linear.linear,
    lambda x, weight, bias=None, num_tokens=None, dtype=None: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype))
embedding_out = _register(
    "embedding_out(Tensor ids, Tensor weight, Tensor(a!) out, Tensor? num_tokens=None, int? padding_index=None) -> ()",
    _embedding.embedding_out)
embedding = _register(
    "embedding(Tensor ids, Tensor weight, Tensor? num_tokens=None, int? padding_index=None) -> Tensor", _embedding.embedding,
    lambda ids, weight, num_tokens=None, padding_index=None: weight.new_empty(ids.shape[0], weight.shape[1]))

attention_out = _register(
    "attention_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor items, Tensor num_items, Tensor(a!) out, "
    "Tensor(b!)? lse=None, float? scale=None) -> ()", _attention.attention_out)
attention = _register(
    "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, float? scale=None) "
    "-> (Tensor, Tensor)", _attention.attention,
    lambda q, k_cache, v_cache, query_start_loc, seq_lens, block_table, scale=None: (
        torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)))

sample_out = _register(
    "sample_out(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position, Tensor seq_lens, "
    "Tensor(a!) status, Tensor(b!) out) -> ()", sampling.sample_out)


def add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6,
                num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """residual += x in place, then returns rmsnorm(residual)."""
    out = torch.empty_like(x)
    add_rmsnorm_out(x, residual, weight, eps, out, num_tokens)
    return out


def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, seed: torch.Tensor,
           position: torch.Tensor, seq_lens: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """Returns one token a row, int32 [R], and ors flags into `status`: see gkernels.kernels.sampling."""
    out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    sample_out(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, out)
    return out


def _schedule_tensors(query_start_loc, seq_lens, block_table, page_size, num_pages, block_q, positions, slot_mapping, token_to_request,
                      last_token, num_tokens, items, num_items, status):
    _schedule.schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, block_q,
                           Schedule(positions, slot_mapping, token_to_request, last_token, num_tokens, items, num_items, status))


_schedule_op = _register(
    "schedule_out(Tensor query_start_loc, Tensor seq_lens, Tensor block_table, int page_size, int num_pages, int block_q, "
    "Tensor(a!) positions, Tensor(b!) slot_mapping, Tensor(c!) token_to_request, Tensor(d!) last_token, Tensor(e!) num_tokens, "
    "Tensor(f!) items, Tensor(g!) num_items, Tensor(h!) status) -> ()", _schedule_tensors)


def schedule_out(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int,
                 block_q: int, out: Schedule) -> None:
    """Fills `out` for the batch: see gkernels.kernels.schedule. The registered op takes the fields of `out` one by one."""
    _schedule_op(query_start_loc, seq_lens, block_table, page_size, num_pages, block_q, out.positions, out.slot_mapping,
                 out.token_to_request, out.last_token, out.num_tokens, out.items, out.num_items, out.status)


def schedule(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int, T: int,
             block_q: int) -> Schedule:
    """Returns the `Schedule` of the batch for a capacity of T tokens."""
    out = Schedule.allocate(T, seq_lens.shape[0], block_q, query_start_loc.device)
    schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, block_q, out)
    return out


__all__ = ["BAD_LENGTH", "BAD_OPTION", "BAD_PAGE", "MAX_R", "NO_TOKEN", "Schedule", "add_rmsnorm", "add_rmsnorm_out", "attention", "attention_config",
           "attention_out", "check_options", "cos_sin_table", "embedding", "embedding_out", "kv_write", "linear", "linear_out", "rmsnorm",
           "rmsnorm_out", "rotary", "rotary_kv_write", "rotary_out", "sample", "sample_out", "schedule", "schedule_out", "silu_and_mul",
           "silu_and_mul_out"]
