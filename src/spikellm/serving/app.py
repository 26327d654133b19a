"""The server's routes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from spikellm.serving.answers import ChatCompletion, Completion
from spikellm.serving.collect import Answer, Choices, GenerationFailedError
from spikellm.serving.engine import FullError
from spikellm.serving.generation import Asked
from spikellm.serving.metrics import CONTENT_TYPE, Metrics
from spikellm.serving.protocol import (
    BadRequestError,
    ChatRequest,
    CompletionRequest,
    Request,
    read_request,
)
from spikellm.serving.service import Service

MOST_BYTES = 4 << 20  # of a request
_OPEN = {"/health"}

Handler = Callable[[HTTPRequest], Awaitable[Response]]


class Routes:
    """Handlers of all paths.

    Args:
        key: that requests must carry, but for those of health; None for none.
    """

    def __init__(self, service: Service, metrics: Metrics, key: str | None) -> None:
        self._service, self._metrics, self._key = service, metrics, key

    def all(self) -> list[Route]:
        """Paths and their handlers."""
        return [
            Route("/health", self._checked("/health", self._health)),
            Route("/metrics", self._checked("/metrics", self._figures)),
            Route("/v1/models", self._checked("/v1/models", self._models)),
            Route("/v1/models/{name:path}", self._checked("/v1/models", self._model)),
            Route(
                "/v1/completions",
                self._checked("/v1/completions", self._completions),
                methods=["POST"],
            ),
            Route(
                "/v1/chat/completions",
                self._checked("/v1/chat/completions", self._chat),
                methods=["POST"],
            ),
        ]

    def _checked(self, path: str, handler: Handler) -> Handler:
        """A handler behind the key, whose errors are answers, and whose answers are counted."""

        async def checked(request: HTTPRequest) -> Response:
            try:
                if path not in _OPEN:
                    self._require_key(request)
                response = await handler(request)
            except BadRequestError as error:
                response = problem(error.status, str(error), error.field, error.code)
            except FullError:
                response = problem(
                    503, "the server has as much to do as it takes on; try again", retry=1
                )
            except GenerationFailedError as error:
                response = problem(500, str(error))
            self._metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return checked

    def _require_key(self, request: HTTPRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self._key is not None and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise BadRequestError("no API key, or another one", None, 401, "invalid_api_key")

    async def _health(self, request: HTTPRequest) -> Response:
        engine = self._service.engine
        state = {
            "status": "ok" if engine.alive else "stopped",
            "model": self._service.name,
            "running": engine.running,
            "waiting": engine.waiting,
        }
        return JSONResponse(state, 200 if engine.alive else 503)

    async def _figures(self, request: HTTPRequest) -> Response:
        self._metrics.running.set(self._service.engine.running)
        self._metrics.waiting.set(self._service.engine.waiting)
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _model(self, request: HTTPRequest) -> Response:
        name = request.path_params["name"]
        if name != self._service.name:
            raise BadRequestError(f"no model {name!r}", "model", 404, "model_not_found")
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": 0, "owned_by": "spikellm"}

    async def _completions(self, request: HTTPRequest) -> Response:
        asked = cast(CompletionRequest, await self._read(request, CompletionRequest))
        form = Completion(self._service.name, self._service.tokenizer)
        return await self._answer(request, asked, self._service.completions(asked), form)

    async def _chat(self, request: HTTPRequest) -> Response:
        asked = cast(ChatRequest, await self._read(request, ChatRequest))
        form = ChatCompletion(self._service.name, self._service.tokenizer)
        return await self._answer(request, asked, self._service.chat(asked), form)

    async def _read(self, request: HTTPRequest, kind: type[Request]) -> Request:
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":
            raise BadRequestError(
                f"content type {sent or 'none'}; expected application/json", None, 415
            )
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise BadRequestError(f"the body has more than {MOST_BYTES} bytes", None, 413)
        found = read_request(kind, bytes(body))
        self._service.require_name(found)
        return found

    async def _answer(
        self, request: HTTPRequest, asked: Request, each: Sequence[Asked], form: Completion
    ) -> Response:
        if asked.stream_options and not asked.stream:
            raise BadRequestError("stream_options have no effect without stream", "stream_options")
        engine = self._service.engine
        choices = Choices(engine, self._service.tokenizer, each)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = _events(choices, form, usage=usage)
            headers = {"cache-control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        collecting = asyncio.ensure_future(choices.collect())
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(_whole(form, collecting.result(), choices))
        finally:
            choices.give_up()
            for task in (collecting, leaving):
                task.cancel()


def _whole(form: Completion, answers: Sequence[Answer], choices: Choices) -> dict[str, Any]:
    found = [
        form.choice(index, answer.text, answer.logprobs, answer.finish)
        for index, answer in enumerate(answers)
    ]
    return form.whole(found, choices.usage)


async def _events(choices: Choices, form: Completion, *, usage: bool) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    try:
        for index in range(len(choices)):
            if begun := form.begin(index):
                yield _event(form.chunk(begun))
        async for index, piece in choices.pieces():
            if piece.error is not None:
                yield _event({"error": _error(500, piece.error)})
                return
            yield _event(form.chunk([form.delta(index, piece, known=choices.known(index))]))
        if usage:
            yield _event(form.chunk([], choices.usage))
        yield "data: [DONE]\n\n"
    finally:
        choices.give_up()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _left(request: HTTPRequest) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(
    status: int, message: str, field: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": field, "code": code}


def problem(
    status: int,
    message: str,
    field: str | None = None,
    code: str | None = None,
    retry: int | None = None,
) -> JSONResponse:
    """What went wrong, as the protocol has it."""
    headers = {} if retry is None else {"retry-after": str(retry)}
    return JSONResponse({"error": _error(status, message, field, code)}, status, headers=headers)


async def _http_problem(request: HTTPRequest, error: Exception) -> Response:
    found = cast(HTTPException, error)
    return problem(found.status_code, f"{request.method} {request.url.path}: {found.detail}")


def make_app(
    service: Service, metrics: Metrics, key: str | None, hosts: Sequence[str]
) -> Starlette:
    """The application.

    Args:
        hosts: names that requests may give as the server's; ``*`` for any.
    """

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)

    return Starlette(
        routes=Routes(service, metrics, key).all(),
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={HTTPException: _http_problem},
        lifespan=running,
    )
