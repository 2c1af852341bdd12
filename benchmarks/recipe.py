"""Compares training recipes of looped models, each at a learning rate of its own.

python -m benchmarks.recipe STUDY.yaml [--out FOLDER] [--runs FOLDER] [--seeds N] [--only NAMES]

A study (benchmarks/recipes/*.yaml) names a configuration, and rows that differ from it. Each row is
trained with seed 0 at learning rates that are factors of two apart, from the study's rate towards
the row's best one, until a lower and a higher rate are both worse. The best rate is then trained
with the other seeds. Rates are judged by the held-out loss, rows by their scores: exact match on
synthetic tasks, bits per byte on text.

A row with `steps_without_loops: N` is trained without loops for its first N steps, at a constant
rate behind a warmup. It then gets its loops as by `plt_jax.convert retrofit`. The steps left begin
anew with a warmup and the optimizer's state. On text they read the same corpus in another order.

OUT/STUDY.jsonl gets a line per finished run. A later call continues it, and calls side by side
share the work. OUT/STUDY.txt is the table.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from plt_jax.benchmarks.ablation import finished
from plt_jax.benchmarks.ablation_report import Metric, from_json, metric_of
from plt_jax.benchmarks.machine import machine
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import RunConfig
from plt_jax.config.variants import NO_LOOP
from plt_jax.config.yaml_file import merge, read_yaml
from plt_jax.errors import EXIT_STOPPED, InputError
from plt_jax.evaluation.exact_match import evaluate_exact_match
from plt_jax.files.writing import write_text
from plt_jax.locks import lock_file
from plt_jax.model.costs import flops_by_loop
from plt_jax.reports.tables import table_of
from plt_jax.runs.configuration import load_config
from plt_jax.runs.conversion import retrofit_run
from plt_jax.training.trainer import train

OTHER_DATA = 1000
"""What is added to the seed of the first steps, so that the later ones do not begin with their data
again."""
WAIT_SECONDS = 5.0
"""How long a call waits for runs of calls beside it before it looks for work again."""


class Job(NamedTuple):
    """A run: the name of a row, its learning rate in doublings of the study's, and its seed."""

    row: str
    doublings: int
    seed: int


Results = Mapping[Job, Mapping[str, Any]]
"""The lines of finished runs."""


class Study:
    """What is compared: a configuration, and rows that differ from it.

    Attributes:
      name: the name of its file, without suffix.
      rows: each row's sections of the configuration, by the row's name, in the file's order.
      baselines: the rows to which all are compared.
    """

    def __init__(self, path: Path):
        """Reads a study.

        Raises:
          InputError: a key is missing or unknown, or a row's configuration is refused.
        """
        values = dict(read_yaml(path))
        self.name = path.stem
        try:
            self._config = str(values.pop("config"))
            self._rate = float(values.pop("learning_rate"))
            self.rows: dict[str, Any] = {
                str(name): dict(sections or {})
                for name, sections in dict(values.pop("rows")).items()
            }
            self.baselines: list[str] = list(values.pop("baselines"))
            self._steps_without_loops = {
                name: sections.pop("steps_without_loops", 0) for name, sections in self.rows.items()
            }
        except KeyError as error:
            raise InputError(f"{path} has no {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: a value is of the wrong type: {error}") from error
        folders = Counter(map(_folder_of, self.rows))
        if alike := [name for name in self.rows if folders[_folder_of(name)] > 1]:
            raise InputError(f"{path}: the rows {' and '.join(alike)} have one folder; rename one")
        if values:
            raise InputError(f"{path}: unknown key {next(iter(values))}")
        if unknown := [name for name in self.baselines if name not in self.rows]:
            raise InputError(f"{path}: baselines names {unknown[0]}, which is no row")
        for name, steps in self._steps_without_loops.items():
            if type(steps) is not int:
                raise InputError(f"{path}: {name} has steps_without_loops {steps}; give a number")
            config = self.config(Job(name, 0, 0), Path("unused"))
            looped = config.model.loop.scheme != "no_loop"
            if steps and not (looped and steps > 0 and config.training.steps > 0):
                raise InputError(
                    f"{path}: {name} has steps_without_loops {steps}; give it to a looped row, "
                    "with fewer steps than training has"
                )
            self.config_without_loops(Job(name, 0, 0), Path("unused"))

    def rate(self, job: Job) -> float:
        """A run's learning rate."""
        return self._rate * 2.0**job.doublings

    def config(self, job: Job, runs: Path, start_from: Path | None = None) -> RunConfig:
        """A run's configuration; its directory is below `runs`.

        Args:
          start_from: the run that it starts from, if the row is first trained without loops.

        Raises:
          InputError: a value is refused.
        """
        own: dict[str, Any] = {
            "seed": job.seed,
            "run_dir": str(self._folder(job, runs)),
            "optimizer": {"learning_rate": self.rate(job)},
        }
        if start_from is not None:
            own["start_from"] = str(start_from)
        config = load_config(self._config, merge(self.rows[job.row], own))
        left = config.training.steps - self._steps_without_loops[job.row]
        return config.model_copy(
            update={"training": config.training.model_copy(update={"steps": left})}
        )

    def config_without_loops(self, job: Job, runs: Path) -> RunConfig | None:
        """The configuration of a run's first steps; None if it has loops from the beginning."""
        if not (steps := self._steps_without_loops[job.row]):
            return None
        config = NO_LOOP.apply_to_run(self.config(job, runs))
        return config.model_copy(
            update={
                "seed": job.seed + OTHER_DATA,
                "run_dir": str(config.directory.with_name(f"seed_{job.seed}_without_loops")),
                "optimizer": config.optimizer.model_copy(update={"schedule": "constant"}),
                "training": config.training.model_copy(update={"steps": steps}),
            }
        )

    def _folder(self, job: Job, runs: Path) -> Path:
        rate = f"rate_{self.rate(job):.4g}"
        return runs / self.name / _folder_of(job.row) / rate / f"seed_{job.seed}"


