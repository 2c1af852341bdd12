"""A run in a bucket is, bit for bit, one on a disk: trained, killed, resumed, damaged, read."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.faults.bucket_server import Disturbance
from plt_jax import locks
from plt_jax.checkpoint.steps import list_steps
from plt_jax.errors import FailedError, InputError
from plt_jax.files.paths import files_in, to_path
from plt_jax.files.writing import write_text
from plt_jax.locks import LOCK, lock_of
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import CHECKPOINTS, CONFIG, METRICS
from plt_jax.training import trainer
from tests.checkpoint.damage import data_file, flip_bit
from tests.distributed import commands
from tests.distributed.test_processes import TRAINING, run_together
from tests.distributed.test_rendezvous import free_port
from tests.training.runs import (
    REPOSITORY,
    STEPS,
    assert_same_run,
    call_at,
    command,
    environment,
    numbers,
    simulated,
    tiny_config,
    write_config,
)

pytestmark = pytest.mark.slow(reason="trains several runs")


@pytest.fixture
def config(finished, bucket):
    """The same run in a bucket, not yet begun."""
    return tiny_config(finished.home, bucket)


@pytest.fixture
def trained(finished, config):
    """The same run in a bucket, at its end: a copy of that on the disk."""
    for name in files_in(finished.directory):
        (config.directory / name).write_bytes((finished.directory / name).read_bytes())
    write_text(config.directory / CONFIG, (finished.directory / CONFIG).read_text())
    return config


def objects(directory):
    """The names and contents of all objects of a run, its lock aside."""
    names = (name for name in files_in(directory) if name != LOCK)
    return {name: (directory / name).read_bytes() for name in names}


def start(config, bucket_server, folder, *options, **flags):
    """Starts train.py as its user would."""
    path = write_config(folder / "config.yaml", config.model_dump(mode="json"))
    return subprocess.Popen(
        [sys.executable, "train.py", str(path), *options],
        **{"cwd": REPOSITORY, "env": environment(**bucket_server.environment, **flags)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
    )


def test_a_run_in_a_bucket_stops_and_resumes_as_on_a_disk(finished, config):
    with call_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert trainer.train(config) == trainer.Outcome(5, stopped=True)
    directory = config.directory
    assert list_steps(directory / CHECKPOINTS) == [4, 5]
    assert [row["step"] for row in read_metrics(directory)][-1] == 5
    assert trainer.train(config) == trainer.Outcome(STEPS, stopped=False)
    assert_same_run(config, finished.config)
    names = files_in(directory)
    assert {"loss.png", "tokenizer.json", "text.json", METRICS, CONFIG} <= set(names)
    assert len([name for name in names if name.startswith("tensorboard/")]) == 2
    assert LOCK not in names
    # The copy of an undisturbed run's logs and checkpoints is left as it is.
    before = objects(directory)
    assert trainer.train(config).step == STEPS
    assert objects(directory) == before


def test_sigkill_during_a_save_loses_that_save_alone(finished, config, bucket_server, tmp_path):
    """Its objects are there, but not its manifest."""
    worker, saved = None, []

    def disturb(request):
        if f"{CHECKPOINTS}/8/commit_success" in request.name and worker is not None:
            worker.send_signal(signal.SIGKILL)
            saved.append(request)
        return None

    bucket_server.disturb = disturb
    worker = start(config, bucket_server, tmp_path)
    worker.communicate(timeout=300)
    assert worker.returncode == -signal.SIGKILL and saved
    folder = config.directory / CHECKPOINTS
    assert (folder / "8").exists() and list_steps(folder) == [4]
    assert (config.directory / LOCK).exists()
    assert trainer.train(config).step == STEPS  # its lock is known to be a dead process's
    assert_same_run(config, finished.config)


def test_a_damaged_object_is_refused_by_name_and_skipped_by_choice(finished, trained, capsys):
    folder = trained.directory / CHECKPOINTS
    flip_bit(data_file(folder / str(STEPS), "optimizer"))
    before = objects(trained.directory)
    with pytest.raises(InputError, match=f"{folder}/{STEPS} is damaged: optimizer/.* another chec"):
        trainer.train(trained)
    assert objects(trained.directory) == before
    checkpoint = trained.checkpoint.model_copy(update={"skip_damaged": True})
    skipping = trained.model_copy(update={"checkpoint": checkpoint})
    assert trainer.train(skipping).step == STEPS
    assert f"moved aside: {folder}/{STEPS}.damaged" in capsys.readouterr().out
    assert list_steps(folder) == [4, STEPS]
    assert_same_run(trained, finished.config)
    assert files_in(folder / f"{STEPS}.damaged")


def test_a_checkpoint_without_its_manifest_was_not_completed(finished, trained):
    (trained.directory / CHECKPOINTS / str(STEPS) / "manifest.json").unlink()
    assert trainer.train(trained).step == STEPS
    assert_same_run(trained, finished.config)


def test_an_object_that_vanishes_is_named(trained):
    file = data_file(trained.directory / CHECKPOINTS / str(STEPS))
    file.unlink()
    with pytest.raises(InputError, match=f"is damaged: params/.*{file.name} is missing"):
        trainer.train(trained)


def test_a_second_trainer_is_refused_and_changes_nothing(trained, tmp_path, bucket_server):
    (trained.directory / CHECKPOINTS / "9" / "params").mkdir(parents=True)
    (trained.directory / CHECKPOINTS / "9" / "params" / "half").write_bytes(b"being written")
    lock = lock_of(trained.directory)
    assert lock.take()
    before = objects(trained.directory)
    with pytest.raises(InputError, match=rf"process {os.getpid()} on .* trains in --run_dir gs://"):
        trainer.train(trained)
    assert objects(trained.directory) == before
    lock.release()


def test_of_two_that_start_at_once_one_trains(finished, config, bucket_server, tmp_path):
    workers = []
    for name in "ab":
        (tmp_path / name).mkdir()
        workers.append(start(config, bucket_server, tmp_path / name))
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert sorted(worker.returncode for worker in workers) == [0, 2], outputs
    loser = outputs[workers.index(next(w for w in workers if w.returncode == 2))]
    assert "trains in --run_dir gs://" in loser or "meanwhile" in loser
    assert_same_run(config, finished.config)


def test_who_is_taken_over_stops_and_writes_nothing_more(config, capsys):
    directory, after = config.directory, {}

    def take_over():
        other = lock_of(directory, take_over=True)
        time.sleep(1)  # what is being sent goes on
        assert other.take()
        after.update(other=other, objects=objects(directory))

    with call_at(6, take_over), pytest.raises(FailedError, match="has taken over gs://"):
        trainer.train(config)
    before = after["objects"]
    changed = {name for name, content in objects(directory).items() if before.get(name) != content}
    assert not {name for name in changed if name == METRICS or name.endswith("manifest.json")}
    after["other"].renew()
    after["other"].release()


def test_the_option_take_over_goes_on_at_once(finished, trained, bucket_server, tmp_path):
    held = {"host": "tpu-0", "process": 7, "machine": "another", "token": "t"}
    write_text(trained.directory / LOCK, json.dumps(held))
    path = write_config(tmp_path / "config.yaml", trained.model_dump(mode="json"))
    began = time.monotonic()
    result = command("train.py", path, "--take_over")
    assert (result.code, time.monotonic() - began < locks.GONE_SECONDS / 2) == (0, True), result
    assert "finished:" in result.out


def test_a_service_in_trouble_costs_time_alone(finished, config, bucket_server):
    draw, left = random.Random(7), [12]
    kinds = [Disturbance(status=429), Disturbance(status=503), Disturbance(dropped=True)]
    kinds += [Disturbance(delay=0.3), Disturbance(lost=True)]

    def disturb(request):
        if draw.random() < 0.97 or not left[0]:
            return None
        left[0] -= 1
        return draw.choice(kinds)

    bucket_server.disturb = disturb
    assert trainer.train(config).step == STEPS
    assert left[0] < 8
    bucket_server.disturb = lambda _: None
    assert_same_run(config, finished.config)


def test_logs_that_cannot_be_sent_end_no_run(config, bucket_server, capsys):
    def disturb(request):
        is_log = request.name.endswith(METRICS) or "tensorboard" in request.name
        return Disturbance(status=403) if is_log and request.method != "GET" else None

    bucket_server.disturb = disturb
    assert trainer.train(config).step == STEPS
    err = capsys.readouterr().err
    assert err.count("note: the logs are not sent to gs://runs/") == 1
    kept = err.rpartition("note: what was not sent is in ")[2].split("\n")[0]
    assert [row["step"] for row in read_metrics(to_path(kept))][-1] == STEPS
    shutil.rmtree(to_path(kept).parent)


def test_a_crash_loses_one_interval_of_logs_at_most(config):
    sent = []

    def crash():
        for _ in range(100):  # sent in the background
            if [row["step"] for row in read_metrics(config.directory)][-1:] == [6]:
                sent.append(6)
                raise ZeroDivisionError
            time.sleep(0.1)

    with call_at(6, crash), pytest.raises(ZeroDivisionError):
        trainer.train(config)
    assert sent


def test_several_processes_train_in_a_bucket(finished, bucket_server, bucket, tmp_path):
    """One of them is killed during a save, and the run goes on; they evaluate and generate."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    often = TRAINING | {"checkpoint_every": 4}
    config = tiny_config(finished.home, bucket, training=often, mesh=mesh)
    port, workers = free_port(), []

    def disturb(request):
        if f"{CHECKPOINTS}/8/" in request.name and workers[1].poll() is None:
            workers[1].kill()

    bucket_server.disturb = disturb
    for index in range(2):
        at = {"coordinator": f"localhost:{port}", "count": 2, "index": index}
        options = [f"--processes.{name}={value}" for name, value in at.items()]
        workers.append(start(config, bucket_server, tmp_path, *options, **simulated(4)))
    out, _ = workers[0].communicate(timeout=300)
    bucket_server.disturb = lambda _: None
    assert (workers[0].returncode, workers[1].wait()) == (1, -signal.SIGKILL)
    assert "process 1 of 2 (host " in out and "it was killed" in out
    assert list_steps(config.directory / CHECKPOINTS) == [4]
    run_together(2, finished.home, bucket, mesh)
    disk = tiny_config(finished.home, tmp_path / "alone", training=TRAINING)
    trainer.train(disk)
    run = tiny_config(finished.home, bucket)
    assert list_steps(run.directory / CHECKPOINTS) == list_steps(disk.directory / CHECKPOINTS)
    one, other = numbers(disk), numbers(run)
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for left, right in zip(one, other, strict=True):
        for name in {"loss", "validation_loss"} & left.keys():
            assert left[name] == pytest.approx(right[name], rel=1e-4)
    result = command("plt_jax.checkpoint", "verify", bucket)
    assert result.code == 0 and result.out.count(": sound, ") == 2, result
    words = ["--mesh.fsdp", 4, "--mesh.tensor", 2]
    generate = ["plt_jax.generate", bucket, "--prompt", "the", "--max_new_tokens", 5]
    together = commands.run_together([["eval.py", bucket, *words], [*generate, *words]])
    assert all(result.code == 0 for process in together for result in process), together
    found = json.loads((run.directory / "eval.json").read_text())
    assert together[0][1].out == command(*generate).out
    assert command("eval.py", bucket).code == 0
    alone = json.loads((run.directory / "eval.json").read_text())
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_what_may_not_be_written_is_refused_before_any_work(trained, bucket, bucket_server):
    bucket_server.disturb = lambda request: (
        Disturbance(status=403) if request.method in ("POST", "PUT", "DELETE") else None
    )
    before = len(bucket_server.requests)
    result = command("eval.py", bucket)
    assert result.code == 2, result
    assert result.err.startswith(f"error: cannot write to {bucket}: the account has no right")
    names = {request.name for request in bucket_server.requests[before:]}
    assert not any("/ocdbt" in name or "/d/" in name for name in names)  # no parameters were read


