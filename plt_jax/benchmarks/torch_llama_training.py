"""Times the training of transformers' Llama, in a process of its own.

It imports nothing of plt_jax, so that any interpreter with torch and transformers can run it:
`PYTHON torch_llama_training.py SHAPE`, where SHAPE is a JSON object (see `main`). It prints one
line of JSON when it is ready. Then it reads lines from standard input, each a number of steps, and
answers each with one line: the seconds that the steps took.
"""

import contextlib
import json
import sys
import time

# Only the interpreter that runs this file needs these two packages.
import torch  # pyright: ignore[reportMissingImports]
from torch_process import answer, llama_config, wait
from transformers import LlamaForCausalLM  # pyright: ignore[reportMissingImports]


def main() -> None:
    shape = json.loads(sys.argv[1])
    train = Trainer(shape)
    train(1)  # the first step compiles, and makes the optimizer's state
    answer(shape, train)


class Trainer:
    """Trains on random tokens, by AdamW with clipping and with decay of all matrices.

    Parameters are float32. In bfloat16 the products run under autocast.
    """

    def __init__(self, shape):
        torch.manual_seed(0)
        self.shape, self.device = shape, shape["device"]
        config = llama_config(shape, shape["length"], use_cache=False)
        with torch.device(self.device):
            self.model = LlamaForCausalLM(config).train()
        self.forward = torch.compile(self.model) if shape["compile"] else self.model
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        size = (shape["accumulate"], shape["batch"] // shape["accumulate"], shape["length"])
        self.tokens = torch.randint(shape["vocab_size"], size, device=self.device)

    def __call__(self, steps: int) -> float:
        """Seconds of so many steps."""
        wait(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            for tokens in self.tokens:
                with self._autocast():
                    loss = self.forward(input_ids=tokens, labels=tokens).loss
                (loss / len(self.tokens)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        return time.perf_counter() - begin

    def _autocast(self):
        if self.shape["dtype"] == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=getattr(torch, self.shape["dtype"]))


if __name__ == "__main__":
    main()
