"""The caller's faults. Anything else that is raised is a bug of ours and propagates."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request that can never succeed as it is written.

    `code` is stable snake_case, for programs; the message is for people and says what to change.
    """

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


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
