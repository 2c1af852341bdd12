"""Reads files that strangers may have made wrong: each is read, or refused in one line.

python -m tests.end_to_end.file_fuzz_worker FOLDER --cases 300 --seed 0

Prints a JSON line for each failure and one with the counts. A case that takes more than a minute,
or 2 GiB more than sound files do, ends the process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import plt_jax
from plt_jax.checkpoint.manifest import MANIFEST, OWN, _dump, find_damage
from plt_jax.config.yaml_file import load_resolved
from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import write_corpus
from plt_jax.data.token_bytes import token_bytes
from plt_jax.data.tokenized_corpus import find_problems, open_tokenized_corpus
from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.decoding.chat import load_chat_template
from plt_jax.errors import FailedError, InputError
from plt_jax.reports.loss_plot import plot_losses
from plt_jax.reports.run_page import write_report
from plt_jax.runs.directory import find_checkpoint, read_params
from tests.models import random_params, small_config
from tests.training.runs import finished_run

SECONDS, MEMORY = 60, 2 * 2**30
HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**200, 1e308, 0.5, float("nan"), float("inf")),
    *("", "x", "../../x", "/dev/zero", "/etc/passwd", "a\0b", "\x1b[31m", "\ud800", "x" * 10_000),
    *([], {}, [[]], [1] * 1000, {"": {}}, ["../x"], {"a": [None]}),
]


class Kind(NamedTuple):
    """A kind of file."""

    folder: Path
    """A folder with a sound one."""
    file: str
    read: Callable[[Path], object]
    """Reads it in a copy of the folder."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Corrects what belongs to the file, as sizes and checksums, after it was changed."""


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def changed(content: bytes, rng: random.Random) -> bytes:
    """A file with a few changes of its bytes, or of the values in its JSON."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines)) if lines else 0
    try:
        whole = lines[at] if rng.random() < 0.5 and len(lines) < 40 else content
        values = json.loads(whole)
    except ValueError:
        return flipped(content, rng)
    if rng.random() < 0.2:
        return flipped(content, rng)
    for _ in range(rng.choice([1, 1, 1, 3])):
        values = with_hostile_value(values, rng)
    text = json.dumps(values)
    if rng.random() < 0.1:
        text = text.replace("1", deep(rng.choice([100, 100_000])), 1)
    return content.replace(whole, text.encode("utf-8", "surrogatepass"), 1)


def flipped(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place : place + rng.choice([1, 8, 1000])]
            case 2:
                data[place:place] = rng.randbytes(rng.choice([1, 8, 1000]))
            case 3:
                data[place : place + 8] = rng.choice([b"\xff", b"\0", b"9", b"["]) * 8
    return bytes(data)


def with_hostile_value(values: Any, rng: random.Random) -> Any:
    """The values with one of them, at any depth, replaced, removed or added."""
    if not isinstance(values, dict | list) or not values or rng.random() < 0.1:
        return rng.choice(HOSTILE)
    if isinstance(values, list):
        at = rng.randrange(len(values))
        return [*values[:at], with_hostile_value(values[at], rng), *values[at + 1 :]]
    key = rng.choice(list(values))
    rest = {name: value for name, value in values.items() if name != key}
    match rng.randrange(8):
        case 0:
            return rest
        case 1:
            return rest | {rng.choice(["", "../x", "x\0", key + "_"]): values[key]}
    return values | {key: with_hostile_value(values[key], rng)}


def kinds(home: Path) -> dict[str, Kind]:
    """Sound files of all kinds, below a folder."""
    run = finished_run(home).directory
    checkpoint = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    config = small_config("plt", 2, vocab_size=32)
    for name, size in (("model", 10**9), ("shards", 3000)):
        plt_jax.save_huggingface(home / name, config, random_params(config), shard_bytes=size)
    texts = ["the state of the union is strong", "peace goes on " * 40]
    tokenizer = train_tokenizer(texts, 300, 2)
    (home / "text").mkdir()
    (home / "text" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    options = CorpusOptions(validation_fraction=0.5)

    def prepare_corpus(folder: Path) -> object:
        return write_corpus([str(home / "text")], folder, tokenizer, options, 1, _silent)

    prepare_corpus(home / "corpus")
    (home / "tokenizer").mkdir()
    tokenizer.save(home / "tokenizer")
    (home / "tokenizer" / "special_tokens.json").unlink()
    settings = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}}
    settings |= {"chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"}
    for name, values in (
        ("tokenizer_config", settings | {"add_bos_token": True}),
        ("generation_config", {"eos_token_id": [1, 0]}),
    ):
        (home / "tokenizer" / f"{name}.json").write_text(json.dumps(values))
    shard = next(path.name for path in (home / "corpus").glob("training-*"))

    def read_corpus(folder: Path) -> object:
        with contextlib.suppress(InputError):
            stream = open_tokenized_corpus(folder).stream("training")
            stream.read(0, min(len(stream), 10**6))
        return find_problems(folder)

    def read_tokenizer(folder: Path) -> object:
        found = load_tokenizer(folder / "tokenizer.json")
        with contextlib.suppress(InputError):
            token_bytes(found, 400)
        template = load_chat_template(folder, found)
        text = template.render([{"role": "user", "content": "hello"}])
        tokens = found.reading_special.encode_prompt(text)
        return found.decode_continuation(tokens[:2], found.continuing.encode("a\nb"))

    def read_run(folder: Path) -> object:
        found = find_checkpoint(folder)
        load_tokenizer(folder / "tokenizer.json")
        return read_params(found)

    def read_rows(folder: Path) -> None:
        plot_losses(folder)
        write_report(str(folder))

    corpus, part = home / "corpus", "parts/00000.json"
    return {
        "checkpoint manifest": Kind(checkpoint, MANIFEST, find_damage, _sign),
        "config.yaml": Kind(run, "config.yaml", lambda at: load_resolved(at / "config.yaml")),
        "orbax metadata": Kind(run, f"checkpoints/{checkpoint.name}/params/_METADATA", read_run),
        "metrics.jsonl": Kind(run, "metrics.jsonl", read_rows),
        "special_tokens.json": Kind(run, "special_tokens.json", read_run),
        "corpus manifest": Kind(corpus, "manifest.json", read_corpus),
        "shard": Kind(corpus, shard, read_corpus, _declare(shard)),
        "plan.json": Kind(corpus, "parts/plan.json", prepare_corpus),
        "part": Kind(corpus, part, prepare_corpus),
        "config.json": Kind(home / "model", "config.json", plt_jax.load_huggingface),
        "safetensors": Kind(home / "model", "model.safetensors", plt_jax.load_huggingface),
        "index.json": Kind(
            home / "shards", "model.safetensors.index.json", plt_jax.load_huggingface
        ),
        "tokenizer.json": Kind(home / "tokenizer", "tokenizer.json", read_tokenizer),
        "tokenizer_config.json": Kind(home / "tokenizer", "tokenizer_config.json", read_tokenizer),
        "generation_config.json": Kind(
            home / "tokenizer", "generation_config.json", read_tokenizer
        ),
        "JSON lines": Kind(
            home / "text",
            "a.jsonl",
            lambda at: write_corpus([str(at)], at.parent / "o", tokenizer, options, 1, _silent),
        ),
    }


def _silent(*_: object) -> Callable[..., None]:
    return lambda *_: None


def _sign(folder: Path) -> None:
    """Gives a checkpoint's manifest the checksum of its fields, as one made on purpose has."""
    with contextlib.suppress(ValueError, KeyError, AttributeError, RecursionError, TypeError):
        fields = json.loads((folder / MANIFEST).read_bytes())
        fields.pop(OWN)
        (folder / MANIFEST).write_text(_dump(fields))


