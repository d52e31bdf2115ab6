"""What stands before the application: keys asked for, and limits on bodies, before anything is read into memory."""

import asyncio
import json
from contextlib import suppress
from typing import Any

from deltacome.serve.http.errors import ApiError
from deltacome.serve.http.keys import Keys, no_valid_key

MOST_BYTES = 8 * 2**20  # of a request's body, whatever it is for
BYTES_PER_TOKEN = 2**10  # of a body: a text of many escapes, or 64 prompts
MOST_BUFFERED = 2**26  # of all bodies that are being read
DROPPED = 8  # times as many are read of a body that is refused
BODY_SECONDS = 20.0  # that a client may take to send it
DROP_SECONDS = 2.0  # that one is read for which is refused

Scope = dict[str, Any]


def most_bytes(max_length: int) -> int:
    """Of the body of a request for prompts and answers of so many tokens."""
    return min(MOST_BYTES, 2**16 + BYTES_PER_TOKEN * max_length)


class BodyGuard:
    """ASGI middleware: reads the body before the application runs, if it comes with a valid key, as JSON, and in time.

    most_bytes: of a body. seconds: that it may take.
    """

    def __init__(self, app: Any, keys: Keys, most_bytes: int = MOST_BYTES, seconds: float = BODY_SECONDS) -> None:
        self.app, self.keys, self.most_bytes, self.seconds = app, keys, most_bytes, seconds
        self.buffered = 0  # bytes of the bodies that are being read

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                is_there = await self._read(scope, receive, body)
        except TimeoutError:
            await _refuse(send, ApiError(408, f"the request's body did not arrive in {self.seconds:g} s"))
            return
        except ApiError as error:
            await _refuse(send, error)
            return
        finally:
            self.buffered -= len(body)
        if not is_there:
            return
        content = bytes(body)
        given = False

        async def receive_again() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app(scope, receive_again, send)

    async def _read(self, scope: Scope, receive: Any, body: bytearray) -> bool:
        """Read the body; False if the client has gone.

        Raises:
            ApiError: if it is refused.
        """
        error, more = self._refusal(dict(scope["headers"])), True
        while more and error is None:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part, more = message.get("body", b""), message.get("more_body", False)
            body += part
            self.buffered += len(part)
            if len(body) > self.most_bytes:
                error = self._too_large()
            elif self.buffered > MOST_BUFFERED:
                error = ApiError(503, "the server reads too many requests at once; try again", code="overloaded")
        if error is not None:
            self.buffered -= len(body)
            body.clear()
            if more:
                await self._drop(receive)
            raise error
        return True

    async def _drop(self, receive: Any) -> None:
        """Read a body to its end, if that comes soon, and keep nothing: few clients listen before."""
        dropped, more = 0, True
        with suppress(TimeoutError):
            async with asyncio.timeout(DROP_SECONDS):
                while more and dropped <= DROPPED * self.most_bytes:
                    message = await receive()
                    dropped, more = dropped + len(message.get("body", b"")), message.get("more_body", False)

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        """What the headers alone say against a request."""
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if self.keys.allowed(key if scheme.lower() == "bearer" else None) is None:
            return no_valid_key()
        length = headers.get(b"content-length", b"0")
        if int(length) > self.most_bytes:
            return self._too_large()
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        has_body = int(length) > 0 or b"transfer-encoding" in headers
        if (
            has_body
            and kind != b"application/json"
            and not (kind.startswith(b"application/") and kind.endswith(b"+json"))
        ):
            return ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self.most_bytes:,} bytes")


async def _refuse(send: Any, error: ApiError) -> None:
    body = json.dumps(error.body).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
