"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} under a status that says whose fault it was.

400  the request cannot be served (RequestError, a field out of range)      404  no such model or path
413  the body is too large                                                  500  this request failed, as with logits that are not finite
503  the queue is full or closing (a Retry-After comes with it), or the engine is dead (clients are told not to try again)
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from quantkit.errors import BusyError, EngineError, RequestError, TooLongError

_SHOWN = 3


class ApiError(Exception):
    """An error with its place in the API."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": _writable(self.message), "type": kind, "param": self.param and _writable(self.param), "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any exception."""
    match error:
        case ApiError():
            return error
        case TooLongError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case BusyError():
            return ApiError(503, str(error), code="overloaded", headers={"Retry-After": "1"})
        case RequestError():
            return ApiError(400, str(error))
        case EngineError():
            return ApiError(503, str(error), code="engine_dead", headers={"x-should-retry": "false"})
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return ApiError(500, f"the request failed: {type(error).__name__}: {error}")


def install(app: FastAPI) -> None:
    """Answer every error of the app in this form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        found = as_api_error(error)
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            found.message = f"{request.method} {request.url.path}: {found.message.lower()}; this server has {', '.join(_paths(app))}"
        return JSONResponse(found.body, found.status, found.headers)

    for kind in (ApiError, RequestError, EngineError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _writable(text: str) -> str:
    """What a client sent comes back in messages, and it may not be Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _paths(app: FastAPI) -> list[str]:
    return [path for path in app.openapi()["paths"] if "{" not in path]


def _of_validation(error: RequestValidationError) -> ApiError:
    """Every field that is wrong, the first ones in words."""
    problems = error.errors()
    first = [_describe(problem) for problem in problems[:_SHOWN]]
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    is_of_a_field = problems[0]["type"] != "json_invalid"
    return ApiError(400, "; ".join(first) + more, param=_field(problems[0]) or None if is_of_a_field else None)


def _field(problem: dict[str, Any]) -> str:
    place = problem["loc"][1:] if problem["loc"] and problem["loc"][0] == "body" else problem["loc"]
    return ".".join(str(part) for part in place if not isinstance(part, str) or "[" not in part)


def _describe(problem: dict[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}"
    field = _field(problem)
    if not field and problem["type"] not in ("missing", "model_attributes_type", "model_type", "dict_type"):
        return f"the body: {problem['msg']}"
    if not field:
        return "the body is not a JSON object; send one as application/json (curl: -H 'Content-Type: application/json')"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, int | float | bool) or (isinstance(given, str) and len(given) <= 40) else ""
    return f"{field}: {message}{shown}"
