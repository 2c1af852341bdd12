"""Writing tokenized corpora: whole whatever happens on the way."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from plt_jax.data import corpus_writer
from plt_jax.data.corpus_units import split_of
from plt_jax.data.tokenized_corpus import (
    MANIFEST,
    CorpusManifest,
    open_tokenized_corpus,
)
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.data.tokens import encode_documents
from plt_jax.errors import InputError
from plt_jax.files.writing import UNFINISHED
from tests.data.corpora import OPTIONS, damage, make, same_corpus, stop_at
from tests.training.runs import REPOSITORY, assert_refused, command, environment


def test_every_document_is_in_one_split(corpus, texts, tokenizer):
    opened = open_tokenized_corpus(corpus)
    assert opened.tokenizer.identity == tokenizer.identity
    assert opened.manifest.empty_documents == 2
    for split in ("training", "validation"):
        own = [text for text in texts if split_of(text.encode(), 0.3) == split]
        stream = opened.stream(split)
        expected = np.concatenate(list(encode_documents(own, tokenizer)))
        tokens, numbers = stream.read(0, len(stream) + 5)
        assert np.array_equal(tokens, expected)
        assert numbers[-1] - numbers[0] + 1 == len(own) > 5
        assert opened.manifest.total(split, "tokens") == len(expected)
        assert opened.manifest.total(split, "documents") == len(own)
        assert opened.manifest.total(split, "text_bytes") == sum(len(text.encode()) for text in own)
        assert sum(shard.split == split for shard in opened.manifest.shards) > 2


def test_the_share_held_out_is_about_that_asked_for():
    drawn = [split_of(str(number).encode(), 0.1) for number in range(5000)]
    assert 430 < drawn.count("validation") < 570
    assert split_of(b"any", 0.0) == "training"


def test_several_processes_make_the_same(corpus, lines, tokenizer, tmp_path):
    make(lines, tmp_path / "made", tokenizer, workers=2)
    assert same_corpus(tmp_path / "made", corpus)


def test_what_is_finished_is_not_made_again(corpus, lines, tokenizer, tmp_path):
    out = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        make(lines, out, tokenizer, advance=stop_at(3))
    with pytest.raises(InputError, match="is not a tokenized corpus, or is not finished"):
        open_tokenized_corpus(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert len(times) >= 3
    (out / ".training-00003.unfinished").write_text("half")
    make(lines, out, tokenizer)
    assert same_corpus(out, corpus)
    for name, time_then in times.items():
        assert (out / name).stat().st_mtime_ns == time_then
    assert not list(out.glob(".*.unfinished"))


@pytest.mark.slow(reason="starts processes")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_goes_on(corpus, lines, tokenizer, tmp_path, workers):
    out, path = tmp_path / "made", tmp_path / "tokenizer.json"
    path.write_text(tokenizer.library.to_str())
    words = [sys.executable, "-c", SLOW, str(lines), str(out), str(path), str(workers)]
    started = subprocess.Popen(words, cwd=REPOSITORY, env=environment())
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("parts/0*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
    assert not (out / MANIFEST).exists()
    assert len(list(out.glob("parts/0*.json"))) >= 2
    again = make_when_free(lines, out, tokenizer)
    assert isinstance(again, CorpusManifest)
    assert same_corpus(out, corpus)


@pytest.mark.slow(reason="starts processes")
def test_workers_that_outlive_their_parent_keep_others_out(corpus, lines, tokenizer, tmp_path):
    out, path = tmp_path / "made", tmp_path / "tokenizer.json"
    path.write_text(tokenizer.library.to_str())
    words = [sys.executable, "-c", SLOW, str(lines), str(out), str(path), "2"]
    with subprocess.Popen(
        words, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        workers = [int(pid) for pid in started.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            os.kill(started.pid, signal.SIGKILL)
            started.wait()
            with pytest.raises(InputError, match="another process is writing"):
                make(lines, out, tokenizer)
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
    assert isinstance(make_when_free(lines, out, tokenizer), CorpusManifest)
    assert same_corpus(out, corpus)


SLOW = """
import multiprocessing, sys, time
from pathlib import Path
from tests.data import test_corpus_writer as here
from plt_jax.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    lines, out, tokenizer, workers = sys.argv[1:]
    def advance(unit, done):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(0.3)
    here.make(lines, out, load_tokenizer(tokenizer), workers=int(workers), advance=advance)
