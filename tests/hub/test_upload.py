"""Folders that become repositories, on a server on this machine."""

import pytest
from huggingface_hub import constants

from plt_jax.errors import InputError
from plt_jax.hub.names import HubName
from plt_jax.hub.upload import check_push, push

NEW = HubName("lab/new", None)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


def files_of(hub, name, branch="main"):
    repository = hub.repositories[name]
    return repository.commits[repository.branches[branch]]


def test_a_new_repository_is_private_and_has_the_folders_bytes(hub, writer, folder):
    target, lines = check_push(NEW), []
    assert (target.exists, target.has_card) == (False, False)
    assert not hub.repositories  # nothing is made by the check
    push(folder, target, "a model", report=lines.append)
    assert hub.repositories["lab/new"].private
    pushed = files_of(hub, "lab/new")
    assert {name: pushed[name] for name in pushed if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert lines == [
        "made the private repository lab/new; its settings can publish it",
        f"pushing {folder} to lab/new, 7.0 kB",
        f"pushed to {hub.url}/lab/new",
    ]


def test_a_push_by_xets_way_of_committing(hub, writer, folder, monkeypatch):
    """With hf_xet, huggingface_hub uploads and commits in batches. The server has no storage of
    Xet, so that all files are small ones here."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (folder / "model.safetensors").write_bytes(b"weights")
    hub.add("lab/old", {"model.safetensors.index.json": b"old"})
    push(folder, check_push(HubName("lab/old", None)), "a model", report=lambda line: None)
    assert files_of(hub, "lab/old") == {"config.json": b"{}", "model.safetensors": b"weights"}


def test_other_files_of_a_repository_stay(hub, writer, folder):
    hub.add("lab/old", {"README.md": b"theirs", "config.json": b"old"})
    target, lines = check_push(HubName("lab/old", None)), []
    assert (target.exists, target.has_card) == (True, True)
    push(folder, target, "a model", report=lines.append)
    assert files_of(hub, "lab/old")["README.md"] == b"theirs"
    assert files_of(hub, "lab/old")["config.json"] == b"{}"
    assert not hub.repositories["lab/old"].private
    assert "private" not in "".join(lines)


def test_weights_of_an_earlier_push_do_not_stay(hub, writer, folder):
    """An importer would read them."""
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "other.safetensors")
    hub.add("lab/old", dict.fromkeys(old, b"old"))
    push(folder, check_push(HubName("lab/old", None)), "a model", report=lambda line: None)
    assert files_of(hub, "lab/old").keys() == {
        *("config.json", "model.safetensors", "other.safetensors")
    }


def test_a_branch_is_made_if_need_be(hub, writer, folder):
    hub.add("lab/old", {"config.json": b"old"})
    lines = []
    for _ in range(2):
        push(folder, check_push(HubName("lab/old", "v2")), "a model", report=lines.append)
    assert files_of(hub, "lab/old")["config.json"] == b"old"
    assert files_of(hub, "lab/old", "v2")["config.json"] == b"{}"
    assert lines[-1] == f"pushed to {hub.url}/lab/old/tree/v2"


@pytest.mark.parametrize(
    ("token", "name", "parts"),
    [
        (None, NEW, ["to push to lab/new, log in with `hf auth login`, or set HF_TOKEN"]),
        ("hf_reader", NEW, ["your token may only read", "/settings/tokens"]),
        ("hf_nobody", NEW, ["the Hub refuses lab/new to you (401)", "hf auth login"]),
        ("hf_writer", HubName("firm/new", None), ["ada cannot make firm/new", "ada, lab"]),
    ],
)
def test_rights_are_checked_before(hub, monkeypatch, token, name, parts):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError) as refusal:
        check_push(name)
    assert all(part in str(refusal.value) for part in parts), refusal.value
    assert not hub.repositories


def test_a_push_that_fails_says_how_to_go_on(hub, writer, folder, monkeypatch):
    hub.add("lab/old", {"config.json": b"old"})
    target = check_push(HubName("lab/old", "v2"))
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(InputError) as refusal:
        push(folder, target, "a model", report=lambda line: None)
    assert "the Hub refuses lab/old@v2 to you (403)" in str(refusal.value)
    assert f"pushed with hf upload lab/old {folder} . --revision v2" in str(refusal.value)
    hub.status = 502
    with pytest.raises(InputError, match="the Hub answers with the error 502"):
        check_push(NEW)
