"""Which template a conversation is written with, and what it is given: resolution, variables, continuation."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.chat import sandbox
from mmjax.chat.templates import SHIPPED, fallback
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, RequestTypeError

log = logging.getLogger(__name__)

JINJA = "{}\n"  # text with one of these is a template and no path
OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
REFUSED = ("chat_template", "tokenize", "messages")
TAG = "\N{SYMBOL FOR UNIT SEPARATOR}continue\N{SYMBOL FOR UNIT SEPARATOR} "  # marks where the last message is cut off


class ChatTemplateResolutionError(RequestError):
    """There is no template to write a conversation with."""


@dataclasses.dataclass(frozen=True)
class StoredTemplates:
    """The templates that come with a checkpoint, by name, and the special tokens that they may print.

    processor: from chat_template.jinja or chat_template.json. tokenizer: from tokenizer_config.json.
    """

    processor: Mapping[str, str]
    tokenizer: Mapping[str, str]
    special: Mapping[str, Any]
    fallback: str | None = None

    @classmethod
    def read(cls, directory: Path, tokenizer: Tokenizer | None, model_type: str | None) -> "StoredTemplates":
        """From a model's directory and its tokenizer, which may live in another."""
        processor = {}
        jinja = directory / "chat_template.jinja"
        if jinja.is_file():
            processor = {"default": jinja.read_text(encoding="utf-8")}
        elif (file := directory / "chat_template.json").is_file():
            processor = _named(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
        processor |= {
            file.stem: file.read_text(encoding="utf-8") for file in directory.glob("*_chat_templates/*.jinja")
        }
        config = tokenizer.config if tokenizer else {}
        return cls(
            processor, _named(config.get("chat_template")), _special(config), fallback(model_type, str(directory))
        )

    def resolve(self, given: str | None, *, tools: bool) -> str:
        """The template to use: the one given (Jinja, or the name of a stored one), else what the checkpoint brings.

        With tools the tokenizer's template goes first: processors' templates know none.
        """
        if given is not None:
            return self._given(given)
        homes = [self.tokenizer, self.processor] if tools else [self.processor, self.tokenizer]
        for home in homes:
            for name in ("tool_use", "default") if tools else ("default",):
                if name in home:
                    return home[name]
        if self.fallback is not None:
            return self.fallback
        names = sorted({*self.processor, *self.tokenizer})
        raise ChatTemplateResolutionError(
            "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template "
            "if the tokenizer does not define one. Pass chat_template: Jinja text, a file"
            + (f", or one of {', '.join(names)}." if names else "."),
            "no_template",
        )

    def _given(self, given: str) -> str:
        for home in (self.processor, self.tokenizer):
            if given in home:
                return home[given]
        if not any(character in given for character in JINJA):
            raise RequestError(
                f"The chat template ({given[:200]}) is neither Jinja text nor the name of a stored template; stored "
                f"are {', '.join(sorted({*self.processor, *self.tokenizer})) or 'none'}.",
                "bad_template",
            )
        return given


def load_template(given: str | os.PathLike[str] | None, stored: StoredTemplates) -> str | None:
    """A template as an operator writes it: a file, Jinja text, the name of a stored one or of one that mmjax brings.

    RequestError for what looks like a file and cannot be read. Never for text out of a request: it reads files.
    """
    if given is None:
        return None
    text = os.fspath(given)
    if not isinstance(text, str):
        raise RequestTypeError(f"chat_template should be a string or a path, got {type(given).__name__}")
    if any(character in text for character in JINJA) or text in {*stored.processor, *stored.tokenizer}:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        name = Path(text).name.removesuffix(".jinja")
        if name in SHIPPED:
            return SHIPPED[name]
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise RequestError(
            f"The supplied chat template ({text}) looks like a file path, but it failed to be opened. Reason: {reason}",
            "bad_template",
        ) from error


def apply(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    stored: StoredTemplates,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> str:
    """The conversation as one text. RequestError for what the template refuses or cannot do."""
    for name in REFUSED:
        if name in kwargs:
            raise RequestError(
                f"chat_template_kwargs cannot hold {name!r}: it is an argument of its own.", "bad_template_kwargs"
            )
    known = sandbox.variables(template)
    extra = {name: value for name, value in kwargs.items() if name in known and name not in OWN}
    for name in kwargs.keys() - extra.keys() - {*OWN}:
        log.warning("chat_template_kwargs: the template reads no %r; it is dropped", name)
    values = {
        **stored.special,
        **extra,
        "messages": _tagged(messages, template) if continue_final_message else messages,
        "tools": tools if tools is not None else kwargs.get("tools"),
        "documents": documents if documents is not None else kwargs.get("documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    text = sandbox.render(template, values)
    return _cut(text) if continue_final_message else text


def _tagged(messages: Sequence[Mapping[str, Any]], template: str) -> list[Mapping[str, Any]]:
    """The messages with a tag behind the last text of the last one."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + TAG}]
    parts = list(content or ())
    for index in reversed(range(len(parts))):
        if "text" in parts[index]:
            parts[index] = {**parts[index], "text": parts[index]["text"] + TAG}
            return [*before, {**last, "content": parts}]
    raise RequestError("continue_final_message needs a last message with text to go on from.", "nothing_to_continue")


def _cut(text: str) -> str:
    """What stands before the tag; templates that trim contents have taken the tag's own blank away."""
    at = text.rfind(TAG.strip())
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template does not print the last message.", "nothing_to_continue"
        )
    return text[:at] if text.startswith(TAG, at) else text[:at].rstrip()


def _named(found: Any) -> dict[str, str]:
    """One template, a list of named ones or a dictionary of them, by name."""
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return dict(found or {})


def _special(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token and the like, as text."""
    found: dict[str, Any] = {}
    for name, token in {**config, **(config.get("extra_special_tokens") or {})}.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
