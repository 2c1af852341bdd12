"""The names of the files in a run directory, and finding the run directory of a path.

config.yaml      the resolved configuration
tokenizer.json   the tokenizer (Hugging Face tokenizers)
special_tokens.json  which of its tokens begin and end a text
text.json        a fingerprint of the text, which is compared when the run resumes
checkpoints/N/   orbax checkpoints by step
metrics.jsonl    one JSON object per line; tensorboard/ has the same; loss.png draws it
eval.json        the newest results of eval.py; depending on its options, documents.json,
                 loops.json, tasks.json and exact_match.json too
report.html      the newest page of plt_jax.training.report
huggingface/     an imported model's config.json and tokenizer files, unchanged; hub.json says from
                 which repository and commit of the Hugging Face Hub they are
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from plt_jax.buckets.address import is_in_bucket
from plt_jax.checkpoint.steps import is_step
from plt_jax.errors import InputError
from plt_jax.files.paths import check_reachable, expand

CONFIG, TEXT, CHECKPOINTS, METRICS = "config.yaml", "text.json", "checkpoints", "metrics.jsonl"
ORIGIN = "hub.json"
"""The file in huggingface/ that says from where on the Hugging Face Hub the others are."""


class Location(NamedTuple):
    """The run directory, and perhaps the checkpoint, that a user's path names."""

    directory: Path
    """The run directory, absolute."""
    step: int | None
    """The checkpoint's step; None if the path names none."""


def locate(path: str | Path) -> Location:
    """Finds the run of a path: a run directory, its `checkpoints`, or one of its checkpoints/STEP.

    Raises:
      InputError: the path is none of these.
    """
    missing = f"{path} does not exist; give a run directory, or one of its checkpoints"
    try:
        path = expand(path).resolve()  # a path such as . has no name before
    except ValueError as error:  # the name is impossible
        raise error if isinstance(error, InputError) else InputError(missing) from error
    check_reachable(path)
    if not is_in_bucket(path) and not os.path.exists(path):  # False also for impossible names
        raise InputError(missing)
    directory, step = path, None
    if is_step(path.name) and path.parent.name == CHECKPOINTS:
        directory, step = path.parent.parent, int(path.name)
    elif path.name == CHECKPOINTS:
        directory = path.parent
    if not (directory / CONFIG).is_file():
        advice = "train one with train.py"
        if (path / "config.json").exists():
            advice = "for a Hugging Face checkpoint, run python -m plt_jax.convert import first"
        raise InputError(
            f"{path} is neither a run directory nor a checkpoint of one: {directory / CONFIG} is "
            f"missing; {advice}"
        )
    return Location(directory, step)
