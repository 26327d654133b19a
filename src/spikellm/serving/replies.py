"""Answers and errors on their way out: JSON, or events of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import JSONResponse

from spikellm.serving.answers import Completion
from spikellm.serving.collect import Answer, Choices


def whole_answer(form: Completion, answers: Sequence[Answer], choices: Choices) -> dict[str, Any]:
    """A whole answer, with what all choices took."""
    found = [
        form.choice(index, answer.text, answer.logprobs, answer.finish)
        for index, answer in enumerate(answers)
    ]
    return form.whole(found, choices.usage)


async def events_of(choices: Choices, form: Completion, *, usage: bool) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    unused: dict[str, Any] = {"usage": None} if usage else {}
    try:
        for index in range(len(choices)):
            if begun := form.begin(index):
                yield _event({**form.chunk(begun), **unused})
        async for index, piece in choices.pieces():
            if piece.error is not None:
                yield _event({"error": _error(503 if piece.busy else 500, piece.error)})
                return
            delta = form.delta(index, piece, known=choices.known(index))
            yield _event({**form.chunk([delta]), **unused})
        if usage:
            yield _event(form.chunk([], choices.usage))
        yield "data: [DONE]\n\n"
    finally:
        choices.give_up()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


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
