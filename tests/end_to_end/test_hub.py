"""Names of the Hugging Face Hub, as users give them to commands."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.runs.directory import find_checkpoint, read_params
from tests.golden.huggingface import GOLDEN
from tests.interop.damage import make_run, write_tokenizer
from tests.models import small_config
from tests.training.runs import (
    assert_refused,
    command,
    environment,
    output_of,
    snapshot,
    tiny_values,
    write_config,
)

LOOP = GOLDEN / "loopcoder_l2"
WORDS = ["a state of peace"] * 9


def convert(*words):
    return output_of("plt_jax.convert", *words)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint with a tokenizer and a chat template, as an export writes it."""
    home = tmp_path_factory.mktemp("published")
    run = make_run(home / "run", small_config(vocab_size=270), write_tokenizer(home / "t.json"))
    convert("export", run, home / "out")
    (home / "out" / "chat_template.jinja").write_text("{{ messages }}")
    return home / "out"


def assert_same_runs(one, other):
    found = [find_checkpoint(run) for run in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *map(read_params, found))
    assert found[0].config.model == found[1].config.model
    files = [snapshot(run) for run in (one, other)]
    for name in ("tokenizer.json", "special_tokens.json", "huggingface/chat_template.jinja"):
        assert files[0][name] == files[1][name]
    kept = [{name for name in some if name.startswith("huggingface/")} for some in files]
    assert kept[1] - kept[0] == {"huggingface/hub.json"} and kept[0] < kept[1]


def test_a_name_gives_the_run_that_its_folder_gives(hub, published, tmp_path):
    code = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"x", "training.pkl": b"x"}
    sha = hub.add_folder("lab/loop", published, **code)
    convert("import", published, tmp_path / "by_folder")
    out = convert("import", "lab/loop", tmp_path / "by_name")
    assert f"imported iquestpltcoder from lab/loop at commit {sha[:12]}: plt, 2 loops" in out
    assert len([line for line in out.splitlines() if line.startswith("fetching ")]) == 2
    assert_same_runs(tmp_path / "by_folder", tmp_path / "by_name")
    origin = json.loads((tmp_path / "by_name" / "huggingface" / "hub.json").read_text())
    assert origin == {"repository": "lab/loop", "revision": None, "commit": sha}
    assert not set(hub.fetched()) & set(code)
    # At its revision, of which there is another now, and without the Hub.
    hub.add_folder("lab/loop", LOOP)
    hub.status = 503
    out = convert("import", f"lab/loop@{sha}", tmp_path / "again")
    assert "the Hub answers with the error 503; reading the cache's copy of lab/loop" in out
    assert_same_runs(tmp_path / "by_folder", tmp_path / "again")


def test_a_folder_of_that_name_comes_first(hub, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "loop").symlink_to(published)
    convert("import", "lab/loop", "run")
    assert not hub.requests
    assert not (tmp_path / "run" / "huggingface" / "hub.json").exists()


def test_what_is_refused_leaves_nothing_and_fetches_no_weights(hub, published, tmp_path):
    large = train_tokenizer([*WORDS, "of our union and the work"], 290, 1).library.to_str()
    hub.add_folder("lab/large", published, **{"tokenizer.json": large.encode()})
    hub.add_folder("lab/gated", published)
    hub.repositories["lab/gated"].gated = True
    for name, part in {
        "lab/none": "there is no file or folder lab/none, and the Hub has no model of that name",
        "lab/gated": "lab/gated is gated; accept its terms",
        "lab/large": "more than model.vocab_size 270",
    }.items():
        assert_refused(command("plt_jax.convert", "import", name, tmp_path / "run"), part)
        assert not (tmp_path / "run").exists()
    assert "model.safetensors" not in hub.fetched()
    result = command("plt_jax.convert", "import", "nowhere", tmp_path / "run")
    assert_refused(result, "nowhere is not a folder")


def test_a_tokenizer_by_name_takes_the_place_of_the_sources(hub, published, tmp_path):
    other = train_tokenizer(WORDS, 262, 2)
    hub.add("lab/words", {"tokenizer.json": other.library.to_str().encode(), "x.py": b"x"})
    words = ["--tokenizer", "lab/words"]
    out = convert("import", published, tmp_path / "run", *words)
    assert "fetching tokenizer.json of lab/words at commit" in out
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").identity == other.identity
    assert hub.fetched() == ["tokenizer.json"]
    # The weights of the Hub with it.
    hub.add_folder("lab/loop", published)
    convert("import", "lab/loop", tmp_path / "both", *words)
    assert load_tokenizer(tmp_path / "both" / "tokenizer.json").identity == other.identity


