"""Checkpoints on disk: the only file that knows orbax.

A checkpoint holds, under its step's number, the parameters, the optimizer's state and the data
iterator's, so that evaluation can read the parameters alone and training can go on exactly.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from plt_jax.config import CheckpointConfig
from plt_jax.errors import InputError

# Orbax reports every save and restore in several lines; what users need to know, we print.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run; saving is asynchronous, use as a context manager to finish it."""

    def __init__(self, directory: str | Path, config: CheckpointConfig):
        self._directory = Path(directory).absolute()
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["validation_loss"],
            reverse=True,  # the policy keeps the end of the order, and lower is better
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(config.keep), best]
            ),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        data: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Starts saving; returns once the arrays are copied.

        Args:
          params, optimizer: trees of arrays, stored apart.
          data: the data iterator's state after the step's batch, the same in all processes.
          validation_loss: nats per token, by which the best checkpoints are kept.
        """
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        self._checkpointer.save_checkpointables_async(
            step, {"params": params, "optimizer": optimizer, "data": data}, metrics=metrics
        )

    def restore(self, params: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The newest parameters, optimizer state, and data iterator's state.

        Args:
          params, optimizer: the abstract trees, with shardings, that the arrays are read into.
        """
        wanted = {"params": params, "optimizer": optimizer, "data": None}
        # Earlier versions kept the data's state as one process's own.
        earlier = self._directory / str(self.latest_step) / "data" / "process_0-of-1.json"
        if earlier.exists():
            del wanted["data"]
        restored = self._checkpointer.load_checkpointables(None, wanted)
        data = restored.get("data") or json.loads(earlier.read_text(encoding="utf-8"))
        return restored["params"], restored["optimizer"], data


def save_params(directory: str | Path, step: int, params: Any) -> None:
    """Writes a checkpoint that holds parameters alone; returns when it is complete.

    Raises:
      OSError: it cannot be written.
    """
    path = (Path(directory) / str(step)).absolute()
    try:
        path.parent.mkdir(exist_ok=True)
        ocp.save_checkpointables(path, {"params": params})
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
        raise OSError(" ".join(str(error).split())[:300]) from error


def can_resume(directory: str | Path, step: int) -> bool:
    """Whether a checkpoint holds an optimizer's state beside the parameters."""
    return (Path(directory) / str(step) / "optimizer").exists()


def load_params(directory: str | Path, step: int, abstract: Any, as_stored: bool = False) -> Any:
    """The parameters of one checkpoint, in the shapes, dtypes and shardings of `abstract`.

    Args:
      as_stored: keep the dtypes that they were stored in.

    Raises:
      InputError: the checkpoint cannot be read, or holds other shapes.
    """
    path = (Path(directory) / str(step)).absolute()
    try:
        stored = ocp.checkpointables_metadata(path).metadata["params"]
        differing = differing_shapes(stored, abstract)
        if as_stored and not differing:
            abstract = jax.tree.map(lambda to, of: to.update(dtype=of.dtype), abstract, stored)
        params = None if differing else ocp.load_checkpointables(path, {"params": abstract})
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot read the checkpoint {path}: {reason}") from error
    if differing:
        raise InputError(
            f"cannot read the checkpoint {path}: {differing}; it was trained with another config"
        )
    return params["params"]


def differing_shapes(stored: Any, wanted: Any) -> str:
    """The first parameter whose shape differs between two trees of arrays, "" if none does."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in leaves
        }

    stored, wanted = shapes(stored), shapes(wanted)
    for name in sorted(stored | wanted):
        if stored.get(name) != wanted.get(name):
            return f"{name} has shape {stored.get(name)} there, and {wanted.get(name)} in the model"
    return ""
