"""Errors in the API's form, whatever raised them, and an OpenAPI document in keeping with that."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deltacome.serve.http.protocol import ErrorBody
from deltacome.serve.http.wording import describe

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)
}
ERROR_SCHEMA = "#/components/schemas/ErrorBody"
RETRY_SECONDS = 5  # after which another server may be there
log = logging.getLogger("deltacome.serve")


class ApiError(Exception):
    """A request that is refused, with the API's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = message.encode(errors="replace").decode()  # surrogates cannot be sent
        super().__init__(message)
        self.status, self.headers = status, headers
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unknown_model(name: str) -> ApiError:
    """The same for a model that there is not and for one that the key does not open."""
    return ApiError(404, f"the model {name!r} does not exist or is not yours", code="model_not_found", param="model")


def queue_full(seconds: int) -> ApiError:
    """seconds: after which to come again."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(429, f"the queue is full; try again in {seconds} s", code="queue_full", headers=headers)


def quota_used(most: int | None, seconds: int) -> ApiError:
    """most: requests that a key may have at once. seconds: after which to come again."""
    message = f"this key may have {most} requests at once; try again in {seconds} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def shutting_down() -> ApiError:
    """The same for requests and for who asks whether the server is ready."""
    message = "this server is shutting down; another may answer"
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": str(RETRY_SECONDS)})


def handle_errors(app: FastAPI) -> None:
    """Answer every error of an application by the API's error object."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)


def _api_error(_: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _invalid(request: Request, error: Any) -> JSONResponse:
    message, param = describe(error.errors()[0], error.body)
    return _api_error(request, ApiError(400, message, param=param))


def _http_error(request: Request, error: Any) -> JSONResponse:
    """What the framework refuses before a route of ours is reached."""
    status, headers = error.status_code, dict(error.headers or {})
    path = request.url.path[:100]
    sentences = {
        400: "the body is not JSON in UTF-8, or nested too deeply",
        404: f"there is no {path} here; /openapi.json lists what there is",
        405: f"{request.method} is not for {path}; it takes {headers.get('Allow', 'another method')}",
    }
    return _api_error(request, ApiError(status, sentences.get(status, str(error.detail)), headers=headers))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("request failed", extra={"fields": {"error": type(error).__name__, "path": request.url.path}})
    return _api_error(request, ApiError(500, "the server failed at this request; its log says how"))


class ApiWithErrors(FastAPI):
    """An application whose OpenAPI document says that every error has the API's form."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    if status != "200":  # also of operations that answer in plain text
                        response["content"] = {"application/json": {"schema": {"$ref": ERROR_SCHEMA}}}
        return document
