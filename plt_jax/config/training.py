"""The sections of training, devices, checkpoints and evaluation."""

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
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the matrices of the layers, and AdamW for all other parameters."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Schedule after the warmup: cosine decay, constant with a linear decay at the end (wsd,
    warmup-stable-decay), or constant."""
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of training.steps in which the learning rate grows linearly from 0."""
    decay_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of training.steps in the decay at the end (wsd)."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak (cosine, wsd)."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay rate of the running mean of the gradient."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay rate of the running mean of the squared gradient."""
    epsilon: Annotated[float, Field(ge=1e-20, le=LARGE)] = 1e-8
    """Added to the square root of the squared gradient's running mean. (Below its lower limit, tiny
    gradients, whose squares are 0 in float32, would make huge updates.)"""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate, of the projections' weights. Norms,
    gates, biases and embeddings do not decay."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the gradient's running mean. (That of the squared gradient stays float32.)"""
    muon_learning_rate: PositiveFloat | None = None
    """Peak learning rate of Muon's matrices; default learning_rate. Muon's updates are scaled to
    the root mean square of AdamW's, so that one rate can suit both."""
    muon_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay rate of Muon's running mean of the gradient."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; null for no clipping."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} "
                "add up to more than 1; lower one"
            )
        for name, field in type(self).model_fields.items():
            own = name.startswith("muon_") and getattr(self, name) != field.default
            if own and self.name != "muon":
                raise ValueError(f"{name} is a field of muon; set name to muon, or leave it out")
        return self


