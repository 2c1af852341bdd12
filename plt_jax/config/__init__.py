"""Typed, validated, frozen configuration: the only source of truth for a run.

Every field is declared once in this package, with its type, unit and meaning. YAML files in
`configs/` hold only the values that differ from these defaults (`yaml_file.py` reads them). The
command line overrides both (`--section.field`, see `commands/config_options.py`). Values are
checked before any device work.
"""

from plt_jax.config.data import DataConfig, TokenizerConfig
from plt_jax.config.model import (
    SCHEMES,
    LoopConfig,
    ModelConfig,
    MoEConfig,
    RopeScalingConfig,
    Scheme,
    SchemeName,
)
from plt_jax.config.run import RunConfig
from plt_jax.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    ProcessesConfig,
    TrainingConfig,
)

__all__ = [
    "SCHEMES",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LoopConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProcessesConfig",
    "RopeScalingConfig",
    "RunConfig",
    "Scheme",
    "SchemeName",
    "TokenizerConfig",
    "TrainingConfig",
]
