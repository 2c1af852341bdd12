"""Stack traces of background threads go to a file, of which one line on stderr says where it is."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, logging, sys, threading, warnings
from plt_jax.commands.parser import run_command
from plt_jax.errors import FailedError

class BadEnd:
    def __del__(self):
        raise ValueError("in a destructor")

async def fail():
    raise ValueError("in a task")

async def leave_a_failed_task():
    task = asyncio.ensure_future(fail())
    await asyncio.sleep(0)

def in_a_thread():
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()

def main():
    {}

run_command(main)
"""

SOURCES = {
    "in_a_thread()": "ZeroDivisionError: division by zero",
    "BadEnd()": "ValueError: in a destructor",
    "asyncio.run(leave_a_failed_task())": "ValueError: in a task",
}


def run(body, folder, **variables):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body)],
        env=os.environ | {"TMPDIR": str(folder)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_stack_trace_is_in_the_file_that_a_note_names(tmp_path, source):
    done = run(source, tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    (note,) = done.stderr.splitlines()
    (path,) = tmp_path.iterdir()
    assert note == f"note: something failed in the background; its stack traces are in {path}"
    stored = path.read_text("utf-8")
    assert stored.count("Traceback") == 1 and SOURCES[source] in stored


def test_there_is_one_note_and_one_file_beside_the_error(tmp_path):
    done = run(f"{'; '.join(SOURCES)}; raise FailedError('the disk is full')", tmp_path)
    assert done.returncode == 1
    assert re.fullmatch("note: .*\nerror: the disk is full\n", done.stderr)
    (path,) = tmp_path.iterdir()
    stored = path.read_text("utf-8")
    assert all(error in stored for error in SOURCES.values())


def test_a_command_without_failures_leaves_no_file(tmp_path):
    done = run("print('done')", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", SOURCES)
def test_they_are_shown_where_tracebacks_are_asked_for(tmp_path, source):
    done = run(source, tmp_path, PLT_TRACEBACK="1")
    assert SOURCES[source] in done.stderr and "Traceback" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_place_for_the_file_they_are_dropped(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); "
    done = run(f"{limit}in_a_thread()", tmp_path)
    assert done.stderr == (
        "note: something failed in the background; its stack traces could not be stored\n"
    )
    assert done.returncode == 0


def test_warnings_and_other_logs_are_shown(tmp_path):
    slow = "logging.getLogger('asyncio').warning('slow')"
    done = run(f"warnings.warn('careful'); logging.error('seen'); {slow}", tmp_path)
    assert "careful" in done.stderr and "seen" in done.stderr and "slow" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_file_says_where_it_failed(tmp_path):
    run("in_a_thread(); BadEnd()", tmp_path)
    (path,) = tmp_path.iterdir()
    stored = path.read_text("utf-8")
    assert "in thread Thread-" in stored and "BadEnd.__del__" in stored


def test_a_failure_while_another_is_written_waits_for_it(tmp_path):
    # The path of the file is asked for while the first trace is written.
    body = (
        "import tempfile; plain = tempfile.mkstemp; "
        "tempfile.mkstemp = lambda **names: (BadEnd(), plain(**names))[1]; in_a_thread()"
    )
    done = run(body, tmp_path)
    assert done.returncode == 0
    (path,) = tmp_path.iterdir()
    stored = path.read_text("utf-8")
    assert stored.index("division by zero") < stored.index("in a destructor")


def test_a_disk_that_is_full_behind_the_files_name_is_said(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    done = run(f"{limit}in_a_thread(); in_a_thread()", tmp_path)
    assert done.stderr == (
        "note: something failed in the background; its stack traces could not be stored\n"
    )


@pytest.mark.parametrize("stream", ["sys.stderr = None", "sys.stderr.close()"])
def test_without_stderr_nothing_is_announced_and_one_file_is_made(tmp_path, stream):
    done = run(f"{stream}; in_a_thread(); in_a_thread(); in_a_thread()", tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    (path,) = tmp_path.iterdir()
    assert path.read_text("utf-8").count("division by zero") == 3
