"""Rows of metrics as runs write them, made up for the tests of reports."""

import numpy as np

from plt_jax.config import RunConfig

CONFIG = RunConfig.model_validate({"model": {"moe": {"experts": 4, "dense_layers": 1}}})
BEGAN = 1_790_000_000.0


def clocked(step, time, **seconds) -> dict:
    """A row of training, written some seconds after BEGAN, with seconds by phase."""
    clock = {f"seconds/{phase}": value for phase, value in seconds.items()}
    return {"step": step, "time": BEGAN + time, "loss": 2.0, **clock}


def evaluated(step, time, loss=2.0) -> dict:
    """A row of an evaluation, written some seconds after BEGAN."""
    row = {"step": step, "validation_loss": loss, "bits_per_byte": loss / 2}
    return {**row, "validation_tokens": 100, "time": BEGAN + time}


def rolled_back(step, undone, time) -> dict:
    """A row of a rollback, written some seconds after BEGAN."""
    return {"step": step, "rolled_back_from": step + undone, "time": BEGAN + time}


def full_rows(count, every=10):
    """Rows with all metrics that a run can write; two loops, three layers with experts."""
    draw = np.random.default_rng(0)
    noise = draw.uniform(0.5, 1.5, (count, 3)).tolist()
    rows = []
    for index, (one, two, three) in enumerate(noise, start=1):
        passed = 3.0 * index
        rows.append(
            {
                **clocked(index * every, passed + 5, starting=5.0, steps=passed),
                **{"loss": one + 2, "gradient_norm": two, "learning_rate": 1e-3, "skipped": 0.0},
                **{f"gradient_norm/layers.{name}": two for name in "qkvo"},
                **{f"update_norm/layers.{name}": three for name in "qkvo"},
                **{"tokens_per_second": 1e5 * one, "model_tflops_per_second": 9.0, "mfu": 0.4},
                **{"gate_by_loop": [[0.5, 0.4, 0.3, one / 2]], "hidden_norm_by_loop": [one, two]},
                **{"experts_per_step": 2.5, "expert_load_entropy": 0.9, "expert_max_load": 0.4},
                "expert_dropped": 0.0,
                "expert_load_entropy_by_loop": [[0.9, 0.8, 0.7]] * 2,
                "expert_max_load_by_loop": [[0.4, 0.3, 0.3]] * 2,
                "expert_dropped_by_loop": [[0.0, 0.0, 0.0]] * 2,
                "router_z_by_loop": [[one, two, three]] * 2,
            }
        )
    return rows
