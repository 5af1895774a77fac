"""Who is asking: the API key of each request becomes a principal, or nothing further happens."""

from __future__ import annotations

from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llmos.errors import AuthenticationError
from llmos.kernel.identity import Principal
from llmos.server import login, witness

# A checkpoint carries its own signature; who logs in has no key yet.
PUBLIC_PATHS = frozenset({"/health", witness.PATH, login.PATH})


def authenticate(app: ASGIApp, verify: Callable[[str], Principal]) -> ASGIApp:
    """Put the principal of the bearer token (RFC 6750) into the request's state.

    Raises:
        AuthenticationError: there is no token, or `verify` refuses it.
    """

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PUBLIC_PATHS:
            token = bearer_token(Headers(scope=scope))
            scope["state"]["principal"] = await run_in_threadpool(verify, token)
        await app(scope, receive, send)

    return layer


def bearer_token(headers: Headers) -> str:
    """Return the token of the Authorization header.

    Raises:
        AuthenticationError: there is none.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise AuthenticationError(
            "this server needs an API key",
            hint="send it as `Authorization: Bearer llmos_...`; `llmos key create` makes one",
        )
    return token.strip()
