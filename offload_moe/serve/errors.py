"""Errors as clients see them: one status and one document per API, never a traceback."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from offload_moe.errors import BudgetError, ConfigError, ModelClosed, OffloadMoeError

logger = logging.getLogger(__name__)

Api = Literal["openai", "anthropic"]

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
SERVER_ERROR = 500


class ApiError(Exception):
    """A request that is answered with an error.

    code: what OpenAI clients match. param: the field at fault, as a path. retry_after_s: seconds, for a header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def document(self, api: Api) -> dict[str, Any]:
        """The body in the form of an API."""
        return self._anthropic() if api == "anthropic" else self._openai()

    def _openai(self) -> dict[str, Any]:
        default = "server_error" if self.status >= SERVER_ERROR else "invalid_request_error"
        kind = OPENAI_TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def _anthropic(self) -> dict[str, Any]:
        default = "api_error" if self.status >= SERVER_ERROR else "invalid_request_error"
        message = self.message if self.param is None or self.param in self.message else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": ANTHROPIC_TYPES.get(self.status, default), "message": message}}


class PromptTooLong(ApiError):
    """The prompt, or prompt and answer together, exceed the context. Both APIs' clients look for certain words."""

    def __init__(self, num_tokens: int, limit: int, param: str = "messages") -> None:
        super().__init__(
            400,
            f"This model's maximum context length is {limit} tokens. However, the prompt has {num_tokens} tokens, "
            "which leaves none for an answer. Shorten it, or start the server with a longer --context.",
            code="context_length_exceeded",
            param=param,
        )
        self.num_tokens, self.limit = num_tokens, limit

    def _anthropic(self) -> dict[str, Any]:
        message = f"prompt is too long: {self.num_tokens} tokens > {self.limit} maximum"
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A field that is not usable."""
    return ApiError(400, message, param=param, code=code)


def closed() -> ApiError:
    """The server ends before the answer does."""
    return ApiError(503, "The server has been closed.", code="shutting_down", retry_after_s=5)


def api_error(error: BaseException) -> ApiError:
    """Any error as one that may be shown; a fault of the server's own is logged with its traceback."""
    match error:
        case ApiError():
            return error
        case ConfigError():
            return ApiError(400, str(error))
        case BudgetError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case ModelClosed():
            return ApiError(503, "The model was closed while it answered. Send the request again.", retry_after_s=1)
        case OffloadMoeError():
            logger.error("%s", error)
            return ApiError(500, str(error))
    logger.error("A request failed unexpectedly", exc_info=error)
    return ApiError(500, f"The server failed on this request ({type(error).__name__}). Its log has the details.")


def as_mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}
