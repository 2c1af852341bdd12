"""The HTTP face: OpenAI's API on Starlette.

Nothing that a client sends ends the server: bodies are bounded and checked, errors are JSON, and a
client that goes away frees its slots at the next step.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from plt_jax.errors import InputError
from plt_jax.serving.answers import (
    ChatAnswers,
    CompletionAnswers,
    TokenLog,
    TokenTexts,
    error,
    token_logs,
    usage,
)
from plt_jax.serving.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from plt_jax.serving.engine import EngineStoppedError
from plt_jax.serving.listening import Pieces
from plt_jax.serving.metrics import Metrics
from plt_jax.serving.model import ServedModel, new_seed
from plt_jax.serving.request import Finish
from plt_jax.serving.running import (
    Answer,
    RefusedError,
    Running,
    collect,
    failure_of,
    merged,
)
from plt_jax.serving.scheduler import QueueFullError

MOST_BODY_BYTES = 2**23
"""Bytes of the largest body that is read."""
OPEN_PATHS = ("/health", "/metrics")
"""Paths that need no API key."""

Body = TypeVar("Body", bound=BaseModel)


def make_app(model: ServedModel, metrics: Metrics, api_key: str | None = None) -> ASGIApp:
    """The application that serves a model.

    Args:
      api_key: what clients must send as their key; None if they need none.
    """
    face = _Face(model)
    routes = [
        Route("/v1/completions", face.completions, methods=["POST"]),
        Route("/v1/chat/completions", face.chat, methods=["POST"]),
        Route("/v1/models", face.models),
        Route("/v1/models/{name:path}", face.model),
        Route("/tokenize", face.tokenize, methods=["POST"]),
        Route("/detokenize", face.detokenize, methods=["POST"]),
        Route("/tokenizer_info", face.tokenizer_info),
        Route("/health", face.health),
        Route("/metrics", lambda _: Response(*metrics.text())),
    ]
    handlers: dict[Any, Any] = {
        RefusedError: lambda _, refused: _refuse(refused),
        InputError: lambda _, refused: _refuse(RefusedError(str(refused))),
        ClientDisconnect: lambda _, gone: Response(status_code=499),  # nobody reads it
        HTTPException: lambda _, refused: _refuse(
            RefusedError(str(refused.detail), refused.status_code)
        ),
        Exception: lambda _, failed: _refuse(
            RefusedError(f"the server failed: {type(failed).__name__}", 500)
        ),
    }
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
    return app if api_key is None else _KeyCheck(app, api_key)


class _KeyCheck:
    """Refuses requests without the API key."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                refused = RefusedError("the API key is missing or wrong", 401)
                await _refuse(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Stream(StreamingResponse):
    """Events that end with the connection, even if that is gone before the first of them."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


class _Face:
    """The answers to all requests."""

    def __init__(self, model: ServedModel):
        self._model = model
        self._texts = TokenTexts(model.tokenizer)

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_name(http.path_params["name"])
        return JSONResponse(self._card())

    async def health(self, http: HttpRequest) -> Response:
        alive = self._model.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def tokenize(self, http: HttpRequest) -> Response:
        body = await _read(http, TokenizeBody)
        tokenizer = self._model.reading(body.special_tokens)
        encode = tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode
        tokens = await asyncio.to_thread(encode, body.prompt)
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self._model.context}
        )

    async def detokenize(self, http: HttpRequest) -> Response:
        body = await _read(http, DetokenizeBody)
        if any(token >= self._model.vocab_size for token in body.tokens):
            raise RefusedError("tokens has one that the model does not have", 400, "tokens")
        text = await asyncio.to_thread(self._model.tokenizer.decode, body.tokens)
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, http: HttpRequest) -> Response:
        """What lm-eval asks for before it uses a server's tokenizer."""
        tokenizer, template = self._model.tokenizer, self._model.template
        bos = tokenizer.special.bos
        return JSONResponse(
            {
                "eos_token": tokenizer.name_of(tokenizer.eos),
                "bos_token": None if bos is None else tokenizer.name_of(bos),
                "chat_template": None if template is None else template.source,
            }
        )

    async def completions(self, http: HttpRequest) -> Response:
        body = await _read(http, CompletionBody)
        self._check_name(body.model)
        # In a thread, since long texts take seconds, in which no other client would be heard.
        prompts = await asyncio.to_thread(self._model.encode_completion, body)
        answers = CompletionAnswers(self._model.name, self._texts, body)
        runs = self._runs(prompts, body)
        if body.stream:
            if body.echo:
                raise RefusedError("echo cannot be streamed; ask without stream", 400, "echo")
            return await self._stream(runs, body, answers)
        if body.max_tokens == 0 and not runs[0].request.score_prompt:
            if not body.echo:
                raise RefusedError("max_tokens is 0; it must be 1 or more", 400, "max_tokens")
            whole = [Answer("", [], [], Finish.LENGTH) for _ in runs]
        else:
            whole = await self._whole(http, runs)
        choices = [
            self._completion(answers, index, run, answer, body.echo)
            for index, (run, answer) in enumerate(zip(runs, whole, strict=True))
        ]
        return JSONResponse(answers.whole(choices, _used(prompts, whole)))

    async def chat(self, http: HttpRequest) -> Response:
        body = await _read(http, ChatBody)
        self._check_name(body.model)
        prompts = [await asyncio.to_thread(self._model.encode_messages, body)]
        answers = ChatAnswers(self._model.name, self._texts, body)
        runs = self._runs(prompts, body)
        if body.stream:
            return await self._stream(runs, body, answers)
        whole = await self._whole(http, runs)
        choices = [
            answers.choice(index, answer.text, token_logs(answer.tokens), answer.finish)
            for index, answer in enumerate(whole)
        ]
        return JSONResponse(answers.whole(choices, _used(prompts, whole)))

    def _completion(
        self,
        answers: CompletionAnswers,
        index: int,
        run: Running,
        answer: Answer,
        echo: bool,
    ) -> dict[str, Any]:
        logs, text = token_logs(answer.tokens), answer.text
        if not echo:
            return answers.choice(index, text, logs, answer.finish)
        before = [TokenLog(run.prompt[0], None, None)]
        before += [
            TokenLog(token, score.log, score.alternatives)
            for token, score in zip(run.prompt[1:], answer.scores, strict=False)
        ]
        given = self._model.tokenizer.decode(run.prompt)
        return answers.choice(index, given + text, before + logs, answer.finish)

    def _runs(
        self, prompts: Sequence[Sequence[int]], body: CompletionBody | ChatBody
    ) -> list[Running]:
        """What the engine is asked: `n` answers to every prompt."""
        most = self._model.engine.scheduler.most_at_once
        if (count := len(prompts) * body.n) > most:
            raise RefusedError(f"{count} answers are asked for; the server takes {most} at once")
        loop, seed, runs = asyncio.get_running_loop(), new_seed(), []
        for prompt in prompts:
            for _ in range(body.n):
                pieces = Pieces(loop)
                listener = self._model.listener(prompt, body.stops, pieces.send)
                request = self._model.request(prompt, body, len(runs), seed, listener)
                runs.append(Running(prompt, request, pieces))
        return runs

    async def _whole(self, http: HttpRequest, runs: Sequence[Running]) -> list[Answer]:
        """All answers, when they have ended."""
        self._submit(runs)
        gathered = asyncio.ensure_future(asyncio.gather(*(collect(run) for run in runs)))
        gone = asyncio.ensure_future(_until_gone(http))
        try:
            await asyncio.wait({gathered, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not gathered.done():
                raise ClientDisconnect
            return gathered.result()
        finally:
            self._cancel(runs)
            gone.cancel()
            gathered.cancel()
            # Else their cancellation is reported as an error that nobody has seen.
            await asyncio.gather(gone, gathered, return_exceptions=True)

    async def _stream(
        self,
        runs: Sequence[Running],
        body: CompletionBody | ChatBody,
        answers: CompletionAnswers | ChatAnswers,
    ) -> Response:
        if any(run.request.max_new_tokens == 0 for run in runs):
            raise RefusedError("max_tokens is 0; it must be 1 or more", 400, "max_tokens")
        self._submit(runs)  # before the answer begins, so that a refusal has its own status
        return _Stream(self._events(runs, body, answers), lambda: self._cancel(runs))

    async def _events(self, runs, body, answers) -> AsyncIterator[str]:
        count = 0
        async for index, piece in merged(runs):
            count += len(piece.tokens)
            if (failure := failure_of(piece.finish)) is not None:
                yield _event(error(failure.message, failure.code))
                return
            choice = answers.piece(index, piece)
            yield _event(answers.chunk([choice], None, body.includes_usage))
        if body.includes_usage:
            prompt_tokens = sum(len(run.prompt) for run in runs[:: body.n])
            yield _event(answers.chunk([], usage(prompt_tokens, count), True))
        yield "data: [DONE]\n\n"

    def _submit(self, runs: Sequence[Running]) -> None:
        try:
            self._model.engine.submit([run.request for run in runs])
        except QueueFullError as full:
            raise RefusedError("too many requests wait; try again later", 429) from full
        except EngineStoppedError as stopped:
            raise RefusedError("the server is ending, or has failed", 503) from stopped

    def _cancel(self, runs: Sequence[Running]) -> None:
        for run in runs:
            self._model.engine.cancel(run.request)

    def _card(self) -> dict[str, Any]:
        model = self._model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "plt_jax",
            "max_model_len": model.context,
        }

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise RefusedError(
                f"the model {name} is not served here; there is {self._model.name}", 404, "model"
            )


async def _read(http: HttpRequest, kind: type[Body]) -> Body:
    """The body of a request."""
    contents = bytearray()
    try:
        async for part in http.stream():
            contents += part
            if len(contents) > MOST_BODY_BYTES:
                raise RefusedError(f"the body has more than {MOST_BODY_BYTES:,} bytes", 413)
        return kind.model_validate_json(bytes(contents))
    except ValidationError as wrong:
        first = wrong.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or None
        message = first["msg"].removeprefix("Value error, ")
        raise RefusedError(f"{place}: {message}" if place else message, 400, place) from wrong


async def _until_gone(http: HttpRequest) -> None:
    """Waits until the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _used(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> dict[str, int]:
    new = sum(len(answer.tokens) for answer in answers)
    return usage(sum(map(len, prompts)), new)


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _refuse(refused: RefusedError) -> Response:
    return JSONResponse(error(refused.message, refused.code, refused.parameter), refused.code)
