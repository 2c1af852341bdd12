"""Reading what strangers made, and writing whole files: plt_jax/files."""

import json
import math
import os

import numpy as np
import pytest

from plt_jax.errors import InputError, one_line
from plt_jax.files import reading
from plt_jax.files.reading import file_below, read_bounded, read_json
from plt_jax.files.writing import replaced_file, to_json, write_pieces, write_text


@pytest.mark.parametrize(
    "name",
    [
        "x" * 256,
        "../a",
        "/etc/passwd",
        "a/../../b",
        "",
        ".",
        "a//b",
        "a/.",
        "a\0b",
        "a\nb",
        "..",
        "a\\..\\b",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="is not the name of a file in"):
        file_below(tmp_path, name)


def test_links_and_what_is_no_file_are_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    assert file_below(tmp_path, "a") == tmp_path / "a"
    assert file_below(tmp_path, "b/missing") == tmp_path / "b" / "missing"
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "folder").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("link", "is a link"),
        ("folder/passwd", "is a link"),
        ("pipe", "is not a regular file"),
    ):
        with pytest.raises(InputError, match=message):
            file_below(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "must hold a mapping, not a list"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": "' + b"x" * 100 + b'"}' + b" " * 1000, "is larger than such a file may be, 900"),
    ],
)
def test_broken_json_is_one_line(tmp_path, monkeypatch, content, message):
    if b"xx" in content:
        monkeypatch.setattr(reading, "MOST_JSON_BYTES", 900)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 3000


def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="is not a regular file"):
            read_bounded(tmp_path / path, 10)


def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path):
    """Nobody can foresee the name, so all names that were used are tried."""
    treasure, target = tmp_path / "treasure", tmp_path / "report.html"
    treasure.write_text("gold")
    for name in ("report.html.tmp", ".report.html.unfinished", "report.html"):
        (tmp_path / name).symlink_to(treasure)
    write_text(target, "page")
    assert treasure.read_text() == "gold"
    assert target.read_text() == "page" and not target.is_symlink()
    names = []
    for _ in range(2):
        with replaced_file(target) as file:
            names.append(file.name)
            file.write(b"x")
    assert names[0] != names[1]
    assert not list(tmp_path.glob(".report.html.*-*"))


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    write_text(tmp_path / "a", "old")

    def pieces():
        yield "new"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_pieces(tmp_path / "a", pieces())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_json_holds_null_for_what_is_no_number():
    values = {"a": [1, np.float32(0.5), math.nan, (math.inf,)], "b": {"c": -math.inf, "d": True}}
    assert json.loads(to_json(values)) == {"a": [1, 0.5, None, [None]], "b": {"c": None, "d": True}}
    assert "NaN" not in to_json(values, indent=2)
    assert to_json([np.int64(3), True, 2]) == "[3, true, 2]"


def test_a_message_shows_no_escape_sequences_and_has_bounds():
    assert one_line("a\x1b[31m\x07b\ncé日\udce9") == "a\\x1b[31m\\x07b cé日\\udce9"
    assert len(one_line("x" * 10**7)) < 3000
    assert str(InputError("tensor \x1b]0;evil\x07")) == "tensor \\x1b]0;evil\\x07"
