"""Of all processes one may write into a run directory, on a disk and in a bucket."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.faults.bucket_server import Disturbance
from plt_jax import locks
from plt_jax.errors import FailedError, InputError
from plt_jax.files.paths import to_path
from plt_jax.locks import LOCK, LOCK_FILE, BucketLock, FolderLock, lock_of
from plt_jax.runs.resume import make_directory, take_lock


@pytest.fixture
def folder(bucket):
    return to_path(bucket)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(locks, "GONE_SECONDS", 1.5)


def of_another_machine(folder):
    """A lock whose holder, on a machine of its own, has just been switched off."""
    held = {"host": "tpu-0", "process": 7, "machine": "another", "token": "t"}
    (folder / LOCK).write_text(json.dumps(held))


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    assert one.take() and one.take()
    assert not other.take()
    one.release()
    assert other.take()
    assert not list(tmp_path.iterdir())
    assert FolderLock(tmp_path / "missing").take()
    assert isinstance(lock_of(tmp_path), FolderLock)


def without_locks(kinds):
    """A replacement for fcntl.flock on a file system that cannot lock some kinds of files."""
    flock = fcntl.flock

    def lock(file, operation):
        if stat.S_IFMT(os.fstat(file).st_mode) in kinds:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    return lock


def test_where_folders_cannot_be_locked_a_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks([stat.S_IFDIR]))
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    assert one.take() and one.take()
    assert not other.take()
    one.release()
    assert other.take()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    other.release()
    (tmp_path / LOCK_FILE).unlink()
    (tmp_path / LOCK_FILE).symlink_to(tmp_path.parent / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        one.take()


def test_a_run_begins_in_a_new_folder_where_a_file_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks([stat.S_IFDIR]))
    folder = tmp_path / "run"
    lock = FolderLock(folder)
    take_lock(lock, folder)  # nobody can have begun a run there
    make_directory(folder, lock)
    assert lock.is_held and (folder / LOCK_FILE).stat().st_mode & 0o111 == 0
    with pytest.raises(InputError, match="another process trains in --run_dir"):
        take_lock(FolderLock(folder), folder)


def test_where_nothing_can_be_locked_everyone_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks([stat.S_IFDIR, stat.S_IFREG]))
    assert FolderLock(tmp_path).take() and FolderLock(tmp_path).take()


def test_a_disk_that_does_not_answer_is_no_disk_without_locks(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(InputError, match=r"cannot open --run_dir .*: Input/output error"):
        take_lock(FolderLock(tmp_path), tmp_path)


def test_a_bucket_has_one_writer_at_a_time(folder, hurried):
    one, other = lock_of(folder), lock_of(folder)
    assert isinstance(one, BucketLock)
    assert one.take() and one.take() and one.is_held
    time.sleep(1)  # some beats
    assert not other.take() and not other.is_held
    assert other.holder().startswith(f"process {os.getpid()} on ")
    other.release()
    one.renew()
    one.check()
    one.release()
    assert not (folder / LOCK).exists()
    assert other.holder() == "another process"
    again = lock_of(folder)
    assert again.take()
    again.release()


def test_of_processes_that_start_at_once_one_trains(folder, hurried):
    taken = []
    contenders = [lock_of(folder) for _ in range(4)]
    threads = [threading.Thread(target=lambda c=c: taken.append(c.take())) for c in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False, False, False, True]
    for contender in contenders:
        contender.release()


def test_the_lock_of_a_killed_process_of_this_machine_is_free_at_once(folder, bucket_server):
    code = (
        "import sys, time; from plt_jax.locks import lock_of; "
        "from plt_jax.files.paths import to_path; "
        "print(lock_of(to_path(sys.argv[1])).take(), flush=True); time.sleep(100)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, **bucket_server.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "True\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    lock, start = lock_of(folder), time.monotonic()
    assert lock.take()
    assert time.monotonic() - start < locks.GONE_SECONDS / 2
    lock.release()


def test_the_lock_of_a_machine_that_is_gone_is_free_after_a_while(folder, hurried, capsys):
    of_another_machine(folder)
    lock, start = lock_of(folder), time.monotonic()
    assert lock.take()
    assert time.monotonic() - start > locks.GONE_SECONDS
    assert (
        "waiting up to 1.5 s for a sign of its holder, process 7 on tpu-0"
        in capsys.readouterr().out
    )
    lock.release()


def test_take_over_does_not_wait_and_the_first_holder_stops(folder, hurried):
    one = lock_of(folder)
    assert one.take()
    other = lock_of(folder, take_over=True)
    assert other.take()
    with pytest.raises(FailedError, match=r"process \d+ on .* has taken over gs://runs/"):
        one.renew()
    with pytest.raises(FailedError, match="has taken over"):
        one.check()
    one.release()
    assert (folder / LOCK).exists(), "the lock is another's now"
    other.renew()
    other.release()


def test_a_holder_learns_from_its_beat_that_it_was_taken_over(folder, hurried):
    one = lock_of(folder)
    assert one.take()
    of_another_machine(folder)
    time.sleep(2)
    with pytest.raises(FailedError, match="process 7 on tpu-0 has taken over"):
        one.check()
    one.release()


def test_a_write_whose_answer_is_lost_does_not_lose_the_lock(folder, bucket_server, hurried):
    lock = lock_of(folder)
    left = [2]

    def disturb(request):
        if request.method == "POST" and left[0]:
            left[0] -= 1
            return Disturbance(lost=True)
        return None

    bucket_server.disturb = disturb
    assert lock.take()
    left[0] = 1
    lock.renew()
    assert not left[0]
    lock.release()


@pytest.mark.parametrize("content", ["{", '{"host": 5, "process": "x", "machine": []}'])
def test_a_lock_that_says_nothing_is_waited_for(folder, hurried, content):
    (folder / LOCK).write_text(content)
    lock = lock_of(folder)
    assert lock.take()
    lock.release()
