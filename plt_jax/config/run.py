"""The whole configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import Field

from plt_jax.config.data import DataConfig, TokenizerConfig
from plt_jax.config.model import ModelConfig
from plt_jax.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    ProcessesConfig,
    TrainingConfig,
)
from plt_jax.config.types import BucketOrPathText, MayChange, Section
from plt_jax.files.paths import to_path


class RunConfig(Section):
    """Everything that determines a training run."""

    run_dir: MayChange[BucketOrPathText | None] = None
    """Where the run is written, a folder or gs://BUCKET/PATH; default runs/NAME for
    configs/NAME.yaml."""
    start_from: MayChange[BucketOrPathText | None] = None
    """A run directory, or one of its checkpoints, whose parameters this run starts from. Its model,
    tokenizer and sequence length then become the defaults."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial parameters and of the data's order."""
    model: ModelConfig = ModelConfig()
    """Shape and arithmetic of the network."""
    data: DataConfig = DataConfig()
    """Training data and validation data."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning-rate schedule."""
    training: TrainingConfig = TrainingConfig()
    """Steps, batches, and what is done between steps."""
    guard: GuardConfig = GuardConfig()
    """Skipped steps, loss spikes and rollbacks."""
    mesh: MayChange[MeshConfig] = MeshConfig()
    """Device mesh."""
    processes: MayChange[ProcessesConfig] = ProcessesConfig()
    """The processes that run one model."""
    checkpoint: MayChange[CheckpointConfig] = CheckpointConfig()
    """Checkpoints: which are kept, and how they are checked."""
    evaluation: MayChange[EvaluationConfig] = EvaluationConfig()
    """Evaluation on held-out text."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.sequence_length > self.model.max_length:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is above model.max_length "
                f"{self.model.max_length}; lower the one or raise the other"
            )
        self._check_loop_losses()
        return self

    def _check_loop_losses(self) -> None:
        training, loop = self.training, self.model.loop
        for name, length in (("loop_losses", loop.count - 1), ("loop_counts", loop.count)):
            weights = getattr(training, name)
            if weights and len(weights) != length:
                raise ValueError(
                    f"training.{name} has {len(weights)} numbers, but a model of {loop.count} "
                    f"loops needs {length}"
                )
        if training.loop_counts and not sum(training.loop_counts):
            raise ValueError("training.loop_counts are all 0; one must be above it")
        if training.exit_entropy is not None and not loop.exit_gate:
            raise ValueError(
                "training.exit_entropy trains an exit gate; set model.loop.exit_gate to true"
            )
        ways = ("loop_losses", "exit_entropy", "loop_counts")
        given = [name for name in ways if getattr(training, name) not in ((), None)]
        if len(given) > 1:
            raise ValueError(
                f"training.{given[0]} and training.{given[1]} are two ways to weigh the loops' "
                "losses; choose one"
            )
        if given and self.model.has_coda and self.model.moe.experts:
            raise ValueError(
                f"training.{given[0]} with experts behind the loops (model.loop.last_layer) is not "
                "supported: their routers would be balanced by the last loop's states alone"
            )
        if training.loop_counts and self.guard.spike_deviations is not None:
            raise ValueError(
                "training.loop_counts makes steps' losses differ, so that guard.spike_deviations "
                "would skip those of few loops; set it to null"
            )
        if training.hidden_scale_warmup and not loop.shifted:
            raise ValueError(
                f"training.hidden_scale_warmup grows hidden_scale, which the scheme {loop.scheme} "
                "does not have; leave it out"
            )

    @property
    def directory(self) -> Path:
        """The run directory.

        Raises:
          ValueError: `run_dir` is not set, as `load_config` always sets it.
        """
        if self.run_dir is None:
            raise ValueError("run_dir is not set; give the folder that the run is written to")
        return to_path(self.run_dir)

    @property
    def sequence_length(self) -> int:
        """Tokens per training example T."""
        return self.data.sequence_length or self.model.max_length
