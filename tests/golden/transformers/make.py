"""Makes the cases beside this file: tiny random models of transformers, with their logits.

They test the import of the model types that the golden cases do not have. Each folder holds what
`save_pretrained` wrote (config.json, model.safetensors) and expected.npz: `input_ids` int32
[2, 24], `logits` float32 [2, 24, 67]. Made with torch 2.15.0 and transformers 5.23.0 on a CPU:

    pip install torch transformers
    python tests/golden/transformers/make.py [NAME ...]

The cases of mistral and olmo2 were made with torch 2.13.0 and transformers 5.24.0.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "llama_rope_llama3_tied": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
    ),
    "llama_rope_linear_biases": (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE, tie_word_embeddings=False, rope_parameters=LINEAR, attention_bias=True
        ),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=False)),
    "qwen3_biases": (
        Qwen3ForCausalLM,
        Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=False, attention_bias=True),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None, head_dim=10)),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**SHAPE, eos_token_id=2, tie_word_embeddings=False)),
    "olmo2_biases_one_key_head": (
        Olmo2ForCausalLM,
        Olmo2Config(
            **SHAPE | {"num_key_value_heads": 1},
            eos_token_id=2,
            tie_word_embeddings=True,
            attention_bias=True,
        ),
    ),
}


def main():
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 67, (2, 24)))
    for name, (model_class, config) in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(list(CASES).index(name))
        model = model_class(config).eval()
        for parameter in model.parameters():  # also of norms and biases, so that they matter
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
        np.savez(
            folder / "expected.npz",
            input_ids=tokens.numpy().astype(np.int32),
            logits=logits.float().numpy(),
        )
        values = json.loads((folder / "config.json").read_text())
        print(name, values["model_type"], values.get("rope_parameters"), float(logits.std()))


if __name__ == "__main__":
    main()
