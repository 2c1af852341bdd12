"""The session's finished run."""

import pytest

from tests.training.runs import finished_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())
