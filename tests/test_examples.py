"""The notebook of examples/ runs from its first cell to its last, and is kept without results."""

import ast
import importlib
import os
from unittest import mock

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from plt_jax.config.yaml_file import merge
from tests.training.runs import REPOSITORY, environment, write_config

EXAMPLES = REPOSITORY / "examples"
NOTEBOOK = EXAMPLES / "looping_in_a_minute.ipynb"
SMALLER = {
    "model": {
        "vocab_size": 512,
        "max_length": 128,
        "width": 48,
        "ffn_width": 96,
        "layer_unroll": 1,
    },
    "data": {"validation_fraction": 0.01},  # evaluations read all of it
}
"""What the test trains, where it differs from the notebook's."""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow(reason="a kernel of its own trains, measures and decodes a model")
def test_the_notebook_runs_and_draws(notebook, tmp_path):
    """Its last cell asserts that decoding is the forward pass."""
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    )
    values = yaml.safe_load((REPOSITORY / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    path = write_config(tmp_path / "smaller.yaml", merge(values, SMALLER))
    parameters.source = "\n".join(
        f"{name} = {value!r}"
        for name, value in {
            "CONFIG": str(path),
            "STEPS": 3,
            "LOOPS": 3,
            "RUN": str(tmp_path / "run"),
        }.items()
    )
    variables = environment(HOME=str(tmp_path), JAX_PLATFORMS="cpu")
    where = {"metadata": {"path": str(EXAMPLES)}}
    with mock.patch.dict(os.environ, variables):
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert "fixed-point gap" in printed
    assert "largest difference" in printed


def test_what_the_notebook_imports_exists(notebook):
    """The same in no time, for those who rename things."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_no_results_are_kept(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
