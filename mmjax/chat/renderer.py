"""`Chat`: OpenAI messages in, a prompt as `LLM.generate` takes it out. The server and `LLM.chat` call the same."""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmjax.chat import conversation, template
from mmjax.chat.content import content_format
from mmjax.chat.media import Connector, at_hand, fetch_all, fetch_all_async, is_elsewhere
from mmjax.chat.parts import MediaRef
from mmjax.chat.template import StoredTemplates
from mmjax.config import env_number
from mmjax.types import RequestError, RequestTypeError

log = logging.getLogger(__name__)

FORMATS = ("auto", "string", "openai")
IoKwargs = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How messages become a prompt, with the names of the OpenAI payload and of vLLM.

    chat_template: Jinja text or the name of a stored template, never a path. chat_template_kwargs: more variables for
    it. chat_template_content_format: "string", "openai" (lists of parts), or "auto" to read it from the template.
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
        if self.chat_template_content_format not in FORMATS:
            raise RequestError(
                f"chat_template_content_format must be one of {', '.join(FORMATS)}, got "
                f"{self.chat_template_content_format!r}.",
                "bad_content_format",
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "continue_final_message goes on with the last message, add_generation_prompt begins another: set "
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
    """A conversation written out, its media not fetched yet."""

    prompt: str
    media: tuple[MediaRef, ...]
    options: ChatOptions

    def finish(self, fetched: Sequence[Any]) -> dict[str, Any]:
        """The prompt as `LLM.generate` takes it, with the data of each medium."""
        data: collections.defaultdict[str, list[Any]] = collections.defaultdict(list)
        names: collections.defaultdict[str, list[str | None]] = collections.defaultdict(list)
        for ref, value in zip(self.media, fetched, strict=True):
            data[ref.modality].append(value)
            names[ref.modality].append(ref.uuid)
        made: dict[str, Any] = {"prompt": self.prompt, "multi_modal_data": dict(data), "multi_modal_uuids": dict(names)}
        for name in ("mm_processor_kwargs", "media_io_kwargs", "cache_salt"):
            if getattr(self.options, name) is not None:
                made[name] = getattr(self.options, name)
        return made


class ChatRenderer:
    """Writes conversations for one model. Safe to use from several threads.

    placeholder: modality -> what stands for one item in a string, with `{i}` for its number. check: (modality, media,
    how many of them are embeddings) raises when the model or the operator allows fewer. connect: media_io_kwargs of a
    request -> where its media come from. default_template: the operator's.
    """

    def __init__(
        self,
        stored: StoredTemplates,
        *,
        placeholder: Mapping[str, str],
        check: Callable[[str, int, int], None],
        connect: Callable[[IoKwargs], Connector],
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
        most = max(1, int(env_number("MEDIA_LOADING_THREAD_COUNT", 8)))
        return concurrent.futures.ThreadPoolExecutor(max_workers=most, thread_name_prefix="fetch")

    def render(self, messages: Any, options: ChatOptions) -> RenderedChat:
        """Check and write out one conversation. Nothing is fetched before everything that needs no media is checked.

        RequestTypeError: no messages. RequestError: something in them, in the options or in the template.
        """
        read = conversation.read(messages)
        media = self._with_sound_tracks(conversation.media_of(read), options)
        for modality, count in collections.Counter(ref.modality for ref in media).items():
            self.check(modality, count, sum(m.modality == modality and m.form == "embeds" for m in media))
        text = self.stored.resolve(options.chat_template or self.default_template, tools=bool(options.tools))
        form = self._form(text, options.chat_template_content_format)
        if form == "openai":
            written = conversation.in_parts(read)
        else:
            written = conversation.in_strings(read, self._placeholder, interleave=self.interleave)
        prompt = template.apply(
            text,
            written,
            self.stored,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            tools=options.tools,
            documents=options.documents,
            kwargs=options.chat_template_kwargs or {},
        )
        return RenderedChat(prompt, tuple(media), options)

    def fetch(self, rendered: RenderedChat) -> dict[str, Any]:
        """Fetch the media of a draft, several at a time: the prompt as `LLM.generate` takes it."""
        if not any(map(is_elsewhere, rendered.media)):
            return rendered.finish([at_hand(ref) for ref in rendered.media])
        return rendered.finish(
            fetch_all(rendered.media, self.connect(rendered.options.media_io_kwargs or {}), self._threads)
        )

    async def fetch_async(self, rendered: RenderedChat) -> dict[str, Any]:
        """`fetch` without blocking the event loop."""
        if not any(map(is_elsewhere, rendered.media)):
            return rendered.finish([at_hand(ref) for ref in rendered.media])
        return rendered.finish(
            await fetch_all_async(rendered.media, self.connect(rendered.options.media_io_kwargs or {}))
        )

    def prompt(self, messages: Any, options: ChatOptions) -> dict[str, Any]:
        """One conversation -> prompt, multi_modal_data, multi_modal_uuids and what else `LLM.generate` reads."""
        return self.fetch(self.render(messages, options))

    async def prompt_async(self, messages: Any, options: ChatOptions) -> dict[str, Any]:
        """`prompt` without blocking the event loop on a download."""
        return await self.fetch_async(self.render(messages, options))

    def _placeholder(self, modality: str, number: int) -> str | None:
        stands = self.placeholder.get(modality)
        return stands and stands.replace("{i}", str(number))

    def _form(self, text: str, asked: str) -> str:
        found = content_format(text)
        if asked not in ("auto", found):
            self._warn_once(f"the chat template looks as if it wants contents as {found!r}, not {asked!r} as was asked")
        form = found if asked == "auto" else asked
        if self.interleave and form == "openai":
            self._warn_once("interleave_mm_strings has no effect: the chat template places media itself")
        return form

    def _warn_once(self, words: str) -> None:
        if words not in self._warned:
            self._warned.add(words)
            log.warning("%s", words)

    def _with_sound_tracks(self, media: list[MediaRef], options: ChatOptions) -> list[MediaRef]:
        """With `use_audio_in_video` the sound track of each video is an audio item of its own, under the same name."""
        kwargs = {**self.processor_kwargs, **(options.mm_processor_kwargs or {})}
        if not kwargs.get("use_audio_in_video"):
            return media
        made = []
        for ref in media:
            made.append(ref)
            if ref.modality == "video" and ref.form == "url":
                made.append(dataclasses.replace(ref, modality="audio"))
        return made
