"""Every kind of fault that the campaign tries."""

from __future__ import annotations

from benchmarks.faults.batches import bad_batches
from benchmarks.faults.signals import (
    at_a_random_moment,
    change_process_count,
    during_a_save,
    kill_a_peer,
    kill_at,
    kill_four_times,
    kill_preparation,
    terminate,
    terminate_twice,
    train_twice_at_once,
    while_starting,
)
from benchmarks.faults.storage import (
    clock_jumps,
    damaged_checkpoint,
    damaged_shard,
    disk_fills_up,
    disk_too_small,
    hostile_corpus,
    hostile_manifest,
    linked_temporary_files,
    missing_corpus,
    read_only_disk,
    slow_disk,
)
from benchmarks.faults.trial import Fault

FAULTS: dict[str, tuple[Fault, int]] = {
    "SIGKILL at a random moment": (kill_at(at_a_random_moment), 8),
    "SIGKILL while starting": (kill_at(while_starting), 3),
    "SIGKILL during a save": (kill_at(during_a_save), 6),
    "SIGKILL four times": (kill_four_times, 2),
    "SIGTERM or SIGINT": (terminate, 5),
    "SIGTERM twice": (terminate_twice, 2),
    "checkpoint: a bit flipped": (damaged_checkpoint("flipped"), 5),
    "checkpoint: a file truncated": (damaged_checkpoint("truncated"), 3),
    "checkpoint: a file missing": (damaged_checkpoint("missing"), 2),
    "shard: a bit flipped": (damaged_shard("flipped"), 4),
    "shard: truncated": (damaged_shard("truncated"), 2),
    "shard: missing": (damaged_shard("missing"), 2),
    "corpus missing": (missing_corpus, 1),
    "disk too small": (disk_too_small, 2),
    "disk fills up": (disk_fills_up, 2),
    "disk read-only": (read_only_disk, 1),
    "disk slow": (slow_disk, 2),
    "a bad batch": (bad_batches(1), 2),
    "a stretch of bad batches": (bad_batches(7), 2),
    "other number of processes": (change_process_count, 3),
    "SIGKILL while preparing data": (kill_preparation, 5),
    "SIGKILL of one of two processes": (kill_a_peer, 6),
    "two trainers at once": (train_twice_at_once, 4),
    "the clock jumps": (clock_jumps, 4),
    "links for temporary files": (linked_temporary_files, 2),
    "checkpoint: a hostile manifest": (hostile_manifest, 4),
    "corpus: a hostile manifest": (hostile_corpus, 4),
}
"""Each kind's fault, and how many times it is tried."""
