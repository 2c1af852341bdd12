"""Faults of runs in buckets: those of disks and processes, and a service that errs."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.bucket_server import BUCKET, BucketServer, Disturbance, Request
from benchmarks.faults.sandbox import STEPS, TrainingProcess, damage
from benchmarks.faults.storage import draw_file, stop_behind_two_checkpoints
from benchmarks.faults.trial import Fault, Trial, require_error_line
from plt_jax.checkpoint.manifest import MANIFEST
from plt_jax.data.tokenized_corpus import open_tokenized_corpus
from plt_jax.files.folders import copy_file, remove_tree
from plt_jax.files.paths import files_in, to_path


@functools.cache
def bucket_server() -> BucketServer:
    """The service of all trials, which this process and those that it starts use from now on."""
    server = BucketServer().__enter__()
    os.environ.update(server.environment)
    return server


def stop_bucket_server() -> None:
    """Ends the service, if there is one. Its threads would keep this process from ending."""
    if bucket_server.cache_info().currsize:
        bucket_server().__exit__()
        bucket_server.cache_clear()


def in_bucket(fault: Fault) -> Fault:
    """A fault whose runs are in a bucket."""

    def in_the_bucket(trial: Trial) -> str:
        server = bucket_server()
        sandbox = copy.copy(trial.sandbox)
        sandbox.runs = f"gs://{BUCKET}"
        try:
            return fault(trial._replace(sandbox=sandbox))
        finally:
            server.disturb = lambda _: None
            # The emulator looks at all of its objects whenever a folder is listed.
            for folder in to_path(f"gs://{BUCKET}").iterdir():
                remove_tree(folder)

    return in_the_bucket


def disturbed(happens: Callable[[Trial], Disturbance], share: float, most: int) -> Fault:
    """A fault: a share of all calls is disturbed, up to `most` of them. The run must go on.

    Args:
      happens: draws what happens to a call.
    """

    def fault(trial: Trial) -> str:
        left = [most]

        def disturb(_: Request) -> Disturbance | None:
            if not left[0] or trial.draw.random() > share:
                return None
            left[0] -= 1
            return happens(trial)

        bucket_server().disturb = disturb
        config = trial.sandbox.config(trial.name)
        trial.finish(config)
        return f"{most - left[0]} calls disturbed; bit for bit"

    return in_bucket(fault)


def an_error_or_a_dropped_connection(trial: Trial) -> Disturbance:
    """A 429, a 503, a call that does not arrive, or an answer that is lost."""
    lost = [Disturbance(dropped=True), Disturbance(lost=True)]
    return trial.draw.choice([Disturbance(status=429), Disturbance(status=503), *lost])


def a_late_answer(trial: Trial) -> Disturbance:
    """An answer that waits for up to two seconds."""
    return Disturbance(delay=trial.draw.uniform(0.2, 2))


def outage(trial: Trial) -> str:
    """Every call fails for up to 15 seconds. The run must go on."""
    config = trial.sandbox.config(trial.name)
    process = trial.sandbox.start(config)
    step, seconds = trial.draw.randint(1, STEPS - 6), trial.draw.uniform(3, 15)
    process.wait_for_step(step)
    bucket_server().disturb = lambda _: Disturbance(status=503)
    time.sleep(seconds)
    bucket_server().disturb = lambda _: None
    trial.finish(config) if process.wait().code else trial.compare(config)
    return f"no answers for {seconds:.0f} s after step {step}; went on bit for bit"


def rights_are_lost(trial: Trial) -> str:
    """Nothing may be written any more: the run must say so, and go on once it may."""
    config = trial.sandbox.config(trial.name)
    process = trial.sandbox.start(config)
    step = trial.draw.randint(1, STEPS - 6)
    process.wait_for_step(step)
    bucket_server().disturb = lambda request: (
        Disturbance(status=403) if request.method in ("POST", "PUT", "DELETE") else None
    )
    line = require_error_line(process.wait(), 1, "cannot", alone=False)
    bucket_server().disturb = lambda _: None
    trial.finish(config)
    return f"after step {step}: {line}; went on bit for bit"


def object_vanishes(trial: Trial) -> str:
    """An object of the newest checkpoint is gone. It must be named, and skipped if so chosen;
    without its manifest the checkpoint was never complete."""
    config = trial.sandbox.config(trial.name, checkpoint={"keep": 3})
    newest = stop_behind_two_checkpoints(trial, config)
    file = draw_file(trial, newest)
    file.unlink()
    if file.name == MANIFEST:
        trial.finish(config)
        return f"{file.name} removed: not complete, went on bit for bit"
    ended = trial.sandbox.start(config).wait()
    require_error_line(ended, 2, str(newest), "damaged", "--checkpoint.skip_damaged")
    trial.finish(config, "--checkpoint.skip_damaged", "true")
    return f"{file.name} removed: named, refused; skipped by choice, bit for bit"


def corpus_in_bucket(trial: Trial, **sections: Any) -> Path:
    """Copies the corpus into the bucket; returns the configuration of a run that reads it there,
    with an empty cache."""
    corpus = f"{trial.sandbox.runs}/{trial.name}-corpus"
    for name in files_in(trial.sandbox.corpus):
        copy_file(trial.sandbox.corpus / name, to_path(corpus) / name)
    data = {
        "sources": [{"path": corpus}],
        "cache_dir": str(trial.sandbox.home / trial.name / "cache"),
    }
    return trial.sandbox.config(trial.name, corpus, data=data, **sections)


def is_shard(request: Request) -> bool:
    """Whether a shard of a corpus is asked for."""
    return request.method == "GET" and request.name.endswith(".array_record")


def shards_err(trial: Trial) -> str:
    """Half of the calls for shards fail, are lost or late, at a cold start. The run must go on."""
    config, count = corpus_in_bucket(trial), [0]

    def disturb(request: Request) -> Disturbance | None:
        if not is_shard(request) or trial.draw.random() < 0.5:
            return None
        count[0] += 1
        return trial.draw.choice([an_error_or_a_dropped_connection, a_late_answer])(trial)

    bucket_server().disturb = disturb
    trial.finish(config)
    return f"{count[0]} calls for shards disturbed; bit for bit"


def killed_run(trial: Trial) -> Path:
    """The configuration of a run that reads its corpus in the bucket and has been killed."""
    config = corpus_in_bucket(trial)
    process = trial.sandbox.start(config)
    process.wait_for_step(trial.draw.randint(1, STEPS - 6))
    process.kill()
    return config


def shard_vanishes(trial: Trial) -> str:
    """A shard that no copy is left of is gone or damaged: it must be named."""
    config = killed_run(trial)
    shutil.rmtree(config.parent / "cache")
    folder = to_path(f"{trial.sandbox.runs}/{trial.name}-corpus")
    shards = open_tokenized_corpus(trial.sandbox.corpus).shards("training")
    path = folder / trial.draw.choice(shards).name
    whole = path.read_bytes()
    done = damage(path, trial.draw.choice(["missing", "truncated", "flipped"]), trial.draw)
    require_error_line(trial.sandbox.start(config).wait(), 2, str(path))
    path.write_bytes(whole)
    trial.finish(config)
    return f"{done}: named; brought back, bit for bit"


def copies_are_damaged(trial: Trial) -> str:
    """Copies of shards on the disk are damaged or gone: they must be fetched again."""
    config = killed_run(trial)
    copies = list((config.parent / "cache" / "shards").glob("*.array_record"))
    chosen = trial.draw.sample(copies, min(3, len(copies)))
    for path in chosen:
        damage(path, trial.draw.choice(["missing", "truncated", "flipped"]), trial.draw)
    trial.finish(config)
    return f"{len(chosen)} of {len(copies)} copies damaged; bit for bit"


def during_a_save(trial: Trial, process: TrainingProcess) -> str:
    """Waits until one of the objects of a checkpoint is written."""
    process.wait_for_step(trial.draw.randrange(STEPS - 5))
    left, name = [trial.draw.randint(1, 30)], [""]

    def disturb(request: Request) -> None:
        if request.method == "POST" and "/checkpoints/" in request.name:
            left[0] -= 1
            name[0] = name[0] or (Path(request.name).name if left[0] <= 0 else "")

    bucket_server().disturb = disturb
    process.wait_for(lambda: bool(name[0]))
    return f"when {name[0]} of a checkpoint was written"
