"""Every error that headrace raises on purpose. The class says what the caller can do; the message says
what was got, what is allowed and what to do.

    HeadraceError
    ├── RequestError                 carries an HTTP status and OpenAI's error type and code
    │   ├── InvalidRequest     400   change the request
    │   │   └── PayloadTooLarge 413
    │   ├── Unauthorized       401   send a valid key
    │   ├── NotFound           404   ask for something that exists
    │   ├── MethodNotAllowed   405
    │   ├── QuotaExceeded      429   wait retry_after_s
    │   ├── Overloaded         503   wait retry_after_s
    │   └── ReplicaLost        502   send the request again
    ├── EngineDead                   the engine process is gone; its owner restarts it
    ├── ModelError                   a model file is missing, damaged or not supported
    │   └── ModelChanged             it was changed while it was read: read it again
    ├── OutOfMemory                  memory is short now; another attempt may succeed
    ├── ConfigError                  the config is wrong; lists every problem at once
    └── ProtocolError                another process sent something that is not of the contract
"""

from __future__ import annotations

from collections.abc import Sequence


def text_of(error: BaseException) -> str:
    """Return what an error says; its kind where it says nothing, as those of time limits do."""
    return str(error) or type(error).__name__


class HeadraceError(Exception):
    """Base of all errors that headrace raises on purpose."""


class RequestError(HeadraceError):
    """A request that ends with an HTTP error status, in OpenAI's error shape."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class InvalidRequest(RequestError):
    """The request is wrong; sending it again unchanged gives the same answer."""

    status = 400
    type = "invalid_request_error"


class PayloadTooLarge(InvalidRequest):
    """The headers or the body are larger than the limit."""

    status = 413
    code = "payload_too_large"


class Unauthorized(RequestError):
    """The key is missing or unknown."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(RequestError):
    """The model or the path does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class QuotaExceeded(RequestError):
    """The tenant's limit is reached; wait `retry_after_s`."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Overloaded(RequestError):
    """No room; wait `retry_after_s`."""

    status = 503
    code = "overloaded"


class ReplicaLost(RequestError):
    """The replica that held the request is gone; sending it again may succeed."""

    status = 502
    code = "replica_lost"


class EngineDead(HeadraceError):
    """The engine process ended or stopped answering."""


class ModelError(HeadraceError):
    """A model file is missing, damaged, or of a kind that is not supported."""


class ModelChanged(ModelError):
    """A model file was changed while it was read; another attempt reads the new one."""


class OutOfMemory(HeadraceError):
    """This machine has too little free memory now. The message says how much is needed, and is free."""


class ConfigError(HeadraceError):
    """The config is wrong. `problems` lists all, one line each: path, what was got, what is allowed."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ProtocolError(HeadraceError):
    """Another process sent bytes that are not of the contract; the connection is closed."""
