"""Loading a run's configuration, with the defaults that it inherits from another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plt_jax.checkpoint.steps import list_steps
from plt_jax.config import RunConfig
from plt_jax.config.yaml_file import load_resolved, merge, read_yaml, validate
from plt_jax.data.tokenizer import TOKENIZER
from plt_jax.errors import InputError, naming
from plt_jax.files.paths import to_path
from plt_jax.runs.names import CHECKPOINTS, CONFIG, locate


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Reads a YAML file, applies nested `overrides`, and validates the result.

    With a `start_from`, the defaults of model, tokenizer and sequence length are that run's. Once
    the run has saved a checkpoint of its own, they are its own.

    Args:
      path: the YAML file.
      overrides: nested values that replace those of the file.

    Raises:
      InputError: the file cannot be read, is not a YAML mapping, or a value is refused; the message
        names the field, the value and what would be right.
    """
    path = Path(path)
    values = merge(read_yaml(path), overrides or {})
    if values.get("run_dir") is None:
        values["run_dir"] = str(Path("runs") / path.stem)
    if not isinstance(values.get("start_from"), str):
        return validate(path, values)
    inherited = _inherited(values["start_from"], to_path(str(values["run_dir"])))
    config = validate(path, merge(inherited, values))
    if inherited["model"]["loop"]["scheme"] == "no_loop" != config.model.loop.scheme:
        raise InputError(
            f"start_from {config.start_from} is a model without loops; give it loops with "
            "python -m plt_jax.convert retrofit, and start from that"
        )
    return config


def _inherited(start_from: str, run_dir: Path) -> dict[str, Any]:
    """The defaults that a run inherits from the one that it starts from, or from itself when it
    resumes."""
    resumes = list_steps(run_dir / CHECKPOINTS)
    with naming("start_from"):
        directory = run_dir.absolute() if resumes else locate(start_from).directory
    config = load_resolved(directory / CONFIG)
    inherited = {
        "model": config.model.model_dump(),
        "data": {"sequence_length": config.sequence_length},
    }
    if (directory / TOKENIZER).exists():
        inherited["tokenizer"] = {"path": str(directory / TOKENIZER)}
    return inherited
