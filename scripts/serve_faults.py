"""Errors as the server tells them: JSON in the shape of OpenAI's, which names the field."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from exactivations.scripts.serve_flight import RETRY_SECONDS, ServeError
from exactivations.scripts.serve_schemas import Fault, FaultBody

WORDS = {
    400: "The body is no JSON.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    422: "A field has a value that cannot be used: `param` names it.",
    429: "The queue is full: ask again after the seconds that Retry-After says.",
    500: "A fault of the server.",
    503: "The memory did not suffice, the server is closing, or its engine has stopped.",
    504: "The deadline passed before the answer was complete.",
}
UNION = ("str", "list[", "function-", "constrained-")


def fault(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """Returns an answer that is none."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    body = FaultBody(error=Fault(message=message, type=kind, param=param, code=code)).model_dump()
    # In ASCII: what is wrong may be half a character, which is told escaped, as it came.
    answer = Response(json.dumps(body), status, media_type="application/json")
    if status == 429:
        answer.headers["Retry-After"] = str(RETRY_SECONDS)
    return answer


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the description of these statuses, for OpenAPI."""
    return {status: {"model": FaultBody, "description": WORDS[status]} for status in statuses}


def handle_faults(app: FastAPI) -> None:
    """Has the app tell all its errors in this way."""

    @app.exception_handler(ServeError)
    async def refused(request: Request, error: ServeError) -> Response:
        return fault(error.status, error.message, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union's alternatives the one that went furthest
        if found["type"] == "json_invalid":
            return fault(400, f"the body is no JSON: {found['ctx']['error']} at character {found['loc'][-1]}")
        param = _field(found["loc"])
        return fault(422, f"{param or 'the body'}: {found['msg'].removeprefix('Value error, ')}", param)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        answer = fault(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return fault(500, f"a fault of the server: {type(error).__name__}")  # its traceback is in the log


def _field(place: Sequence[str | int]) -> str | None:
    """Returns where a value is, as prompts.3; without the alternatives of a union that pydantic puts between."""
    parts = [str(part) for part in place[1:]]
    return ".".join([*parts[:1], *(part for part in parts[1:] if not part.startswith(UNION))]) or None
