"""Small Hugging Face configurations of every architecture, and the weights that fit them."""

from hypothesis import strategies as st

from gkernels.model.config import ARCHITECTURES

ROPES = [None, {"type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0},
         {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}]


def tiny_config(architecture="LlamaForCausalLM", **changes):
    """A config.json of transformers v4 with 2 layers and about 20,000 weights."""
    return {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower(), "vocab_size": 96,
            "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
            "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"} | changes


@st.composite
def tiny_configs(draw):
    return tiny_config(
        draw(st.sampled_from(ARCHITECTURES)), num_hidden_layers=draw(st.integers(1, 3)),
        num_key_value_heads=draw(st.sampled_from([1, 2, 4])), head_dim=draw(st.sampled_from([8, 16, 20])),
        tie_word_embeddings=draw(st.booleans()), attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()),
        torch_dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])), rope_scaling=draw(st.sampled_from(ROPES)))
