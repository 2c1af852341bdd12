"""Files of repositories, from a server on this machine."""

import contextlib
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from plt_jax.errors import InputError
from plt_jax.hub.download import fetch, open_snapshot
from plt_jax.hub.names import HubName
from tests.hub.server import LARGE, serving, using

NAME = HubName("lab/loop", None)
WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "modeling.py": b"raise SystemExit"}
assert len(WEIGHTS) > LARGE


def quiet(line):
    pass


def opened(name=NAME, *others, report=quiet):
    return open_snapshot(name, "config.json", others, report=report)


@contextlib.contextmanager
def refused(*parts):
    with pytest.raises(InputError) as refusal:
        yield
    for part in parts:
        assert part in str(refusal.value)


def test_only_what_is_asked_for_is_fetched_and_only_once(hub):
    sha, lines = hub.add("lab/loop", FILES), []
    found = opened(NAME, "tokenizer.json", report=lines.append)
    assert (found.commit, found.outage, hub.fetched()) == (sha, None, ["config.json"])
    assert found.sizes["model.safetensors"] == len(WEIGHTS)
    fetch(found, ["model.safetensors"], report=lines.append)
    assert (found.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert lines == [
        f"fetching config.json of lab/loop at commit {sha[:12]}, 2 bytes",
        f"fetching model.safetensors of lab/loop at commit {sha[:12]}, 10.2 kB",
    ]
    hub.requests.clear()
    fetch(opened(report=lines.append), ["model.safetensors"], report=lines.append)
    assert (len(lines), hub.fetched()) == (2, [])


def test_a_revision_is_a_branch_or_a_commit(hub):
    old = hub.add("lab/loop", FILES)
    other = hub.add("lab/loop", FILES | {"config.json": b'{"a": 1}'}, branch="v2")
    for revision, sha in ((None, old), ("v2", other), (other, other), (old, old)):
        found = opened(HubName("lab/loop", revision))
        assert found.commit == sha
        assert (found.folder / "config.json").read_bytes() == (
            b'{"a": 1}' if sha == other else b"{}"
        )
    with refused("lab/loop has no revision v3"):
        opened(HubName("lab/loop", "v3"))


def test_a_branch_that_moves_is_followed(hub):
    hub.add("lab/loop", FILES)
    opened()
    moved = hub.add("lab/loop", FILES | {"config.json": b'{"a": 1}'})
    assert opened().commit == moved


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before the next attempt
    hub.add("lab/loop", FILES)
    found = opened()
    hub.cuts["model.safetensors"] = 5120
    fetch(found, ["model.safetensors"], report=quiet)
    assert (found.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "bytes=5120-" in [request.range for request in hub.requests]


def test_a_file_that_is_whole_is_not_fetched_again(hub):
    hub.add("lab/loop", FILES | {"second.safetensors": WEIGHTS[::-1]})
    found, lines = opened(), []
    fetch(found, ["model.safetensors"], report=quiet)
    hub.requests.clear()
    fetch(found, ["model.safetensors", "second.safetensors"], report=lines.append)
    assert hub.fetched() == ["second.safetensors"]
    assert "fetching second.safetensors of" in lines[0]


def test_a_name_of_a_file_stands_for_no_other(hub):
    hub.add("lab/loop", FILES | {"*": b"star", "[c]onfig.json": b"bracket"})
    fetch(opened(), ["*", "[c]onfig.json"], report=quiet)
    assert sorted(hub.fetched()) == ["*", "[c]onfig.json", "config.json"]


def test_names_that_lead_elsewhere_are_not_fetched(hub):
    names = ["../../../escaped", "/absolute", "a/../b", "a/b", ".."]
    hub.add("lab/loop", FILES | dict.fromkeys(names, b"x"))
    found = opened()
    for name in names:
        with pytest.raises(InputError):
            fetch(found, [name], report=quiet)
    assert [path.name for path in found.folder.iterdir()] == ["config.json"]
    assert not list(Path(constants.HF_HUB_CACHE).parent.rglob("escaped"))


def test_a_file_that_is_missing_is_named(hub):
    hub.add("lab/loop", {"README.md": b""})
    with refused("lab/loop on the Hub has no config.json; it holds README.md"):
        opened()
    hub.add("lab/loop", FILES)
    with refused("lab/loop on the Hub has no second.safetensors"):
        fetch(opened(), ["second.safetensors"], report=quiet)


def test_what_the_hub_refuses_says_what_to_do(hub, monkeypatch):
    hub.add("lab/private", FILES, private=True)
    hub.add("lab/gated", FILES, gated=True)
    for name in ("lab/none", "lab/private"):
        with refused(f"there is no file or folder {name}, and the Hub has no", "hf auth login"):
            opened(HubName(name, None))
    with refused(f"lab/gated is gated; accept its terms on {hub.url}/lab/gated", "HF_TOKEN"):
        opened(HubName("lab/gated", None))
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    for name in ("lab/private", "lab/gated"):
        opened(HubName(name, None))
    hub.status = 403
    with refused("the Hub refuses lab/private to you (403)", "hf auth login"):
        opened(HubName("lab/private", None))


def test_what_is_no_hub_is_refused(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.url}/page")
    with refused(f"{hub.url}/page does not answer as a Hub does; correct HF_ENDPOINT"):
        opened()


def outages(hub, monkeypatch):
    """Makes the Hub fail in each way in turn; yields what a message says of it."""
    hub.status = 500
    yield "the Hub answers with the error 500"
    hub.status = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield "the Hub is not asked, since HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    yield "the Hub cannot be reached at http://127.0.0.1:9"


def test_without_the_hub_the_cache_is_read(hub, monkeypatch):
    sha, name = hub.add("lab/loop", FILES), HubName("lab/loop", "main")
    fetch(opened(name), ["model.safetensors"], report=quiet)
    for reason in outages(hub, monkeypatch):
        lines = []
        found = opened(name, report=lines.append)
        assert lines == [f"{reason}; reading the cache's copy of lab/loop at commit {sha[:12]}"]
        assert (found.commit, found.outage) == (sha, reason)
        fetch(found, ["model.safetensors"], report=quiet)
        with refused(reason, "its cache holds no whole model"):
            fetch(found, ["second.safetensors"], report=quiet)


def test_without_the_hub_and_a_copy_it_says_what_to_do(hub, monkeypatch):
    hub.add("lab/loop", FILES)
    for reason in outages(hub, monkeypatch):
        with refused(
            f"there is no file or folder lab/loop@v2; {reason}",
            "run hf download lab/loop --revision v2 --local-dir FOLDER",
        ):
            opened(HubName("lab/loop", "v2"))


def test_a_connection_that_is_lost_in_between_is_an_outage(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts
    hub.add("lab/loop", FILES)
    found = opened()
    with serving() as other:
        url = other.url
    with using(url, tmp_path), refused(f"the Hub cannot be reached at {url}; run the command"):
        fetch(found, ["model.safetensors"], report=quiet)
