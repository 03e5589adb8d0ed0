"""What the gateway refuses, in OpenAI's form.

Invariants
- A final refusal is 400, 401, 404 or 413 with `x-should-retry: false`: SDKs would repeat any other status.
- What may be tried again is 429 or 503, with `Retry-After`.
"""

from __future__ import annotations

RETRIED = frozenset({429, 503})


class Refused(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        code: machine-readable reason.
        message: for people, in one line: what is wrong, then what to do.
        param: the field that is wrong.
        retry_after_s: of a status in `RETRIED`.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int = 1
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers that tell clients whether to try again."""
        if self.status in RETRIED:
            return {"x-should-retry": "true", "Retry-After": str(self.retry_after_s)}
        headers = {"x-should-retry": "false"}
        return headers | {"WWW-Authenticate": "Bearer"} if self.status == 401 else headers

    @property
    def body(self) -> dict[str, object]:
        """The response's body as plain data."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        match self.status:
            case 401:
                return "authentication_error"
            case 404:
                return "not_found_error"
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
        return "invalid_request_error"


def episode_ended() -> Refused:
    """The refusal of whatever comes after the end of an episode."""
    return Refused(400, "episode_ended", "the episode has ended: stop, its result is recorded")


def session_lost() -> Refused:
    """The refusal once the environment has lost the episode's session."""
    return Refused(503, "session_lost", "the environment lost the session: this attempt is over, stop")


def moved() -> Refused:
    """The refusal where the episode is no longer this actor's."""
    return Refused(401, "invalid_api_key", "this key's episode went to another actor: stop")
