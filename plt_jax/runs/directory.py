"""Run directories: how their checkpoints are found and opened, and how imported models become one.

names.py lists the files of a run directory; resume.py checks and writes those of training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from plt_jax.checkpoint.damage import refuse_damaged
from plt_jax.checkpoint.params import OnDemand, ParamsReader
from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import save_params
from plt_jax.config import MeshConfig, RunConfig
from plt_jax.config.yaml_file import dump_config, load_resolved
from plt_jax.data.tokenizer import HUGGINGFACE, TOKENIZER, TextTokenizer, load_tokenizer
from plt_jax.decoding.quantization import dequantize_params
from plt_jax.distributed import processes
from plt_jax.distributed.mesh import abstract_arrays, make_mesh
from plt_jax.errors import InputError
from plt_jax.files.folders import copy_file, new_folder
from plt_jax.files.paths import to_path
from plt_jax.files.writing import to_json, write_text
from plt_jax.model.kernels import is_hopper
from plt_jax.model.looping import with_loops
from plt_jax.model.transformer import abstract_params
from plt_jax.runs.names import CHECKPOINTS, CONFIG, ORIGIN, locate
from plt_jax.runs.quantized import QuantizedReader, is_quantized_checkpoint, to_parts

WAIT_SECONDS = 300
"""How long processes that write files together wait for one another."""


class Found(NamedTuple):
    """A checkpoint, and the run that it belongs to."""

    directory: Path
    """The run directory."""
    config: RunConfig
    step: int


class Trained(NamedTuple):
    """A checkpoint that is opened for evaluation or decoding."""

    directory: Path
    """The run directory."""
    config: RunConfig
    tokenizer: TextTokenizer
    step: int
    params: Any
    """See `read_params`, or `params_on_demand`."""


def open_trained(
    path: str | Path,
    mesh: Mesh | None = None,
    loops: int | None = None,
    *,
    dtype: str | None = None,
) -> Trained:
    """Opens a run directory (its newest checkpoint) or one of its `checkpoints/STEP` folders.

    Args:
      mesh: the mesh of the parameters, by the rules of distributed/mesh.py; default one device. It
        need not be the one that they were trained on.
      loops: number of loops to run; default as many as the model was trained with.
      dtype: see `read_params`.

    Raises:
      InputError: the path is neither, holds no checkpoint, or has no tokenizer; or the scheme
        cannot run so many loops.
    """
    return _open(find_checkpoint(path), loops, lambda found: read_params(found, mesh, dtype))


def open_for_decoding(
    path: str | Path,
    mesh: Mesh | None = None,
    loops: int | None = None,
    *,
    dtype: str | None = None,
) -> Trained:
    """As `open_trained`, for `prepare_for_decode`, which reads parameters where it lays them out.

    So all parameters and all laid out weights are never in memory together. Weights that are stored
    in eight bits stay so.

    Raises:
      InputError: see `open_trained`; `prepare_for_decode` raises it, too, where a parameter cannot
        be read, such as where its checkpoint has been removed since.
    """
    return _open(find_checkpoint(path), loops, lambda found: params_on_demand(found, mesh, dtype))


def _open(found: Found, loops: int | None, read: Callable[[Found], Any]) -> Trained:
    """Opens a checkpoint, whose parameters `read` reads; see `open_trained`."""
    directory, config, step = found
    # The tokenizer is read first, since the parameters take longer.
    tokenizer = tokenizer_of(found)
    if tokenizer is None:
        raise InputError(
            f"{directory} was imported without a tokenizer; import it again with --tokenizer FILE"
        )
    tokenizer.check_size(config.model.vocab_size)
    params = read(found)
    # This machine need not have the kernels that the model was trained with.
    moe = config.model.moe.model_copy(update={"grouped_product": "auto"})
    kernels = {"attention": "auto", "moe": moe}
    if not is_hopper():
        kernels["decode_attention"] = "auto"
    model = config.model.model_copy(update=kernels)
    if loops is not None:
        model, params = with_loops(model, params, loops)
    return Trained(directory, config.model_copy(update={"model": model}), tokenizer, step, params)


def find_checkpoint(path: str | Path) -> Found:
    """The checkpoint that a path names: one checkpoint's folder, or a run directory's newest.

    Raises:
      InputError: the path leads to no complete checkpoint.
    """
    directory, step = locate(path)
    steps = list_steps(directory / CHECKPOINTS)
    if not steps:
        raise InputError(
            f"{directory / CHECKPOINTS} holds no checkpoint; train until the first is saved"
        )
    if step is not None and step not in steps:
        raise InputError(f"{path} is not a complete checkpoint; there are {steps}")
    step = steps[-1] if step is None else step
    return Found(directory, load_resolved(directory / CONFIG), step)


def tokenizer_of(found: Found) -> TextTokenizer | None:
    """The tokenizer of a run; None if it was imported without one.

    Raises:
      InputError: it cannot be read.
    """
    path = found.directory / TOKENIZER
    if not path.exists() and (found.directory / HUGGINGFACE).exists():
        return None
    return load_tokenizer(path)


def read_params(
    found: Found, mesh: Mesh | None = None, dtype: str | None = None, quantized: bool = False
) -> Any:
    """A checkpoint's parameters, as `Transformer.init` gives them, unboxed.

    Args:
      mesh: the mesh of the parameters, by the rules of distributed/mesh.py; default one device.
      dtype: the dtype that they are read into; default: as they were stored.
      quantized: whether weights that are stored in eight bits are returned as `quantize_params`
        gives them, instead of as the float32 numbers that they stand for.

    Raises:
      InputError: the checkpoint is damaged, cannot be read, or has other shapes than its
        configuration.
    """
    reader = _reader_of(found, mesh, dtype)
    params = reader.read(reader.abstract)
    return params if quantized else dequantize_params(params, dtype or "float32")


def params_on_demand(found: Found, mesh: Mesh | None = None, dtype: str | None = None) -> OnDemand:
    """A checkpoint's parameters, each of which is read where it is asked for. Those that are stored
    in eight bits are as `quantize_params` gives them.

    The arguments and errors are those of `read_params`; a parameter that cannot be read is found
    out where it is asked for.
    """
    reader = _reader_of(found, mesh, dtype)
    return OnDemand(reader.abstract, reader.read)


def _reader_of(
    found: Found, mesh: Mesh | None, dtype: str | None
) -> ParamsReader | QuantizedReader:
    """What reads a checkpoint's parameters, once its files are found to be whole."""
    if found.config.checkpoint.verify:
        refuse_damaged(found.directory / CHECKPOINTS, found.step, ["params"])
    boxed = abstract_params(found.config.model)
    abstract = abstract_arrays(boxed, mesh or make_mesh(MeshConfig(), jax.local_devices()[:1]))
    directory = found.directory / CHECKPOINTS
    if is_quantized_checkpoint(directory, found.step):
        return QuantizedReader(directory, found.step, abstract)
    return ParamsReader(directory, found.step, abstract, as_stored=True, dtype=dtype)


