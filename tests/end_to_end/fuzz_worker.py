"""Trains random configurations with train.py, in a process whose XLA compiles without optimizing.

It prints JSON lines: one for each case, and one at the end that counts them. A case passes if it is
refused in one line that names a field that it set, and nothing is written, or if it trains.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import yaml

from plt_jax.checkpoint.steps import list_steps
from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import write_corpus
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from tests.end_to_end.drawn_configs import Case, base, drawn, nested
from tests.training.runs import Result, command, json_rows, make_home

SECONDS = 240
"""The time after which a case counts as hanging."""
CASES_CACHED = 40
"""The number of cases whose compiled programs are kept in memory."""


def make(home: Path) -> Path:
    """Makes texts, tokenized corpora, tokenizers, and what is none of these."""
    make_home(home)
    for path in (home / "corpus").iterdir():
        path.write_text(f"{path.read_text()} " * 4)
    texts = [path.read_text() for path in sorted((home / "corpus").iterdir())]
    tokenizer, other = train_tokenizer(texts, 258, 10**6), train_tokenizer(texts, 270, 2)
    for name, trained, fraction in (
        ("one", tokenizer, 0.2),
        ("two", tokenizer, 0.2),
        ("strange", other, 0.2),
        ("unheld", tokenizer, 0.0),
    ):
        rows = (json.dumps({"text": text}) for text in texts)
        (home / f"{name}.jsonl").write_text("\n".join(rows))
        options = CorpusOptions(validation_fraction=fraction, shard_bytes=2000)
        write_corpus([str(home / f"{name}.jsonl")], home / name, trained, options, 1, _silent)
    (home / "tokenizer.json").write_text(tokenizer.library.to_str())
    (home / "large.json").write_text(train_tokenizer(texts * 9, 500, 1).library.to_str())
    unspecial = json.loads(tokenizer.library.to_str()) | {"added_tokens": []}
    (home / "unspecial.json").write_text(json.dumps(unspecial))
    (home / "empty").mkdir()
    (home / "file.txt").write_text("mine")
    (home / "long.txt").write_text(" ".join(texts))
    (home / "short.txt").write_text("the state")
    (home / "latin.txt").write_bytes("le café ".encode("latin-1") * 500)
    values = nested(base(home) | {"run_dir": str(home / "trained")})
    (home / "trained.yaml").write_text(yaml.safe_dump(values))
    result = command("train.py", home / "trained.yaml")
    assert result.code == 0, result
    return home


def _silent(*_: Any) -> Any:
    return lambda *_: None


def words_of(case: Case, home: Path, folder: Path) -> list[str]:
    """Writes a case's YAML file; returns the command line that goes with it."""
    values = {"run_dir": str(folder / "run"), **base(home), **case.values}
    # No argument can hold a NUL, and no YAML file what is not UTF-8.
    written = {name: as_word(value) for name, value in case.values.items()}
    options = {name for name in case.options if "\0" not in written[name]}
    options |= {name for name in written if "\udcff" in written[name]}
    in_file = {name: value for name, value in values.items() if name not in options}
    (folder / "case.yaml").write_text(yaml.safe_dump(nested(in_file), allow_unicode=True))
    words = [f"--{name}={written[name]}" for name in sorted(options)]
    return [str(folder / "case.yaml"), *words]


