"""The engine against LlamaForCausalLM of transformers, on a GPU: the same greedy tokens."""

import os

import pytest
import torch

from gkernels.model.config import PRESETS, LlamaConfig
from gkernels.model.engine import Engine, Sampling
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights, views

try:
    import transformers
except ImportError:
    transformers = None

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def peer():
    """Where a GPU is required, so is what its tokens are compared with."""
    if transformers is None:
        (pytest.fail if os.environ.get("GKERNELS_REQUIRE_GPU") else pytest.skip)("no transformers here; pip install 'transformers>=5.17'")


def hugging_face(config_dict, weights, config, dtype):
    """LlamaForCausalLM with our weights."""
    peer = transformers.LlamaConfig(**{k: v for k, v in config_dict.items() if k not in ("architectures", "torch_dtype", "dtype")})
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(peer, dtype=dtype, attn_implementation="sdpa").eval()
    state = {name: tensor.to(dtype) for name, tensor in views(weights, config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


@torch.no_grad()
def logits_along(model, prompt, output):
    """Logits for each token of `output`, with everything before it given."""
    ids = torch.tensor([prompt + output[:-1]], device="cuda")
    return model(ids).logits[0, len(prompt) - 1:].double()


def test_small_fp32_model_all_tokens():
    config_dict = dict(architectures=["LlamaForCausalLM"], vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                       num_attention_heads=8, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, rope_theta=1e4, hidden_act="silu",
                       max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=511, bos_token_id=0, torch_dtype="float32")
    config = LlamaConfig.from_dict(config_dict)
    weights = random_weights(config, "cuda", torch.float32, seed=1)
    model = hugging_face(config_dict, weights, config, torch.float32)
    torch.use_deterministic_algorithms(False)
    try:
        engine = Engine(Llama.build(config, weights, 512), max_tokens=64, max_requests=8)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    prompts = [torch.randint(0, 511, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 5, 17, 100, 200)]
    outputs = engine.generate(prompts, Sampling(max_tokens=48, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == 48
        assert output == logits_along(model, prompt, output).argmax(-1).tolist()
    assert not any(runner.eager_steps for runner in engine.runners) and engine.runner.replays == engine.modes["single"]
    assert engine.modes["loop"] > 40 or engine.why


def test_llama_1b_shapes_bf16_wherever_the_reference_is_sure():
    config_dict = PRESETS["llama-3.2-1b"]
    config = LlamaConfig.from_dict(config_dict)
    weights = random_weights(config, "cuda", torch.bfloat16, seed=2)
    torch.use_deterministic_algorithms(False)
    try:
        engine = Engine(Llama.build(config, weights, 1024), max_tokens=256, max_requests=8, max_len=1024)
        prompts = [torch.randint(0, 128000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 64, 300)]
        outputs = engine.generate(prompts, Sampling(max_tokens=24, ignore_eos=True))
        half, wide = (hugging_face(config_dict, weights, config, dtype) for dtype in (torch.bfloat16, torch.float32))
        sure = 0
        for prompt, output in zip(prompts, outputs, strict=True):
            low, high = logits_along(half, prompt, output), logits_along(wide, prompt, output)
            error = (low - high).abs().amax(-1)
            best = high.topk(2).values
            for token, want, is_sure in zip(output, high.argmax(-1).tolist(), (best[:, 0] - best[:, 1] > 2 * error).tolist(), strict=True):
                sure += is_sure
                assert not is_sure or token == want
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert sure >= 18, f"only {sure} of 72 tokens are beyond the reference's own error: the test would say little"
