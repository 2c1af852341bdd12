"""Faults of processes: signals while they train or prepare data, and a changed process count."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.faults.sandbox import REPOSITORY, STEPS, TIMEOUT, TrainingProcess
from benchmarks.faults.trial import Fault, Trial, require, require_error_line
from plt_jax.data.tokenized_corpus import open_tokenized_corpus

PEER_SECONDS = 20
"""Within which a process must have ended whose peer was killed."""


def kill_at(wait: Callable[[Trial, TrainingProcess], str]) -> Fault:
    """A fault: SIGKILL as soon as `wait` returns; `wait` describes the moment."""

    def fault(trial: Trial) -> str:
        config = trial.sandbox.config(trial.name)
        process = trial.sandbox.start(config)
        when = wait(trial, process)
        process.kill()
        trial.finish(config)
        return f"killed {when}; went on bit for bit"

    return fault


def at_a_random_moment(trial: Trial, process: TrainingProcess) -> str:
    """Waits for a random step, and up to 50 ms more."""
    step, delay = trial.draw.randrange(STEPS), trial.draw.random() * 0.05
    process.wait_for_step(step)
    time.sleep(delay)
    return f"{1000 * delay:.0f} ms after step {step}"


def while_starting(trial: Trial, process: TrainingProcess) -> str:
    """Waits 0.5 to 6 s, in which Python imports, data is read and programs are compiled."""
    delay = trial.draw.uniform(0.5, 6)
    time.sleep(delay)
    return f"{delay:.1f} s after its start"


def during_a_save(trial: Trial, process: TrainingProcess) -> str:
    """Waits until a checkpoint is being written, and up to 100 ms more."""
    process.wait_for_step(trial.draw.randrange(STEPS - 5))
    process.wait_for_save()
    delay = trial.draw.random() * 0.1
    time.sleep(delay)
    return f"{1000 * delay:.0f} ms into a save"


def kill_four_times(trial: Trial) -> str:
    """The same run is killed and resumed four times."""
    config = trial.sandbox.config(trial.name)
    steps = []
    for _ in range(4):
        process = trial.sandbox.start(config)
        # A kill between two saves takes the run back to the first: the next kill comes later.
        steps.append(min(STEPS - 1, (steps[-1] if steps else 0) + trial.draw.randint(6, 9)))
        process.wait_for_step(steps[-1])
        process.kill()
    trial.finish(config)
    return f"killed at steps {', '.join(map(str, steps))}; went on bit for bit"


def terminate(trial: Trial) -> str:
    """SIGTERM or SIGINT: the run must save and exit with code 3."""
    config = trial.sandbox.config(trial.name)
    number = trial.draw.choice([signal.SIGTERM, signal.SIGINT])
    process = trial.sandbox.start(config)
    step = trial.draw.randint(1, STEPS - 6)
    process.wait_for_step(step)
    process.signal(number)
    ended = process.wait()
    require(ended.code == 3, f"exit code {ended.code} instead of 3: {ended.error[-300:]}")
    trial.finish(config)
    return f"{number.name} at step {step}: saved, exit code 3; went on bit for bit"


def terminate_twice(trial: Trial) -> str:
    """A second SIGTERM while the first one's save may be under way: any exit code will do."""
    config = trial.sandbox.config(trial.name)
    process = trial.sandbox.start(config)
    process.wait_for_step(trial.draw.randint(1, STEPS - 6))
    process.signal(signal.SIGTERM)
    delay = trial.draw.random() * 0.3
    time.sleep(delay)
    process.signal(signal.SIGTERM)
    code = process.wait().code
    trial.finish(config)
    return (
        f"a second SIGTERM {1000 * delay:.0f} ms after the first: code {code}; went on bit for bit"
    )


def change_process_count(trial: Trial) -> str:
    """A run of one process is resumed by two, or the reverse: equal but for rounding (1e-4)."""
    config = trial.sandbox.config(trial.name)
    first, second = trial.draw.choice([(1, 2), (2, 1)])
    step = trial.draw.randint(2, STEPS - 12)
    run_processes(trial, config, first, stop_at=step)
    run_processes(trial, config, second)
    compare_rounded(trial, config)
    return f"SIGTERM in {first} process{'es' * (first > 1)} at step {step}, went on in {second}"


def compare_rounded(trial: Trial, config: Path) -> None:
    """Compares the metrics of a run on several devices with the undisturbed one's, within 1e-4."""
    found = trial.sandbox.result(config).rows
    for ours, right in zip(found, trial.expected.rows, strict=True):
        for name, value in right.items():
            require(
                np.allclose(np.array(ours[name], float), np.array(value, float), 1e-4, 1e-7),
                f"{name} is {ours[name]} instead of {value} at step {right['step']}",
            )


