"""What the programs that time transformers' Llama share: its shape, and their answers.

It imports nothing of plt_jax, since it runs with interpreters that have torch and transformers
alone.
"""

import json
import os
import sys

# Only the interpreters that run this file need these two packages.
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

ENVIRONMENT = ("ONEDNN_MAX_CPU_ISA", "TRANSFORMERS_SDPA_FORCE_GQA")


def llama_config(shape, length, **settings):
    """The configuration of a Llama for contexts of `length` tokens.

    Args:
      shape: the JSON object that `torch_peer.shape_of` makes.
      settings: further fields of the configuration.
    """
    return transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["ffn_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_width"],
        tie_word_embeddings=shape["tied_embeddings"],
        max_position_embeddings=length,
        attn_implementation="sdpa",
        **settings,
    )


def answer(shape, seconds_of):
    """Prints what runs here, and then, for each number that standard input has, its seconds.

    Args:
      seconds_of: `seconds_of(count)`, the seconds that so many tokens or steps take.
    """
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if shape["device"] == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": shape["compile"],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds_of(int(line))), flush=True)


def wait(device):
    """Waits for the device's work."""
    if device == "cuda":
        torch.cuda.synchronize()
