"""`POST /api/login`: a name, a password and perhaps a code become an API key for some hours.

Nobody is known before: `workflows.login` limits guesses, the layers of `server.app` all else.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmos.errors import RequestError
from llmos.workflows import login
from llmos.workflows.parts import Parts

PATH: Final = "/api/login"


class LoginRequest(BaseModel):
    """The body; its secrets are shown in no error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(max_length=256)]
    password: Annotated[str, Field(max_length=1024, repr=False)]
    code: Annotated[str, Field(max_length=16, repr=False)] = ""


def routes(parts: Parts) -> list[Route]:
    """Return the route by which people of one home log in."""

    async def log_in(request: Request) -> Response:
        try:
            body = LoginRequest.model_validate_json(await request.body())
        except ValidationError:
            raise RequestError(
                "the body is not a JSON object with name, password and perhaps code"
            ) from None
        issued = await run_in_threadpool(login.run, body.name, body.password, body.code, parts)
        facts = {"id": issued.id, "token": issued.token, "expires_in_s": login.LIFETIME.seconds}
        return JSONResponse(facts, headers={"Cache-Control": "no-store"})

    return [Route(PATH, log_in, methods=["POST"])]
