"""What callers do wrong. Every other exception is a bug of ours, and is reported as one."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request that can never succeed as it is written. A server answers it with a status of 4xx.

    `code` is stable snake_case, for programs; the message is for people and says what to change.
    """

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


class RequestTypeError(RequestError, TypeError):
    """A value of the wrong type. Also a TypeError, as which callers expect it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "wrong_type")


class TooDeepError(RequestError):
    """Lists in lists, or objects in objects, so deep that nothing can be done with them."""

    def __init__(self) -> None:
        super().__init__("The request is nested too deeply.", "too_deep")


class ValidationError(RequestError):
    """A parameter with an unusable value. `str()` names both after the message, when they are known."""

    def __init__(
        self, message: str, *, parameter: str | None = None, value: Any = None, code: str = "invalid_parameter"
    ) -> None:
        super().__init__(message, code)
        self.parameter = parameter
        self.value = value

    def __str__(self) -> str:
        extras = []
        if self.parameter is not None:
            extras.append(f"parameter={self.parameter}")
        if self.value is not None:
            extras.append(f"value={self.value}")
        message = super().__str__()
        return f"{message} ({', '.join(extras)})" if extras else message


VLLMValidationError = ValidationError  # the name by which clients of vLLM know it