class TrainingConfig(Section):
    """Steps and batches of training, and what is done between steps."""

    steps: MayChange[PositiveInt] = 1000
    """Number of optimizer steps in total."""
    batch_size: PositiveInt = 32
    """Examples per optimizer step, over all devices and micro-batches."""
    accumulate: MayChange[PositiveInt] = 1
    """Number of micro-batches per step, whose gradients are summed; it must divide batch_size."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-normaliser of the output softmax, added to the loss."""
    loop_losses: tuple[NonNegativeFloat, ...] = ()
    """Weights of the losses after each loop but the last, from the first loop on, beside the last
    one's weight of 1 (Nanbeige's loop_loss_weights); empty for the last loop's loss alone."""
    exit_entropy: NonNegativeFloat | None = None
    """Weight beta of the entropy of exits: the loss is then the expected loss over the exit gate's
    distribution, minus beta times its entropy (Ouro, arXiv 2510.25741). Null: the gate, if there is
    one, is not trained."""
    loop_counts: tuple[NonNegativeFloat, ...] = ()
    """Shares of steps whose loss is taken after 1, 2, ... loops, all of one step alike; empty for
    the last loop always. Every step runs all loops, so that one program serves all."""
    hidden_scale_warmup: Fraction = 0.0
    """Share of training.steps in which model.loop.hidden_scale grows linearly from 0 to its value,
    so that a retrofitted model starts as its source. Evaluations and samples have its full value,
    within that share, too."""
    log_every: MayChange[PositiveInt] = 10
    """Steps between rows of training metrics."""
    evaluate_every: MayChange[PositiveInt] = 200
    """Steps between evaluations on held-out text; the last step is always evaluated."""
    checkpoint_every: MayChange[PositiveInt] = 200
    """Steps between checkpoints; the last step is always saved."""
    hang_after: MayChange[PositiveFloat | None] = 600.0
    """Seconds in one phase of training (waiting for data, computing a step, saving, ...) after
    which a line on stderr names the phase; null for never."""
    sample_prompt: MayChange[Text] = ""
    """Prompt of the sample that is printed at the end."""
    profile_from: MayChange[PositiveInt | None] = None
    """First step that the profiler traces (the trace is written to the run's TensorBoard folder);
    null for no profile."""
    profile_steps: MayChange[PositiveInt] = 3
    """Number of steps that the profiler traces."""
    wandb_project: MayChange[Annotated[Text, Field(min_length=1)] | None] = None
    """Weights & Biases project that metrics are also sent to (pip install 'plt_jax[wandb]'); null
    for none."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.profile_from is not None and self.profile_from > self.steps:
            raise ValueError(
                f"profile_from {self.profile_from} is after the last step, {self.steps} (steps); "
                "lower it"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}; "
                f"accumulate must be one of {divisors(self.batch_size)}"
            )
        return self


class GuardConfig(Section):
    """Skipped steps, loss spikes and rollbacks. A step whose loss or gradient is not finite is
    skipped: it changes neither the parameters nor the optimizer's state."""

    spike_deviations: PositiveFloat | None = None
    """A step is a spike, and skipped too, if its loss or gradient norm is more than this many
    standard deviations (robustly estimated) above the median of the window; null for no limit."""
    window: Annotated[int, Field(ge=8, lt=LARGE_INT)] = 128
    """Number of recent steps that a spike is measured against; before that many steps there are no
    spikes."""
    patience: MayChange[PositiveInt] = 10
    """Number of steps skipped in a row after which training rolls back to the newest checkpoint and
    goes on with the data after the skipped steps; at most the window."""
    rollbacks: MayChange[NonNegativeInt] = 3
    """Most rollbacks of one start of a run; if one more is needed, the run stops with an error."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> GuardConfig:
        if self.patience > self.window:
            raise ValueError(
                f"patience {self.patience} is above window {self.window}; lower it, or raise window"
            )
        return self


class MeshConfig(Section):
    """The device mesh: the sizes of its axes, of which one may be -1 (all remaining devices)."""

    data: AxisSize = -1
    """Size of the axis that shards the batch and replicates the parameters."""
    fsdp: AxisSize = 1
    """Size of the axis that shards the batch and the parameters (along the model's width)."""
    expert: AxisSize = 1
    """Size of the axis that shards the batch and the experts, and replicates other parameters."""
    context: AxisSize = 1
    """Size of the axis that shards long sequences, and replicates the parameters."""
    tensor: AxisSize = 1
    """Size of the axis that shards heads, feed-forward width and vocabulary."""

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
        """The axis sizes in mesh order, slowest axis first."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class ProcessesConfig(Section):
    """The processes that run one model. On TPU pods and under Slurm they find one another without
    these fields."""

    coordinator: Text | None = None
    """HOST:PORT of process 0, to which the others connect; any free port."""
    count: PositiveInt | None = None
    """Number of processes."""
    index: NonNegativeInt | None = None
    """Index of this process, from 0."""
    timeout: PositiveInt = 300
    """Seconds to wait for the other processes, at the start and wherever all must meet."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> ProcessesConfig:
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(f"{missing[0]} is missing; give coordinator, count and index, or none")
        if self.coordinator is not None and self.count is not None and self.index is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"coordinator is {self.coordinator}; it must be HOST:PORT")
            if self.index >= self.count:
                raise ValueError(
                    f"index {self.index} must be below count {self.count}; processes count from 0"
                )
        return self


class CheckpointConfig(Section):
    """Checkpoints: which are kept, and how they are checked."""

    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    keep_best: NonNegativeInt = 1
    """Number of checkpoints with the lowest validation loss that are kept as well."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps divisible by this number are never removed; null for none."""
    verify: bool = True
    """Check a checkpoint's files against their checksums before reading them."""
    skip_damaged: bool = False
    """Resume from the newest checkpoint that is not damaged, and rename damaged ones; otherwise a
    run whose newest checkpoint is damaged is refused. It needs verify."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        if self.skip_damaged and not self.verify:
            raise ValueError("skip_damaged needs verify, which finds damage; set verify to true")
        return self


class EvaluationConfig(Section):
    """Evaluation on held-out text."""

    batch_size: PositiveInt = 32
    """Sequences per evaluation batch; rounded up to a multiple of the devices that share it."""
    sequences: PositiveInt | None = 64
    """Number of sequences of an evaluation during training, evenly spaced over the held-out text;
    null for all. The evaluation after the last step, and eval.py, always read all sequences."""
