"""The gate that every request goes through: its key, the size of its body and the time to send it; and what is counted of it."""

import asyncio
import secrets
import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exactivations.scripts.serve_faults import fault
from exactivations.scripts.serve_metrics import Metrics

OPEN = ("/health",)  # who watches over a server need not be one who may use it


class Gate:
    """Reads a body whole, and lets through what may come in.

    Args:
        app: What is behind the gate.
        api_key: What `Authorization: Bearer` must say; None asks for none.
        max_body_bytes: The most bytes of a body.
        seconds: Within which a body must have come.
        metrics: Told of each request.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, seconds: float, metrics: Metrics) -> None:
        self._app, self._key, self._metrics = app, api_key, metrics
        self._max_body_bytes, self._seconds = max_body_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            route = scope.get("route")
            endpoint = "none" if route is None else route.path  # paths that do not exist are without end
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - begun)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        if self._key is not None and scope["path"] not in OPEN and not self._is_key(request.headers.get("authorization", "")):
            refusal = fault(401, "this server asks for its API key: Authorization: Bearer KEY", code="invalid_api_key")
            refusal.headers["www-authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._body(request, receive)
        except TimeoutError:
            await fault(408, f"the body did not come within {self._seconds:g} seconds")(scope, receive, send)
            return
        if body is None:
            await fault(413, f"the body has more than {self._max_body_bytes} bytes")(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    def _is_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        assert self._key is not None
        # Headers are bytes, which were read as Latin-1.
        return scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode("latin-1"), self._key.encode())

    async def _body(self, request: Request, receive: Receive) -> bytes | None:
        """Returns the body, or None as soon as it is known to be too large."""
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            return None
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)  # nor does a client that has gone send more
            if len(body) > self._max_body_bytes:
                return None
        return body
