"""What stands before the application: limits on the bodies that clients send, and on how long they take."""

import asyncio
import json
from typing import Any

from deltacome.serve.http.errors import ApiError

MOST_BYTES = 8 * 2**20  # of a request's body
DROPPED = 8  # times as many are read and dropped before the connection is closed
BODY_SECONDS = 20.0  # that a client may take to send it

Scope = dict[str, Any]


class BodyGuard:
    """ASGI middleware: reads the body before the application runs, and refuses one that is too large or too slow."""

    def __init__(self, app: Any, most_bytes: int = MOST_BYTES, seconds: float = BODY_SECONDS) -> None:
        self.app, self.most_bytes, self.seconds = app, most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(receive)
        except TimeoutError:
            await _refuse(send, ApiError(408, f"the request's body did not arrive in {self.seconds:g} s"))
            return
        except ApiError as error:
            await _refuse(send, error)
            return
        if body is None:
            return
        given = False

        async def receive_again() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_again, send)

    async def _read(self, receive: Any) -> bytes | None:
        """The body; None if the client has gone.

        One that is too large is read to its end, if that comes soon, because few clients listen before.
        """
        body, more, dropped = bytearray(), True, 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if dropped or len(body) > self.most_bytes:
                dropped += len(body)
                body.clear()
                if dropped > DROPPED * self.most_bytes:
                    break
        if dropped:
            raise ApiError(413, f"the request's body is larger than {self.most_bytes:,} bytes")
        return bytes(body)


async def _refuse(send: Any, error: ApiError) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
