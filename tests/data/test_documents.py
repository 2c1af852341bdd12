"""Documents in files of every kind, in pieces of every size."""

import bz2
import gzip
import json
import lzma
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.data import documents as module
from plt_jax.data.documents import FilePiece, read_piece, split_files
from plt_jax.data.input_files import describe_left_out, find_files
from plt_jax.errors import InputError

COMPRESSORS = ("gz", "bz2", "xz", "zst")
TEXTS = ["one", "zwei äöü\nthree", "", "  ", "four \u2028 五"]


def refuse(problem):
    raise AssertionError(problem)


def read_all(path, piece_bytes=2**20, field="text", report=refuse):
    pieces = split_files(find_files([str(path)]).files, piece_bytes)
    return [text for piece in pieces for text in read_piece(piece, field, report)]


def lines(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


def write(path, contents: str):
    """Writes text, compressed as the name says."""
    data = contents.encode("utf-8")
    compressors = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    if path.suffix in compressors:
        path.write_bytes(compressors[path.suffix].compress(data))
    elif path.suffix == ".zst":
        arrow = pytest.importorskip("pyarrow")
        with arrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", *(f"jsonl.{c}" for c in COMPRESSORS)])
def test_each_line_is_a_document(kind, tmp_path):
    assert read_all(write(tmp_path / f"a.{kind}", lines(TEXTS))) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_each_text_file_is_a_document(name, tmp_path):
    assert read_all(write(tmp_path / name, "\ufeff" + TEXTS[1])) == [TEXTS[1]]


def test_each_row_is_a_document(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"n": [1, 2, 3, 4, 5, 6], "body": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pieces = split_files(find_files([str(tmp_path)]).files, 1)
    assert [(piece.begin, piece.end) for piece in pieces] == [(0, 1), (1, 2), (2, 3)]
    assert read_all(tmp_path, 1, "body") == [*TEXTS, ""]
    assert read_all(tmp_path, 2**20, "body") == [*TEXTS, ""]
    with pytest.raises(InputError, match="has no column 'text'; it has n, body"):
        read_all(tmp_path)
    with pytest.raises(InputError, match="the column 'n' holds no text"):
        read_all(tmp_path, field="n")


@given(
    texts=st.lists(st.text("aé\n\r\u2028 ", max_size=12), max_size=8),
    piece_bytes=st.integers(1, 80),
    blank=st.booleans(),
    end=st.booleans(),
)
def test_pieces_of_any_size_hold_each_line_once(texts, piece_bytes, blank, end, tmp_path_factory):
    contents = "".join(
        json.dumps({"text": text}, ensure_ascii=False) + ("\n\n" if blank else "\n")
        for text in texts
    )
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes((contents if end else contents.rstrip("\n")).encode("utf-8"))
    assert read_all(path, piece_bytes) == texts


def test_files_come_in_the_order_given_and_of_their_paths(tmp_path):
    for name in ("b/2.txt", "b/10.jsonl", "a.txt", "b/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "b"), str(tmp_path / "a.txt")])
    assert [file.path.name for file in found.files] == ["10.jsonl", "2.txt", "a.txt"]
    assert [path.name for path in found.left_out] == ["notes.md"]
    assert describe_left_out(found.left_out) == " (left out: 1 file: .md 1)"


def test_suffixes_may_be_capital_and_folders_may_be_links(tmp_path):
    for name in ("in/A.JSONL", "in/B.TXT", "in/c.csv", "elsewhere/d.jsonl.GZ"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    found = find_files([str(tmp_path / "in")])
    assert [file.path.name for file in found.files] == ["A.JSONL", "B.TXT", "d.jsonl.GZ"]
    assert [path.name for path in found.left_out] == ["c.csv"]
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    with pytest.raises(InputError, match="loop leads to a folder around it"):
        find_files([str(tmp_path / "in")])


def test_a_name_that_is_no_text_is_refused_before_any_work(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"caf\\udce9\.txt is not UTF-8"):
        find_files([str(tmp_path)])


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="is not a regular file"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "is not JSON"),
        (b'"text"', "is not a JSON object"),
        (b'{"body": "x", "id": 2}', "has no text in 'text'; it has body, id"),
        (b'{"text": 3}', "has no text in 'text', but a number"),
        (b'{"text": ["x"]}', "has no text in 'text', but a list"),
        (b'{"text": {"x": "y"}}', "has no text in 'text', but an object"),
        (b'[{"text": "x"}]', "begins an array or an object of several lines"),
        (b"{", "begins an array or an object of several lines"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "is not UTF-8"),
    ],
)
def test_a_broken_line_is_reported_with_its_place(line, problem, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    reported = []
    assert read_all(path, report=reported.append) == ["one", "two"]
    (found,) = reported
    assert found.startswith(f"{path}, the line at byte 16, ")
    assert problem in found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2"])
def test_a_line_without_end_is_left_out(name, tmp_path, monkeypatch):
    """A compressed file of a megabyte may hold one of a gigabyte."""
    monkeypatch.setattr(module, "MOST_LINE_BYTES", 40)
    texts = ["one", "x" * 500, "two", "y" * 39, "three"]
    path = write(tmp_path / name, lines(texts))
    for piece_bytes in (1, 7, 100, 2**20):
        reported = []
        assert read_all(path, piece_bytes, report=reported.append) == ["one", "two", "three"]
        assert len(reported) == 2
        assert reported[0] == f"{path}, the line at byte 25, has more than 40 bytes"


def test_a_compressed_text_without_end_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_TEXT_BYTES", 40)
    write(tmp_path / "a.txt.gz", "x" * 41)
    write(tmp_path / "b.txt.gz", "y" * 40)
    write(tmp_path / "c.txt", "z" * 41)
    reported = []
    assert read_all(tmp_path, report=reported.append) == ["y" * 40, "z" * 41]
    assert reported == [
        f"{tmp_path / 'a.txt.gz'} holds more than 40 bytes; split it into documents"
    ]


def test_a_null_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
    assert read_all(tmp_path) == ["", "x"]


def test_text_within_other_fields_is_named_with_dots(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"meta": {"text": "one", "n": 1}}, {"meta": {"text": None, "n": 2}}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"meta": {"text": "two"}}\n{"meta.text": "three"}\n')
    assert read_all(tmp_path, field="meta.text") == ["one", "", "two", "three"]
    (tmp_path / "c.jsonl").write_text('{"meta": null}\n')
    parquet.write_table(arrow.table({"meta": [{"text": "x"}, None]}), tmp_path / "d.parquet")
    assert read_all(tmp_path / "c.jsonl", field="meta.text") == [""]
    assert read_all(tmp_path / "d.parquet", field="meta.text") == ["x", ""]
    with pytest.raises(InputError, match=r"has no column 'text'; it has meta .*meta\.text"):
        read_all(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column 'meta' holds no text, but struct<"):
        read_all(tmp_path / "a.parquet", field="meta")


def test_text_columns_of_every_kind_are_read(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    plain = arrow.array(["a", None, "b"])
    for column in (plain, plain.dictionary_encode(), plain.cast("large_string")):
        parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
        assert read_all(tmp_path) == ["a", "", "b"]
    parquet.write_table(arrow.table({"text": arrow.nulls(2)}), tmp_path / "a.parquet")
    assert read_all(tmp_path) == ["", ""]


def test_a_row_that_is_not_utf8_is_named_and_left_out(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = arrow.array([b"one", b"\xff", b"two"]).view(arrow.string())
    parquet.write_table(arrow.table({"text": broken}), tmp_path / "a.parquet")
    reported = []
    assert read_all(tmp_path, report=reported.append) == ["one", "two"]
    assert reported == [f"{tmp_path / 'a.parquet'}, row 2 of row groups 0 on, is not UTF-8"]


def test_text_that_is_not_utf8_is_reported(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    reported = []
    assert read_all(tmp_path, report=reported.append) == []
    assert reported == [f"{tmp_path / 'a.txt'} is not UTF-8 text: byte 2 does not decode"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_damaged_file_is_refused(name, damage, tmp_path):
    path = tmp_path / name
    if name.endswith("parquet"):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": ["one", "two"] * 500}), path)
    else:
        write(path, lines(str(number) * 3 for number in range(5000)))
    contents = path.read_bytes()
    path.write_bytes(contents[: len(contents) // 2] if damage == "truncated" else b"no such file")
    with pytest.raises(InputError, match=f"cannot read {path} .*; repair it, or leave it out"):
        read_all(path)


def test_what_is_not_there_or_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no file or folder .*nothing"):
        find_files([str(tmp_path / "nothing")])
    with pytest.raises(InputError, match=r"has no files of text; give .txt"):
        find_files([str(tmp_path)])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"a\.csv is of no known kind; give .txt"):
        find_files([str(tmp_path / "a.csv")])


def test_a_file_that_goes_away_is_refused(tmp_path):
    piece = FilePiece(str(tmp_path / "a.jsonl"), 0, 10, 10)
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl \(No such file"):
        list(read_piece(piece, "text", refuse))
