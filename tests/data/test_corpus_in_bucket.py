"""Tokenized corpora in buckets: written, checked and read there as on a disk."""

import bz2
import gzip
import json
import threading
import time
from urllib.parse import quote

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from benchmarks.faults.bucket_server import Disturbance
from plt_jax.commands import prepare
from plt_jax.config.data import DataConfig
from plt_jax.data import corpus_writer
from plt_jax.data.corpus_writer import Part
from plt_jax.data.documents import read_piece, split_files
from plt_jax.data.input_files import find_files
from plt_jax.data.tokenized_corpus import MANIFEST, find_problems, open_tokenized_corpus
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.errors import InputError
from plt_jax.files.paths import files_in, to_path
from tests.data.corpora import OPTIONS, damage, make, same_corpus, stop_at, upload
from tests.training.runs import assert_refused, command


def test_it_is_the_corpus_of_a_disk(bucket, corpus, lines, tokenizer, tmp_path):
    make(lines, bucket, tokenizer)
    assert files_in(to_path(bucket)) == [
        name for name in files_in(corpus) if not name.endswith(".lock")
    ]
    assert find_problems(to_path(bucket)) == []
    far = open_tokenized_corpus(bucket, DataConfig(cache_dir=str(tmp_path)))
    near = open_tokenized_corpus(corpus)
    assert far.fingerprint == near.fingerprint
    assert far.tokenizer.identity == tokenizer.identity
    for split in ("training", "validation"):
        read, expected = far.stream(split).read(0, 10**6), near.stream(split).read(0, 10**6)
        assert all(map(np.array_equal, read, expected))


def test_validation_shards_are_requested_one_ahead(bucket, corpus, tmp_path):
    """They are read in their order."""
    upload(corpus, to_path(bucket))
    far = open_tokenized_corpus(bucket, DataConfig(cache_dir=str(tmp_path)))
    assert far.cache is not None
    far.stream("validation").read(0, 5)
    first, second, third = (far.cache.path_of(shard) for shard in far.shards("validation")[:3])
    deadline = time.monotonic() + 60
    while not second.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (first.exists(), second.exists(), third.exists()) == (True, True, False)


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_damage_is_found_named_and_mended(bucket, corpus, lines, tokenizer, kind):
    make(lines, bucket, tokenizer)
    path = to_path(bucket) / "training-00001.array_record"
    damage(path, kind)
    (problem,) = find_problems(to_path(bucket))
    assert str(path) in problem
    if kind != "flipped":  # shards are too large to hash at every start
        with pytest.raises(InputError, match=path.name):
            open_tokenized_corpus(bucket)
    path.unlink(missing_ok=True)
    make(lines, bucket, tokenizer)
    assert find_problems(to_path(bucket)) == []
    assert same_corpus(bucket, corpus)


