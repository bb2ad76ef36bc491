"""`ChatRenderer`: OpenAI messages in, a prompt as `LLM.generate` takes it out. `LLM.chat` and the server use it."""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mmjax.chat import conversation, template
from mmjax.chat.content import content_format
from mmjax.chat.media import MediaData, fetch_all, fetch_all_async, local_data, needs_fetch
from mmjax.chat.parts import MediaRef
from mmjax.chat.template import StoredTemplates
from mmjax.config import env_number
from mmjax.multimodal.connector import Connect, IoKwargs
from mmjax.types import RequestError, RequestTypeError

log = logging.getLogger(__name__)

CONTENT_FORMATS = ("auto", "string", "openai")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The options for rendering messages, named as in OpenAI's API and vLLM.

    chat_template: Jinja text or the name of a stored template, never a path. chat_template_kwargs: more variables for
    the template. chat_template_content_format: "string", "openai" (lists of parts), or "auto" for what the template
    expects.
    """

    chat_template: str | None = None
    chat_template_content_format: str = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    media_io_kwargs: IoKwargs | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        if self.chat_template_content_format not in CONTENT_FORMATS:
            raise RequestError(
                f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}, got "
                f"{self.chat_template_content_format!r}.",
                "bad_content_format",
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "continue_final_message continues the last message, add_generation_prompt starts a new one: set "
                "add_generation_prompt=False.",
                "bad_continuation",
            )
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise RequestTypeError(f"chat_template should be a string, got {type(self.chat_template).__name__}")
        for name in ("chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise RequestTypeError(f"{name} should be a dictionary, got {type(value).__name__}")
        for name in ("tools", "documents"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in value):
                raise RequestTypeError(f"{name} should be a list of dictionaries")


@dataclasses.dataclass(frozen=True, eq=False)
class RenderedChat:
    """A conversation rendered to text, its media not fetched yet."""

    prompt: str
    media: tuple[MediaRef, ...]
    options: ChatOptions

    def with_media(self, fetched: Sequence[MediaData]) -> dict[str, Any]:
        """The prompt as `LLM.generate` takes it, with the data of each media item."""
        data: collections.defaultdict[str, list[MediaData]] = collections.defaultdict(list)
        uuids: collections.defaultdict[str, list[str | None]] = collections.defaultdict(list)
        for ref, value in zip(self.media, fetched, strict=True):
            data[ref.modality].append(value)
            uuids[ref.modality].append(ref.uuid)
        prompt: dict[str, Any] = {
            "prompt": self.prompt,
            "multi_modal_data": dict(data),
            "multi_modal_uuids": dict(uuids),
        }
        for name in ("mm_processor_kwargs", "media_io_kwargs", "cache_salt"):
            if getattr(self.options, name) is not None:
                prompt[name] = getattr(self.options, name)
        return prompt


class CheckCount(Protocol):
    """Checks how many items of a modality a prompt holds."""

    def __call__(self, modality: str, count: int, num_embeds: int) -> None:
        """RequestError for more than the model or the operator allows. num_embeds of them are given as embeddings."""
        ...


class ChatRenderer:
    """Renders conversations for one model. May be used from several threads.

    placeholder: modality -> text that stands for one item, with `{i}` for its number. default_template: the operator's.
    interleave: if contents are strings, whether placeholders are put between the texts and not in front of them.
    """

    def __init__(
        self,
        stored: StoredTemplates,
        *,
        placeholder: Mapping[str, str],
        check: CheckCount,
        connect: Connect,
        default_template: str | None = None,
        interleave: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
    ):
        self.stored, self.placeholder, self.check, self.connect = stored, placeholder, check, connect
        self.default_template, self.interleave = default_template, interleave
        self.processor_kwargs = dict(processor_kwargs or {})
        self._warned: set[str] = set()

    @functools.cached_property
    def _threads(self) -> concurrent.futures.Executor:
        count = max(1, int(env_number("MEDIA_LOADING_THREAD_COUNT", 8)))
        return concurrent.futures.ThreadPoolExecutor(max_workers=count, thread_name_prefix="fetch")

    def template_text(self, *, tools: bool) -> str | None:
        """The template of requests that bring none; None if there is none."""
        try:
            return self.stored.resolve(self.default_template, tools=tools)
        except template.ChatTemplateResolutionError:
            return None

    def render(self, messages: Any, options: ChatOptions) -> RenderedChat:
        """Check and render one conversation. All checks that need no media are made here.

        RequestTypeError for objects that are not messages. RequestError for mistakes in messages, options or template.
        """
        read = conversation.read_messages(messages)
        media = self._with_audio_tracks(conversation.media_of(read), options)
        for modality, count in collections.Counter(ref.modality for ref in media).items():
            self.check(modality, count, sum(m.modality == modality and m.source == "embeds" for m in media))
        text = self.stored.resolve(options.chat_template or self.default_template, tools=bool(options.tools))
        if self._content_format(text, options.chat_template_content_format) == "openai":
            contents = conversation.with_parts(read)
        else:
            contents = conversation.with_strings(read, self._placeholder_text, interleave=self.interleave)
        prompt = template.apply(
            text,
            contents,
            self.stored,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            tools=options.tools,
            documents=options.documents,
            kwargs=options.chat_template_kwargs or {},
        )
        return RenderedChat(prompt, tuple(media), options)

    def fetch(self, rendered: RenderedChat) -> dict[str, Any]:
        """The prompt as `LLM.generate` takes it, with its media fetched concurrently."""
        if not any(map(needs_fetch, rendered.media)):
            return rendered.with_media(list(map(local_data, rendered.media)))
        connector = self.connect(rendered.options.media_io_kwargs or {})
        return rendered.with_media(fetch_all(rendered.media, connector, self._threads))

    async def fetch_async(self, rendered: RenderedChat) -> dict[str, Any]:
        """`fetch` without blocking the event loop."""
        if not any(map(needs_fetch, rendered.media)):
            return rendered.with_media(list(map(local_data, rendered.media)))
        connector = self.connect(rendered.options.media_io_kwargs or {})
        return rendered.with_media(await fetch_all_async(rendered.media, connector))

    def _placeholder_text(self, modality: str, number: int) -> str | None:
        text = self.placeholder.get(modality)
        return text and text.replace("{i}", str(number))

    def _content_format(self, template_text: str, given: str) -> str:
        detected = content_format(template_text)
        if given not in ("auto", detected):
            self._warn_once(f"the chat template seems to expect contents as {detected!r}, but {given!r} was requested")
        resolved = detected if given == "auto" else given
        if self.interleave and resolved == "openai":
            self._warn_once("interleave_mm_strings has no effect: the chat template places media itself")
        return resolved

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)

    def _with_audio_tracks(self, media: list[MediaRef], options: ChatOptions) -> list[MediaRef]:
        """With `use_audio_in_video`, add the audio track of each video as an audio item with the same uuid."""
        kwargs = {**self.processor_kwargs, **(options.mm_processor_kwargs or {})}
        if not kwargs.get("use_audio_in_video"):
            return media
        refs = []
        for ref in media:
            refs.append(ref)
            if ref.modality == "video" and ref.source == "url":
                refs.append(dataclasses.replace(ref, modality="audio"))
        return refs
