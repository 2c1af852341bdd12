"""Impossible sources and destinations are refused. Interrupted conversions leave nothing behind."""

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import plt_jax.runs.directory
from plt_jax import InputError, save_huggingface
from plt_jax.checkpoint.store import save_params
from tests.interop.damage import (
    CONVERT,
    MODEL,
    assert_command_refused,
    assert_export_refused,
    assert_import_refused,
    write_tokenizer,
)
from tests.models import random_params, small_config
from tests.training.runs import (
    REPOSITORY,
    Result,
    assert_refused,
    command,
    environment,
    snapshot,
)

# Sources and destinations.


def test_a_source_that_does_not_exist_is_refused(tmp_path):
    assert_import_refused(tmp_path / "none", tmp_path / "none")


def test_a_source_that_is_a_file_is_refused(llama):
    assert_import_refused(llama / "config.json", llama / "config.json", "not a folder")


def test_a_source_with_an_impossible_name_is_refused(tmp_path):
    assert_import_refused(tmp_path / ("x" * 300), "x" * 300)


def taken_folder(home):
    (home / "taken").mkdir()
    (home / "taken" / "notes.txt").write_text("mine")
    return home / "taken"


def taken_file(home):
    (home / "file").write_text("mine")
    return home / "file"


def below_a_file(home):
    return taken_file(home) / "new"


def below_a_dangling_link(home):
    (home / "link").symlink_to(home / "nowhere")
    return home / "link" / "new"


def a_dangling_link(home):
    (home / "link").symlink_to(home / "nowhere")
    return home / "link"


def with_a_name_too_long(home):
    return home / ("x" * 300)


def below_a_read_only_folder(home):
    # Root may write below a read-only folder, but not here.
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    return Path("/proc/new")


@pytest.mark.parametrize("name", ["import", "export", "retrofit", "save_huggingface"])
@pytest.mark.parametrize(
    "destination",
    [
        *[taken_folder, taken_file, below_a_file, below_a_dangling_link, a_dangling_link],
        *[with_a_name_too_long, below_a_read_only_folder],
    ],
    ids=lambda destination: destination.__name__,
)
def test_an_impossible_destination_is_refused(llama, dense_run, tmp_path, destination, name):
    path = destination(tmp_path)
    before = snapshot(tmp_path)
    if name == "save_huggingface":
        config = small_config()
        with pytest.raises(InputError) as refusal:
            save_huggingface(path, config, random_params(config))
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    else:
        source = llama if name == "import" else dense_run
        assert_refused(command(CONVERT, name, source, path), str(path))
    assert snapshot(tmp_path) == before


def test_a_tokenizer_that_cannot_be_read_is_refused(llama, tmp_path):
    words = [CONVERT, "import", llama, tmp_path / "new", "--tokenizer"]
    assert_command_refused(tmp_path, [*words, tmp_path / "none"], tmp_path / "none")
    assert_command_refused(tmp_path, [*words, llama / MODEL], llama / MODEL)
    (llama / "tokenizer.json").write_text("{")
    assert_command_refused(tmp_path, words[:-1], llama / "tokenizer.json")


def test_a_tokenizer_with_more_tokens_than_the_embeddings_is_refused(llama, tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    words = [CONVERT, "import", llama, tmp_path / "new", "--tokenizer", path]
    assert_command_refused(tmp_path, words, "67")


# Interruptions.


def failing_after_writing(error):
    """A replacement for save_params that saves the parameters and then raises an error."""

    def save(*arguments):
        save_params(*arguments)
        raise error

    return save


FULL = OSError(28, "No space left on device")


def test_an_import_whose_checkpoint_cannot_be_written_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(plt_jax.runs.directory, "save_params", failing_after_writing(FULL))
    words = [CONVERT, "import", llama, tmp_path / "new"]
    assert_command_refused(tmp_path, words, f"cannot write {tmp_path / 'new'}: No space left")


def test_an_import_into_an_empty_folder_leaves_it_empty(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(plt_jax.runs.directory, "save_params", failing_after_writing(FULL))
    (tmp_path / "empty").mkdir()
    assert_command_refused(tmp_path, [CONVERT, "import", llama, tmp_path / "empty"], "No space")


def test_a_failed_import_takes_the_parents_that_it_made_with_it(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(plt_jax.runs.directory, "save_params", failing_after_writing(FULL))
    words = [CONVERT, "import", llama, tmp_path / "a" / "b" / "new"]
    assert_command_refused(tmp_path, words, "No space left")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interrupted_import_leaves_nothing(llama, tmp_path, monkeypatch, error):
    monkeypatch.setattr(plt_jax.runs.directory, "save_params", failing_after_writing(error()))
    before = snapshot(tmp_path)
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            command(CONVERT, "import", llama, tmp_path / "new")
    else:
        result = command(CONVERT, "import", llama, tmp_path / "new")
        assert result.code == 1
        assert error.__name__ in result.err and len(result.err.splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_a_retrofit_whose_checkpoint_cannot_be_written_leaves_nothing(
    dense_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(plt_jax.runs.directory, "save_params", failing_after_writing(FULL))
    words = [CONVERT, "retrofit", dense_run, tmp_path / "new"]
    assert_command_refused(tmp_path, words, f"cannot write {tmp_path / 'new'}: No space left")


@contextlib.contextmanager
def files_of_at_most(size):
    """Makes writes beyond `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_import_to_a_full_disk_leaves_nothing(llama, tmp_path):
    # The command runs in its own process, because orbax's threads may go on after an error.
    program = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
        f"runpy.run_module('{CONVERT}', run_name='__main__')"
    )
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, "import", str(llama), str(tmp_path / "new")],
        env=environment(JAX_ENABLE_COMPILATION_CACHE="false", PYTHONDONTWRITEBYTECODE="1"),
        **{"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 300},
    )
    assert snapshot(tmp_path) == before
    # Orbax's threads print stack traces before and behind the error; they go to a file.
    lines = done.stderr.splitlines(keepends=True)
    error = "".join(line for line in lines if not line.startswith("note: "))
    assert_refused(Result(done.returncode, done.stdout, error), str(tmp_path / "new"))


def test_an_export_whose_file_cannot_be_written_leaves_nothing(tmp_path):
    config = small_config()
    params = random_params(config)
    with files_of_at_most(4096):
        assert_export_refused(tmp_path, config, params, f"cannot write {tmp_path / 'destination'}")


def test_an_export_whose_later_shard_cannot_be_written_leaves_nothing(tmp_path):
    config = small_config(vocab_size=8)
    params = random_params(config)
    with (
        files_of_at_most(1300),  # the first larger file is a projection after attention
        pytest.raises(InputError, match="cannot write"),
    ):
        save_huggingface(tmp_path / "new", config, params, shard_bytes=1)
    assert snapshot(tmp_path) == {}
