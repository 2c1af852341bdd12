"""Runs on tokenized corpora, from the command line to a resume on other processes' terms."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.faults.bucket_server import Disturbance
from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import write_corpus
from plt_jax.data.shard_cache import LEAST_SHARDS
from plt_jax.data.tokenized_corpus import open_tokenized_corpus
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.files.paths import to_path
from plt_jax.training import trainer
from tests.data.corpora import upload
from tests.training.runs import (
    STEPS,
    assert_refused,
    assert_same_run,
    call_at,
    command,
    losses,
    tiny_config,
    tiny_values,
    write_config,
)

pytestmark = pytest.mark.slow(reason="trains several runs")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, finished):
    """Two corpora of one tokenizer, and one of another."""
    home = tmp_path_factory.mktemp("prepared")
    texts = [path.read_text() for path in sorted((finished.home / "corpus").iterdir())]
    tokenizer = train_tokenizer(texts, 270, 2)
    for name, part, trained in (
        ("one", texts[:7], tokenizer),
        ("two", texts[7:], tokenizer),
        ("strange", texts, train_tokenizer(texts, 262, 2)),
    ):
        source = home / f"{name}.jsonl"
        rows = (json.dumps({"text": f"{text} {again}"}) for text in part for again in range(4))
        source.write_text("\n".join(rows))
        options = CorpusOptions(validation_fraction=0.2, shard_bytes=500)
        write_corpus([str(source)], home / name, trained, options, 1, lambda *_: lambda *_: None)
    return home


def sources(*paths: Path | str, **settings) -> dict:
    return {"data": {"sources": [{"path": str(path), **settings} for path in paths]}}


@pytest.fixture(scope="module")
def trained(finished, corpora, tmp_path_factory):
    """A run on both corpora, trained to its end."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_config(finished.home, run_dir, **sources(corpora / "one", corpora / "two"))
    assert trainer.train(config) == trainer.Outcome(STEPS, stopped=False)
    return config


def test_the_command_trains_and_evaluates(finished, corpora, tmp_path):
    values = tiny_values(finished.home)
    del values["data"]["validation_fraction"]
    path = write_config(tmp_path / "run.yaml", values)
    given = json.dumps(
        [{"path": str(corpora / "one"), "weight": 3}, {"path": str(corpora / "two"), "weight": 1}]
    )
    run_dir = tmp_path / "run"
    result = command("train.py", path, "--run_dir", run_dir, "--data.sources", given)
    assert result.code == 0, result.err
    assert f"data.sources {corpora / 'one'} is read " in result.out
    evaluated = command("eval.py", run_dir)
    assert evaluated.code == 0, evaluated.err
    found = json.loads((run_dir / "eval.json").read_text())
    last = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit_where_the_corpora_have_moved(
    finished, corpora, trained, tmp_path, capsys
):
    config = tiny_config(
        finished.home, tmp_path / "run", **sources(corpora / "one", corpora / "two")
    )
    with call_at(6, _fail), pytest.raises(RuntimeError, match="power cut"):
        trainer.train(config)
    for name in ("one", "two"):
        shutil.copytree(corpora / name, tmp_path / "moved" / name)
    moved = sources(tmp_path / "moved" / "one", tmp_path / "moved" / "two")
    config = tiny_config(finished.home, tmp_path / "run", **moved)
    assert trainer.train(config).step == STEPS
    assert f"data.sources[0].path: {corpora / 'one'} -> {tmp_path / 'moved' / 'one'}" in (
        capsys.readouterr().out
    )
    assert_same_run(config, trained)


def test_corpora_in_a_bucket_are_read_bit_for_bit_as_on_a_disk(
    finished, corpora, trained, bucket_server, bucket, tmp_path, capsys
):
    """A run on disks goes on with the corpora in a bucket, and with a cache for a part of them."""
    copy = sources(corpora / "one", corpora / "two")
    with call_at(6, _fail), pytest.raises(RuntimeError, match="power cut"):
        trainer.train(tiny_config(finished.home, tmp_path / "run", **copy))
    for name in ("one", "two"):
        upload(corpora / name, to_path(f"{bucket}/{name}"))
    shards = [
        shard
        for name in ("one", "two")
        for shard in open_tokenized_corpus(corpora / name).manifest.shards
    ]
    most = LEAST_SHARDS * max(shard.size for shard in shards)
    assert most < sum(shard.size for shard in shards)
    values = sources(f"{bucket}/one", f"{bucket}/two")
    values["data"] |= {"cache_dir": str(tmp_path / "cache"), "cache_gb": most / 1e9}
    config = tiny_config(finished.home, tmp_path / "run", **values)
    assert trainer.train(config).step == STEPS
    assert "need a shard fetched again" in capsys.readouterr().out
    assert_same_run(config, trained)
    kept = [path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()]
    assert 0 < sum(kept) <= most
    evaluated = command("eval.py", tmp_path / "run")
    assert evaluated.code == 0, evaluated.err
    # What cannot be fetched ends the run in a line, as a disk that fails.
    bucket_server.disturb = lambda request: (
        Disturbance(status=404) if request.name.endswith(".array_record") else None
    )
    path = write_config(
        tmp_path / "other.yaml",
        config.model_copy(update={"run_dir": str(tmp_path / "other")}).model_dump(mode="json"),
    )
    assert_refused(command("train.py", path), f"the shard {bucket}/", "is missing; bring it back")


