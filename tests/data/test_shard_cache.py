"""Shards of corpora in buckets: the cache gives what the bucket has, within its bound."""

import collections
import contextlib
import errno
import fcntl
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults.bucket_server import Disturbance
from plt_jax.config.data import DataConfig
from plt_jax.data.shard_cache import FETCHES, LEAST_SHARDS, CachedShard, ShardCache
from plt_jax.data.tokenized_corpus import open_tokenized_corpus
from plt_jax.errors import FailedError, InputError
from plt_jax.files.paths import to_path
from plt_jax.files.writing import UNFINISHED
from tests.data.corpora import damage, upload


@pytest.fixture
def far(corpus, bucket):
    """The corpus in a bucket, opened on its disk, where it may be found."""
    upload(corpus, to_path(bucket))
    return open_tokenized_corpus(corpus)._replace(folder=to_path(bucket))


def cached(far, cache: ShardCache) -> list[CachedShard]:
    dtype = np.dtype(f"<u{far.manifest.token_bytes}")
    return [cache.open(far.folder / shard.name, shard, dtype) for shard in far.manifest.shards]


def tokens_on_disk(corpus: Path) -> list[np.ndarray]:
    opened = open_tokenized_corpus(corpus)
    streams = {split: opened.stream(split) for split in ("training", "validation")}
    begin = dict.fromkeys(streams, 0)
    found = []
    for shard in opened.manifest.shards:
        found.append(streams[shard.split].read(begin[shard.split], shard.tokens)[0])
        begin[shard.split] += shard.tokens
    return found