def _declare(shard: str) -> Callable[[Path], None]:
    """Gives a shard's size and checksum to the manifest of its corpus."""

    def declare(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text())
        content = (folder / shard).read_bytes()
        for entry in values["shards"]:
            if entry["name"] == shard:
                entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(values))

    return declare


def attempt(kind: Kind, content: bytes) -> str:
    """How reading a changed file ends: "read", "refused", or what is wrong with that."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "copy"
        shutil.copytree(kind.folder, folder, symlinks=True)
        (folder / kind.file).write_bytes(content)
        kind.prepare(folder)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                kind.read(folder)
        except (InputError, FailedError) as error:
            text = str(error)
            sound = len(text.splitlines()) == 1 and len(text) < 3000 and text.isprintable()
            return "refused" if sound else f"is no short line: {text[:200]!r}"
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {str(error)[:200]} ({place.filename}:{place.lineno})"
        finally:
            signal.alarm(0)
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="the only kind to try")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    all_kinds = kinds(arguments.folder)
    chosen = [arguments.kind] if arguments.kind else list(all_kinds)
    for name in chosen:
        kind = all_kinds[name]
        found = attempt(kind, (kind.folder / kind.file).read_bytes())
        assert found == "read", f"the sound {name}: {found}"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    counts, failures = collections.Counter[str](), 0
    for number in range(arguments.cases):
        name = chosen[number % len(chosen)]
        kind = all_kinds[name]
        rng = random.Random(f"{arguments.seed} {number} {name}")
        content = changed((kind.folder / kind.file).read_bytes(), rng)
        print(json.dumps({"trying": name, "case": number}), flush=True)
        found = attempt(kind, content)
        counts[found if found in ("read", "refused") else "failed"] += 1
        if found not in ("read", "refused"):
            failures += 1
            print(json.dumps({"kind": name, "case": number, "failure": found}), flush=True)
    print(json.dumps({"cases": arguments.cases, **counts}), flush=True)


if __name__ == "__main__":
    main()
