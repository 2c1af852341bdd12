"""The sections of training and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from plt_jax.config.types import (
    LARGE,
    LARGE_INT,
    AxisSize,
    Fraction,
    MayChange,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    divisors,
)


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warmup: cosine decay, warmup-stable-decay (linear at the end), or constant."""
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of training.steps that the linear warmup from 0 takes."""
    decay_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of training.steps that the final decay takes (wsd)."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak (cosine, wsd)."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the squared gradient's running mean."""
    epsilon: Annotated[float, Field(ge=1e-20, le=LARGE)] = 1e-8
    """Added to the root of the squared gradient's mean. (Below the limit, gradients too small for
    their squares to be other than 0 would make huge updates.)"""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay, times the learning rate, of the projections' weights; norms, gates, biases
    and embeddings have none."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; null for no clipping."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} "
                "add up to more than 1; lower one"
            )
        return self


class TrainingConfig(Section):
    """The training loop."""

    steps: MayChange[PositiveInt] = 1000
    """Optimizer steps in total."""
    batch_size: PositiveInt = 32
    """Examples per optimizer step, over all devices and accumulation steps."""
    accumulate: MayChange[PositiveInt] = 1
    """Micro-batches that a step's gradient is summed over; must divide batch_size."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-normaliser of the output softmax, added to the loss."""
    log_every: MayChange[PositiveInt] = 10
    """Steps between lines of metrics."""
    evaluate_every: MayChange[PositiveInt] = 200
    """Steps between evaluations on held-out text; the last step is always evaluated."""
    checkpoint_every: MayChange[PositiveInt] = 200
    """Steps between checkpoints; the last step is always saved."""
    hang_after: MayChange[PositiveFloat | None] = 600.0
    """Seconds in one phase of training (waiting for data, computing a step, saving, ...) after
    which a line says which it is; null for never."""
    sample_prompt: MayChange[Text] = ""
    """Prompt of the sample printed at the end."""
    profile_from: MayChange[PositiveInt | None] = None
    """Step that a traced window begins with (its trace is among the run's TensorBoard events); null
    for none."""
    profile_steps: MayChange[PositiveInt] = 3
    """Steps in that window."""
    wandb_project: MayChange[Annotated[Text, Field(min_length=1)] | None] = None
    """Weights & Biases project that metrics go to besides (pip install 'plt_jax[wandb]'); null for
    none."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.profile_from is not None and self.profile_from > self.steps:
            raise ValueError(
                f"profile_from {self.profile_from} is behind the last step, {self.steps} (steps); "
                "lower it"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}; "
                f"accumulate must be one of {divisors(self.batch_size)}"
            )
        return self


class GuardConfig(Section):
    """Steps that are out of order. One whose loss or gradient is not finite changes nothing."""

    spike_deviations: PositiveFloat | None = None
    """A step whose loss or gradient norm lies this many standard deviations (robustly estimated)
    above the median of the window changes nothing either; null for no such limit."""
    window: Annotated[int, Field(ge=8, lt=LARGE_INT)] = 128
    """Steps that a spike is measured against; before there are so many, nothing is one."""
    patience: MayChange[PositiveInt] = 10
    """Steps skipped in a row after which training goes back to the newest checkpoint, and on with
    the data behind that which led there; at most the window."""
    rollbacks: MayChange[NonNegativeInt] = 3
    """Times that one start of a run does so before it stops with an error."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> GuardConfig:
        if self.patience > self.window:
            raise ValueError(
                f"patience {self.patience} is above window {self.window}; lower the one or raise "
                "the other"
            )
        return self


class MeshConfig(Section):
    """Device mesh: axis sizes, of which one may be -1 (all remaining devices)."""

    data: AxisSize = -1
    """Devices that split the batch and replicate the parameters."""
    fsdp: AxisSize = 1
    """Devices that split the batch and the parameters (by width)."""
    expert: AxisSize = 1
    """Devices that split the batch and the experts; the rest of the model they replicate."""
    context: AxisSize = 1
    """Devices that split the sequence, for long ones, and replicate the parameters."""
    tensor: AxisSize = 1
    """Devices that split heads, feed-forward width and vocabulary."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> MeshConfig:
        sizes = self.sizes()
        if 0 in sizes.values():
            name = next(name for name, size in sizes.items() if size == 0)
            raise ValueError(f"{name} is 0; use a positive size, or -1 for the remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one axis may be -1, got {sizes}")
        return self

    def sizes(self) -> dict[str, int]:
        """Axis sizes in mesh order, slowest axis first."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class ProcessesConfig(Section):
    """The processes that train one model. On TPU pods and under Slurm they find one another, and
    nothing need be given."""

    coordinator: Text | None = None
    """Host and port, HOST:PORT, of process 0, where the others report; any free port."""
    count: PositiveInt | None = None
    """How many processes there are."""
    index: NonNegativeInt | None = None
    """Which of them this is, from 0."""
    timeout: PositiveInt = 300
    """Seconds to wait for the others, when starting and wherever all must meet."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> ProcessesConfig:
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(f"{missing[0]} is missing; give coordinator, count and index, or none")
        if self.coordinator is not None and self.count is not None and self.index is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"coordinator is {self.coordinator}; it must be HOST:PORT")
            if self.index >= self.count:
                raise ValueError(
                    f"index {self.index} must be below count {self.count}; processes count from 0"
                )
        return self


class CheckpointConfig(Section):
    """What is kept on disk."""

    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: NonNegativeInt = 1
    """Checkpoints of lowest validation loss kept besides."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides are kept for ever; null for none."""
    verify: bool = True
    """Check a checkpoint's files against their checksums before they are read."""
    skip_damaged: bool = False
    """Resume from the newest checkpoint that is not damaged, moving damaged ones aside; otherwise
    a damaged newest one is refused. Needs verify."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        if self.skip_damaged and not self.verify:
            raise ValueError("skip_damaged needs verify, which finds damage; set verify to true")
        return self


class EvaluationConfig(Section):
    """Evaluation on held-out text."""

    batch_size: PositiveInt = 32
    """Sequences per evaluation batch, raised to divide over the devices."""
    sequences: PositiveInt | None = 64
    """Sequences of an evaluation during training, evenly spaced over the held-out text; null for
    all. The evaluation after the last step, and eval.py, always read all."""