def as_word(value: Any) -> str:
    """The text of a value on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def names(message: str, field: str) -> bool:
    """Whether a message names a field, by its dotted name or by the end of that name after the name
    of its section."""
    section, _, leaf = field.rpartition(".")
    before, after = r"(?<![\w./-])", r"(?![\w])"
    if re.search(f"(?:(?<=--)|{before}){re.escape(field)}{after}", message):
        return True
    parts = field.split(".")
    ends = [".".join(parts[start:]) for start in range(1, len(parts) - 1)]
    within = [rf"{before}{re.escape(section)}: .*{before}{leaf}{after}"] if section else []
    return any(re.search(end, message) for end in within + [before + re.escape(e) for e in ends])


def judge(case: Case, result: Result, folder: Path) -> str:
    """How a case ended: "trained", "refused", or a description of what is wrong."""
    if result.code == EXIT_STOPPED:
        sys.exit(EXIT_STOPPED)  # training takes the signals that are meant for the worker
    if result.code == EXIT_DONE:
        return _judge_run(case, result, folder)
    if result.code != EXIT_BAD_INPUT:
        return f"exit code {result.code}: {result.err}"
    lines = result.err.splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"not one line: {result.err}"
    if not any(names(lines[0], field) for field in case.values):
        return f"names no field: {lines[0]}"
    if (folder / "run").exists():
        return f"refused, and yet there is a run directory: {lines[0]}"
    return "refused"


def _judge_run(case: Case, result: Result, folder: Path) -> str:
    directory = folder / "run"
    if "run_dir" in case.values:
        directory = Path(case.values["run_dir"] or "runs/case")
    steps = case.values.get("training.steps", 2)
    rows = json_rows(directory / "metrics.jsonl")
    for name in ("loss", "validation_loss", "gradient_norm"):
        found = [row[name] for row in rows if name in row]
        if not found or not all(value is not None and math.isfinite(value) for value in found):
            return f"{name} is {found}"
    if any(row.get("skipped") for row in rows):
        return f"steps were skipped: {rows}"
    if list_steps(directory / "checkpoints")[-1:] != [int(steps)]:
        return "the last step has no checkpoint"
    if result.err:
        return f"stderr of a run that trained: {result.err}"
    return "trained"


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block after `seconds` seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"hangs for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(case: Case, home: Path) -> str:
    """Trains a case in its own folder; returns what `judge` says."""
    folder = home / "case"
    for path in (folder, home / "other"):
        shutil.rmtree(path, ignore_errors=True)
    (folder / "cwd").mkdir(parents=True)
    os.chdir(folder / "cwd")
    try:
        with deadline(SECONDS):
            return judge(case, command("train.py", *words_of(case, home, folder)), folder)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{error}".split())[:300]
        return f"{type(error).__name__} at {place.filename}:{place.lineno}: {reason}"


def signature(outcome: str) -> str:
    """A text that is equal for failures that are likely to have the same cause."""
    return re.sub(r"\d+|/\S+", "", outcome)[:60]


def smaller(case: Case, home: Path, outcome: str) -> Case:
    """The case without the changes that its failure does not need."""
    for name in sorted(case.values):
        values = {other: value for other, value in case.values.items() if other != name}
        less = Case(values, case.options & values.keys())
        if signature(run(less, home)) == signature(outcome):
            case = less
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path, help="new folder to make corpora and runs in")
    parser.add_argument("--cases", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case later")
    parser.add_argument("--all", action="store_true", help="print all cases, not just failures")
    parser.add_argument("--values", type=json.loads, help="values of a single case, as JSON")
    words = parser.parse_args()
    home = words.home.absolute()
    make(home)
    if words.values is not None:
        print(run(Case(words.values, frozenset()), home))
        return
    gc.freeze()  # tracing makes much garbage, and collecting it need not visit the loaded modules
    gc.set_threshold(50_000)
    counts, failures, known = collections.Counter(), [], set()
    began = time.monotonic()
    for number, case in enumerate(drawn(home, words.cases, words.seed, jax.device_count()), 1):
        if time.monotonic() - began > words.seconds:
            break
        start, outcome = time.monotonic(), run(case, home)
        kind = outcome if outcome in ("trained", "refused") else "failed"
        counts[kind] += 1
        counts[f"seconds_{kind}"] += time.monotonic() - start
        if kind == "failed":
            if signature(outcome) not in known:
                case = smaller(case, home, outcome)
            known.add(signature(outcome))
            failures.append(tell(case, outcome))
        if words.all or kind == "failed":
            print(json.dumps({"case": number, **tell(case, outcome)}), flush=True)
        if number % CASES_CACHED == 0:
            jax.clear_caches()
    print(json.dumps({"counts": counts, "failures": failures, "devices": jax.device_count()}))


def tell(case: Case, outcome: str) -> dict[str, Any]:
    """A case and its outcome as JSON values, which --values takes."""
    return {"values": case.values, "options": sorted(case.options), "outcome": outcome}


if __name__ == "__main__":
    sys.exit(main())
