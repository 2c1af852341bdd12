"""Small tokenizers of the kinds that public models have, and models that write what is asked."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from plt_jax.data.special_tokens import SpecialTokens
from plt_jax.data.tokenizer import TextTokenizer

TEXT = (
    "the quick brown fox jumps over the lazy dog. the state of the union is strong.\n" * 5,
    "def f(x):\n    return x + 1\n\nfor i in range(3):\n        print(i)\n" * 5,
    "a/b/c\n/usr/lib,\n/usr/bin;\n12345 67\n\n  naïve 日本\n" * 5,
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

GPT2 = None
"""The pattern that ByteLevel has by itself."""
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pattern: str | None = GPT2, prefix_space: bool = False, **settings) -> Tokenizer:
    """A byte-level tokenizer, as GPT-2's, Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_fallback(legacy: bool) -> Tokenizer:
    """A tokenizer with byte fallback and a space before a text, as Llama 2's.

    Args:
      legacy: whether a normalizer puts the space there, and not a pre-tokenizer.
    """
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.Replace(" ", "▁")
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=[*SPECIAL, *BYTES], show_progress=False
    )
    # Without the newline, whose token is a byte.
    words.train_from_iterator([f" {line}" for text in TEXT for line in text.split("\n")], trainer)
    trained = json.loads(words.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for token, index in trained["vocab"].items() if token != "\n"},
            [tuple(pair) for pair in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def unigram(scheme: str) -> Tokenizer:
    """A SentencePiece Unigram tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


KINDS = {
    "byte-level": lambda: byte_level(),
    "o200k": lambda: byte_level(O200K),
    "prefix space": lambda: byte_level(prefix_space=True),
    "strips": lambda: byte_level(normalizer=normalizers.Strip()),
    "NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "Llama 2": lambda: byte_fallback(legacy=True),
    "Llama 2, new": lambda: byte_fallback(legacy=False),
    "Unigram": lambda: unigram("first"),
    "Unigram, always": lambda: unigram("always"),
}


@functools.cache
def tokenizer_of(kind: str) -> TextTokenizer:
    """The tokenizer of a kind, with `<s>` and `</s>` as begin and end token."""
    library = KINDS[kind]()
    library.encode_special_tokens = True
    begin, end = library.token_to_id("<s>"), library.token_to_id("</s>")
    return TextTokenizer(library, SpecialTokens(begin, (end,)))


def write_chain_model(
    folder: Path, tokenizer: Tokenizer, text: Sequence[int], **files: Mapping[str, Any] | str
) -> Path:
    """Writes a Hugging Face llama that continues each token of a text by the next one.

    Args:
      tokenizer: its tokenizer.
      text: tokens, each of which occurs once.
      files: the content of further files, and of config.json beyond its shape, by their names
        without `.json`; a text is a chat_template.jinja.
    """
    assert len(set(text)) == len(text)
    folder.mkdir(parents=True)
    V = max(tokenizer.get_vocab().values()) + 1
    D = -(-V // 4) * 4
    embedding, head = np.eye(V, D, dtype=np.float32), np.zeros((V, D), np.float32)
    head[list(text[1:]), list(text[:-1])] = 20
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    weights |= {"model.norm.weight": np.ones(D, np.float32)}
    shapes = {
        **{f"self_attn.{name}_proj.weight": (D, D) for name in "qkvo"},
        **{"mlp.gate_proj.weight": (4, D), "mlp.up_proj.weight": (4, D)},
        "mlp.down_proj.weight": (D, 4),
    }
    for name, shape in shapes.items():
        weights[f"model.layers.0.{name}"] = np.zeros(shape, np.float32)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"model.layers.0.{name}.weight"] = np.ones(D, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in ({"config": {}} | files).items():
        if isinstance(content, str):
            (folder / "chat_template.jinja").write_text(content, encoding="utf-8")
            continue
        values = shape | content if name == "config" else content
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