def test_all_commands_read_and_write_buckets(finished, trained, bucket, tmp_path):
    """Each says of a run in a bucket what it says of the same run on a disk."""
    disk = tmp_path / "run"
    shutil.copytree(finished.directory, disk)
    for name, *words in (
        ("eval.py",),
        ("eval.py", "--loops"),
        ("plt_jax.generate", "--prompt", "the", "--max_new_tokens", "3"),
        ("plt_jax.checkpoint", "ls"),
        ("plt_jax.training.report",),
    ):
        outputs = []
        for run in (disk, bucket):
            place = ["ls", run] if words == ["ls"] else [run, *words]
            result = command(name, *place)
            assert result.code == 0, result
            outputs.append(result.out.replace(str(run), "RUN"))
        assert outputs[0] == outputs[1], name
    written = set(files_in(disk)) - set(files_in(finished.directory))
    assert {"eval.json", "loops.json", "loops.html", "report.html"} <= written
    for name in written - {"report.html", "loops.html"}:
        assert (disk / name).read_bytes() == (trained.directory / name).read_bytes(), name
    new, corpus = f"{bucket}-new", finished.home / "corpus"
    for words in (
        ("plt_jax.checkpoint", "export", bucket, f"{new}/params"),
        ("plt_jax.convert", "export", f"{new}/params", f"{new}/hf"),
        ("plt_jax.convert", "import", f"{new}/hf", f"{new}/back"),
        ("plt_jax.convert", "quantize", f"{new}/back", f"{new}/int8"),
        ("eval.py", f"{new}/int8", "--text", corpus),
        ("eval.py", bucket, "--text", corpus),
        ("eval.py", f"{new}/back", "--text", corpus),
    ):
        result = command(*words)
        assert result.code == 0, (words, result)
    scores = [json.loads((to_path(run) / "eval.json").read_text()) for run in (bucket, words[1])]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-6)  # other batches
    taken = command("plt_jax.convert", "import", f"{new}/hf", f"{new}/back")
    assert taken.code == 2 and f"{new}/back is not empty" in taken.err


def test_a_run_starts_from_a_run_in_a_bucket(finished, trained, bucket, tmp_path):
    config = tiny_config(
        finished.home,
        f"{bucket}-next",
        start_from=bucket,
        tokenizer={"path": f"{bucket}/tokenizer.json"},
    )
    assert trainer.train(config).step == STEPS
    assert list_steps(to_path(f"{bucket}-next") / CHECKPOINTS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://nowhere/run", "there is no bucket gs://nowhere; make it"),
        ("gs://runs/nothing", "gs://runs/nothing/config.yaml is missing"),
        ("s3://runs/mine", "s3:// is not supported; give a path of a file system"),
    ],
)
def test_what_is_not_there_is_one_line(bucket_server, path, message):
    for name, *words in (("eval.py", path), ("plt_jax.checkpoint", "ls", path)):
        result = command(name, *words)
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1
