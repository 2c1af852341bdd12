"""Names of cached files, and how they are written."""

import pytest

from plt_jax.data.cache import cache_folder, fingerprint, write_atomically
from plt_jax.errors import InputError


def test_fingerprint_tells_parts_and_order_apart():
    lists = [[], [""], ["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""]]
    names = [fingerprint(parts) for parts in lists]
    assert len(set(names)) == len(lists)
    assert names == [fingerprint(parts) for parts in lists]


def test_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("~/a/b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to the cache folder .*data\.cache_dir"):
        cache_folder(str(tmp_path / "file" / "cache"))


def test_the_home_folder_of_nobody_is_refused_by_the_field():
    with pytest.raises(InputError, match=r"data\.cache_dir: ~nobody-is-called-so begins with the"):
        cache_folder("~nobody-is-called-so")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device.*data\.cache_dir"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_readers_never_see_an_unfinished_file(tmp_path):
    path = tmp_path / "file"

    def write(file):
        file.write(b"half")
        assert not path.exists()
        write_atomically(path, lambda other: other.write(b"another writer's"))
        file.write(b" and half")

    write_atomically(path, write)
    assert path.read_bytes() == b"half and half"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
