"""What every request passes before the server looks at it: host, origin, token, size.

Without a token the server trusts whoever reaches it, so it listens on this machine only. A web page
that the user visits must still not reach it: a name that was re-bound to 127.0.0.1 is refused by
its `Host` header, a form or script of another page by its `Origin`.
"""

import base64
import binascii
import secrets
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rectvlm.predict.dicomweb import is_loopback
from rectvlm.serve.options import TOKEN_VARIABLE

_FORM_BYTES = 10_000
"""What a form adds to its file: boundaries and headers of its parts."""
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'unsafe-inline' 'wasm-unsafe-eval' blob:",  # a viewer may bring WebAssembly
        "worker-src blob:",
        "style-src 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src data:",
        "connect-src 'self' data: blob:",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": _CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer. Pages are self-contained: their scripts and styles are inline, and
nothing is loaded from or sent to another place."""


class RequestGuard:
    """ASGI middleware that refuses requests, and adds `SECURITY_HEADERS` to all answers."""

    def __init__(self, app: ASGIApp, token: str | None, max_upload_bytes: int) -> None:
        """Guard an application.

        Args:
            app: the application.
            token: secret that every request but that for `/health` must carry; None on a server of
                this machine only.
            max_upload_bytes: size of the largest file that is taken.
        """
        self.app, self.token = app, token
        self.max_body_bytes = max_upload_bytes + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._find_refusal(scope["method"], scope["path"], Headers(scope=scope))
        answer = self.app if refusal is None else refusal
        await answer(scope, self._limit_body(receive), _add_headers(send))

    def _find_refusal(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        host = _host_name(headers.get("host", ""))
        if self.token is None and not is_loopback(host):
            return _refuse(421, "This server answers to localhost only: open http://127.0.0.1.")
        if method not in _SAFE_METHODS and not _is_own_origin(headers):
            return _refuse(403, "Another page may not send requests here: use the server's own.")
        if self.token is not None and path != "/health" and not self._has_token(headers):
            refusal = _refuse(401, f"Give the server's token ({TOKEN_VARIABLE}) as a password.")
            refusal.headers["WWW-Authenticate"] = 'Basic realm="rectvlm", charset="UTF-8"'
            return refusal
        if int(_digits(headers.get("content-length", ""))) > self.max_body_bytes:
            return _refuse(413, _size_fault(self.max_body_bytes))
        return None

    def _has_token(self, headers: Headers) -> bool:
        """Compare the token in a time that says nothing of it."""
        assert self.token is not None
        given = _given_token(headers.get("authorization", ""))
        return secrets.compare_digest(given.encode(), self.token.encode())

    def _limit_body(self, receive: Receive) -> Receive:
        """Refuse a body as soon as it is too long, whatever its header says."""
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise HTTPException(413, _size_fault(self.max_body_bytes))
            return message

        return receive_limited


def _add_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(SECURITY_HEADERS)
        await send(message)

    return send_with_headers


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


def _size_fault(limit_bytes: int) -> str:
    limit_mb = (limit_bytes - _FORM_BYTES) / 1e6
    return (
        f"The upload is too large: expected at most {limit_mb:g} MB; give one series, or start the "
        "server with a larger --max-upload-mb."
    )


def _host_name(host: str) -> str:
    """Name or address in a `Host` header, without its port; empty for a strange one."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_own_origin(headers: Headers) -> bool:
    """Whether a request comes from a page of this server, or from a program."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    return urlsplit(origin).netloc == headers.get("host")


def _given_token(authorization: str) -> str:
    """Token in an `Authorization` header: `Bearer TOKEN`, or the password of `Basic`."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _digits(text: str) -> str:
    return text[:20] if text.isascii() and text.isdigit() else "0"