def test_what_is_finished_is_not_made_again(bucket_server, bucket, corpus, lines, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        make(lines, bucket, tokenizer, advance=stop_at(3))
    with pytest.raises(InputError, match="is not a tokenized corpus, or is not finished"):
        open_tokenized_corpus(bucket)
    shards = [name for name in files_in(to_path(bucket)) if name.endswith(".array_record")]
    before = len(bucket_server.requests)
    make(lines, bucket, tokenizer)
    assert same_corpus(bucket, corpus)
    again = bucket_server.requests[before:]
    written = {request.name.split("/")[-1] for request in again if request.method != "GET"}
    assert written.isdisjoint(shards)


def test_several_processes_make_the_same(bucket, corpus, lines, tokenizer):
    make(lines, bucket, tokenizer, workers=2)
    assert same_corpus(bucket, corpus)


def test_errors_that_pass_are_not_noticed(bucket_server, bucket, corpus, lines, tokenizer):
    count = iter(range(10**6))
    kinds = (Disturbance(status=503), Disturbance(status=429), Disturbance(lost=True))

    def disturb(request):
        number = next(count)
        return kinds[number // 30 % 3] if number % 30 == 0 else None

    bucket_server.disturb = disturb
    make(lines, bucket, tokenizer)
    bucket_server.disturb = lambda _: None
    assert find_problems(to_path(bucket)) == []
    assert same_corpus(bucket, corpus)


@pytest.fixture(params=["disk", "bucket"])
def out(request, tmp_path):
    """Where a corpus may be written: on a disk, or in a bucket."""
    return str(tmp_path / "made") if request.param == "disk" else request.getfixturevalue("bucket")


def test_parts_in_any_order_make_the_corpus(out, corpus, lines, tokenizer):
    for number in (3, 1):
        left = make(lines, out, tokenizer, part=Part(number, 3))
        assert isinstance(left, int)
        assert left > 0
        assert MANIFEST not in files_in(to_path(out))
    assert not isinstance(make(lines, out, tokenizer, part=Part(2, 3)), int)
    assert same_corpus(out, corpus)
    assert find_problems(to_path(out)) == []


def test_parts_at_the_same_time_make_the_corpus(out, corpus, lines, tokenizer):
    results = {}

    def write(number: int) -> None:
        results[number] = make(lines, out, tokenizer, part=Part(number, 3))

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert any(not isinstance(result, int) for result in results.values())
    assert same_corpus(out, corpus)


def test_parts_that_do_not_fit_together_are_refused(out, lines, tokenizer, monkeypatch):
    monkeypatch.setattr("plt_jax.locks.BEAT_SECONDS", 0.2)

    def start_the_same(unit, done):
        if unit.index:
            return
        with pytest.raises(InputError, match="another process is writing part 1 of 3 of --out"):
            make(lines, out, tokenizer, part=Part(1, 3))

    make(lines, out, tokenizer, part=Part(1, 3), advance=start_the_same)
    with pytest.raises(InputError, match=r"was made with other parts \(3 there, 2 here\)"):
        make(lines, out, tokenizer, part=Part(2, 2))
    with pytest.raises(InputError, match=r"was made with other parts \(3 there, 1 here\)"):
        make(lines, out, tokenizer)
    with pytest.raises(InputError, match="other shard_bytes"):
        make(lines, out, tokenizer, OPTIONS._replace(shard_bytes=10), part=Part(2, 3))


def test_a_corpus_of_an_earlier_version_is_of_one_part(out, lines, tokenizer):
    make(lines, out, tokenizer)
    plan = to_path(out) / "parts" / "plan.json"
    values = json.loads(plan.read_text())
    assert values.pop("parts") == 1
    plan.write_text(json.dumps(values))
    assert not isinstance(make(lines, out, tokenizer), int)
    with pytest.raises(InputError, match=r"was made with other parts \(1 there, 2 here\)"):
        make(lines, out, tokenizer, part=Part(1, 2))


def test_a_part_waits_for_the_tokenizer_of_the_first(out, lines, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "WAIT_SECONDS", 0.05)
    words = [lines, "--out", out, "--vocab_size", 300, "--validation_fraction", 0.3, "--of", 2]
    second = threading.Thread(target=lambda: found.append(run(*words, "--part", 2)))
    found = []
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert run(*words, "--part", 1).code == 0
    second.join()
    (result,) = found
    assert result.code == 0
    assert open_tokenized_corpus(out).tokenizer.library.get_vocab_size() <= 300


def run(*words):
    return command("plt_jax.data.prepare", *words, "--workers", "1")


@pytest.mark.parametrize(("part", "of"), [(0, 2), (3, 2), (2, 1), (1, 0)])
def test_an_impossible_part_is_refused(lines, tmp_path, part, of):
    words = [lines, "--out", tmp_path / "made", "--vocab_size", 300]
    assert_refused(run(*words, "--part", part, "--of", of), f"--part {part} --of {of}: ")


def test_inputs_in_a_bucket_are_those_of_a_disk(bucket, texts, tokenizer, tmp_path):
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(rows[:20]))
    (source / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[20:24]).encode()))
    (source / "c.txt.bz2").write_bytes(bz2.compress(texts[24].encode()))
    (source / "d.txt").write_text(texts[25])
    (source / "notes.md").write_text("none")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[26:30]}), source / "e.parquet")
    with pyarrow.CompressedOutputStream(str(source / "f.jsonl.zst"), "zstd") as file:
        file.write("".join(rows[30:]).encode())
    upload(source, to_path(bucket) / "texts")
    make(source, tmp_path / "near", tokenizer)
    make(f"{bucket}/texts", f"{bucket}/far", tokenizer)
    assert same_corpus(tmp_path / "near", f"{bucket}/far")
    make(f"{bucket}/texts/e.parquet", tmp_path / "one", tokenizer)
    (to_path(bucket) / "texts" / "d.txt").write_text(texts[25])  # a new generation of the object
    with pytest.raises(InputError, match="was made with other files"):
        make(f"{bucket}/texts", f"{bucket}/far", tokenizer)
    with pytest.raises(InputError, match="there is no file or folder gs://"):
        make(f"{bucket}/nothing", f"{bucket}/far", tokenizer)


