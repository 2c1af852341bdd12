"""What a bucket's service does not answer is asked again, for a stated time and no longer."""

import aiohttp
import pytest
import requests
from gcsfs.retry import HttpError
from google.api_core import exceptions

from plt_jax.buckets import service
from plt_jax.buckets.service import patiently

BUSY = [
    HttpError({"code": 503, "message": "busy"}),
    HttpError({"code": 429, "message": "busy"}),
    aiohttp.ServerDisconnectedError(),
    requests.ConnectionError("busy"),
    exceptions.ServiceUnavailable("busy"),
    TimeoutError("busy"),
]
FINAL = [HttpError({"code": 403, "message": "no"}), exceptions.Forbidden("no"), ValueError("no")]


class Service:
    """Raises an error so many times, then answers."""

    def __init__(self, error, times):
        self.error, self.left, self.calls = error, times, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.left:
            raise self.error
        return "answer"


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(service, "FIRST_PAUSE", 0.01)


@pytest.mark.parametrize("error", BUSY, ids=lambda error: type(error).__name__)
def test_a_busy_service_is_asked_until_it_answers(error):
    asked = Service(error, times=3)
    assert patiently("gs://runs/a", asked) == "answer"
    assert asked.calls == 4


@pytest.mark.parametrize("error", BUSY, ids=lambda error: type(error).__name__)
def test_patience_has_an_end(monkeypatch, error):
    monkeypatch.setenv(service.PATIENCE, "0.1")
    asked = Service(error, times=1000)
    with pytest.raises(OSError, match="the bucket does not answer") as raised:
        patiently("gs://runs/a", asked)
    assert raised.value.filename == "gs://runs/a" and 1 < asked.calls < 20


@pytest.mark.parametrize("error", FINAL, ids=lambda error: type(error).__name__)
def test_a_refusal_is_not_asked_for_again(error):
    asked = Service(error, times=1)
    with pytest.raises(OSError, match="no") as raised:
        patiently("gs://runs/a", asked)
    assert "does not answer" not in str(raised.value) and asked.calls == 1


def test_what_is_not_there_is_a_file_that_is_not_found():
    with pytest.raises(FileNotFoundError) as raised:
        patiently("gs://runs/a", Service(FileNotFoundError("b/runs/o/a"), times=1))
    assert raised.value.strerror == "No such file or directory"
