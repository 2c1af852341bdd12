"""Makes the cases beside this file: tiny random Ouro models, with what the public code computes.

The code is that of the published checkpoints (modeling_ouro.py and configuration_ouro.py beside
their weights; an edition of it is in LoopedLMs/ouro_rl). Each folder holds what `save_pretrained`
wrote (config.json, model.safetensors) and expected.npz: `input_ids` int32 [2, 24]; `logits` float32
[L, 2, 24, 67], after every loop; `exit` float32 [L, 2, 24], the probability to exit after a loop;
and `exited` float32 [2, 24, 67], the logits with an exit threshold of 0.6. Made with torch 2.13.0
and transformers 4.54.1 on a CPU:

    pip install torch transformers==4.54.1
    python tests/golden/ouro/make.py FOLDER_OF_THE_TWO_FILES
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch

THRESHOLD = 0.6
SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CASES = {
    "ouro_l4": {},
    "ouro_l2_wide_heads": {"head_dim": 12, "num_key_value_heads": 2, "total_ut_steps": 2},
    "ouro_l3_exits_tied": {
        "total_ut_steps": 3,
        "early_exit_threshold": THRESHOLD,
        "tie_word_embeddings": True,
        "rope_theta": 1000.0,
    },
}


def main():
    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(folder.parent))
    published = importlib.import_module(f"{folder.name}.modeling_ouro")
    config_class = importlib.import_module(f"{folder.name}.configuration_ouro").OuroConfig
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 67, (2, 24)))
    for number, (name, changes) in enumerate(CASES.items()):
        torch.manual_seed(number)
        config = config_class(**SHAPE | changes)
        model = published.OuroForCausalLM(config).eval()
        for parameter in model.parameters():  # also of norms and the gate, so that they matter
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(Path(__file__).parent / name)
        (Path(__file__).parent / name / "generation_config.json").unlink()
        with torch.no_grad():
            loops = range(config.total_ut_steps)
            logits = [model(tokens, exit_at_step=step, use_cache=False).logits for step in loops]
            exited = model(tokens, exit_threshold=THRESHOLD, use_cache=False).logits
            _, _, gates = model.model(tokens, use_cache=False)
        stays, exits = torch.ones(tokens.shape), []
        for gate in gates[:-1]:
            leaves = torch.sigmoid(gate[..., 0])
            exits.append(stays * leaves)
            stays = stays * (1 - leaves)
        np.savez(
            Path(__file__).parent / name / "expected.npz",
            input_ids=tokens.numpy().astype(np.int32),
            logits=torch.stack(logits).numpy(),
            exit=torch.stack([*exits, stays]).numpy(),
            exited=exited.numpy(),
        )
        print(name, float(logits[-1].std()), [float(one.mean()) for one in [*exits, stays]])


if __name__ == "__main__":
    main()
