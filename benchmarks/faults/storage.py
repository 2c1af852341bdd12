"""Faults of storage: damaged and missing files, and disks that are full, read-only or slow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.faults.disks import fill, remount, small_disk
from benchmarks.faults.sandbox import REPOSITORY, STEPS, copy_corpus, damage, newest_checkpoint
from benchmarks.faults.trial import Fault, Trial, require, require_error_line
from plt_jax.checkpoint.manifest import File, find_damage, read_manifest, write_manifest
from plt_jax.checkpoint.steps import list_steps
from plt_jax.data.tokenized_corpus import MANIFEST, open_tokenized_corpus
from plt_jax.files.paths import files_in
from plt_jax.runs.names import CHECKPOINTS


def stop_behind_two_checkpoints(trial: Trial, config: Path) -> Path:
    """Kills a run that has two checkpoints; returns the newest one."""
    process = trial.sandbox.start(config)
    process.wait_for_step(trial.draw.randint(12, STEPS - 3))
    process.wait_for(lambda: len(list_steps(process.run / CHECKPOINTS)) > 1)
    process.kill()
    newest = newest_checkpoint(process.run)
    assert newest is not None
    return newest


def damaged_checkpoint(kind: str) -> Fault:
    """A fault: the newest checkpoint is damaged. It must be refused, and skipped if so chosen."""

    def fault(trial: Trial) -> str:
        config = trial.sandbox.config(trial.name, checkpoint={"keep": 3})
        newest = stop_behind_two_checkpoints(trial, config)
        done = damage(draw_file(trial, newest), kind, trial.draw)
        ended = trial.sandbox.start(config).wait()
        require_error_line(ended, 2, str(newest), "damaged", "--checkpoint.skip_damaged")
        trial.finish(config, "--checkpoint.skip_damaged", "true")
        return f"{done}: named, refused; skipped by choice, bit for bit"

    return fault


def draw_file(trial: Trial, checkpoint: Path) -> Path:
    """A file of a checkpoint that is not empty."""
    files = [checkpoint / name for name in files_in(checkpoint)]
    return trial.draw.choice([file for file in files if file.stat().st_size])


def damaged_shard(kind: str) -> Fault:
    """A fault: a shard of the corpus is damaged. The run must name it, or not depend on it."""

    def fault(trial: Trial) -> str:
        corpus = copy_corpus(trial.sandbox, trial.name)
        config = trial.sandbox.config(trial.name, corpus)
        shards = open_tokenized_corpus(corpus).manifest.shards
        shard = trial.draw.choice([one for one in shards if one.split == "training"])
        process = trial.sandbox.start(config)
        process.wait_for_step(trial.draw.randint(1, STEPS - 6))
        process.kill()
        path = corpus / shard.name
        whole = path.read_bytes()
        done = damage(path, kind, trial.draw)
        ended = trial.sandbox.start(config).wait()
        if ended.code == 0:  # the padding of a small shard holds no record
            trial.compare(config)
            found = subprocess.run(
                [sys.executable, "-m", "plt_jax.data.verify", str(corpus)],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
            )
            require(found.returncode == 1 and shard.name in found.stderr, "verify does not find it")
            return f"{done}, in what pads the file: no token differs, bit for bit; verify names it"
        require_error_line(ended, 2, shard.name)
        path.write_bytes(whole)
        trial.finish(config)
        return f"{done}: named; brought back, bit for bit"

    return fault


def missing_corpus(trial: Trial) -> str:
    """The corpus is removed while the run is stopped: it must be named."""
    corpus = copy_corpus(trial.sandbox, trial.name)
    config = trial.sandbox.config(trial.name, corpus)
    process = trial.sandbox.start(config)
    process.wait_for_step(trial.draw.randint(1, STEPS - 6))
    process.kill()
    shutil.rmtree(corpus)
    require_error_line(trial.sandbox.start(config).wait(), 2, str(corpus), MANIFEST)
    shutil.copytree(trial.sandbox.corpus, corpus)
    trial.finish(config)
    return "the corpus removed: named; brought back, bit for bit"


def disk_too_small(trial: Trial) -> str:
    """The run directory lies on a disk of 260 to 700 KiB, which one checkpoint fills."""
    folder, config = trial.new_run()
    size = trial.draw.randint(260, 700)
    with small_disk(folder, f"{size}k"):
        ended = trial.sandbox.start(config).wait()
        code = 2 if ended.code == 2 else 1  # 2 if the disk was full before the first step
        error = require_error_line(ended, code, "No space left", alone=False)
        remount(folder, "size=64m")
        trial.finish(config)
    what = error.partition(": ")[2].split(str(trial.sandbox.home))[0]
    return f"a disk of {size} KiB: {what}... named; given more, bit for bit"


def disk_fills_up(trial: Trial) -> str:
    """Another file takes all the space of the run's disk after a step."""
    folder, config = trial.new_run()
    with small_disk(folder, "64m"):
        process = trial.sandbox.start(config)
        step = trial.draw.randint(3, STEPS - 6)
        process.wait_for_step(step)
        fill(folder / "filler")
        ended = process.wait()
        require_error_line(ended, 1, "No space left", alone=False)
        (folder / "filler").unlink()
        trial.finish(config)
    return f"the disk full after step {step}: named, exit code 1; emptied, bit for bit"