def kill_a_peer(trial: Trial) -> str:
    """One of two processes is killed: the other must end soon, with the line that names it."""
    config, killed = trial.sandbox.config(trial.name), trial.draw.randrange(2)
    together = start_processes(trial, config, 2)
    step = trial.draw.randint(2, STEPS - 6)
    together[0].wait_for_step(step)
    together[killed].kill()
    since = time.monotonic()
    ended = together[1 - killed].wait()
    seconds = time.monotonic() - since
    named = f"process {killed} of 2 (host "
    require_error_line(ended, 1, named, "it was killed", alone=False)
    require(seconds < PEER_SECONDS, f"the other took {seconds:.0f} s to end")
    run_processes(trial, config, trial.draw.choice([1, 2]))
    compare_rounded(trial, config)
    return f"process {killed} killed after step {step}: named by the other, code 1; went on"


def train_twice_at_once(trial: Trial) -> str:
    """The same command is given twice: one trains undisturbed, the other is refused."""
    config = trial.sandbox.config(trial.name)
    # The second's errors go to a file of their own.
    other = trial.sandbox.home / f"{trial.name}_other" / "run.yaml"
    other.parent.mkdir()
    other.write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    first, delay = trial.sandbox.start(config), trial.draw.random() * 2
    time.sleep(delay)
    ended = [trial.sandbox.start(other).wait(), first.wait()]
    refused = [one for one in ended if one.code]
    for one in refused:
        require_error_line(one, 2, "process", "trains in --run_dir")
    require(len(refused) < 2, "both were refused")
    trial.compare(config)
    how = "one refused" if refused else "one came when the other had ended"
    return f"started {1000 * delay:.0f} ms apart: {how}, bit for bit"


def start_processes(trial: Trial, config: Path, count: int) -> list[TrainingProcess]:
    """Starts the processes of a run."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    together: list[TrainingProcess] = []
    for index in range(count):
        options = []
        if count > 1:
            names = {"coordinator": f"localhost:{port}", "count": count, "index": index}
            options = [f"--processes.{name}={value}" for name, value in names.items()]
            options.append("--mesh.data=2")
        together.append(trial.sandbox.start(config, *options))
    return together


def run_processes(trial: Trial, config: Path, count: int, stop_at: int | None = None) -> None:
    """Trains in several processes, to the end or until SIGTERM after a step."""
    together = start_processes(trial, config, count)
    if stop_at is not None:
        together[0].wait_for_step(stop_at)
        together[-1].signal(signal.SIGTERM)
    for process in together:
        code = process.wait().code
        require(code == (0 if stop_at is None else 3), f"exit code {code}")


def kill_preparation(trial: Trial) -> str:
    """Preparing a corpus is killed and called again: it must make the undisturbed corpus."""
    out = trial.sandbox.home / trial.name / "corpus"
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = trial.sandbox.corpus / "tokenizer.json"
    # The same corpus as Sandbox makes, with a pause after each unit.
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from plt_jax.data.corpus_units import CorpusOptions\n"
        "from plt_jax.data.corpus_writer import write_corpus\n"
        "from plt_jax.data.tokenizer import load_tokenizer\n"
        "texts, out, tokenizer, pause = sys.argv[1:]\n"
        "write_corpus([texts], Path(out), load_tokenizer(tokenizer),\n"
        "        CorpusOptions(validation_fraction=0.1, shard_bytes=2**14), 1,\n"
        "        lambda *_: lambda unit, result: time.sleep(float(pause)))\n"
    )
    command = [sys.executable, "-c", script, str(trial.sandbox.texts), str(out), str(tokenizer)]
    started = subprocess.Popen([*command, "0.1"], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    units, delay = trial.draw.randint(0, 4), trial.draw.random() * 0.15
    deadline = time.monotonic() + TIMEOUT
    while len(list(out.glob("parts/0*.json"))) < units and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    started.kill()
    started.wait()
    subprocess.run([*command, "0"], cwd=REPOSITORY, check=True)
    same = (
        open_tokenized_corpus(out).fingerprint
        == open_tokenized_corpus(trial.sandbox.corpus).fingerprint
    )
    require(same, "the corpus differs from one that was prepared undisturbed")
    return f"killed {1000 * delay:.0f} ms after {units} finished shards; went on to the same corpus"