"""


def make_when_free(*arguments):
    """Workers of a killed process end, and let the folder go, a moment later."""
    for _ in range(100):
        with contextlib.suppress(InputError):
            return make(*arguments)
        time.sleep(0.1)
    return make(*arguments)


@pytest.mark.slow(reason="starts processes")
def test_a_worker_that_is_killed_is_said_to_be(lines, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_writer, "_work", _die)
    with pytest.raises(InputError, match=r"a worker was killed.*finished shards are kept"):
        make(lines, tmp_path / "made", tokenizer, workers=2)


def _die(unit):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_field": "body"}, r"other text_field \(text there, body here\)"),
        ({"validation_fraction": 0.1}, r"other validation_fraction \(0.3 there, 0.1 here\)"),
        ({"shard_bytes": 10}, "other shard_bytes"),
    ],
)
def test_other_options_do_not_go_on(corpus, lines, tokenizer, changes, message):
    with pytest.raises(InputError, match=message):
        make(lines, corpus, tokenizer, OPTIONS._replace(**changes))


def test_another_tokenizer_does_not_go_on(corpus, lines, documents):
    with pytest.raises(InputError, match="was made with another tokenizer"):
        make(lines, corpus, train_tokenizer(documents, 290, 2))


def test_other_files_do_not_go_on(corpus, lines, tokenizer):
    with pytest.raises(InputError, match="was made with other files; give the same"):
        make(lines / "a.jsonl", corpus, tokenizer)


def test_a_folder_of_something_else_is_left_alone(lines, tokenizer, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty, and holds no tokenized corpus"):
        make(lines, tmp_path, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt"]


def test_a_corpus_below_its_own_inputs_is_none_of_them(texts, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    first = make(tmp_path, tmp_path / "made", tokenizer)
    assert make(tmp_path, tmp_path / "made", tokenizer) == first


def test_a_shard_that_is_a_link_is_written_again(corpus, lines, tokenizer, tmp_path):
    out = tmp_path / "made"
    make(lines, out, tokenizer)
    shard = out / "training-00001.array_record"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    make(lines, out, tokenizer)
    assert not shard.is_symlink()
    assert same_corpus(out, corpus)


def test_killed_before_its_plan_it_begins_again(lines, tokenizer, corpus, tmp_path):
    (tmp_path / f".tokenizer.json.1a{UNFINISHED}").write_text("half")
    make(lines, tmp_path, tokenizer)
    assert same_corpus(tmp_path, corpus)


def test_the_vocabulary_knows_nothing_of_what_is_held_out(tmp_path):
    """A word that only documents held out have is no token."""
    texts = []
    for word, split in (("quokka", "validation"), ("wombat", "training")):
        every = (f"{word} {number} " * 9 for number in range(40))
        texts += [text for text in every if split_of(text.encode(), 0.5) == split]
    assert 10 < sum("quokka" in text for text in texts) < len(texts) - 10
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--vocab_size", 300, "--validation_fraction", 0.5]
    assert run(source, "--out", tmp_path / "made", *words).code == 0
    vocabulary = open_tokenized_corpus(tmp_path / "made").tokenizer.library.get_vocab()
    assert any("wombat" in token for token in vocabulary)
    assert not any("quokka" in token for token in vocabulary)


def test_another_vocabulary_does_not_go_on(lines, tmp_path):
    words = [lines, "--out", tmp_path / "made", "--vocab_size"]
    assert run(*words, 300).code == 0
    assert_refused(run(*words, 290), "other vocab_size (300 there, 290 here)")


def test_two_do_not_make_one_corpus_at_once(lines, tokenizer, tmp_path):
    def start_another(unit, done):
        with pytest.raises(InputError, match="another process is writing"):
            make(lines, tmp_path / "made", tokenizer)

    make(lines, tmp_path / "made", tokenizer, advance=start_another)


def test_a_broken_document_stops_it_or_is_left_out(lines, tokenizer, tmp_path):
    source = tmp_path / "c.jsonl"
    source.write_text('{"text": "fine"}\n{"text": \n{"text": "fine, too"}\n')
    with pytest.raises(InputError, match=r"line at byte 17, is not JSON .*--skip_broken"):
        make(source, tmp_path / "made", tokenizer)
    skipping = OPTIONS._replace(skip_broken=True)
    with pytest.raises(InputError, match="other skip_broken"):
        make(source, tmp_path / "made", tokenizer, skipping)
    manifest = make(source, tmp_path / "other", tokenizer, skipping)
    assert manifest.broken_documents == 1
    assert manifest.total("training", "documents") + manifest.total("validation", "documents") == 2


def test_files_without_text_make_no_corpus(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match="the files hold no text"):
        make(tmp_path / "a.txt", tmp_path / "made", tokenizer)


def run(*words) -> tuple[int, str, str]:
    return command("plt_jax.data.prepare", *words, "--workers", "1")


def test_the_command_trains_a_tokenizer_prepares_and_verifies(lines, tmp_path):
    words = [lines, "--out", tmp_path / "made", "--vocab_size", 300, "--validation_fraction", 0.3]
    result = run(*words)
    assert result.code == 0, result.err
    assert "training: " in result.out
    assert "left out: 2 documents that were empty" in result.out
    made = open_tokenized_corpus(tmp_path / "made")
    assert made.tokenizer.library.get_vocab_size() <= 300
    assert run(*words).code == 0  # its tokenizer is found again
    verified = command("plt_jax.data.verify", tmp_path / "made")
    assert (verified.code, verified.err) == (0, "")
    damage(tmp_path / "made" / "training-00000.array_record", "flipped")
    verified = command("plt_jax.data.verify", tmp_path / "made")
    assert verified.code == 1
    assert verified.err.startswith(str(tmp_path / "made" / "training-00000.array_record"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --tokenizer FILE and --vocab_size V"),
        (["--tokenizer", "x.json", "--vocab_size", "300"], "give one of"),
        (["--tokenizer", "nothing.json"], "cannot read the tokenizer nothing.json"),
        (["--vocab_size", "30"], "cannot hold all 256 bytes"),
        (["--vocab_size", "300", "--validation_fraction", "1"], "--validation_fraction must be"),
        (["--vocab_size", "300", "--shard_mib", "0"], "--shard_mib must be at least 1"),
        (["--vocab_size", "300", "--text_field", "body"], "has no text in 'body'; it has text"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(lines, tmp_path, words, message):
    assert_refused(run(lines, "--out", tmp_path / "made", *words), message)


def test_a_stop_from_the_keyboard_says_how_to_go_on(lines, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_writer, "make_shards", stop)
    result = run(lines, "--out", tmp_path / "made", "--vocab_size", 300)
    assert result.code == 3
    assert "run the same command to go on" in result.out


def test_a_folder_that_cannot_be_written_is_named(lines, tokenizer):
    with contextlib.redirect_stderr(io.StringIO()):
        assert_refused(
            run(lines, "--out", "/proc/made", "--vocab_size", 300), "cannot write --out /proc/made"
        )
