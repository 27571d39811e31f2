"""Trains the small Llama checkpoint that the package ships:  python examples/train_shakespeare.py TEXT OUT_DIR [--seconds 120]

A byte-level BPE tokenizer of 1024 tokens and a Llama model of 3.8 M parameters (7.7 MB in bf16) learn the first 90 % of a text;
the last 10 % is held out, and the weights with the best held-out loss are kept. Sixteen speeches (parts between blank lines) make
one document, which <|endoftext|> ends. Plain PyTorch: no kernel of this library takes part.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from gkernels.model import load
from gkernels.model.config import LlamaConfig

END = "<|endoftext|>"
CONFIG: dict = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    "torch_dtype": "bfloat16"}


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.D = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (rearrange(p(x), "b t (h d) -> b h t d", d=self.D) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(v.dtype) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: LlamaConfig, dropout: float):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cos, sin):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Parameter names are those of the checkpoint, so `state_dict` needs no mapping."""

    def __init__(self, c: LlamaConfig, dropout: float):
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                                    "layers": nn.ModuleList(Layer(c, dropout) for _ in range(c.num_layers)),
                                    "norm": nn.RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.dropout = nn.Dropout(dropout)
        frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.outer(torch.arange(c.max_position_embeddings), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * c.num_layers) if writes else 0.02)

    def forward(self, ids):                                                # [B, T] -> [B, T, V]
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        x = self.dropout(self.model["embed_tokens"](ids))
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


def train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    speeches = text.split("\n\n")
    documents = ["\n\n".join(speeches[i:i + 16]) for i in range(0, len(speeches), 16)]
    end = tokenizer.token_to_id(END)
    ids = [end]
    for document in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids += document.ids + [end]
    return torch.tensor(ids)


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: torch.Tensor, window: int) -> float:
    """Mean nats per token over consecutive windows, so the first token of each window is predicted from one token only."""
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, 16 * window):
        block = ids[start:start + 16 * window + 1]
        full = (len(block) - 1) // window * window
        for inputs, targets in ((block[:full].view(-1, window), block[1:full + 1]), (block[full:-1].view(1, -1), block[full + 1:])):
            if inputs.numel():
                total += F.cross_entropy(model(inputs).flatten(0, 1).float(), targets, reduction="sum").item()
    model.train()
    return total / (len(ids) - 1)


def train(model: nn.Module, learn: torch.Tensor, held: torch.Tensor, options: argparse.Namespace, started: float) -> tuple[dict, int]:
    """Returns the weights of the best held-out loss, and the steps taken. The learning rate falls by what ends first, steps or seconds."""
    device, window = learn.device, min(CONFIG["max_position_embeddings"], len(learn) - 2)
    matrices, norms = ([p for p in model.parameters() if (p.dim() == 2) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
                                  lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    best, best_state, step, evaluation = math.inf, {}, 0, 0.0
    next_report = 0.0
    while True:
        spent = time.monotonic() - started
        left_for_training = max(options.seconds - 2 * evaluation - 5, 1e-3)   # 5 s to save and to evaluate in fp32
        progress = max(step / options.steps, spent / left_for_training)
        if progress >= next_report or progress >= 1:
            before = time.monotonic()
            with autocast:
                loss = held_out_loss(model, held, window)
            evaluation = time.monotonic() - before
            if loss < best:
                best, best_state = loss, {name: value.clone() for name, value in model.state_dict().items()}
            next_report = progress + max(0.02, 10 * evaluation / options.seconds)
            print(f"step {step:5d}  {time.monotonic() - started:6.1f} s  held out {loss:.4f} nats/token  best {best:.4f}", flush=True)
        if progress >= 1:
            return best_state, step
        rate = min((step + 1) / 100, 1.0) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        starts = torch.randint(len(learn) - window, (options.batch, 1), device=device)
        batch = learn[starts + torch.arange(window + 1, device=device)]
        with autocast:
            logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="wall-clock limit, evaluation and saving included")
    parser.add_argument("--steps", type=int, default=1000, help="40 passes over a text of 1.1 MB")
    parser.add_argument("--batch", type=int, default=32, help="windows of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    torch.manual_seed(options.seed)
    text = options.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    tokenizer = train_tokenizer(text[:cut])
    learn, held = (encode(tokenizer, part).to(options.device) for part in (text[:cut], text[cut:]))
    config = LlamaConfig.from_dict(CONFIG)
    model = Llama(config, options.dropout).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(learn)} tokens to learn, {len(held)} held out")
    state, steps = train(model, learn, held, options, started)

    weights = load.empty_weights(config, "cpu", config.dtype, tied=True)
    for name, view in load.views(weights, config).items():
        view.copy_(state[name])
        state[name].copy_(view)                                            # judge what is shipped: the weights rounded to bf16
    model.load_state_dict(state)
    loss = held_out_loss(model, held, config.max_position_embeddings)
    load.save_checkpoint(options.out, CONFIG, weights)
    tokenizer.save(str(options.out / "tokenizer.json"))
    device = torch.cuda.get_device_name() if learn.is_cuda else "cpu"
    bits = loss * (len(held) - 1) / math.log(2) / len(text[cut:].encode())
    training = {"held_out_nats_per_token": round(loss, 4), "held_out_bits_per_byte": round(bits, 4), "steps": steps, "batch": options.batch,
                "seconds": round(time.monotonic() - started, 1), "date": datetime.now(timezone.utc).date().isoformat(), "device": device,
                "torch": torch.__version__}
    for name, values in {
            "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.8},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
                                      "model_max_length": CONFIG["max_position_embeddings"], "clean_up_tokenization_spaces": False},
            "training.json": training}.items():
        (options.out / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(training))


if __name__ == "__main__":
    main()