@pytest.mark.slow(reason="trains a run, and resumes it")
def test_training_takes_a_tokenizer_by_name_and_notices_when_it_changes(hub, finished, tmp_path):
    own = (finished.directory / "tokenizer.json").read_bytes()
    described = {"tokenizer.json": own, "tokenizer_config.json": b'{"eos_token": "<|eos|>"}'}
    hub.add("lab/words", described | {"merges.txt": b"", "model.safetensors": b""})
    values = tiny_values(finished.home, run_dir=str(tmp_path / "run"))
    values["tokenizer"] = {"path": "lab/words"}
    path = write_config(tmp_path / "run.yaml", values)
    result = command("train.py", path, "--training.steps", "1")
    assert result.code == 0, result
    assert "fetching 2 files of lab/words" in result.out
    assert sorted(hub.fetched()) == ["tokenizer.json", "tokenizer_config.json"]
    expected = load_tokenizer(finished.directory / "tokenizer.json").identity
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").identity == expected

    hub.status = 500  # the cache's copy is the one that the run has
    result = command("train.py", path, "--training.steps", "2")
    assert result.code == 0, result
    assert "resuming at step 1 of 2" in result.out
    hub.status = None
    other = train_tokenizer(WORDS, 262, 2).library.to_str().encode()
    hub.add("lab/words", described | {"tokenizer.json": other})
    result = command("train.py", path, "--training.steps", "3")
    assert_refused(result, "the training text or its tokenizer has changed")


def test_a_corpus_takes_a_tokenizer_by_name(hub, finished, tmp_path):
    own = (finished.directory / "tokenizer.json").read_bytes()
    hub.add("lab/words", {"tokenizer.json": own})
    words = [finished.home / "corpus", "--out", tmp_path / "corpus", "--workers", "1"]
    output_of("plt_jax.data.prepare", *words, "--tokenizer", "lab/words@main")
    expected = load_tokenizer(finished.directory / "tokenizer.json").identity
    assert load_tokenizer(tmp_path / "corpus" / "tokenizer.json").identity == expected
    result = command("plt_jax.data.prepare", *words, "--tokenizer", "lab/none")
    assert_refused(result, "there is no file or folder lab/none, and the Hub has no model")


def test_a_pushed_model_comes_back_with_the_same_bytes(hub, published, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    convert("import", published, tmp_path / "run")
    out = convert("export", tmp_path / "run", tmp_path / "out", "--push", "lab/mine")
    assert "made the private repository lab/mine" in out
    assert out.splitlines()[-1] == f"pushed to {hub.url}/lab/mine"
    convert("import", "lab/mine", tmp_path / "back")
    jax.tree.map(
        np.testing.assert_array_equal,
        *(read_params(find_checkpoint(tmp_path / run)) for run in ("run", "back")),
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Loops: plt, 2 loops" in card and "convert import lab/mine runs/mine" in card
    convert("export", tmp_path / "back", tmp_path / "twice", "--push", "lab/mine@v2")
    files = [snapshot(tmp_path / name) for name in ("out", "twice")]
    assert files[0].pop("README.md") and "README.md" not in files[1]  # the repository has one
    assert files[0] == files[1]
    branches = hub.repositories["lab/mine"].branches
    assert branches.keys() == {"main", "v2"}


def test_a_push_is_refused_before_anything_is_written(hub, published, tmp_path, monkeypatch):
    convert("import", published, tmp_path / "run")
    words = ["plt_jax.convert", "export", tmp_path / "run", tmp_path / "out", "--push"]
    assert_refused(command(*words, "lab/mine"), "to push to lab/mine, log in with `hf auth login`")
    assert_refused(command(*words, "mine"), "--push mine is not ORG/NAME or ORG/NAME@BRANCH")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert_refused(command(*words, "lab/mine"), "your token may only read")
    assert not (tmp_path / "out").exists() and not hub.repositories


def test_the_hub_is_the_one_of_the_environment(hub, published, tmp_path):
    """In a process of its own, without patches."""
    hub.add_folder("lab/loop", published)
    words = ["-m", "plt_jax.convert", "import", "lab/loop", tmp_path / "run"]
    variables = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    result = subprocess.run(
        [sys.executable, *map(str, words)], env=variables, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "from lab/loop at commit" in result.stdout
    assert str(tmp_path / "home" / "hub") != constants.HF_HUB_CACHE
    assert (tmp_path / "home" / "hub" / "models--lab--loop").is_dir()