def create_run(
    config: RunConfig,
    params: Any,
    tokenizer: TextTokenizer | None,
    files: Mapping[str, Path],
    origin: Mapping[str, str | None] | None = None,
) -> None:
    """Makes a run directory with one checkpoint, of step 0, that holds only parameters.

    With several processes all must call it. Each writes the parameters that its devices hold, and
    process 0 all else; it is complete when process 0 returns.

    Args:
      params: as `Transformer.init` gives them, unboxed, or as `quantize_params` does.
      tokenizer: the run's tokenizer, if there is one.
      files: files to copy to its huggingface/ folder, by name.
      origin: where on the Hugging Face Hub they are from, for the folder's ORIGIN.

    Raises:
      InputError: the directory holds something, or cannot be written to; nothing is left then.
    """
    with _new_shared_folder(config.directory) as directory:
        if processes.is_first():
            write_text(directory / CONFIG, dump_config(config))
            if tokenizer is not None:
                tokenizer.save(directory)
            (directory / HUGGINGFACE).mkdir()
            for name, file in files.items():
                copy_file(file, directory / HUGGINGFACE / name)
            if origin is not None:
                write_text(directory / HUGGINGFACE / ORIGIN, to_json(origin, indent=2) + "\n")
        save_params(directory / CHECKPOINTS, 0, to_parts(params), WAIT_SECONDS)


@contextlib.contextmanager
def _new_shared_folder(path: Path) -> Iterator[Path]:
    """Yields the folder of `new_folder`, which process 0 makes, in all processes.

    Raises:
      InputError: see `new_folder`.
    """
    # In a bucket the folder has its name from the beginning, and all have to see it empty.
    processes.barrier("the destination is checked", WAIT_SECONDS)
    if processes.is_first():
        with new_folder(path) as folder:
            processes.broadcast(str(folder), WAIT_SECONDS)
            yield folder
        return
    try:
        yield to_path(processes.broadcast("", WAIT_SECONDS))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
