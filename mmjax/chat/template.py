"""Reads chat templates, selects one, and applies it to messages."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.chat import sandbox
from mmjax.chat.templates import TEMPLATES, fallback
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, RequestTypeError

log = logging.getLogger(__name__)

JINJA_CHARS = "{}\n"  # text with one of these characters is a template, not a path
ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
REFUSED_KWARGS = ("chat_template", "tokenize", "messages")
TAG = "\N{SYMBOL FOR UNIT SEPARATOR}continue\N{SYMBOL FOR UNIT SEPARATOR} "  # marks where the last message is cut off


class ChatTemplateResolutionError(RequestError):
    """No chat template could be found."""


@dataclasses.dataclass(frozen=True)
class StoredTemplates:
    """The templates that come with a checkpoint, by name, and the special tokens that they may print.

    processor: from chat_template.jinja, chat_template.json or processor_config.json. tokenizer: from
    tokenizer_config.json. fallback: mmjax's own template for this type of model.
    """

    processor: Mapping[str, str]
    tokenizer: Mapping[str, str]
    special_tokens: Mapping[str, Any]
    fallback: str | None = None

    @classmethod
    def read(cls, directory: Path, tokenizer: Tokenizer | None, model_type: str | None) -> "StoredTemplates":
        """From a model's directory and its tokenizer, which may come from another directory."""
        processor: dict[str, str] = {}
        jinja = directory / "chat_template.jinja"
        if jinja.is_file():
            processor = {"default": jinja.read_text(encoding="utf-8")}
        for name in ("chat_template.json", "processor_config.json"):
            if not processor and (file := directory / name).is_file():
                content = json.loads(file.read_text(encoding="utf-8"))
                processor = _by_name(content.get("chat_template") if isinstance(content, dict) else None)
        processor |= {
            file.stem: file.read_text(encoding="utf-8") for file in directory.glob("*_chat_templates/*.jinja")
        }
        config = tokenizer.config if tokenizer else {}
        tokenizer_templates = _by_name(config.get("chat_template"))
        return cls(processor, tokenizer_templates, _special_tokens(config), fallback(model_type, str(directory)))

    def resolve(self, given: str | None, *, tools: bool) -> str:
        """The template to use: the given one (Jinja text, or the name of a stored one), else the checkpoint's.

        With tools, the tokenizer's templates come first, because those of processors do not print tools.
        """
        if given is not None:
            return self._resolve_given(given)
        for templates in (self.tokenizer, self.processor) if tools else (self.processor, self.tokenizer):
            for name in ("tool_use", "default") if tools else ("default",):
                if name in templates:
                    return templates[name]
        if self.fallback is not None:
            return self.fallback
        names = sorted({*self.processor, *self.tokenizer})
        raise ChatTemplateResolutionError(
            "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template "
            "if the tokenizer does not define one. Pass chat_template: Jinja text, a file"
            + (f", or one of {', '.join(names)}." if names else "."),
            "no_template",
        )

    def _resolve_given(self, given: str) -> str:
        for templates in (self.processor, self.tokenizer):
            if given in templates:
                return templates[given]
        if not any(character in given for character in JINJA_CHARS):
            raise RequestError(
                f"The chat template ({given[:200]}) is neither Jinja text nor the name of a stored template; stored "
                f"are {', '.join(sorted({*self.processor, *self.tokenizer})) or 'none'}.",
                "bad_template",
            )
        return given


def load_template(given: str | os.PathLike[str] | None, stored: StoredTemplates) -> str | None:
    """The template that the operator gives: a file, Jinja text, or the name of a stored template or of one of mmjax's.

    RequestError for a file that cannot be read. Never pass text from a request, because this reads files.
    """
    if given is None:
        return None
    text = os.fspath(given)
    if not isinstance(text, str):
        raise RequestTypeError(f"chat_template should be a string or a path, got {type(given).__name__}")
    if any(character in text for character in JINJA_CHARS) or text in {*stored.processor, *stored.tokenizer}:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        name = Path(text).name.removesuffix(".jinja")
        if name in TEMPLATES:
            return TEMPLATES[name]
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
    """The conversation as one text. RequestError for messages that the template refuses, and for errors in it."""
    for name in REFUSED_KWARGS:
        if name in kwargs:
            raise RequestError(
                f"chat_template_kwargs cannot hold {name!r}: it is an argument of its own.", "bad_template_kwargs"
            )
    known = sandbox.variables(template)
    extra = {name: value for name, value in kwargs.items() if name in known and name not in ARGUMENTS}
    for name in kwargs.keys() - extra.keys() - {*ARGUMENTS}:
        log.warning("chat_template_kwargs: the template reads no %r; it is dropped", name)
    values = {
        **stored.special_tokens,
        **extra,
        "messages": _tagged(messages, template) if continue_final_message else messages,
        "tools": tools if tools is not None else kwargs.get("tools"),
        "documents": documents if documents is not None else kwargs.get("documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    text = sandbox.render(template, values)
    return _cut(text) if continue_final_message else text


def _tagged(messages: Sequence[Mapping[str, Any]], template: str) -> list[Mapping[str, Any]]:
    """The messages with a tag after the last text of the last one."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + TAG}]
    parts = list(content or ())
    for index in reversed(range(len(parts))):
        if "text" in parts[index]:
            parts[index] = {**parts[index], "text": parts[index]["text"] + TAG}
            return [*before, {**last, "content": parts}]
    raise RequestError("continue_final_message needs a last message with text to continue.", "nothing_to_continue")


def _cut(text: str) -> str:
    """The text before the tag. Templates that trim contents remove the space at the tag's end."""
    at = text.rfind(TAG.strip())
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template does not print the last message.", "nothing_to_continue"
        )
    return text[:at] if text.startswith(TAG, at) else text[:at].rstrip()


def _by_name(templates: Any) -> dict[str, str]:
    """Templates by name, from one template, a list of named ones or a dictionary."""
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, list):
        return {entry["name"]: entry["template"] for entry in templates}
    return dict(templates or {})


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token and the like, as text."""
    found: dict[str, Any] = {}
    extra = config.get("extra_special_tokens")  # by name; in transformers 5 a list of tokens that no template prints
    named = config.get("model_specific_special_tokens") or {}
    for name, token in {**named, **config, **(extra if isinstance(extra, Mapping) else {})}.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
