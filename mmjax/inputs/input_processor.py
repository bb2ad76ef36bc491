"""`Request` -> `Rendered`: the prompt in tokens and positions, its media processed and named, ready for the engine.

The steps: count, tokenise, find or process every item, expand placeholders, check the length, place. Nothing here
touches a device, and a `Renderer` may be used from several threads.
"""

import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmjax.inputs import parse
from mmjax.inputs import prompt_embeds as whole_prompt
from mmjax.inputs.media_embeds import EmbedsInput, MediaEmbedsReader
from mmjax.inputs.parse import MediaInput, ParsedPrompt
from mmjax.inputs.processor_cache import ProcessorCache
from mmjax.inputs.processor_kwargs import check_kwargs, given_kwargs
from mmjax.multimodal import audio, image, size_check, video
from mmjax.multimodal.hash import content_id, named_id
from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    Processor,
    TimestampTokens,
    linear_positions,
)
from mmjax.processors.resize import image_size
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, ValidationError

log = logging.getLogger(__name__)


class ProcessingError(RuntimeError):
    """A processor has failed on an item that nobody found anything wrong with. That is a bug, and no RequestError."""


TOKENIZATION_KWARGS = ("add_special_tokens", "truncate_prompt_tokens")


class HashedItem(NamedTuple):
    """A processed item under the name by which every cache knows it: equal keys mean equal features."""

    modality: str
    item_hash: str
    item: MediaItem


@dataclasses.dataclass(frozen=True, eq=False)
class EngineInput:
    """A prompt the engine can schedule. `items` are in the order of `spans` (in the order given where they fill no
    tokens); `spans` index items within their kind. Token i >= T sits at position i + `delta` on every row."""

    prompt: str | None
    token_ids: np.ndarray  # int32 [T]
    rope_positions: np.ndarray  # int32 [R, T]
    rope_delta: int
    spans: list[PlaceholderSpan]
    items: list[HashedItem]
    cache_salt: str | None = None
    encoder_prompt: str | None = None
    encoder_token_ids: np.ndarray | None = None  # int32, encoder-decoder models only
    timestamps: TimestampTokens | None = None  # what the answer keeps to where it tells times
    is_embeds: bool = False  # the prompt came as embeddings: its tokens, all 0, say nothing


class _Asked(NamedTuple):
    """What a request says of all its media."""

    kwargs: Mapping[str, Any]
    io_kwargs: Mapping[str, Mapping[str, Any]]
    background: image.Color
    salt: str | None
    serial: int


# Prompts rendered at once, however many threads ask. More of them keep Python's lock from the thread that feeds the
# device: on 16 cores, 20 made a batch of images wait 90 to 140 ms before its first dispatch, 4 to 8 make it wait 30 to
# 45 ms and keep up with an H100.
MAX_CONCURRENT = min(8, (os.cpu_count() or 1) + 1)


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """What an input processor must know of the model, the engine and the operator's choices.

    limit_mm_per_prompt, mm_processor_kwargs, media_io_kwargs: see `EngineArgs`. cache_gb: GiB of processed media to
    keep; 0 keeps none. Without both this cache and prefix caching the caller's uuids of media are ignored. generates:
    whether there must be room for an output token. max_item_embeds: embeddings of one item that the encoder cache
    holds; None for any number. max_item_inputs: encoder inputs of one item, by modality. media_embeds_dim: width of the
    embeddings that may come in place of media, prompt_embeds_dim: in place of a whole prompt; None accepts none.
    mm_embed_dim: width of the engine's mm_embeds buffer. block_size: tokens per block of the KV cache.
    """

    model_id: str
    vocab_size: int
    max_model_len: int
    limit_mm_per_prompt: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    media_io_kwargs: Mapping[str, Mapping[str, Any]] | None = None
    cache_gb: float = 4.0
    prefix_caching: bool = True
    encoder_decoder: bool = False
    generates: bool = True
    max_item_embeds: int | None = None
    max_item_inputs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    media_embeds_dim: int | None = None
    prompt_embeds_dim: int | None = None
    mm_embed_dim: int = 0
    block_size: int = 1
    media_limits: MediaLimits = DEFAULT


