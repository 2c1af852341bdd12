"""The plot of a run's losses, loss.png."""

from __future__ import annotations

from pathlib import Path

from plt_jax.files.writing import replaced_file
from plt_jax.runs.metrics_file import read_metrics


def plot_losses(directory: Path) -> None:
    """Draws loss.png: training and validation loss in nats per token, by step."""
    from matplotlib.figure import Figure  # slow to import, and used once per run

    rows = read_metrics(directory)
    training = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    validation = [row for row in rows if row.get("validation_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.6, label="training")
    if validation:
        steps = [row["step"] for row in validation]
        losses = [row["validation_loss"] for row in validation]
        last = validation[-1].get("bits_per_byte")
        label = "held-out text" + (f" (last: {last:.3f} bits per byte)" if last else "")
        axes.plot(steps, losses, "o-", color="tab:orange", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(directory.name)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    with replaced_file(directory / "loss.png") as file:
        figure.savefig(file, dpi=120, format="png")
