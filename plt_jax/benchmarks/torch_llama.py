"""Times the Llama of Hugging Face transformers with a static cache, in a process of its own.

It imports nothing of plt_jax, so that any interpreter with torch and transformers can run it:
`PYTHON torch_llama.py SHAPE`, where SHAPE is a JSON object (see `main`). It prints one line of JSON
when it is ready. Then it reads lines from standard input, each a number of tokens, and answers each
with one line: the seconds that decoding them took.
"""

import json
import sys
import time

# Only the interpreter that runs this file needs these two packages.
import torch  # pyright: ignore[reportMissingImports]
from torch_process import answer, llama_config, wait
from transformers import (  # pyright: ignore[reportMissingImports]
    LlamaForCausalLM,
    StaticCache,
)


def main() -> None:
    shape = json.loads(sys.argv[1])
    device = shape["device"]
    torch.manual_seed(0)
    config = llama_config(shape, shape["capacity"])
    torch.set_default_dtype(getattr(torch, shape["dtype"]))
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    step = model.forward
    if shape["compile"]:
        mode = "reduce-overhead" if device == "cuda" else "default"
        step = torch.compile(model.forward, mode=mode, fullgraph=True)
    decode = Decoder(model, step, config, shape, device)
    decode(3)  # the first call compiles
    answer(shape, decode)


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
        wait(self.device)
        begin = time.perf_counter()
        for position in positions:
            out = self.step(
                input_ids=self.token, past_key_values=self.cache, cache_position=position
            )
            self.token.copy_(out.logits[:, -1:].argmax(-1))
        wait(self.device)
        return time.perf_counter() - begin

    def _rewind(self, position: int) -> None:
        """Resets the cache's length, which newer versions of transformers keep in the cache."""
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(position)


if __name__ == "__main__":
    main()
