"""Paths in buckets do what paths of a disk do, in one service and under its failures."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from benchmarks.faults.bucket_server import Disturbance
from plt_jax.buckets import service
from plt_jax.buckets.service import check_bucket, generation_of, write_generation
from plt_jax.errors import InputError
from plt_jax.files.folders import check_new_folder, copy_file, new_folder, remove_tree
from plt_jax.files.paths import check_writable, file_state, files_in, states_below, to_path
from plt_jax.files.reading import read_json
from plt_jax.files.writing import replaced_file, write_new, write_pieces, write_synced, write_text


@pytest.fixture
def folder(bucket):
    return to_path(bucket)


@pytest.fixture
def hurried(monkeypatch):
    """Calls that are not answered are given up within seconds."""
    monkeypatch.setattr(service, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv(service.PATIENCE, "3")


def test_a_folder_of_a_bucket_is_like_one_of_a_disk(folder, tmp_path):
    for root in (folder, tmp_path / "run"):
        assert not root.exists() and not root.is_dir()
        (root / "a" / "b").mkdir(parents=True, exist_ok=True)
        write_text(root / "config.json", '{"x": 1}')
        write_pieces(root / "a" / "rows", ["é\n", "2\n"])
        write_synced(root / "a" / "b" / "deep", "3")
        assert read_json(root / "config.json") == {"x": 1}
        assert root.is_dir() and (root / "a").exists() and not (root / "a").is_file()
        assert (root / "a" / "rows").is_file() and not (root / "a" / "rows").is_dir()
        assert (root / "a" / "rows").read_text(encoding="utf-8") == "é\n2\n"
        assert (root / "a" / "rows").stat().st_size == 5
        assert sorted(path.name for path in root.iterdir()) == ["a", "config.json"]
        assert [path.name for path in root.glob("conf*")] == ["config.json"]
        assert files_in(root) == ["a/b/deep", "a/rows", "config.json"]
        with (root / "a" / "rows").open("rb") as file:
            assert file.readline(100) == "é\n".encode() and file.read() == b"2\n"
        with (root / "a" / "rows").open("rb") as file:
            assert file.seek(3) == 3 and file.read() == b"2\n"
            assert (
                file.seek(-5, os.SEEK_END) == 0 and file.tell() == 0 and file.read(2) == b"\xc3\xa9"
            )
        states = states_below(root)
        assert {name: size for name, (size, _) in states.items()} == {
            "a/b/deep": 1,
            "a/rows": 5,
            "config.json": 8,
        }
        assert states["a/rows"] == file_state(root / "a" / "rows")
        write_text(root / "a" / "rows", "é\n3\n")
        assert states_below(root)["a/rows"].version != states["a/rows"].version
        assert not write_new(root / "config.json", "{}")
        assert read_json(root / "config.json") == {"x": 1}
        check_writable(root)
        (root / "a").rename(root / "c")
        assert files_in(root) == ["c/b/deep", "c/rows", "config.json"]
        (root / "config.json").unlink()
        (root / "config.json").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError) as raised:
            (root / "config.json").read_bytes()
        assert raised.value.strerror == "No such file or directory"
        remove_tree(root)
        assert not root.exists()


def test_files_of_any_size_come_and_go_whole(folder, tmp_path):
    content = os.urandom(5_000_001)  # more than one block of a reader
    (tmp_path / "large").write_bytes(content)
    copy_file(tmp_path / "large", folder / "large")
    with (folder / "large").open("rb") as file:
        assert file.read(10) == content[:10]
        assert file.read() == content[10:]
    copy_file(folder / "large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_what_another_process_writes_is_seen(bucket, bucket_server):
    """From the first look at a bucket on, in a process that has not listed one before."""
    code = (
        "import sys; from plt_jax.files.paths import to_path; path = to_path(sys.argv[1])\n"
        "for _ in sys.stdin: print(path.exists() and [one.name for one in path.iterdir()])\n"
    )
    seen = []
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, bucket],
        env={**os.environ, **bucket_server.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        for name in ("one", "two", None):
            reader.stdin.write("look\n")
            reader.stdin.flush()
            seen.append(reader.stdout.readline().strip())
            if name is not None:
                target = "/upload/storage/v1/b/runs/o?uploadType=media&name="
                inside = f"{bucket.removeprefix('gs://runs/')}/{name}"
                assert bucket_server.call("POST", target + inside, b"hello")[0] == 200
        reader.stdin.close()
    assert seen == ["False", "['one']", "['one', 'two']"]


def test_a_writer_that_fails_leaves_the_old_object(folder):
    write_text(folder / "a", "old")
    with pytest.raises(ZeroDivisionError), replaced_file(folder / "a") as file:
        file.write(b"%d" % (1 // 0))
    assert (folder / "a").read_text() == "old"
    with pytest.raises(ZeroDivisionError), new_folder(folder / "new") as made:
        [write_text(made / str(10 // n), "x") for n in (1, 0)]
    assert files_in(folder) == ["a"]
    with pytest.raises(InputError, match=f"{folder} is not empty"):
        check_new_folder(folder)


@pytest.mark.parametrize("path", ["gs://", "gs:///run", "gs://runs/../other", "gs://runs/a/./b"])
def test_an_impossible_address_is_refused(path):
    with pytest.raises(InputError, match="is not gs://BUCKET/PATH"):
        to_path(path)


def test_an_address_has_one_spelling(bucket):
    assert str(to_path(f"{bucket}//a/")) == f"{bucket}/a"
    assert str(to_path(bucket) / "a" / "../b") != f"{bucket}/b"  # names of objects are plain text
    assert to_path(bucket).absolute() == to_path(bucket) == to_path(bucket).resolve()


@pytest.mark.parametrize("path", ["s3://runs/a", "hdfs://x", "az://a/b", "file:///tmp"])
def test_other_schemes_are_refused_by_name(path):
    with pytest.raises(InputError, match=f"{path.split(':')[0]}:// is not supported"):
        to_path(path)


def test_a_bucket_that_does_not_exist_is_named(bucket_server):
    with pytest.raises(InputError, match=r"there is no bucket gs://nowhere; make it"):
        check_bucket(to_path("gs://nowhere/run"))


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "no credentials of Google Cloud are found"), (403, "the account has no right to do")],
)
def test_missing_rights_are_one_line_at_once(folder, bucket_server, status, message):
    bucket_server.disturb = lambda _: Disturbance(status=status)
    with pytest.raises(InputError, match=message):
        check_bucket(folder)
    for call in (
        lambda: write_text(folder / "a", "x"),
        lambda: write_generation(folder / "a", "x", 0),
    ):
        with pytest.raises((InputError, PermissionError), match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "disturbance",
    [
        Disturbance(status=429),
        Disturbance(status=503),
        Disturbance(dropped=True),
        Disturbance(lost=True),
    ],
    ids=["429", "503", "dropped", "lost"],
)
def test_a_call_that_is_not_answered_is_repeated(folder, bucket_server, hurried, disturbance):
    write_text(folder / "a", "before")
    left = dict.fromkeys(["GET", "POST", "DELETE"], 1)

    def disturb(request):
        left[request.method] -= 1
        return disturbance if left[request.method] >= 0 else None

    bucket_server.disturb = disturb
    write_text(folder / "a", "after")
    assert (folder / "a").read_text() == "after"
    assert generation_of(folder / "a") > 0
    (folder / "a").unlink(missing_ok=True)
    assert not (folder / "a").exists()
    assert max(left.values()) < 0


@pytest.mark.slow(reason="waits for the end of gcsfs's own attempts")
def test_a_bucket_that_never_answers_is_given_up(folder, bucket_server, hurried):
    bucket_server.disturb = lambda _: Disturbance(status=503)
    with pytest.raises(InputError, match="cannot read gs://runs: the bucket does not answer"):
        check_bucket(folder)


def test_of_writers_at_once_one_succeeds(folder):
    results = []
    barrier = threading.Barrier(4)

    def write(number):
        barrier.wait()
        results.append(write_generation(folder / "lock", json.dumps(number), 0))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [result for result in results if result]
    assert len(winners) == 1 and generation_of(folder / "lock") == winners[0]
    assert write_generation(folder / "lock", "x", winners[0] + 1) is None
    assert write_generation(folder / "lock", "x", winners[0]) > winners[0]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"pip install 'plt_jax\[gcs\]'"):
        service.prepare_packages.__wrapped__()


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_of_several_that_write_a_new_file_one_succeeds(folder, tmp_path, where):
    path = (folder if where == "bucket" else tmp_path) / "plan.json"
    results = {}

    def write(number: int) -> None:
        results[number] = write_new(path, str(number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results.values()) == [False, False, False, True]
    assert results[int(path.read_text())]
    assert files_in(path.parent) == ["plan.json"]


def test_objects_that_stand_for_folders_are_no_files(folder, monkeypatch):
    """Consoles make them; the emulator does not."""
    inside = str(folder).removeprefix("gs://")
    about = {"size": "3", "generation": "7"}
    names = ("", "/", "/deep/", "/deep.txt/", "/deep/a.txt")

    class Listing:
        def find(self, _, detail=False):
            found = {inside + name: about for name in names}
            return found if detail else list(found)

    monkeypatch.setattr("plt_jax.buckets.path.file_system", Listing)
    assert states_below(folder) == {"deep/a.txt": (3, 7)}
    assert [path.name for path in folder.rglob("*.txt")] == ["a.txt"]


def test_new_files_are_whole_on_file_systems_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    assert write_new(tmp_path / "plan.json", "1")
    assert not write_new(tmp_path / "plan.json", "2")
    assert (tmp_path / "plan.json").read_text() == "1"
    assert files_in(tmp_path) == ["plan.json"]
