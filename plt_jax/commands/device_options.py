"""The options --mesh.* and --processes.*: the devices and processes that run a trained model.

They are the fields of a run's configuration, with the same names and help.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

import pydantic
from pydantic_settings import BaseSettings, CliSettingsSource

from plt_jax.commands.config_options import read_source
from plt_jax.config import ProcessesConfig, RunConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.errors import InputError
from plt_jax.interop.options import DTYPES

if TYPE_CHECKING:  # it imports JAX
    from jax.sharding import Mesh

SECTIONS = ("mesh", "processes")
"""The sections of the configuration that say where a program runs."""

_fields: dict[str, Any] = {
    name: (RunConfig.model_fields[name].annotation, RunConfig.model_fields[name])
    for name in SECTIONS
}
_Options = pydantic.create_model("_Options", __base__=BaseSettings, **_fields)


class DeviceOptions:
    """The options of one command."""

    def __init__(self, parser: ArgumentParser):
        """Adds them to the command's parser."""
        self._source = CliSettingsSource(_Options, root_parser=parser)
        self._processes = ProcessesConfig()

    def connect(self, arguments: Namespace) -> Mesh | None:
        """Connects this process with the others, if there are any, and arranges all devices.

        It must be called before anything that needs devices.

        Args:
          arguments: what the parser has read.

        Returns:
          The mesh; None where no option asks for one and there is a single process, which leaves
          the choice of devices to the command.

        Raises:
          InputError: a value is refused, a process does not come or was given other options, or
            the sizes of the mesh do not multiply to the number of devices.
        """
        values = read_source(self._source, arguments)
        try:
            config = RunConfig.model_validate(values)
        except pydantic.ValidationError as error:
            raise InputError(describe_errors(error)) from error
        from plt_jax.distributed import processes, rendezvous
        from plt_jax.distributed.mesh import describe_devices, make_mesh

        self._processes = config.processes
        rendezvous.initialize(config.processes)
        given = {
            name: value
            for name, value in vars(arguments).items()
            if name.partition(".")[0] != "processes" and not callable(value)
        }
        processes.check_equal({"command line": repr(sorted(given.items()))}, self.timeout)
        if "mesh" not in values and processes.is_single():
            return None
        mesh = make_mesh(config.mesh)
        if processes.is_first():
            print(f"devices: {describe_devices(mesh)}", file=sys.stderr, flush=True)
        return mesh

    @property
    def timeout(self) -> int:
        """Seconds to wait for other processes."""
        return self._processes.timeout

    def finish(self, what: str) -> None:
        """Waits until all processes have come to their end, so that none ends well where another
        one fails; process 0 may still have to write.

        Args:
          what: a clause that says what has happened then.

        Raises:
          MissingProcessError: some processes did not come.
        """
        from plt_jax.distributed import processes

        processes.barrier(what, self.timeout)


def add_dtype(parser: ArgumentParser, what: str, default: str) -> None:
    """Adds --dtype.

    Args:
      what: the arrays that have it.
      default: whose dtype they have without the option, or as what.
    """
    parser.add_argument("--dtype", choices=DTYPES, help=f"dtype of the {what}; default: {default}")
