"""Names of repositories, and how they are told from paths."""

import importlib.util

import pytest

from plt_jax.errors import InputError
from plt_jax.hub.names import HubName, name_unless_path, read_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lab/loop", HubName("lab/loop", None)),
        ("lab/loop-2.5_b@v1.0", HubName("lab/loop-2.5_b", "v1.0")),
        ("lab/loop@refs/pr/1", HubName("lab/loop", "refs/pr/1")),
    ],
)
def test_a_name_is_read(text, name):
    assert read_name(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "loop", "/lab/loop", "./lab/loop", "lab/loop/", "lab/loop/x", "~/loop", "../loop"),
        *("lab/..", "lab/lo--op", "lab/loop.git", "lab/loop@", "lab/loop@../x", "läb/loop"),
        *("lab/loop@v1@v2", "lab/loop@/x", "lab/lo op", "lab/loop\n"),
    ],
)
def test_what_has_not_the_form_is_a_path(text):
    assert read_name(text) is None


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_unless_path("lab/loop") == HubName("lab/loop", None)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "loop").symlink_to("nowhere")
    assert name_unless_path("lab/loop") is None


def test_without_the_package_a_name_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"no file or folder lab/loop; .* 'plt_jax\[hub\]'"):
        name_unless_path("lab/loop")
    assert name_unless_path("loop") is None
