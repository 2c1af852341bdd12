"""What a training run needs, checked and built before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from plt_jax.config import ProcessesConfig, RunConfig
from plt_jax.data.cache import fingerprint
from plt_jax.data.load import Data, load_data
from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.distributed.mesh import describe_devices, make_mesh, use_mesh
from plt_jax.errors import InputError
from plt_jax.evaluation.perplexity import Evaluation, make_evaluate
from plt_jax.model.attention import choose_backend, fastest_backend
from plt_jax.model.costs import describe_loops
from plt_jax.model.grouped import choose_kernel
from plt_jax.model.kernels import traced_platform
from plt_jax.runs.names import CONFIG
from plt_jax.runs.resume import check_directory, check_text
from plt_jax.training.program import TrainProgram
from plt_jax.training.start import check_start_from
from plt_jax.training.trackers import check_wandb


class RunSetup(NamedTuple):
    """What stays fixed while a run trains."""

    config: RunConfig
    program: TrainProgram
    data: Data
    evaluate: Callable[[Any, Any, int | None], Evaluation]
    """See `make_evaluate`."""
    kernels: str
    """What computes attention and experts, for people."""
    changes: list[str]
    """What has changed in the configuration since the run's last start."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.config.directory

    @property
    def mesh(self) -> Mesh:
        """The mesh that the run trains on."""
        return self.program.mesh


def set_up(config: RunConfig) -> RunSetup:
    """Checks that a run can start, and builds what it needs; nothing is written to its directory.

    Raises:
      InputError: something does not fit the configuration.
    """
    changes = check_directory(config)
    check_start_from(config)
    mesh = make_mesh(config.mesh)
    program = TrainProgram.build(config, mesh)
    kernels = describe_kernels(config, mesh)
    check_wandb(config.training.wandb_project)
    data = load_data(config, program.batch_layout.rows)
    check_text(config, data.tokenizer, data.fingerprint)
    check_sample_prompt(config, data.tokenizer)
    evaluate = make_evaluate(config, mesh, data.token_bytes)
    return RunSetup(config, program, data, evaluate, kernels, changes)


def shared_state(setup: RunSetup) -> dict[str, str]:
    """What must be the same in all processes, by name."""
    # Each machine may have a cache of its own.
    data = setup.config.data.model_copy(update={"cache_dir": ""})
    shared = setup.config.model_copy(update={"processes": ProcessesConfig(), "data": data})
    return {
        "configuration": shared.model_dump_json(),
        "tokenizer": fingerprint([setup.data.tokenizer.identity]),
        "text": setup.data.fingerprint,
    }


def check_shared_directory(directory: Path) -> None:
    """Checks that this process sees the run directory that process 0 has written.

    Raises:
      InputError: it does not.
    """
    if not (directory / CONFIG).is_file():
        raise InputError(
            f"the run directory {directory} is not the one that process 0 has made; it must be on "
            "a file system that all share"
        )


def describe_kernels(config: RunConfig, mesh: Mesh) -> str:
    """What computes attention and experts on the mesh, and what would be faster there.

    Raises:
      InputError: the devices cannot run the kernels that the model names.
    """
    model = config.model
    with use_mesh(mesh):
        backend = choose_backend(model)
        chosen = [f"attention: {backend}"]
        if model.attention == "auto" and backend != fastest_backend():
            chosen[0] += f" (not {fastest_backend()}: {model.cudnn_obstacle})"
        if model.moe.experts:
            kernel = choose_kernel(model.moe)
            chosen.append(f"experts: {kernel}")
            auto = model.moe.grouped_product == "auto"
            if auto and kernel == "blocks" and traced_platform() == "gpu":
                chosen[-1] += " (tokamax is made for GPUs: pip install 'plt_jax[tokamax]')"
    return ", ".join(chosen)


def check_sample_prompt(config: RunConfig, tokenizer: TextTokenizer) -> None:
    """Checks that the sample prompt leaves room in the context.

    Raises:
      InputError: it does not.
    """
    length = len(tokenizer.encode_prompt(config.training.sample_prompt))
    if length >= config.model.max_length:
        raise InputError(
            f"training.sample_prompt has {length} tokens, but the context holds "
            f"{config.model.max_length} (model.max_length), one of them new; shorten it"
        )


def print_setup(setup: RunSetup) -> None:
    """Prints what is about to be trained, and on which devices."""
    config = setup.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.program.abstract_state.params))
    print(f"run directory {config.run_dir}")
    for change in setup.changes:
        print(f"changed since its last start: {change}")
    print(f"model: {describe_loops(config.model)}, {parameters:,} parameters, {config.model.dtype}")
    for line in setup.data.about:
        print(line)
    print(f"devices: {describe_devices(setup.mesh)}")
    print(setup.kernels, flush=True)
