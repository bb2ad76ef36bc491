"""`InputProcessor`: turns a parsed prompt into the engine's input: token ids, positions and processed media.

The steps: count the media, tokenize, process every item or take it from the cache, expand placeholders, check the
length, compute positions. Nothing here uses a device.
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

from mmjax.inputs import parse, prompt_embeds
from mmjax.inputs.media_embeds import EmbedsInput, MediaEmbedsReader
from mmjax.inputs.parse import MediaInput, ParsedPrompt
from mmjax.inputs.processor_cache import ProcessorCache
from mmjax.inputs.processor_kwargs import check_kwargs, given_kwargs, kwargs_of_items
from mmjax.inputs.tokenization import TokenizationOptions
from mmjax.multimodal import audio, image, size_check, video
from mmjax.multimodal.hash import content_id, named_id
from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.processors.base import (
    NOTHING_SUPPRESSED,
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    Processor,
    SuppressedTokens,
    TimestampTokens,
    linear_positions,
)
from mmjax.processors.resize import image_size
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, ValidationError

log = logging.getLogger(__name__)


class ProcessingError(RuntimeError):
    """A processor failed on an item that passed all checks: a bug, not a mistake of the caller."""


class HashedItem(NamedTuple):
    """A processed item and its hash, the key of every cache: equal hashes mean equal features."""

    modality: str
    item_hash: str
    item: MediaItem


@dataclasses.dataclass(frozen=True, eq=False)
class EngineInput:
    """A prompt that the engine can schedule.

    items: one per span, in the order of spans; if there are no spans, in the order given. spans: each refers to an item
    by its modality and its index in that modality. Token i >= T has rotary position i + rope_delta on every axis.
    timestamps: for a transcript with timestamps. is_embeds: the prompt was given as embeddings, and its token ids are
    meaningless zeros. suppressed: tokens that must not be sampled.
    """

    prompt: str | None
    token_ids: np.ndarray  # int32 [T]
    rope_positions: np.ndarray  # int32 [R, T]
    rope_delta: int
    spans: list[PlaceholderSpan]
    items: list[HashedItem]
    cache_salt: str | None = None
    encoder_prompt: str | None = None
    encoder_token_ids: np.ndarray | None = None  # int32, encoder-decoder models only
    timestamps: TimestampTokens | None = None
    is_embeds: bool = False
    suppressed: SuppressedTokens = NOTHING_SUPPRESSED


class _MediaOptions(NamedTuple):
    """The options of a media item. serial: the prompt's number, for hashes if nothing is cached."""

    processor_kwargs: Mapping[str, Any]
    io_kwargs: Mapping[str, Mapping[str, Any]]
    background: image.Color
    cache_salt: str | None
    serial: int


