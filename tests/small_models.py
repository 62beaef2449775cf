"""Models of two layers that compile in a second, and prompts for them."""

import numpy as np

from jaxopt_models.models.config import ModelConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LLAMA = ModelConfig.from_hf({"model_type": "llama"} | SIZES)
SLIDING = ModelConfig.from_hf({"model_type": "mistral", "sliding_window": 6} | SIZES)
MIXTRAL = ModelConfig.from_hf(
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | SIZES
)
GEMMA = ModelConfig.from_hf(
    {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 6}
    | SIZES
    | {"head_dim": 16}
)

# One token; more than a window; more than the 64 positions that buffers grow by.
PROMPTS = [[7], [int(t) for t in np.arange(11) * 5 % 64], [int(t) for t in np.arange(70) * 7 % 64]]
