"""Documents in files of every kind, in pieces of every size."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.data.documents import FilePiece, find_files, read_piece, split_files
from plt_jax.errors import InputError

TEXTS = ["one", "zwei äöü\nthree", "", "  ", "four \u2028 五"]


def refuse(problem):
    raise AssertionError(problem)


def read_all(path, piece_bytes=2**20, field="text", report=refuse):
    pieces = split_files(find_files([str(path)]), piece_bytes)
    return [text for piece in pieces for text in read_piece(piece, field, report)]


def lines(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


def write(path, contents: str):
    """Writes text, compressed as the name says."""
    data = contents.encode("utf-8")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        arrow = pytest.importorskip("pyarrow")
        with arrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_each_line_is_a_document(name, tmp_path):
    assert read_all(write(tmp_path / name, lines(TEXTS))) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_each_text_file_is_a_document(name, tmp_path):
    assert read_all(write(tmp_path / name, "\ufeff" + TEXTS[1])) == [TEXTS[1]]


def test_each_row_is_a_document(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"n": [1, 2, 3, 4, 5, 6], "body": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pieces = split_files(find_files([str(tmp_path)]), 1)
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
    assert [path.name for path in found] == ["10.jsonl", "2.txt", "a.txt"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "is not JSON"),
        (b'"text"', "is not a JSON object"),
        (b'{"body": "x", "id": 2}', "has no text in 'text'; it has body, id"),
        (b'{"text": 3}', "has no text in 'text'; it has text"),
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