def test_the_commands_prepare_and_verify(bucket, lines):
    upload(lines, to_path(bucket) / "lines")
    words = [f"{bucket}/lines", "--out", f"{bucket}/made", "--vocab_size", 300]
    result = run(*words, "--validation_fraction", 0.3)
    assert result.code == 0, result.err
    assert f"the corpus is in {bucket}/made" in result.out
    verified = command("plt_jax.data.verify", f"{bucket}/made")
    assert (verified.code, verified.err) == (0, "")
    damage(to_path(bucket) / "made" / "training-00000.array_record", "flipped")
    verified = command("plt_jax.data.verify", f"{bucket}/made")
    assert verified.code == 1
    assert verified.err.startswith(f"{bucket}/made/training-00000.array_record is damaged")


def test_what_cannot_work_is_refused_in_a_line(bucket_server, bucket, lines, tmp_path):
    nowhere = "gs://nowhere/made"
    words = ["--vocab_size", 300]
    assert_refused(run(lines, "--out", nowhere, *words), "there is no bucket gs://nowhere")
    assert_refused(run(nowhere, "--out", tmp_path / "made", *words), "there is no bucket")
    assert_refused(command("plt_jax.data.verify", nowhere), "there is no bucket gs://nowhere")
    assert_refused(command("plt_jax.data.verify", bucket), "is not a tokenized corpus")
    bucket_server.disturb = lambda request: (
        Disturbance(status=403) if request.method == "POST" else None
    )
    result = run(lines, "--out", bucket, *words)
    assert_refused(result, f"cannot write to {bucket}: the account has no right")
    assert "training a tokenizer" not in result.out


@pytest.mark.parametrize("name", ["dd//tmp/secret.txt", "dd/a//b.txt", "dd/./b.txt"])
def test_objects_with_names_that_no_file_has_are_refused(bucket_server, bucket, tokenizer, name):
    """Their parts would lead elsewhere, even to this machine's files."""
    put(bucket_server, f"{bucket}/{name}", b"text")
    with pytest.raises(InputError, match="is not the name of a file; rename the object"):
        make(f"{bucket}/dd", f"{bucket}/far", tokenizer)


def test_an_object_that_begins_the_names_of_others_is_refused(bucket_server, bucket):
    for name in ("a.jsonl", "a.jsonl/b.jsonl"):
        put(bucket_server, f"{bucket}/{name}", b'{"text": "x"}')
    with pytest.raises(InputError, match="is an object, and the beginning of other"):
        find_files([f"{bucket}/a.jsonl"])


def put(bucket_server, path: str, content: bytes) -> None:
    """Makes an object of any name, as other programs may."""
    name = quote(path.removeprefix("gs://runs/"), safe="")
    target = f"/upload/storage/v1/b/runs/o?uploadType=media&name={name}"
    status, _, answer = bucket_server.call("POST", target, content)
    assert status == 200, answer


def test_large_texts_are_read_in_few_calls(bucket_server, bucket):
    path = to_path(bucket) / "a.txt"
    path.write_bytes(b"word " * 2**20)
    before = len(bucket_server.requests)
    (piece,) = split_files(find_files([str(path)]).files, 10**9)
    (text,) = read_piece(piece, "text", lambda problem: None)
    assert len(text) == 5 * 2**20
    assert len(bucket_server.requests) - before < 25


def test_of_two_tokenizers_at_once_one_goes_on(out, lines, documents, tokenizer, monkeypatch):
    """Another call begins between a call's look at the folder and its own beginning."""
    other, claim, calls = train_tokenizer(documents, 290, 2), corpus_writer._claim, []

    def late(*arguments):
        if not calls:
            calls.append(1)
            make(lines, out, other, part=Part(2, 2))
        return claim(*arguments)

    monkeypatch.setattr(corpus_writer, "_claim", late)
    with pytest.raises(InputError, match="was made with another tokenizer"):
        make(lines, out, tokenizer, part=Part(1, 2))
    assert not isinstance(make(lines, out, other, part=Part(1, 2)), int)
    assert open_tokenized_corpus(out).tokenizer.identity == other.identity


def test_killed_behind_its_plan_it_goes_on(out, corpus, lines, tokenizer):
    make(lines, out, tokenizer, part=Part(1, 2))
    for name in ("tokenizer.json", "special_tokens.json"):
        (to_path(out) / name).unlink()
    assert not isinstance(make(lines, out, tokenizer, part=Part(2, 2)), int)
    assert same_corpus(out, corpus)
