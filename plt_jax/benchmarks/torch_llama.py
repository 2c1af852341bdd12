"""Times the Llama of Hugging Face transformers with a static cache, in a process of its own.

It imports nothing of plt_jax, so that any interpreter with torch and transformers can run it:
`PYTHON torch_llama.py SHAPE`, where SHAPE is a JSON object (see `main`). It prints one line of JSON
when it is ready. Then it reads lines from standard input, each a number of tokens, and answers each
with one line: the seconds that decoding them took.
"""

import json
import os
import sys
import time

# Only the interpreter that runs this file needs these two packages.
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

ENVIRONMENT = ("ONEDNN_MAX_CPU_ISA", "TRANSFORMERS_SDPA_FORCE_GQA")


def main() -> None:
    shape = json.loads(sys.argv[1])
    device = shape["device"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["ffn_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_width"],
        tie_word_embeddings=shape["tied_embeddings"],
        max_position_embeddings=shape["capacity"],
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(getattr(torch, shape["dtype"]))
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    step = model.forward
    if shape["compile"]:
        mode = "reduce-overhead" if device == "cuda" else "default"
        step = torch.compile(model.forward, mode=mode, fullgraph=True)
    decode = Decoder(model, step, config, shape, device)
    decode(3)  # the first call compiles
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": shape["compile"],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(decode(int(line))), flush=True)


class Decoder:
    """Greedy decoding at the end of a context whose keys and values are random."""

    def __init__(self, model, step, config, shape, device):
        self.step, self.shape, self.device = step, shape, device
        self.cache = StaticCache(config=config, max_cache_len=shape["capacity"])
        self.token = torch.zeros((shape["batch"], 1), dtype=torch.long, device=device)
        with torch.no_grad():  # the first call allocates the cache
            model.forward(
                input_ids=self.token,
                past_key_values=self.cache,
                cache_position=torch.zeros(1, dtype=torch.long, device=device),
            )
            for layer in self.cache.layers:
                layer.keys.normal_()
                layer.values.normal_()

    @torch.no_grad()
    def __call__(self, tokens: int) -> float:
        """Seconds of decoding so many tokens of every sequence, always after the same context."""
        start = self.shape["context"]
        positions = [torch.tensor([start + i], device=self.device) for i in range(tokens)]
        self._rewind(start)
        self._wait()
        begin = time.perf_counter()
        for position in positions:
            out = self.step(
                input_ids=self.token, past_key_values=self.cache, cache_position=position
            )
            self.token.copy_(out.logits[:, -1:].argmax(-1))
        self._wait()
        return time.perf_counter() - begin

    def _rewind(self, position: int) -> None:
        """Resets the cache's length, which newer versions of transformers keep in the cache."""
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(position)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