def _fail():
    raise RuntimeError("power cut")


def test_another_seed_reads_in_another_order(finished, corpora, trained, tmp_path):
    given = sources(corpora / "one", corpora / "two")
    config = tiny_config(finished.home, tmp_path / "run", seed=1, **given)
    trainer.train(config)
    assert losses(config) != losses(trained)


def train_refused(config, *parts):
    path = Path(config.run_dir).parent / "refused.yaml"
    write_config(path, config.model_dump(mode="json"))
    assert_refused(command("train.py", path), *parts)


def test_a_run_of_an_earlier_version_goes_on(finished, trained, tmp_path):
    """Its config.yaml has renamed fields, and names a source that it did not read."""
    shutil.copytree(trained.run_dir, tmp_path / "run")
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    values["data"]["source"] = "sotu"
    values["data"]["questions"] = values["data"].pop("synthetic")
    write_config(tmp_path / "run" / "config.yaml", values)
    config = trained.model_copy(update={"run_dir": str(tmp_path / "run")})
    path = write_config(tmp_path / "again.yaml", config.model_dump(mode="json"))
    result = command("train.py", path)
    assert result.code == 0, result
    assert f"is at step {STEPS} of {STEPS}" in result.out
    evaluated = command("eval.py", tmp_path / "run")
    assert evaluated.code == 0, evaluated


def test_other_text_does_not_resume(finished, corpora, trained, tmp_path):
    shutil.copytree(trained.run_dir, tmp_path / "run")
    swapped = sources(corpora / "two", corpora / "one")
    config = tiny_config(finished.home, tmp_path / "run", training={"steps": 9}, **swapped)
    train_refused(config, "the training text or its tokenizer has changed", "text.json")


def test_other_weights_do_not_resume(finished, corpora, trained, tmp_path):
    shutil.copytree(trained.run_dir, tmp_path / "run")
    weighted = sources(corpora / "one", corpora / "two", weight=1)
    config = tiny_config(finished.home, tmp_path / "run", **weighted)
    train_refused(config, "data.sources[0].weight: None -> 1.0; data.sources[1].weight")


def test_what_cannot_work_is_refused_in_a_line(finished, corpora, tmp_path):
    def refused(*parts, **sections):
        train_refused(tiny_config(finished.home, tmp_path / "run", **sections), *parts)
        assert not (tmp_path / "run").exists()

    refused("nothing is not a tokenized corpus", **sources(corpora / "nothing"))
    refused(
        "strange was prepared with another tokenizer",
        **sources(corpora / "one", corpora / "strange"),
    )
    refused("would be read ", "epochs are 0.25", **sources(corpora / "one", epochs=0.25))
    refused("set model.vocab_size to", model={"vocab_size": 260}, **sources(corpora / "one"))
    other = corpora / "strange" / "tokenizer.json"
    refused(
        "was prepared with another tokenizer",
        tokenizer={"path": str(other)},
        **sources(corpora / "one"),
    )
    with pytest.raises(ValueError, match=r"sources\[1\] has no weight, but others have"):
        tiny_config(
            finished.home,
            tmp_path / "run",
            data={"sources": [{"path": "a", "weight": 1}, {"path": "b"}]},
        )
    with pytest.raises(ValueError, match=r"validation_source goes with data.source"):
        tiny_config(
            finished.home,
            tmp_path / "run",
            data={"validation_source": "a", "sources": [{"path": "a"}]},
        )


def test_a_shard_that_vanishes_stops_the_run_with_its_checkpoint_intact(
    finished, corpora, tmp_path, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(corpora / "one", copy)
    config = tiny_config(
        finished.home,
        tmp_path / "run",
        data={"prefetch": 0, **sources(copy)["data"]},
        training={"steps": 40},
    )
    # Shards are opened when they are first read; without the cache that is every time.
    monkeypatch.setattr("plt_jax.data.tokenized_corpus.OPEN_SHARDS", 0)

    def vanish():
        for shard in open_tokenized_corpus(copy).manifest.shards:
            (copy / shard.name).unlink()

    with call_at(6, vanish):
        path = write_config(tmp_path / "run.yaml", config.model_dump(mode="json"))
        assert_refused(command("train.py", path), "the shard ", "is missing; bring it back")
    shutil.rmtree(copy)
    shutil.copytree(corpora / "one", copy)
    assert trainer.train(config).step == 40
