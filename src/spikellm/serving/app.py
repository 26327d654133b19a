"""The server's routes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from spikellm.serving.answers import ChatCompletion, Completion
from spikellm.serving.collect import Choices, GenerationFailedError
from spikellm.serving.engine import FullError, StoppedError
from spikellm.serving.generation import Asked
from spikellm.serving.hosts import may_be_called
from spikellm.serving.metrics import CONTENT_TYPE, Metrics
from spikellm.serving.protocol import (
    BadRequestError,
    ChatRequest,
    CompletionRequest,
    R,
    Request,
    read_request,
)
from spikellm.serving.replies import events_of, problem, whole_answer
from spikellm.serving.service import Service

MOST_BYTES = 4 << 20  # of a request
_OPEN = {"/health"}
_LEFT = 499  # the client has left; nobody reads it

_log = logging.getLogger("spikellm")
T = TypeVar("T")
Handler = Callable[[HTTPRequest], Awaitable[Response]]


class Routes:
    """Handlers of all paths.

    Args:
        key: that requests must carry, but for those of health; None for none.
        host: that the server is bound to.
    """

    def __init__(self, service: Service, metrics: Metrics, key: str | None, host: str) -> None:
        self._service, self._metrics, self._key, self._host = service, metrics, key, host
        self._reading = asyncio.Semaphore(1)  # requests are read one at a time, in a thread

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
                self._require_host(request)
                if path not in _OPEN:
                    self._require_key(request)
                response = await handler(request)
            except BadRequestError as error:
                response = problem(error.status, str(error), error.field, error.code)
            except FullError:
                response = problem(
                    503, "the server has as much to do as it takes on; try again", retry=1
                )
            except StoppedError:
                response = problem(503, "the server is being stopped")
            except GenerationFailedError as error:
                response = problem(503 if error.busy else 500, str(error))
            except ClientDisconnect:
                response = Response(status_code=_LEFT)
            except Exception as error:
                _log.exception("spikellm: %s failed", path)
                response = problem(500, f"unexpected {type(error).__name__}")
            self._metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return checked

    def _require_key(self, request: HTTPRequest) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = self._key or ""
        same = hmac.compare_digest(given.strip().encode(), known.encode())
        if self._key is not None and not (same and scheme.lower() == "bearer"):
            raise BadRequestError("no API key, or another one", None, 401, "invalid_api_key")

    def _require_host(self, request: HTTPRequest) -> None:
        if not may_be_called(self._host, name := request.headers.get("host", "")):
            raise BadRequestError(f"host {name!r} is not this server's name")

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
        asked = await self._read(request, CompletionRequest)
        each = await self._apart(lambda: self._service.completions(asked))
        form = Completion(self._service.name, self._service.tokenizer, each)
        return await self._answer(request, asked, each, form)

    async def _chat(self, request: HTTPRequest) -> Response:
        asked = await self._read(request, ChatRequest)
        each = await self._apart(lambda: self._service.chat(asked))
        form = ChatCompletion(self._service.name, self._service.tokenizer, each)
        return await self._answer(request, asked, each, form)

    async def _apart(self, work: Callable[[], T]) -> T:
        """Do what may take long in a thread, so that others are answered meanwhile."""
        async with self._reading:
            return await asyncio.to_thread(work)

    async def _read(self, request: HTTPRequest, kind: type[R]) -> R:
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
        found = await self._apart(lambda: read_request(kind, bytes(body)))
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
            events = events_of(choices, form, usage=usage)
            headers = {"cache-control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        collecting = asyncio.ensure_future(choices.collect())
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=_LEFT)
            return JSONResponse(whole_answer(form, collecting.result(), choices))
        finally:
            choices.give_up()
            for task in (collecting, leaving):
                task.cancel()


async def _left(request: HTTPRequest) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_problem(request: HTTPRequest, error: Exception) -> Response:
    found = cast(HTTPException, error)
    return problem(found.status_code, f"{request.method} {request.url.path}: {found.detail}")


def make_app(service: Service, metrics: Metrics, key: str | None, host: str) -> Starlette:
    """The application; its arguments are those of :class:`Routes`."""

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)

    return Starlette(
        routes=Routes(service, metrics, key, host).all(),
        exception_handlers={HTTPException: _http_problem},
        lifespan=running,
    )
