"""A model that is served in the tests: it writes a text that is known, and has a chat template."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from plt_jax.commands import serve
from plt_jax.runs.directory import open_for_decoding
from tests.tokenizers_of_kinds import byte_level, write_chain_model
from tests.training.runs import output_of

TEXT = "the quick brown fox jumps over lazy dog.\n"
CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}the"
)
"""A template behind which the model goes on with TEXT."""


def library():
    return byte_level()


def import_model(folder: Path, **files: Any) -> Path:
    """Imports the model; returns its run directory, whose name is `served`.

    Args:
      files: see `write_chain_model`.
    """
    tokenizer = library()
    tokens = tokenizer.encode(TEXT, add_special_tokens=False).ids
    end = tokenizer.token_to_id("</s>")
    source = write_chain_model(
        folder / "source",
        tokenizer,
        [*tokens, end],
        config={"eos_token_id": end, "bos_token_id": tokenizer.token_to_id("<s>")},
        chat_template=CHATML,
        **files,
    )
    output_of("plt_jax.convert", "import", source, folder / "served")
    return folder / "served"


def options(**changed) -> Namespace:
    """The options of the command, with small slots."""
    values = {
        "name": None,
        "slots": 2,
        "context": None,
        "queue": 4,
        "prefill_tokens": 16,
        "prefix_cache_mb": 1,
        "cache_dtype": None,
        "weights": None,
    }
    return Namespace(**values | changed)


def build(run: Path, **changed):
    """The model and its numbers; the engine does not run yet."""
    return serve.build(open_for_decoding(run), options(**changed))
