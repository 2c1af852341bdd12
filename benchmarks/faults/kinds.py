"""Every kind of fault that the campaign tries."""

from __future__ import annotations

from benchmarks.faults import buckets
from benchmarks.faults.batches import bad_batches
from benchmarks.faults.buckets import (
    a_late_answer,
    an_error_or_a_dropped_connection,
    disturbed,
    in_bucket,
    object_vanishes,
    outage,
    rights_are_lost,
)
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
    "bucket: errors, dropped calls": (disturbed(an_error_or_a_dropped_connection, 0.03, 20), 3),
    "bucket: late answers": (disturbed(a_late_answer, 0.1, 40), 2),
    "bucket: an outage": (in_bucket(outage), 2),
    "bucket: rights are lost": (in_bucket(rights_are_lost), 2),
    "bucket: an object vanishes": (in_bucket(object_vanishes), 3),
    "bucket: a bit flipped": (in_bucket(damaged_checkpoint("flipped")), 2),
    "bucket: SIGKILL": (in_bucket(kill_at(at_a_random_moment)), 3),
    "bucket: SIGKILL during a save": (in_bucket(kill_at(buckets.during_a_save)), 4),
    "bucket: SIGKILL four times": (in_bucket(kill_four_times), 1),
    "bucket: SIGTERM or SIGINT": (in_bucket(terminate), 2),
    "bucket: two trainers at once": (in_bucket(train_twice_at_once), 2),
    "bucket: SIGKILL of one of two processes": (in_bucket(kill_a_peer), 2),
    "bucket: shards: errors": (in_bucket(buckets.shards_err), 3),
    "bucket: shards: missing, damaged": (in_bucket(buckets.shard_vanishes), 3),
    "bucket: shards: damaged copies": (in_bucket(buckets.copies_are_damaged), 3),
}
"""Each kind's fault, and how many times it is tried."""