def _folder_of(row: str) -> str:
    """The name of a row's folder."""
    return re.sub(r"[^\w.-]+", "_", row)


def wanted(row: str, results: Results, seeds: int) -> list[Job]:
    """The runs that a row needs next, given those that have finished; none if it has all."""
    losses = losses_by_rate(row, results)
    if not losses:
        return [Job(row, 0, 0)]
    best = best_rate(losses)
    if missing := [rate for rate in (best + 1, best - 1) if rate not in losses]:
        return [Job(row, rate, 0) for rate in missing]
    jobs = [Job(row, best, seed) for seed in range(1, seeds)]
    return [job for job in jobs if job not in results]


def losses_by_rate(row: str, results: Results) -> dict[int, float]:
    """The held-out losses of a row's runs with seed 0, by the learning rate in doublings."""
    return {
        job.doublings: from_json(line["loss"])
        for job, line in results.items()
        if job.row == row and job.seed == 0
    }


def best_rate(losses: Mapping[int, float]) -> int:
    """The rate with the least loss. A loss that is not finite is the worst."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def read_results(path: Path) -> dict[Job, dict[str, Any]]:
    """The runs that have finished; none if the file is missing."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {Job(line["row"], line["doublings"], line["seed"]): line for line in lines}


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Claims a run directory for as long as this process works on it.

    Yields:
      Whether it is claimed; if not, another call trains there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w", encoding="utf-8") as lock:
        yield lock_file(lock.fileno(), wait=False) is not False


def run(study: Study, job: Job, runs: Path) -> dict[str, Any] | None:
    """Trains and scores a run. Returns its line, None if a signal has stopped it."""
    config, start = study.config(job, runs), time.monotonic()
    if first := study.config_without_loops(job, runs):
        if train(first).stopped:
            return None
        jax.clear_caches()
        looped = config.directory.with_name(f"seed_{job.seed}_start")
        if not looped.exists():
            loop = config.model.loop
            # It is complete as soon as it is there.
            retrofit_run(str(first.directory), str(looped), loop, loop.gate_bias, 0, report=print)
        config = study.config(job, runs, looped)
    if train(config).stopped:
        return None
    if config.data.synthetic.task != "none":
        evaluate_exact_match(str(config.directory))
    jax.clear_caches()  # the next run has programs of its own
    scores = finished(config)
    assert scores is not None
    return {
        "row": job.row,
        "doublings": job.doublings,
        "rate": study.rate(job),
        **scores,
        "seconds": round(time.monotonic() - start),
    }


