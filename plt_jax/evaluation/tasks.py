"""Tasks of the lm-evaluation-harness on a trained model: what eval.py --tasks runs and writes."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plt_jax.errors import InputError
from plt_jax.files.writing import to_json

if TYPE_CHECKING:  # JAX is imported late, and lm_eval is an extra
    from jax.sharding import Mesh
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

TASKS = "tasks.json"

SUITES = {
    "paper_moe": (
        "mmlu",
        "ceval-valid",
        "agieval",
        "mmlu_pro",
        "bbh",
        "drop",
        "mbpp",
        "humaneval",
        "hendrycks_math",
        "gsm8k",
    ),
    "paper_dense": (
        "mmlu",
        "hellaswag",
        "arc_challenge",
        "arc_easy",
        "piqa",
        "winogrande",
        "commonsense_qa",
    ),
}
"""The PLT paper's suites for its mixtures of experts and for its open dense models, by the names
that the harness gives their tasks. The paper does not state numbers of examples in the prompt, so
each task's own number is used."""


class TaskReport(NamedTuple):
    """The results of tasks, and the file that holds them."""

    results: dict[str, Any]
    """The harness's own results, and the `step` of the checkpoint."""
    path: Path

    def table(self) -> str:
        """The harness's own tables of tasks and of groups of tasks."""
        from lm_eval.utils import make_table

        tables = [make_table(self.results)]
        if self.results.get("groups"):
            tables.append(make_table(self.results, "groups"))
        return "\n".join(tables)


def evaluate_tasks(
    path: str,
    tasks: Sequence[str],
    limit: int | None = None,
    shots: int | None = None,
    include_path: str | None = None,
    batch_size: int | None = None,
    run_code: bool = False,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    **prompting: Any,
) -> TaskReport:
    """Runs tasks on a run or checkpoint; writes tasks.json in the run directory.

    It downloads only what a task's own configuration requires.

    Args:
      limit: the number of examples of each task; None for all.
      shots: the number of examples in the prompt; None for each task's own number.
      include_path: a folder of further tasks.
      batch_size, mesh, dtype: see `HarnessModel`.
      run_code: whether tasks that run what the model writes (humaneval, mbpp) may.
      prompting: how the harness makes prompts: its apply_chat_template, fewshot_as_multiturn and
        system_instruction.

    Raises:
      InputError: lm_eval is not installed; the model has no chat template, or another than the
        tasks' messages need; a task does not exist, runs code without permission, or
        cannot be loaded, for example because its data is missing; or an error of `HarnessModel`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "--tasks needs a package that is not installed: pip install 'plt_jax[lm_eval]'"
        )
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; it must be at least 1")
    if shots is not None and shots < 0:
        raise InputError(f"--num_fewshot is {shots}; it must be at least 0")
    if prompting.get("fewshot_as_multiturn") and not prompting.get("apply_chat_template"):
        raise InputError("--fewshot_as_multiturn needs --apply_chat_template")
    if include_path is not None and not os.path.isdir(include_path):
        raise InputError(f"--include_path {include_path} is no folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.tasks import TaskManager

    from plt_jax.evaluation.harness import HarnessModel
    from plt_jax.evaluation.results import write_results

    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    manager = TaskManager(include_path=include_path)
    names = check_names(manager, tasks, run_code)
    model = HarnessModel(path, batch_size, mesh=mesh, dtype=dtype)
    model.chat_template(prompting.get("apply_chat_template", False))  # refuses before tasks load
    loaded = load_tasks(manager, names, run_code)
    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its signature
    results = simple_evaluate(
        model,
        tasks=loaded,
        limit=limit,
        num_fewshot=shots,
        task_manager=manager,
        log_samples=False,
        confirm_run_unsafe_code=run_code,
        **prompting,
    )
    results = {"step": model.step, **results}
    target = model.directory / TASKS
    write_results(target, [to_json(results, indent=2), "\n"])
    return TaskReport(results, target)


def check_names(manager: TaskManager, patterns: Sequence[str], run_code: bool) -> list[str]:
    """The names of tasks and groups that patterns stand for.

    Raises:
      InputError: a pattern matches no task, or a task declares that it runs code and may not.
    """
    for pattern in patterns:
        if not manager.match_tasks([pattern]):
            raise InputError(
                f"no task is called {pattern}; lm_eval ls tasks lists the harness's, "
                "--include_path adds a folder"
            )
    names = manager.match_tasks(list(patterns))
    _check_code([name for name in names if _runs_code(manager, name)], run_code)
    return names


def _runs_code(manager: TaskManager, name: str) -> bool:
    """Whether a task, or a member of a group or tag, declares that it runs code."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    declared = entry.cfg or {}
    members = entry.tags if entry.kind.name == "TAG" else declared.get("task")
    named = (
        [] if isinstance(members, str) else [one for one in members or () if isinstance(one, str)]
    )
    return bool(declared.get("unsafe_code")) or any(_runs_code(manager, one) for one in named)


def load_tasks(manager: TaskManager, names: Sequence[str], run_code: bool) -> list[Task | Group]:
    """The tasks and groups of names, with their data.

    Raises:
      InputError: one cannot be loaded, or runs code and may not.
    """
    found: list[Task | Group] = []
    for name in names:
        loaded = _loaded(manager, name, [name])
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else loaded["tasks"].values()
    everything = _loaded(manager, ", ".join(names), found)["tasks"]
    unsafe = [name for name, task in everything.items() if getattr(task, "UNSAFE_CODE", False)]
    _check_code(unsafe, run_code)
    return found


def _check_code(names: Sequence[str], run_code: bool) -> None:
    if names and not run_code:
        raise InputError(
            f"{', '.join(names)} would run the code that the model writes; add --run_code to let "
            "it, or leave the task out"
        )


def _loaded(manager: TaskManager, name: str, tasks: Sequence[str | Task | Group]) -> TaskDict:
    try:
        return manager.load(list(tasks))
    except Exception as error:  # a task's own code and downloads may raise anything
        raise InputError(f"{name} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip(" #")]
    return lines[0] if lines else type(error).__name__