class InputProcessor:
    """Turns prompts into the engine's inputs for one model. May be used from several threads.

    `processor` None: a plain language model, which takes no media. `tokenizer` None: prompts must be token ids.
    """

    def __init__(self, processor: Processor | None, tokenizer: Tokenizer | None, config: InputConfig) -> None:
        self.processor, self.tokenizer, self.config = processor, tokenizer, config
        self.mm_limits = parse.mm_limits(config.limit_mm_per_prompt)
        self.processor_kwargs = dict(config.mm_processor_kwargs or {})
        self.io_kwargs = {modality: dict(kwargs) for modality, kwargs in (config.media_io_kwargs or {}).items()}
        _background(self.io_kwargs)  # a bad color is reported at start
        dim = config.media_embeds_dim
        self.embeds = MediaEmbedsReader(processor, dim) if processor and dim is not None else None
        self.cache = ProcessorCache(int(config.cache_gb * 2**30))
        self.hashed = config.cache_gb > 0 or config.prefix_caching
        placeholder_ids = (
            [tokenizer.id_of(name) for name in processor.placeholder_token.values()] if processor and tokenizer else []
        )
        # a placeholder may lie past the embedding, since media always take its place
        self.out_of_vocab_ids = {token for token in placeholder_ids if token is not None and token >= config.vocab_size}
        self._room = threading.Semaphore(MAX_CONCURRENT)
        self._serial = itertools.count()
        self._warned: set[str] = set()

    def parse(self, prompt: Any) -> ParsedPrompt:
        """A prompt as a caller writes it -> Request; see `mmjax.inputs.parse`."""
        request = parse.parse_prompt(
            prompt,
            encoder_decoder=self.config.encoder_decoder,
            embeds=self.embeds,
            row_width=self.config.prompt_embeds_dim,
        )
        self.check_counts(request)
        return request

    def check_counts(self, request: ParsedPrompt) -> None:
        """RequestError if the prompt holds more media than the model or the operator allows."""
        for modality, media in request.media.items():
            embedded = sum(
                isinstance(x.data, EmbedsInput) or (x.data is None and self.embeds is not None) for x in media
            )
            self.check_count(modality, len(media), embedded)

    def check_count(self, modality: str, count: int, embedded: int = 0) -> None:
        """RequestError if `count` items of a modality are more than the model or the operator allows; `embedded` of
        them come as embeddings."""
        kinds = self.processor.mm_limits if self.processor else {}
        if embedded and self.embeds is None:
            raise parse.embeds_disabled(modality)
        if embedded and not self.mm_limits[modality]:
            count -= embedded  # a limit of 0 with embeddings allowed means: nothing but embeddings
        parse.check_count(modality, count, self.mm_limits[modality], kinds.get(modality, 0))

    def merged_io_kwargs(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """`media_io_kwargs` of the engine and of a request together, the request's winning, by modality."""
        if not given:
            return self.io_kwargs
        from mmjax.multimodal.media import MediaIO, VideoMediaIO

        for modality, kwargs in given.items():
            if kwargs is not None and not isinstance(kwargs, Mapping):
                raise RequestError(
                    f"media_io_kwargs[{modality!r}] must be a dictionary, got {type(kwargs).__name__}.",
                    "bad_media_kwargs",
                )
        return {
            modality: (VideoMediaIO if modality == "video" else MediaIO).merge_kwargs(
                self.io_kwargs.get(modality), given.get(modality)
            )
            for modality in {**self.io_kwargs, **given}
        }

    def process(self, request: ParsedPrompt, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Tokenise, process, expand, check and place. RequestError for everything the caller can mend.

        `tokenization_kwargs`: add_special_tokens (bool), truncate_prompt_tokens (keep the last n; -1: max_model_len).
        """
        with self._room:
            return self._process_prompt(request, tokenization_kwargs)

    def _process_prompt(self, request: ParsedPrompt, tokenization_kwargs: Mapping[str, Any] | None) -> EngineInput:
        if request.prompt_embeds is not None:
            return self._embedded(request, request.prompt_embeds)
        self.check_counts(request)
        tokens = self._tokens(request, tokenization_kwargs or {})
        media = self._items(request)
        items = {modality: [entry.item for entry in entries] for modality, entries in media.items()}
        expanded = self.processor.expand_prompt(tokens, items) if self.processor else ExpandedPrompt(tokens, [])
        self._check_length(len(expanded.token_ids))
        if self.processor:
            positions, delta = self.processor.rope_positions(expanded.token_ids, expanded.spans, items)
        else:
            positions, delta = linear_positions(len(expanded.token_ids))
        placed = [media[span.modality][span.item_index] for span in expanded.spans]
        encoder = np.asarray(expanded.encoder_token_ids, np.int32) if self.config.encoder_decoder else None
        return EngineInput(
            prompt=request.text,
            token_ids=np.asarray(expanded.token_ids, np.int32),
            rope_positions=positions,
            rope_delta=delta,
            spans=expanded.spans,
            items=placed or [entry for entries in media.values() for entry in entries],
            cache_salt=request.cache_salt,
            encoder_prompt=request.encoder_text,
            encoder_token_ids=encoder,
            timestamps=expanded.timestamps,
        )

    def _embedded(self, request: ParsedPrompt, rows: np.ndarray) -> EngineInput:
        """A prompt of embeddings, in items as long as a page, so that prompts that begin alike share pages."""
        self._check_length(len(rows))
        items = whole_prompt.to_items(rows, self.config.mm_embed_dim, self.config.block_size)
        tokens = [0] * len(rows)
        positions, delta = (
            self.processor.rope_positions(tokens, [], {}) if self.processor else linear_positions(len(tokens))
        )
        modality = whole_prompt.PROMPT_MODALITY
        return EngineInput(
            prompt=request.text,
            token_ids=np.asarray(tokens, np.int32),
            rope_positions=positions,
            rope_delta=delta,
            spans=[
                PlaceholderSpan(i * self.config.block_size, item.num_embeds, modality, i)
                for i, item in enumerate(items)
            ],
            items=[
                HashedItem(modality, content_id(self.config.model_id, modality, item.embeds, {}, {}), item)
                for item in items
            ],
            cache_salt=request.cache_salt,
            is_embeds=True,
        )

    # --- text

    def _tokens(self, request: ParsedPrompt, options: Mapping[str, Any]) -> list[int]:
        """Ids of the prompt before expansion."""
        if request.token_ids is not None:
            for token in request.token_ids:
                if not 0 <= token < self.config.vocab_size and token not in self.out_of_vocab_ids:
                    raise RequestError(f"Token id {token} is out of vocabulary", "bad_token_id")
            return list(request.token_ids)
        if self.tokenizer is None:
            raise RequestError(
                "Without a tokenizer (skip_tokenizer_init) prompts must be `prompt_token_ids`.", "no_tokenizer"
            )
        special, keep = self._tokenization(options)
        text = self._with_placeholders(request)
        bound = None if keep is not None else self.config.max_model_len
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=special, max_tokens=bound)
        in_parts = getattr(self.processor, "tokenize", None)  # of the families whose text is not tokenised as a whole
        tokens: list[int] = in_parts(text, encode) if in_parts else encode(text)
        if keep is not None:
            return tokens[max(0, len(tokens) - keep) :]
        if len(tokens) > self.config.max_model_len:  # before any medium is decoded
            raise ValidationError(
                f"This model's maximum context length is {self.config.max_model_len} tokens, but the text alone has "
                f"{len(tokens)}. {self._too_long(len(tokens))}",
                parameter="input_tokens",
                value=len(tokens),
            )
        return tokens

    def _tokenization(self, options: Mapping[str, Any]) -> tuple[bool, int | None]:
        """(add special tokens, tokens to keep or None)."""
        for name in options:
            if name not in TOKENIZATION_KWARGS:
                raise ValidationError(
                    f"Unknown key in tokenization_kwargs; known are {TOKENIZATION_KWARGS}.", parameter=name
                )
        keep = options.get("truncate_prompt_tokens")
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < -1):
            raise ValidationError("Must be an integer >= -1.", parameter="truncate_prompt_tokens", value=keep)
        # the start tokens of an encoder-decoder prompt are its own business
        special = bool(options.get("add_special_tokens", not self.config.encoder_decoder))
        return special, self.config.max_model_len - 1 if keep == -1 else keep

    def _with_placeholders(self, request: ParsedPrompt) -> str:
        """The text, with `<image>`, `<video>` and `<audio>` replaced by the model's placeholders: only where the text
        has none of the model's own for that modality and exactly as many generic ones as items."""
        text = request.text or ""
        for modality, media in request.media.items():
            generic, placeholder_token = (
                f"<{modality}>",
                self.processor.placeholder_token.get(modality) if self.processor else None,
            )
            if (
                self.processor
                and placeholder_token
                and placeholder_token not in text
                and text.count(generic) == len(media)
            ):
                first, *rest = text.split(generic)
                placeholder = self.processor.placeholder_text[modality]
                text = first + "".join(placeholder.replace("{i}", str(i)) + part for i, part in enumerate(rest, 1))
        return text

    def _check_length(self, length: int) -> None:
        if not length:
            raise RequestError("The decoder prompt cannot be empty", "empty_prompt")
        if length + self.config.generates > self.config.max_model_len:  # there must be room for one generated token
            raise RequestError(self._too_long(length), "prompt_too_long")

    def _too_long(self, length: int) -> str:
        return (
            f"The decoder prompt (length {length}) is longer than the maximum model length of "
            f"{self.config.max_model_len}. "
            "Make sure that `max_model_len` is no smaller than the number of text tokens plus multimodal tokens, and "
            "leave room for at least one token of the answer."
        )

    # --- media

    def _items(self, request: ParsedPrompt) -> dict[str, list[HashedItem]]:
        """Every item of the request, from the cache or processed now."""
        if not request.media:
            return {}
        kwargs = self._kwargs(request)
        io_kwargs = self.merged_io_kwargs(request.io_kwargs)
        asked = _Asked(kwargs, io_kwargs, _background(io_kwargs), request.cache_salt, next(self._serial))
        return {
            modality: [self._item(modality, index, entry, asked) for index, entry in enumerate(media)]
            for modality, media in request.media.items()
        }

    def _kwargs(self, request: ParsedPrompt) -> dict[str, Any]:
        """Engine and request kwargs together, the request's winning; keys the processor does not know are dropped."""
        assert self.processor is not None  # counts were checked: no processor, no media
        merged = {**self.processor_kwargs, **request.processor_kwargs}
        check_kwargs(merged)
        for name in merged.keys() - self.processor.accepted_kwargs:
            if name not in self._warned:
                self._warned.add(name)
                log.warning("mm_processor_kwargs: %r is not used by this model and dropped", name)
        return {name: value for name, value in given_kwargs(merged).items() if name in self.processor.accepted_kwargs}

    def _item(self, modality: str, index: int, media: MediaInput, asked: _Asked) -> HashedItem:
        data, io_kwargs = media.data, asked.io_kwargs.get(modality, {})
        if data is not None and not isinstance(data, EmbedsInput):
            size_check.check_size(modality, data, self.config.media_limits)
        if not self.hashed:
            key = f"{asked.serial}-{modality}-{index}"
        elif media.uuid is not None:
            key = named_id(self.config.model_id, modality, media.uuid, asked.salt, asked.kwargs, io_kwargs)
        else:
            content = data.fields if isinstance(data, EmbedsInput) else data
            key = content_id(self.config.model_id, modality, content, asked.kwargs, io_kwargs)
        passing = isinstance(data, EmbedsInput) and media.uuid is None  # rows cost nothing to make again
        item = None if passing else self.cache.get(key)
        if item is None:
            if data is None:
                raise RequestError(
                    f"Cache miss for {modality} at index {index} but data is not provided.", "cache_miss"
                )
            item = self._process_item(modality, index, data, asked)
            if not passing:
                self.cache.put(key, item)
        self._check_rows(modality, index, item.num_embeds)
        most = self.config.max_item_inputs.get(modality, item.num_inputs)
        if item.num_inputs > most:
            raise RequestError(
                f"The {modality} item at index {index} has {item.num_inputs} parts to encode, but at most "
                f"{most} are encoded at "
                "once. Reduce its resolution, length or number of frames.",
                "item_too_large",
            )
        return HashedItem(modality, key, item)

    def _check_rows(self, modality: str, index: int, count: int) -> None:
        """RequestError if an item of so many embeddings is larger than the encoder cache."""
        if self.config.max_item_embeds is not None and count > self.config.max_item_embeds:
            raise RequestError(
                f"The {modality} item at index {index} with length {count} exceeds the pre-allocated "
                f"encoder cache size {self.config.max_item_embeds}. Reduce the input resolution, or raise "
                f"`max_num_batched_tokens` to at least {count}.",
                "item_too_large",
            )

    def _least_embeds(self, modality: str, media: Any, kwargs: Mapping[str, Any]) -> int:
        """Embeddings that an item will have at least, known before it is resized: `min_pixels` can ask for a picture of
        billions of pixels, on which a processor would spend minutes."""
        assert self.processor is not None
        if modality == "image":
            return self.processor.num_embeds(modality, image_size(media), kwargs)
        if modality == "video":  # half of one step's: a whole clip may be bounded more tightly than a step alone
            return self.processor.num_embeds(modality, (1, *media.frames.shape[1:3]), kwargs) // 2
        return 0

    def _process_item(self, modality: str, index: int, data: Any, asked: _Asked) -> MediaItem:
        """Decode and process one item. RequestError for an item that cannot be, ProcessingError for any other failure;
        neither message shows what the item holds."""
        assert self.processor is not None
        try:
            if isinstance(data, EmbedsInput):
                assert self.embeds is not None  # parsed, so allowed
                return self.embeds.to_media_item(modality, index, data, asked.kwargs)
            media = self._decode(modality, data, asked.background)
            self._check_rows(modality, index, self._least_embeds(modality, media, asked.kwargs))
            return self.processor.process_item(modality, media, asked.kwargs)
        except RequestError:
            raise
        except MemoryError as error:
            raise RequestError(
                f"The {modality} item at index {index} needs more memory than there is. Reduce its resolution, length "
                "or number of frames.",
                "item_too_large",
            ) from error
        except Exception as error:
            raise ProcessingError(
                f"Failed to apply {type(self.processor).__module__} on {modality} item {index} "
                f"({type(error).__name__})."
            ) from error

    def _decode(self, modality: str, data: Any, background: image.Color) -> Any:
        assert self.processor is not None
        if modality == "image":
            return image.decode(data, background=background, limits=self.config.media_limits)
        if modality == "video":
            return video.decode(data, background=background, limits=self.config.media_limits)
        return audio.decode(data, self.processor.sampling_rate, limits=self.config.media_limits)


def _background(io_kwargs: Mapping[str, Mapping[str, Any]]) -> image.Color:
    """What shows where an image is transparent. RequestError for what is no colour."""
    return image.background_color(io_kwargs.get("image", {}).get("rgba_background_color", image.WHITE))