# Prompts processed at the same time, on however many threads. More of them keep the GIL from the thread that feeds the
# device: on 16 cores, with 20 a batch of images waited 90 to 140 ms for its first dispatch; with 4 to 8 it waits 30 to
# 45 ms, and they keep up with an H100.
MAX_CONCURRENT = min(8, (os.cpu_count() or 1) + 1)


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """The properties of the model, the engine and the operator's settings that an input processor needs.

    limit_mm_per_prompt, mm_processor_kwargs, media_io_kwargs: see `EngineArgs`. cache_gb: GiB of processed media to
    cache; 0 disables the cache. Without this cache and without prefix caching, uuids of media are ignored. generates:
    whether there must be room for an output token. max_item_embeds: the most embeddings of an item that the encoder
    cache holds; None for any number. max_item_inputs: the most encoder inputs of an item, by modality.
    media_embeds_dim: width of embeddings in place of media, prompt_embeds_dim: in place of a whole prompt; None refuses
    them. mm_embed_dim: width of the
    engine's mm_embeds buffer. block_size: tokens per block of the KV cache.
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
    """Turns prompts into engine inputs for one model. May be used from several threads.

    processor: None for a text-only model. tokenizer: None if prompts must be token ids.
    """

    def __init__(self, processor: Processor | None, tokenizer: Tokenizer | None, config: InputConfig) -> None:
        self.processor, self.tokenizer, self.config = processor, tokenizer, config
        self.mm_limits = parse.mm_limits(config.limit_mm_per_prompt)
        self.processor_kwargs = dict(config.mm_processor_kwargs or {})
        self.io_kwargs = {modality: dict(kwargs) for modality, kwargs in (config.media_io_kwargs or {}).items()}
        _background(self.io_kwargs)  # report a bad color at start
        dim = config.media_embeds_dim
        self.embeds = MediaEmbedsReader(processor, dim) if processor and dim is not None else None
        self.cache = ProcessorCache(int(config.cache_gb * 2**30))
        self.uses_hashes = config.cache_gb > 0 or config.prefix_caching
        placeholder_ids = (
            [tokenizer.id_of(name) for name in processor.placeholder_token.values()] if processor and tokenizer else []
        )
        # placeholders may be outside the vocabulary, since their embeddings are never looked up
        self.out_of_vocab_ids = {token for token in placeholder_ids if token is not None and token >= config.vocab_size}
        self._concurrency = threading.Semaphore(MAX_CONCURRENT)
        self._serials = itertools.count()
        self._warned: set[str] = set()

    def parse(self, prompt: Any) -> ParsedPrompt:
        """Check the form of a caller's prompt; see `mmjax.inputs.parse`."""
        parsed = parse.parse_prompt(
            prompt,
            encoder_decoder=self.config.encoder_decoder,
            embeds=self.embeds,
            prompt_embeds_dim=self.config.prompt_embeds_dim,
        )
        self._check_counts(parsed)
        return parsed

    def _check_counts(self, prompt: ParsedPrompt) -> None:
        for modality, media in prompt.media.items():
            num_embeds = sum(
                isinstance(x.data, EmbedsInput) or (x.data is None and self.embeds is not None) for x in media
            )
            self.check_count(modality, len(media), num_embeds)

    def check_count(self, modality: str, count: int, num_embeds: int) -> None:
        """RequestError if `count` items of a modality are more than the model or the operator allows. num_embeds of
        them are given as embeddings."""
        model_limits = self.processor.mm_limits if self.processor else {}
        if num_embeds and self.embeds is None:
            raise parse.embeds_disabled(modality)
        if num_embeds and not self.mm_limits[modality]:
            count -= num_embeds  # if embeddings are enabled, a limit of 0 refuses all but them
        parse.check_count(modality, count, self.mm_limits[modality], model_limits.get(modality, 0))

    def merged_io_kwargs(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The engine's `media_io_kwargs`, overridden by those of a request, by modality."""
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

    def process(self, prompt: ParsedPrompt, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Prepare a prompt for the engine. RequestError for anything that the caller can correct.

        tokenization_kwargs: see `TokenizationOptions.read`.
        """
        options = TokenizationOptions.read(
            tokenization_kwargs or {},
            self.config.max_model_len - self.config.generates,
            from_start=not self.config.generates,  # as vLLM does: what is embedded is known by its start
        )
        with self._concurrency:
            if prompt.prompt_embeds is not None:
                return self._process_embeds(prompt, options)
            return self._process_tokens(prompt, options)

    def _process_tokens(self, prompt: ParsedPrompt, options: TokenizationOptions) -> EngineInput:
        """A prompt of text or token ids."""
        self._check_counts(prompt)
        token_ids = self._tokenize(prompt, options)
        if len(token_ids) > self.config.max_model_len:  # checked before any media are decoded
            raise self._too_long(len(token_ids))
        hashed = self._items(prompt)
        items = {modality: [entry.item for entry in entries] for modality, entries in hashed.items()}
        expanded = self.processor.expand_prompt(token_ids, items) if self.processor else ExpandedPrompt(token_ids, [])
        self._check_length(len(expanded.token_ids), options.max_length)
        if self.processor:
            positions, delta = self.processor.rope_positions(expanded.token_ids, expanded.spans, items)
        else:
            positions, delta = linear_positions(len(expanded.token_ids))
        in_spans = [hashed[span.modality][span.item_index] for span in expanded.spans]
        encoder_ids = np.asarray(expanded.encoder_token_ids, np.int32) if self.config.encoder_decoder else None
        return EngineInput(
            prompt=prompt.text,
            token_ids=np.asarray(expanded.token_ids, np.int32),
            rope_positions=positions,
            rope_delta=delta,
            spans=expanded.spans,
            items=in_spans or [entry for entries in hashed.values() for entry in entries],
            cache_salt=prompt.cache_salt,
            encoder_prompt=prompt.encoder_text,
            encoder_token_ids=encoder_ids,
            timestamps=expanded.timestamps,
        )

    def _process_embeds(self, prompt: ParsedPrompt, options: TokenizationOptions) -> EngineInput:
        """A prompt of embeddings [T, D], as one item per block, so that prompts with equal beginnings share blocks."""
        assert prompt.prompt_embeds is not None
        embeds = prompt.prompt_embeds[options.used(len(prompt.prompt_embeds))]
        self._check_length(len(embeds), options.max_length)
        items = prompt_embeds.to_items(embeds, self.config.mm_embed_dim, self.config.block_size)
        token_ids = [0] * len(embeds)
        positions, delta = (
            self.processor.rope_positions(token_ids, [], {}) if self.processor else linear_positions(len(token_ids))
        )
        modality = prompt_embeds.PROMPT_MODALITY
        return EngineInput(
            prompt=prompt.text,
            token_ids=np.asarray(token_ids, np.int32),
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
            cache_salt=prompt.cache_salt,
            is_embeds=True,
        )

    # --- text

    def _tokenize(self, prompt: ParsedPrompt, options: TokenizationOptions) -> list[int]:
        """The prompt's token ids that are used, placeholders not expanded."""
        if prompt.token_ids is not None:
            for token in prompt.token_ids:
                if not 0 <= token < self.config.vocab_size and token not in self.out_of_vocab_ids:
                    raise RequestError(f"Token id {token} is out of vocabulary", "bad_token_id")
            return list(prompt.token_ids[options.used(len(prompt.token_ids))])
        if self.tokenizer is None:
            raise RequestError(
                "Without a tokenizer (skip_tokenizer_init) prompts must be `prompt_token_ids`.", "no_tokenizer"
            )
        # an encoder-decoder's processor adds the start tokens itself
        default = not self.config.encoder_decoder
        special = default if options.add_special_tokens is None else bool(options.add_special_tokens)
        text = self._with_placeholders(prompt)
        max_tokens = None if options.max_used is not None else self.config.max_model_len
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=special, max_tokens=max_tokens)
        token_ids = self.processor.tokenize(text, encode) if self.processor else encode(text)
        return options.truncate(token_ids, self.tokenizer.num_closing_tokens if special else 0)

    def _with_placeholders(self, prompt: ParsedPrompt) -> str:
        """The text, with `<image>`, `<video>` and `<audio>` replaced by the model's placeholders, if the text has no
        placeholder of the model for that modality, and exactly as many generic ones as there are items."""
        text = prompt.text or ""
        if self.processor is None:
            return text
        for modality, media in prompt.media.items():
            generic, own = f"<{modality}>", self.processor.placeholder_token.get(modality)
            if own and own not in text and text.count(generic) == len(media):
                first, *rest = text.split(generic)
                placeholder = self.processor.placeholder_text[modality]
                text = first + "".join(placeholder.replace("{i}", str(i)) + part for i, part in enumerate(rest, 1))
        return text

    def _check_length(self, length: int, max_length: int | None) -> None:
        """RequestError for a prompt of no tokens, or of more than fit the model or `max_length` allows."""
        if not length:
            raise RequestError("The decoder prompt cannot be empty", "empty_prompt")
        if length + self.config.generates > self.config.max_model_len:
            raise self._too_long(length)
        if max_length is not None and length > max_length:
            raise ValidationError(
                f"This model's maximum context length is {self.config.max_model_len} tokens, and `max_length` allows "
                f"{max_length} of them, but the prompt has {length}. Shorten it, raise `max_length`, or set "
                "`truncation=True`.",
                parameter="input_tokens",
                value=length,
                code="prompt_too_long",
            )

    def _too_long(self, length: int) -> ValidationError:
        most = self.config.max_model_len
        return ValidationError(
            f"This model's maximum context length is {most} tokens. The decoder prompt (length {length}) is longer "
            f"than the maximum model length of {most}. Make sure that `max_model_len` is no smaller than the number of "
            "text tokens plus multimodal tokens, and leave room for at least one output token.",
            parameter="input_tokens",
            value=length,
            code="prompt_too_long",
        )

    # --- media

    def _items(self, prompt: ParsedPrompt) -> dict[str, list[HashedItem]]:
        """Every media item of the prompt, from the cache or processed now."""
        if not prompt.media:
            return {}
        kwargs = self._merged_processor_kwargs(prompt)
        io_kwargs = self.merged_io_kwargs(prompt.io_kwargs)
        options = _MediaOptions(kwargs, io_kwargs, _background(io_kwargs), prompt.cache_salt, next(self._serials))
        own = {modality: kwargs_of_items(kwargs, modality, len(inputs)) for modality, inputs in prompt.media.items()}
        return {
            modality: [
                self._item(modality, index, media, options._replace(processor_kwargs=own[modality][index]))
                for index, media in enumerate(inputs)
            ]
            for modality, inputs in prompt.media.items()
        }

    def _merged_processor_kwargs(self, prompt: ParsedPrompt) -> dict[str, Any]:
        """The engine's `mm_processor_kwargs`, overridden by the prompt's; without those that the processor does not
        accept."""
        assert self.processor is not None, "without a processor, the check of counts refuses all media"
        merged = {**self.processor_kwargs, **prompt.processor_kwargs}
        check_kwargs(merged)
        for name in merged.keys() - self.processor.accepted_kwargs:
            if name not in self._warned:
                self._warned.add(name)
                log.warning("mm_processor_kwargs: %r is not used by this model and dropped", name)
        return {name: value for name, value in given_kwargs(merged).items() if name in self.processor.accepted_kwargs}

    def _item(self, modality: str, index: int, media: MediaInput, options: _MediaOptions) -> HashedItem:
        data = media.data
        if data is not None and not isinstance(data, EmbedsInput):
            size_check.check_size(modality, data, self.config.media_limits)
        item_hash = self._item_hash(modality, index, media, options)
        uncached = isinstance(data, EmbedsInput) and media.uuid is None  # such items are cheap to make
        item = None if uncached else self.cache.get(item_hash)
        if item is None:
            if data is None:
                raise RequestError(
                    f"Cache miss for {modality} at index {index} but data is not provided.", "cache_miss"
                )
            item = self._process_item(modality, index, data, options)
            if not uncached:
                self.cache.put(item_hash, item)
        self._check_item(modality, index, item)
        return HashedItem(modality, item_hash, item)

    def _item_hash(self, modality: str, index: int, media: MediaInput, options: _MediaOptions) -> str:
        """The key of an item in the caches; a unique one if nothing is cached."""
        kwargs, io_kwargs = options.processor_kwargs, options.io_kwargs.get(modality, {})
        if not self.uses_hashes:
            return f"{options.serial}-{modality}-{index}"
        if media.uuid is not None:
            return named_id(self.config.model_id, modality, media.uuid, options.cache_salt, kwargs, io_kwargs)
        content = media.data.fields if isinstance(media.data, EmbedsInput) else media.data
        return content_id(self.config.model_id, modality, content, kwargs, io_kwargs)

    def _check_item(self, modality: str, index: int, item: MediaItem) -> None:
        """RequestError for an item too large for the engine."""
        self._check_num_embeds(modality, index, item.num_embeds)
        max_inputs = self.config.max_item_inputs.get(modality, item.num_inputs)
        if item.num_inputs > max_inputs:
            raise RequestError(
                f"The {modality} item at index {index} has {item.num_inputs} parts to encode, but at most "
                f"{max_inputs} are encoded at once. Reduce its resolution, length or number of frames.",
                "item_too_large",
            )

    def _check_num_embeds(self, modality: str, index: int, count: int) -> None:
        """RequestError for an item with more embeddings than the encoder cache holds."""
        if self.config.max_item_embeds is not None and count > self.config.max_item_embeds:
            raise RequestError(
                f"The {modality} item at index {index} with length {count} exceeds the pre-allocated "
                f"encoder cache size {self.config.max_item_embeds}. Reduce the input resolution, or raise "
                f"`max_num_batched_tokens` to at least {count}.",
                "item_too_large",
            )

    def _min_num_embeds(self, modality: str, media: Any, kwargs: Mapping[str, Any]) -> int:
        """A lower bound of an item's embeddings, known before it is resized: with `min_pixels`, an image may be resized
        to billions of pixels, which would take a processor minutes."""
        assert self.processor is not None
        if modality == "image":
            return self.processor.num_embeds(modality, image_size(media), kwargs)
        if modality == "video":  # half of one frame's, because a limit on all frames together may shrink each
            return self.processor.num_embeds(modality, (1, *media.frames.shape[1:3]), kwargs) // 2
        return 0

    def _process_item(self, modality: str, index: int, data: Any, options: _MediaOptions) -> MediaItem:
        """Decode and process one item. RequestError for an item that cannot be decoded or processed, ProcessingError
        for any other failure; neither message quotes the item."""
        assert self.processor is not None
        kwargs = options.processor_kwargs
        try:
            if isinstance(data, EmbedsInput):
                assert self.embeds is not None, "parsing refuses embeddings that are not enabled"
                return self.embeds.to_media_item(modality, index, data, kwargs)
            media = self._decode(modality, data, options.background)
            self._check_num_embeds(modality, index, self._min_num_embeds(modality, media, kwargs))
            return self.processor.process_item(modality, media, kwargs)
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
    """The color behind transparent images. RequestError for a value that is not a color."""
    return image.background_color(io_kwargs.get("image", {}).get("rgba_background_color", image.WHITE))
