"""Prepares the ablation's text: the State of the Union addresses and the standard library's source.

python benchmarks/speeches_and_code.py FOLDER

Each speech and each module is a document. Tests of the library are left out: they are twice as long
as the rest, and repeat themselves. The library is that of the Python that runs this.
"""

import json
import sys
import sysconfig
import tempfile
from pathlib import Path

from plt_jax.data.corpus import read_documents
from plt_jax.data.prepare import main as prepare

VOCABULARY, HELD_OUT = 4096, 0.02
LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}


def modules() -> list[str]:
    """The source of every module, in the order of their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in library.rglob("*.py") if not LEFT_OUT.intersection(path.parts))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in texts if text.strip()]


def main(folder: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        inputs = []
        for name, documents in (("speeches", read_documents("sotu")), ("code", modules())):
            inputs.append(str(Path(made, f"{name}.jsonl")))
            lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
            Path(inputs[-1]).write_text(lines, encoding="utf-8")
        options = {"--vocab_size": VOCABULARY, "--validation_fraction": HELD_OUT, "--out": folder}
        words = [str(word) for option in options.items() for word in option]
        sys.argv[1:] = [*inputs, *words]
        sys.exit(prepare())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
