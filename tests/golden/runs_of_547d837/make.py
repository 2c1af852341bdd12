"""Makes the runs beside this file, and records what the code of commit 547d837 finds in them.

It imports names of that commit, so it runs in a checkout of it; FOLDER is the folder of this file:

    PYTHONPATH=. python FOLDER/make.py train FOLDER     trains the runs anew
    PYTHONPATH=. python FOLDER/make.py record FOLDER    writes expected.json and expected.npz

README.md says what is recorded.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

CASES = ("dense", "experts", "permutations")
PROMPT_LENGTH, NEW_TOKENS = 6, 10
VOCABULARY_STRIDE = 5  # Every fifth logit is kept, so that the files stay small.
COMMIT = Path.cwd()


def main():
    command, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    jax.config.update("jax_default_matmul_precision", "highest")
    {"train": train_all, "record": record_all}[command](folder)


def train_all(folder):
    with tempfile.TemporaryDirectory() as scratch:
        work = copy_inputs(folder, Path(scratch))
        for case in CASES:
            run("train.py", f"{case}.yaml", cwd=work)
            if case == "dense":
                shutil.copy(work / "dense" / "tokenizer.json", work)
        for name in (*CASES, "tokenizer.json"):
            target = folder / name
            if (work / name).is_dir():
                shutil.rmtree(target, ignore_errors=True)
                drop = shutil.ignore_patterns("tensorboard", "loss.png", ".lock")
                shutil.copytree(work / name, target, ignore=drop)
            else:
                shutil.copy(work / name, target)


def record_all(folder):
    numbers, arrays = {"made_by": versions()}, {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            numbers[case] = {
                "resumed_at_4": resume(folder, work / "from_4", case, 4),
                "resumed_at_8": resume(folder, work / "from_8", case, 8),
                "evaluation": evaluate(folder, work / "evaluated", case),
            }
            numbers[case] |= decode(folder / case, arrays, case)
    (folder / "expected.json").write_text(json.dumps(numbers, indent=1) + "\n")
    np.savez_compressed(folder / "expected.npz", **arrays)


def copy_inputs(folder, work):
    """Copies what the runs were made from."""
    for name in ("corpus", *[f"{case}.yaml" for case in CASES]):
        source = folder / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, work / name)
    return work


def run(*words, cwd):
    words = [str(COMMIT / words[0]), *words[1:]]
    environment = os.environ | {
        "PYTHONPATH": str(COMMIT),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    subprocess.run([sys.executable, *words], cwd=cwd, env=environment, check=True)


def resume(folder, work, case, step):
    """The rows of metrics.jsonl of the four steps behind a checkpoint, without times."""
    work.mkdir()
    copy_inputs(folder, work)
    shutil.copy(folder / "tokenizer.json", work)
    shutil.copytree(folder / case, work / case)
    if step == 4:
        shutil.rmtree(work / case / "checkpoints" / "8")
    run("train.py", f"{case}.yaml", "--training.steps", str(step + 4), cwd=work)
    rows = map(json.loads, (work / case / "metrics.jsonl").read_text().splitlines())
    kept = ("step", "loss", "gradient_norm", "learning_rate", "validation_loss", "bits_per_byte")
    return [
        {name: row[name] for name in kept if name in row}
        for row in rows
        if step < row["step"] <= step + 4
    ]


def evaluate(folder, work, case):
    """What eval.py writes."""
    work.mkdir()
    copy_inputs(folder, work)
    shutil.copytree(folder / case, work / case)
    run("eval.py", case, cwd=work)
    return json.loads((work / case / "eval.json").read_text())


def decode(directory, arrays, case):
    """Greedy tokens; adds the logits of decoding and of a forward pass to `arrays`."""
    from plt_jax.run import open_trained

    import plt_jax

    assert Path(plt_jax.__file__).is_relative_to(COMMIT), plt_jax.__file__
    trained = open_trained(directory)
    config, params = trained.config.model, trained.params
    prompt = jnp.arange(2 * PROMPT_LENGTH).reshape(2, PROMPT_LENGTH) * 19 % 250 + 4
    cache = plt_jax.init_cache(config, 2, PROMPT_LENGTH + NEW_TOKENS)
    prepared = plt_jax.prepare_for_decode(config, params)
    lengths = jnp.full(2, PROMPT_LENGTH)
    logits, cache = plt_jax.prefill(config, prepared, prompt, lengths, cache)
    greedy, decoded = [], []
    for _ in range(NEW_TOKENS):
        decoded.append(logits)
        greedy.append(jnp.argmax(logits, axis=-1))
        logits, cache = plt_jax.decode_step(config, prepared, greedy[-1], cache)
    tokens = jnp.concatenate([prompt, jnp.stack(greedy, axis=1)], axis=1)
    forward = plt_jax.Transformer(config).apply({"params": params}, tokens)
    for name, logits in (("decoded", jnp.stack(decoded, axis=1)), ("forward", forward)):
        arrays[f"{case}_{name}"] = np.asarray(logits[..., ::VOCABULARY_STRIDE], np.float32)
    return {"prompts": prompt.tolist(), "greedy": jnp.stack(greedy, axis=1).tolist()}


def versions():
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
    return {
        "commit": "547d837",
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