def read_only_disk(trial: Trial) -> str:
    """The run directory is read-only when the run is resumed."""
    folder, config = trial.new_run()
    with small_disk(folder, "64m"):
        process = trial.sandbox.start(config)
        process.wait_for_step(trial.draw.randint(1, STEPS - 6))
        process.kill()
        remount(folder, "ro")
        require_error_line(trial.sandbox.start(config).wait(), 2, "Read-only file system")
        remount(folder, "rw")
        trial.finish(config)
    return "read-only when resuming: named; writable again, bit for bit"


def linked_temporary_files(trial: Trial) -> str:
    """Links to a file of the user wait where earlier versions wrote their temporary files."""
    config = trial.sandbox.config(trial.name)
    process = trial.sandbox.start(config)
    process.wait_for_step(trial.draw.randint(1, STEPS - 6))
    process.kill()
    treasure = config.parent / "treasure"
    treasure.write_text("gold", encoding="utf-8")
    names = ["config.yaml", "tokenizer.json", "text.json", "metrics.jsonl", "loss.png"]
    for name in names:
        for link in (f"{name}.tmp", f".{name}.unfinished"):
            (process.run / link).symlink_to(treasure)
    (process.run / "loss.png").unlink(missing_ok=True)
    (process.run / "loss.png").symlink_to(treasure)
    trial.finish(config)
    require(treasure.read_text(encoding="utf-8") == "gold", "a link was followed")
    return "links in place of temporary files: not followed, bit for bit"


HOSTILE = ("../../../../etc/passwd", "/etc/passwd", "/dev/zero", "params/../../../run.yaml")


def hostile_manifest(trial: Trial) -> str:
    """The newest checkpoint's manifest names a file elsewhere, with a right checksum of its own."""
    config = trial.sandbox.config(trial.name, checkpoint={"keep": 3})
    newest = stop_behind_two_checkpoints(trial, config)
    manifest = read_manifest(newest)
    assert manifest is not None
    name = trial.draw.choice(HOSTILE)
    write_manifest(newest, {**manifest.files, name: File(100, 5)}, manifest.validation_loss)
    ended = trial.sandbox.start(config).wait()
    require_error_line(ended, 2, str(newest), "is not the name of a file", name)
    trial.finish(config, "--checkpoint.skip_damaged", "true")
    return f"a manifest that names {name}: refused; skipped by choice, bit for bit"


def hostile_corpus(trial: Trial) -> str:
    """The corpus's manifest names a file elsewhere, or more tokens than a shard holds."""
    corpus = copy_corpus(trial.sandbox, trial.name)
    config = trial.sandbox.config(trial.name, corpus)
    process = trial.sandbox.start(config)
    process.wait_for_step(trial.draw.randint(1, STEPS - 6))
    process.kill()
    path = corpus / MANIFEST
    whole = path.read_text(encoding="utf-8")
    values = json.loads(whole)
    change = trial.draw.choice([{"name": name} for name in HOSTILE] + [{"tokens": 10**9}])
    values["shards"][0] |= change
    path.write_text(json.dumps(values), encoding="utf-8")
    ended = trial.sandbox.start(config).wait()
    require_error_line(ended, 2, "is not the name of a file" if "name" in change else "shard")
    path.write_text(whole, encoding="utf-8")
    trial.finish(config)
    return f"a manifest with {change}: refused; brought back, bit for bit"


CLOCK = """
import time
real, begun = time.time, time.time()
time.time = lambda: real() + (({days}) * 86400 if real() - begun > {seconds} else 0)
"""
"""Python that sets the clock after some seconds."""


def clock_jumps(trial: Trial) -> str:
    """The clock is set back or forward by days while the run trains."""
    config, days = trial.sandbox.config(trial.name), trial.draw.choice([-3000, -30, -1, 30, 3000])
    script = CLOCK.format(days=days, seconds=trial.draw.uniform(3, 9))
    ended = trial.sandbox.start(config, script=script).wait()
    require(ended.code == 0, f"it ended with {ended.code}: {ended.error[-300:]}")
    trial.compare(config)
    return f"the clock set by {days:+} days: bit for bit"


SLOW = """
import time
from plt_jax.checkpoint import store
take = store.take_checksums
def slowly(*arguments):
    time.sleep({seconds})
    return take(*arguments)
store.take_checksums = slowly
"""
"""Python that makes every save take some seconds more."""


def slow_disk(trial: Trial) -> str:
    """Every save takes 1.5 to 3 s more, many times as long as the steps between two saves."""
    config, seconds = trial.sandbox.config(trial.name), trial.draw.uniform(1.5, 3.0)
    script = SLOW.format(seconds=seconds)
    process = trial.sandbox.start(config, "--training.hang_after", "0.5", script=script)
    process.wait_for_step(trial.draw.randint(11, STEPS - 6))
    before = process.read_errors().count("saving has taken")
    named = process.wait_for(lambda: process.read_errors().count("saving has taken") > before)
    ended = process.kill()
    require(named, f"no warning names the slow save: {ended.error[-300:]}")
    newest = newest_checkpoint(process.run)
    require(newest is not None and not find_damage(newest), "the last checkpoint is not intact")
    trial.finish(config)
    return f"each save takes {seconds:.1f} s more: named; killed, bit for bit"
