"""The commands as a user runs them: train, evaluate, generate, stop and resume."""

import json
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from plt_jax.checkpoint.steps import list_steps
from plt_jax.model.looping import with_loops
from plt_jax.runs.directory import open_trained
from tests.models import forward
from tests.training.runs import (
    REPOSITORY,
    STEPS,
    Result,
    command,
    environment,
    finished_run,
    json_rows,
    output_of,
    snapshot,
    tiny_values,
    write_config,
)

pytestmark = pytest.mark.slow(reason="starts every command as its users do")


def run(*words: object, cwd=REPOSITORY) -> Result:
    """Runs Python in another process."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        **{"cwd": cwd, "env": environment(), "capture_output": True, "timeout": 300},
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that `python train.py tiny.yaml` made in the folder `runs`, and what it printed."""
    home = finished_run(tmp_path_factory.getbasetemp()).home
    folder = tmp_path_factory.mktemp("user")
    values = tiny_values(home, training={"sample_prompt": "the peace of"})
    write_config(folder / "tiny.yaml", values)
    result = run(REPOSITORY / "train.py", "tiny.yaml", cwd=folder)
    assert result.code == 0, result.err
    return folder / "runs" / "tiny", result


def test_train_leaves_a_run_directory(trained):
    directory, result = trained
    assert {path.name for path in directory.iterdir()} == {
        *["config.yaml", "tokenizer.json", "text.json", "checkpoints", "metrics.jsonl"],
        *["special_tokens.json", "tensorboard", "loss.png"],
    }
    rows = json_rows(directory / "metrics.jsonl")
    assert all({"step", "loss", "tokens_per_second"} <= set(row) for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    evaluations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluations] == [4, STEPS]
    assert all("bits_per_byte" in row for row in evaluations)
    assert list_steps(directory / "checkpoints")[-1] == STEPS
    events = [path.name for path in (directory / "tensorboard").iterdir()]
    assert len(events) == 1 and events[0].startswith("events.out.tfevents.")
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((directory / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert "a sample:\nthe peace of" in result.out
    assert f"done: {STEPS} steps" in result.out


def test_train_prints_nothing_on_stderr(trained):
    _, result = trained
    assert result.err == ""


def test_train_again_says_finished_and_changes_nothing(trained, monkeypatch):
    directory, _ = trained
    before = snapshot(directory)
    monkeypatch.chdir(directory.parents[1])
    result = command("train.py", "tiny.yaml")
    assert result.code == 0
    assert f"finished: runs/tiny is at step {STEPS} of {STEPS}" in result.out
    assert snapshot(directory) == before


def test_eval(trained):
    directory, _ = trained
    result = run("eval.py", directory)
    assert (result.code, result.err) == (0, "")
    written = json.loads((directory / "eval.json").read_text())
    assert {"loss", "perplexity", "bits_per_byte", "by_loop"} <= set(written)
    assert len(written["by_loop"]) == 2
    last = [row for row in json_rows(directory / "metrics.jsonl") if "validation_loss" in row][-1]
    assert written["loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert f"{written['bits_per_byte']:.4f}" in result.out


def generate(directory, *words) -> str:
    return output_of("plt_jax.generate", directory, *words)


def test_generate_is_greedy_and_says_the_same_each_time(trained):
    directory, _ = trained
    words = ["--prompt", "the peace", "--max_new_tokens", "6"]
    result = run("-m", "plt_jax.generate", directory, *words)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("the peace") and result.out.endswith("\n")
    assert len(result.out) > len("the peace\n")
    assert generate(directory, *words) == result.out
    assert generate(directory, *words, "--seed", "7") == result.out
    # The likeliest token alone is greedy at any temperature.
    assert generate(directory, *words, "--temperature", "2", "--top_k", "1") == result.out


@pytest.mark.parametrize("loops", [1, 3])
def test_generate_with_another_number_of_loops(trained, loops):
    directory, _ = trained
    model = open_trained(directory)
    config, params = with_loops(model.config.model, model.params, loops)
    tokens = model.tokenizer.encode_prompt("the peace")
    start = len(tokens)
    for _ in range(6):
        logits = forward(config)(params, jnp.array([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    words = ["--prompt", "the peace", "--max_new_tokens", "6", "--loops", loops]
    assert generate(directory, *words) == f"the peace{model.tokenizer.decode(tokens[start:])}\n"


def test_generate_draws_by_its_seed(trained):
    directory, _ = trained
    words = ["--prompt", "the peace", "--max_new_tokens", "6", "--temperature", "1.5"]
    drawn = [generate(directory, *words, "--seed", seed) for seed in (1, 2, 3, 1)]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) > 1


def test_generate_from_one_checkpoint_without_a_prompt(trained):
    directory, _ = trained
    out = generate(directory / "checkpoints" / "4", "--max_new_tokens", "3")
    assert len(out) > 1


def test_generate_stops_where_the_context_is_full(trained):
    directory, _ = trained
    # Fifteen of sixteen places are taken by the first token of all and fourteen bytes.
    words = ["--prompt", "zqzqzqzqzqzqzq", "--max_new_tokens", "100"]
    assert generate(directory, *words).startswith("zqzqzqzqzqzqzq")


def test_a_signal_stops_the_run_and_the_same_command_resumes_it(trained, tmp_path):
    directory, _ = trained
    # A schedule that does not depend on the number of steps, which is out of reach at first.
    words = ["train.py", directory.parents[1] / "tiny.yaml", "--run_dir", tmp_path / "run"]
    words += ["--optimizer.schedule", "constant", "--optimizer.warmup_fraction", "0"]
    words += ["--training.evaluate_every", "1000000", "--training.checkpoint_every", "1000000"]
    process = subprocess.Popen(
        [sys.executable, *map(str, words), "--training.steps", "1000000"],
        **{"cwd": REPOSITORY, "env": environment(), "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    (step,) = list_steps(tmp_path / "run" / "checkpoints")
    assert "SIGTERM: saving after the steps under way ..." in out
    assert f"stopped at step {step}, saved; run the same command to go on" in out
    result = command(*words, "--training.steps", step + 2)
    assert result.code == 0, result
    assert f"changed since its last start: training.steps: 1000000 -> {step + 2}" in result.out
    assert f"resuming at step {step} of {step + 2}" in result.out
    rows = json_rows(tmp_path / "run" / "metrics.jsonl")
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, step + 3))


@pytest.mark.parametrize("name", ["train.py", "eval.py", "plt_jax.generate", "plt_jax.describe"])
def test_every_command_explains_itself(name):
    result = command(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert "usage:" in result.out


def test_a_refusal_is_one_line_of_the_whole_process():
    result = run("train.py", "none.yaml")
    assert result == Result(
        2, "", "error: cannot read the config none.yaml: No such file or directory\n"
    )