def table(study: Study, results: Results) -> str:
    """One line per row: its best rate, its score there, and the differences to the baselines."""

    def flops(name: str) -> float:
        job, unused = Job(name, 0, 0), Path("unused")
        return sum(
            config.training.steps * loop.total
            for config in (study.config_without_loops(job, unused), study.config(job, unused))
            if config is not None
            for loop in flops_by_loop(config.model, config.sequence_length)
        )

    first = next(iter(study.rows))
    config = study.config(Job(first, 0, 0), Path("unused"))
    metric = metric_of({"task": config.data.synthetic.task})
    scores = {name: scores_by_seed(name, results, metric) for name in study.rows}
    lines = []
    for name in study.rows:
        if not scores[name]:
            continue
        losses = losses_by_rate(name, results)
        best = best_rate(losses)
        line = {
            "label": name,
            "flops": flops(name) / flops(first),
            "rates": len(losses),
            "rate": study.rate(Job(name, best, 0)),
            "loss": losses[best],
            "seeds": len(scores[name]),
            "score": statistics.fmean(scores[name].values()),
        }
        if len(scores[name]) > 1:
            line["deviation"] = float(np.std(list(scores[name].values()), ddof=1))
        for baseline in study.baselines:
            both = scores[name].keys() & scores[baseline].keys()
            if both and name != baseline:
                each = [scores[name][seed] - scores[baseline][seed] for seed in both]
                line[baseline] = statistics.fmean(each)
        lines.append(line)
    difference = metric.form.replace("{:", "{:+")
    columns = (
        ("flops", f"x FLOPs of {first}", "{:.2f}"),
        ("rates", "rates", "{}"),
        ("rate", "best rate", "{:.2g}"),
        ("loss", "its loss, seed 0", "{:.4f}"),
        ("seeds", "seeds", "{}"),
        ("score", metric.name, metric.form),
        ("deviation", "+-", metric.form),
        *((name, f"- {name}", difference) for name in study.baselines),
    )
    return table_of(columns, lines)


def scores_by_seed(row: str, results: Results, metric: Metric) -> dict[int, float]:
    """The scores of a row at its best rate, by seed."""
    losses = losses_by_rate(row, results)
    return {
        job.seed: metric.score(line)
        for job, line in sorted(results.items())
        if job.row == row and job.doublings == best_rate(losses)
    }


def main() -> int | None:
    parser = CommandParser(prog="python -m benchmarks.recipe", description=__doc__)
    parser.add_argument("study", help="YAML file: config, learning_rate, baselines and rows")
    parser.add_argument("--out", default="measured", help="folder for STUDY.jsonl and STUDY.txt")
    parser.add_argument("--runs", default="runs/recipe", help="folder for the run directories")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row at its best rate")
    parser.add_argument("--only", help="rows, separated by semicolons; default all")
    arguments = parser.parse_args()
    study, out = Study(Path(arguments.study)), Path(arguments.out)
    names = arguments.only.split(";") if arguments.only else list(study.rows)
    if unknown := [name for name in names if name not in study.rows]:
        raise InputError(f"--only: no row {unknown[0]}; there are {', '.join(study.rows)}")
    out.mkdir(parents=True, exist_ok=True)
    lines, runs = out / f"{study.name}.jsonl", Path(arguments.runs)
    while jobs := open_jobs(names, read_results(lines), arguments.seeds):
        if (done := run_first_free(study, jobs, runs, lines)) is None:
            return EXIT_STOPPED
        if not done:
            time.sleep(WAIT_SECONDS)
    text = table(study, read_results(lines))
    print(text)
    command = " ".join(["python -m benchmarks.recipe", *sys.argv[1:]])
    write_text(out / f"{study.name}.txt", f"{text}\n\n{command}\n{json.dumps(machine())}\n")
    return None


def open_jobs(names: list[str], results: Results, seeds: int) -> list[Job]:
    """The runs that rows need next. All rows' rates come before any row's other seeds."""
    jobs = [job for name in names for job in wanted(name, results, seeds)]
    return sorted(jobs, key=lambda job: job.seed > 0)


def run_first_free(study: Study, jobs: list[Job], runs: Path, lines: Path) -> bool | None:
    """Runs the first job that no other call works on.

    Returns:
      Whether there was one; None if a signal has stopped it.
    """
    for job in jobs:
        folder = study.config(job, runs).directory
        with claim(folder) as claimed:
            if not claimed or job in read_results(lines):
                continue
            print(f"== {job.row}, rate {study.rate(job):.4g}, seed {job.seed}", flush=True)
            line = run(study, job, runs)
            if line is None:
                return None
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"machine": machine()["processor"]}) + "\n")
            return True
    return False


if __name__ == "__main__":
    run_command(main)