def files(cache: ShardCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if path.name != ".lock"]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def fetches(bucket_server, far) -> collections.Counter:
    """How often each shard has been asked for."""
    inside = str(far.folder).removeprefix("gs://runs/")
    return collections.Counter(
        request.name.removeprefix(f"{inside}/")
        for request in bucket_server.requests
        if request.method == "GET"
        and request.name.startswith(inside)
        and request.name.endswith(".array_record")
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_small_cache_gives_every_span_and_stays_within_its_bound(corpus, far, tmp_path, seed):
    largest = max(shard.size for shard in far.manifest.shards)
    cache = ShardCache(tmp_path / "shards", 3 * largest)
    shards, expected = cached(far, cache), tokens_on_disk(corpus)
    draw = random.Random(seed)
    for _ in range(60):
        index = draw.randrange(len(shards))
        begin = draw.randrange(len(shards[index]))
        tokens, _ = shards[index].read(begin, 50)
        assert np.array_equal(tokens, expected[index][begin : begin + 50])
        assert bytes_in(cache.folder) <= cache.most_bytes
        assert {path.suffix for path in files(cache)} == {".array_record"}
    assert open_but_removed(cache.folder) == []


def open_but_removed(folder: Path) -> list[str]:
    """The files of a folder that this process has open though they have been removed."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the list itself was open
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return [link for link in links if link.startswith(str(folder)) and link.endswith("(deleted)")]


def test_the_shards_unused_for_longest_make_room(far, tmp_path):
    three = far.manifest.shards[:3]
    cache = ShardCache(tmp_path / "shards", three[0].size + three[2].size + 10)
    for number in (0, 1):
        cache.request(far.folder / three[number].name, three[number]).result()
        os.utime(cache.path_of(three[number]), ns=(number, number))
    cache.request(far.folder / three[0].name, three[0]).result()  # which uses it again
    cache.request(far.folder / three[2].name, three[2]).result()
    assert [cache.path_of(shard).exists() for shard in three] == [True, False, True]


def test_several_processes_fetch_a_shard_once(bucket_server, corpus, far, tmp_path):
    """As many caches stand for as many processes: what they share is the folder."""
    bucket_server.disturb = lambda _: Disturbance(delay=0.02)
    caches = [ShardCache(tmp_path / "shards", 10**9) for _ in range(3)]
    expected, found = tokens_on_disk(corpus), {}

    def read(number: int) -> None:
        shards = cached(far, caches[number])
        for index in random.Random(number).sample(range(len(shards)), len(shards)):
            found[number, index] = shards[index].read(0, 10**6)[0]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 * len(expected)
    for (_, index), tokens in found.items():
        assert np.array_equal(tokens, expected[index])
    times = fetches(bucket_server, far)
    assert set(times.values()) == {1}
    assert len(times) == len(expected)


def test_a_shard_that_is_finished_while_its_file_is_opened_is_not_fetched_again(
    bucket_server, far, tmp_path, monkeypatch
):
    (shard, *_) = far.manifest.shards
    ShardCache(tmp_path / "shards", 10**9).request(far.folder / shard.name, shard).result()
    late, looks, touch = ShardCache(tmp_path / "shards", 10**9), [], ShardCache._touch

    def look(cache, path, shard):
        looks.append(path)
        return len(looks) > 1 and touch(cache, path, shard)  # at first it was not there yet

    monkeypatch.setattr(ShardCache, "_touch", look)
    assert late._fetch(far.folder / shard.name, shard) == late.path_of(shard)
    assert set(fetches(bucket_server, far).values()) == {1}
    assert not list((tmp_path / "shards").glob("*.unfinished"))


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_a_damaged_copy_is_fetched_again(corpus, far, tmp_path, kind):
    cache, expected = ShardCache(tmp_path / "shards", 10**9), tokens_on_disk(corpus)
    (first, *_), (shard, *_) = cached(far, cache), far.manifest.shards
    cache.request(far.folder / shard.name, shard).result()
    damage(cache.path_of(shard), kind)
    assert np.array_equal(first.read(0, 10**6)[0], expected[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is missing; bring it back"),
        ("truncated", "is damaged (it has "),
        ("flipped", "is damaged (its SHA-256 is not the manifest's)"),
    ],
)
def test_a_damaged_object_is_refused_by_name(far, tmp_path, kind, message):
    cache, (shard, *_) = ShardCache(tmp_path / "shards", 10**9), far.manifest.shards
    damage(far.folder / shard.name, kind)
    with pytest.raises(InputError) as refused:
        cached(far, cache)[0].read(0, 5)
    assert str(far.folder / shard.name) in str(refused.value)
    assert message in str(refused.value)
    assert not files(cache)


def test_a_killed_fetch_is_begun_again(corpus, far, tmp_path):
    cache, (shard, *_) = ShardCache(tmp_path / "shards", 10**9), far.manifest.shards
    cache.folder.mkdir()
    (cache.folder / f".{shard.sha256}{UNFINISHED}").write_bytes(b"half" * shard.size)
    assert np.array_equal(cached(far, cache)[0].read(0, 10**6)[0], tokens_on_disk(corpus)[0])
    assert [path.name for path in files(cache)] == [cache.path_of(shard).name]


def test_what_killed_processes_have_left_makes_room_but_not_what_is_on_its_way(far, tmp_path):
    shard, other = far.manifest.shards[:2]
    cache = ShardCache(tmp_path / "shards", shard.size + 100)
    cache.folder.mkdir()
    left, coming = (cache.folder / f".{name}{UNFINISHED}" for name in ("left", other.sha256))
    left.write_bytes(b"x" * 90)
    coming.write_bytes(b"x" * 90)
    os.utime(coming, ns=(1, 1))  # its turn comes first
    with open(coming, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process that fetches it has
        cache.request(far.folder / shard.name, shard).result()
        assert (left.exists(), coming.exists()) == (False, True)


def test_errors_that_pass_are_not_noticed_and_others_are_one_line(
    bucket_server, corpus, far, tmp_path, monkeypatch
):
    answers = iter([Disturbance(status=503), Disturbance(dropped=True)])
    bucket_server.disturb = lambda request: next(answers, None)
    cache = ShardCache(tmp_path / "shards", 10**9)
    assert np.array_equal(cached(far, cache)[0].read(0, 10**6)[0], tokens_on_disk(corpus)[0])
    bucket_server.disturb = lambda _: Disturbance(status=403)
    monkeypatch.setenv("PLT_BUCKET_PATIENCE", "0")
    with pytest.raises(FailedError, match=r"cannot fetch the shard gs://.*has no right to do this"):
        cached(far, cache)[1].read(0, 5)
    bucket_server.disturb = lambda _: None
    with pytest.raises(FailedError, match="cannot fetch the shard"):
        cached(far, cache)[2].read(0, 5)  # at once: reads that are queued must not wait, too
    monkeypatch.setattr("plt_jax.data.shard_cache._FAILED_SECONDS", 0)
    assert len(cached(far, cache)[1].read(0, 5)[0]) == 5


def test_a_request_comes_before_its_reading(bucket_server, far, tmp_path):
    cache = ShardCache(tmp_path / "shards", 10**9)
    shards = far.manifest.shards[:FETCHES]
    coming = [cache.request(far.folder / shard.name, shard) for shard in shards]
    for request in coming:
        request.result()
    asked = fetches(bucket_server, far)
    for shard in cached(far, cache)[: len(shards)]:
        shard.read(0, 5)
    assert fetches(bucket_server, far) == asked
    assert len(asked) == len(shards)


def test_a_missing_shard_is_asked_for_once(bucket_server, far, tmp_path):
    shard = far.manifest.shards[0]
    (far.folder / shard.name).unlink()
    with pytest.raises(InputError, match="is missing; bring it back"):
        cached(far, ShardCache(tmp_path / "shards", 10**9))[0].read(0, 5)
    assert fetches(bucket_server, far)[shard.name] == 1


def test_many_processes_stay_within_the_bound_together(corpus, far, tmp_path):
    """Each has more on its way than has room."""
    largest = max(shard.size for shard in far.manifest.shards)
    caches = [ShardCache(tmp_path / "shards", 2 * largest) for _ in range(4)]
    expected, most, ended = tokens_on_disk(corpus), [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            with (
                contextlib.suppress(FileNotFoundError),
                open(tmp_path / "shards" / ".lock") as lock,
            ):
                fcntl.flock(lock, fcntl.LOCK_EX)  # nobody makes room while it counts
                most.append(bytes_in(tmp_path / "shards"))

    found: dict[tuple[int, int], np.ndarray] = {}

    def read(number: int) -> None:
        shards = cached(far, caches[number])
        for index in random.Random(number).sample(range(len(shards)), 6):
            found[number, index] = shards[index].read(0, 10**6)[0]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    watcher = threading.Thread(target=watch)
    for thread in (*threads, watcher):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    watcher.join()
    assert len(found) == 4 * 6
    for (_, index), tokens in found.items():
        assert np.array_equal(tokens, expected[index])
    assert largest < max(most) <= 2 * largest


def test_file_systems_without_locks_are_used_all_the_same(corpus, far, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    most = 3 * LEAST_SHARDS * far.manifest.shards[0].size
    expected, found = tokens_on_disk(corpus), []

    def read(number: int) -> None:
        shards = cached(far, ShardCache(tmp_path / "shards", most))
        for index in random.Random(0).choices(range(len(shards)), k=20):  # all the same
            found.append((index, shards[index].read(0, 10**6)[0]))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 * 20
    for index, tokens in found:
        assert np.array_equal(tokens, expected[index])


def test_a_cache_that_cannot_be_written_is_one_line(bucket, far, tmp_path):
    (tmp_path / "shards").write_text("a file")
    with pytest.raises(InputError, match=r"data\.cache_dir .* cannot keep shards \("):
        open_tokenized_corpus(bucket, DataConfig(cache_dir=str(tmp_path)))
    with pytest.raises(FailedError, match=r"cannot use the cache of shards .*shards \("):
        cached(far, ShardCache(tmp_path / "shards", 10**9))[0].read(0, 5)


def test_room_is_checked_before_any_work(bucket, far, tmp_path, monkeypatch):
    largest = max(shard.size for shard in far.manifest.shards)
    values = {"cache_dir": str(tmp_path), "cache_gb": (LEAST_SHARDS * largest - 1) / 1e9}
    with pytest.raises(InputError, match=r"data\.cache_gb is .* raise it to"):
        open_tokenized_corpus(bucket, DataConfig(**values))
    values["cache_gb"] = LEAST_SHARDS * largest / 1e9
    assert open_tokenized_corpus(bucket, DataConfig(**values)).fingerprint == far.fingerprint
    monkeypatch.setattr("shutil.disk_usage", lambda _: collections.namedtuple("F", "free")(1000))
    with pytest.raises(InputError, match=r"data\.cache_dir .* has 1e-06 GB left, but"):
        open_tokenized_corpus(bucket, DataConfig(**values))
