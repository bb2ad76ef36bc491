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
from cachetools import LRUCache

from mmjax import inputs
from mmjax.inputs import Media, Request
from mmjax.multimodal import audio, bounds, image, video
from mmjax.multimodal.hash import content_id, named_id
from mmjax.multimodal.limits import DEFAULT, Limits
from mmjax.processors import prompt as whole_prompt
from mmjax.processors.base import Expanded, Item, Processor, Span, Timestamps, linear_positions
from mmjax.processors.embeds import EmbedReader, Embeds
from mmjax.processors.options import check as check_options
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError, ValidationError

log = logging.getLogger(__name__)

TOKENIZATION_KWARGS = ("add_special_tokens", "truncate_prompt_tokens")


class MediaItem(NamedTuple):
    """A processed item under the name by which every cache knows it: equal keys mean equal features."""

    kind: str
    key: str
    item: Item


@dataclasses.dataclass(frozen=True, eq=False)
class Rendered:
    """A prompt the engine can schedule. `items` are in the order of `spans` (in the order given where they fill no
    tokens); `spans` index items within their kind. Token i >= T sits at position i + `delta` on every row."""

    prompt: str | None
    tokens: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [R, T]
    delta: int
    spans: list[Span]
    items: list[MediaItem]
    salt: str | None = None
    encoder_prompt: str | None = None
    encoder_tokens: np.ndarray | None = None  # int32, encoder-decoder models only
    timestamps: Timestamps | None = None  # what the answer keeps to where it tells times
    embedded: bool = False  # the prompt came as embeddings: its tokens, all 0, say nothing


class _Asked(NamedTuple):
    """What a request says of all its media."""

    kwargs: Mapping[str, Any]
    io_kwargs: Mapping[str, Mapping[str, Any]]
    background: image.Color
    salt: str | None
    serial: int


class ItemCache:
    """Processed items by key, least recently used out first, within a budget of bytes. Items above it are not kept.
    Counts what is asked for and what is found. Safe from any thread."""

    def __init__(self, budget_bytes: int):
        self.queries = self.hits = 0
        self._items: LRUCache[str, Item] = LRUCache(budget_bytes, getsizeof=lambda item: item.nbytes)
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return int(self._items.currsize)

    def get(self, key: str) -> Item | None:
        with self._lock:
            item = self._items.get(key)
            self.queries += 1
            self.hits += item is not None
            return item

    def put(self, key: str, item: Item) -> None:
        with self._lock:
            if item.nbytes <= self._items.maxsize and key not in self._items:
                self._items[key] = item

    def clear(self) -> None:
        """Forget every item; the statistics go on."""
        with self._lock:
            self._items.clear()


# Prompts rendered at once, however many threads ask. More of them keep Python's lock from the thread that feeds the
# device: on 16 cores, 20 made a batch of images wait 90 to 140 ms before its first dispatch, 4 to 8 make it wait 30 to
# 45 ms and keep up with an H100.
AT_ONCE = min(8, (os.cpu_count() or 1) + 1)


class Renderer:
    """Turns requests into prompts for one model.

    `processor` None: a plain language model, which takes no media. `tokenizer` None: prompts must be token ids.
    `max_item_rows`: rows the encoder cache can hold of one item; `max_item_units`: by modality, encoder units of one
    item. `cache_gb` is in GiB; 0 keeps no items. Without both item cache and prefix cache the caller's names for media
    are ignored. `embed_width`: of the rows that may come in place of media, `prompt_width`: of those in place of a
    whole prompt; None takes none. `slab_width`: of the rows that the engine keeps. `page`: tokens per page of keys.
    """

    def __init__(
        self,
        processor: Processor | None,
        tokenizer: Tokenizer | None,
        *,
        model_id: str,
        vocab_size: int,
        max_model_len: int,
        limit_mm_per_prompt: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        cache_gb: float = 4.0,
        prefix_caching: bool = True,
        encoder_decoder: bool = False,
        answers: bool = True,
        max_item_rows: int | None = None,
        max_item_units: Mapping[str, int] | None = None,
        embed_width: int | None = None,
        prompt_width: int | None = None,
        slab_width: int = 0,
        page: int = 1,
        limits: Limits = DEFAULT,
    ):
        self.processor, self.tokenizer, self.model_id = processor, tokenizer, model_id
        self.vocab_size, self.max_model_len, self.max_item_rows = vocab_size, max_model_len, max_item_rows
        self.max_item_units = max_item_units or {}
        self.counts = inputs.read_limits(limit_mm_per_prompt)
        self.processor_kwargs = dict(mm_processor_kwargs or {})
        self.io_kwargs = {kind: dict(kwargs) for kind, kwargs in (media_io_kwargs or {}).items()}
        _background(self.io_kwargs)  # a bad colour is told at start
        self.answers = answers
        self.encoder_decoder, self.limits = encoder_decoder, limits
        self.embeds = EmbedReader(processor, embed_width) if processor and embed_width is not None else None
        self.prompt_width, self.slab_width, self.page = prompt_width, slab_width, page
        self.cache = ItemCache(int(cache_gb * 2**30))
        self.named = cache_gb > 0 or prefix_caching
        markers = [tokenizer.id_of(name) for name in processor.marker.values()] if processor and tokenizer else []
        # a marker may lie past the embedding, since media always take its place
        self.beyond = {token for token in markers if token is not None and token >= vocab_size}
        self._room = threading.Semaphore(AT_ONCE)
        self._serial = itertools.count()
        self._warned: set[str] = set()

    def parse(self, prompt: Any) -> Request:
        """A prompt as a caller writes it -> Request; see `mmjax.inputs.parse`."""
        request = inputs.parse(
            prompt, encoder_decoder=self.encoder_decoder, embeds=self.embeds, row_width=self.prompt_width
        )
        self.check_counts(request)
        return request

    def check_counts(self, request: Request) -> None:
        """RequestError if the prompt holds more media than the model or the operator allows."""
        for kind, media in request.media.items():
            embedded = sum(isinstance(x.data, Embeds) or (x.data is None and self.embeds is not None) for x in media)
            self.check_count(kind, len(media), embedded)

    def check_count(self, kind: str, count: int, embedded: int = 0) -> None:
        """RequestError if `count` items of a modality are more than the model or the operator allows; `embedded` of
        them come as embeddings."""
        kinds = self.processor.kinds if self.processor else {}
        if embedded and self.embeds is None:
            raise inputs.embeds_disabled(kind)
        if embedded and not self.counts[kind]:
            count -= embedded  # a limit of 0 with embeddings allowed means: nothing but embeddings
        inputs.check_count(kind, count, self.counts[kind], kinds.get(kind, 0))

    def merged_io_kwargs(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """`media_io_kwargs` of the engine and of a request together, the request's winning, by modality."""
        if not given:
            return self.io_kwargs
        from mmjax.multimodal.media import MediaIO, VideoMediaIO

        for kind, kwargs in given.items():
            if kwargs is not None and not isinstance(kwargs, Mapping):
                raise RequestError(
                    f"media_io_kwargs[{kind!r}] must be a dictionary, got {type(kwargs).__name__}.", "bad_media_kwargs"
                )
        return {
            kind: (VideoMediaIO if kind == "video" else MediaIO).merge_kwargs(self.io_kwargs.get(kind), given.get(kind))
            for kind in {**self.io_kwargs, **given}
        }

    def render(self, request: Request, tokenization_kwargs: Mapping[str, Any] | None = None) -> Rendered:
        """Tokenise, process, expand, check and place. RequestError for everything the caller can mend.

        `tokenization_kwargs`: add_special_tokens (bool), truncate_prompt_tokens (keep the last n; -1: max_model_len).
        """
        with self._room:
            return self._render(request, tokenization_kwargs)

    def _render(self, request: Request, tokenization_kwargs: Mapping[str, Any] | None) -> Rendered:
        if request.rows is not None:
            return self._embedded(request, request.rows)
        self.check_counts(request)
        tokens = self._tokens(request, tokenization_kwargs or {})
        media = self._items(request)
        items = {kind: [entry.item for entry in entries] for kind, entries in media.items()}
        expanded = self.processor.expand(tokens, items) if self.processor else Expanded(tokens, [])
        self._check_length(len(expanded.tokens))
        if self.processor:
            positions, delta = self.processor.positions(expanded.tokens, expanded.spans, items)
        else:
            positions, delta = linear_positions(len(expanded.tokens))
        placed = [media[span.kind][span.index] for span in expanded.spans]
        encoder = np.asarray(expanded.encoder_tokens, np.int32) if self.encoder_decoder else None
        return Rendered(
            prompt=request.text,
            tokens=np.asarray(expanded.tokens, np.int32),
            positions=positions,
            delta=delta,
            spans=expanded.spans,
            items=placed or [entry for entries in media.values() for entry in entries],
            salt=request.salt,
            encoder_prompt=request.encoder_text,
            encoder_tokens=encoder,
            timestamps=expanded.timestamps,
        )

    def _embedded(self, request: Request, rows: np.ndarray) -> Rendered:
        """A prompt of embeddings, in items as long as a page, so that prompts that begin alike share pages."""
        self._check_length(len(rows))
        items = whole_prompt.items(rows, self.slab_width, self.page)
        tokens = [0] * len(rows)
        positions, delta = self.processor.positions(tokens, [], {}) if self.processor else linear_positions(len(tokens))
        kind = whole_prompt.KIND
        return Rendered(
            prompt=request.text,
            tokens=np.asarray(tokens, np.int32),
            positions=positions,
            delta=delta,
            spans=[Span(i * self.page, item.rows, kind, i) for i, item in enumerate(items)],
            items=[MediaItem(kind, content_id(self.model_id, kind, item.ready, {}, {}), item) for item in items],
            salt=request.salt,
            embedded=True,
        )

    # --- text

    def _tokens(self, request: Request, options: Mapping[str, Any]) -> list[int]:
        """Ids of the prompt before expansion."""
        if request.tokens is not None:
            for token in request.tokens:
                if not 0 <= token < self.vocab_size and token not in self.beyond:
                    raise RequestError(f"Token id {token} is out of vocabulary", "bad_token_id")
            return list(request.tokens)
        if self.tokenizer is None:
            raise RequestError(
                "Without a tokenizer (skip_tokenizer_init) prompts must be `prompt_token_ids`.", "no_tokenizer"
            )
        special, keep = self._tokenization(options)
        text = self._with_placeholders(request)
        bound = None if keep is not None else self.max_model_len
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=special, max_tokens=bound)
        in_parts = getattr(self.processor, "tokenize", None)  # of the families whose text is not tokenised as a whole
        tokens: list[int] = in_parts(text, encode) if in_parts else encode(text)
        if keep is not None:
            return tokens[max(0, len(tokens) - keep) :]
        if len(tokens) > self.max_model_len:  # before any medium is decoded
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens, but the text alone has "
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
        special = bool(options.get("add_special_tokens", not self.encoder_decoder))
        return special, self.max_model_len - 1 if keep == -1 else keep

    def _with_placeholders(self, request: Request) -> str:
        """The text, with `<image>`, `<video>` and `<audio>` replaced by the model's placeholders: only where the text
        has none of the model's own for that modality and exactly as many generic ones as items."""
        text = request.text or ""
        for kind, media in request.media.items():
            generic, marker = f"<{kind}>", self.processor.marker.get(kind) if self.processor else None
            if self.processor and marker and marker not in text and text.count(generic) == len(media):
                first, *rest = text.split(generic)
                placeholder = self.processor.placeholder[kind]
                text = first + "".join(placeholder.replace("{i}", str(i)) + part for i, part in enumerate(rest, 1))
        return text

    def _check_length(self, length: int) -> None:
        if not length:
            raise RequestError("The decoder prompt cannot be empty", "empty_prompt")
        if length + self.answers > self.max_model_len:  # there must be room for one generated token
            raise RequestError(self._too_long(length), "prompt_too_long")

    def _too_long(self, length: int) -> str:
        return (
            f"The decoder prompt (length {length}) is longer than the maximum model length of {self.max_model_len}. "
            "Make sure that `max_model_len` is no smaller than the number of text tokens plus multimodal tokens, and "
            "leave room for at least one token of the answer."
        )

    # --- media

    def _items(self, request: Request) -> dict[str, list[MediaItem]]:
        """Every item of the request, from the cache or processed now."""
        if not request.media:
            return {}
        kwargs = self._kwargs(request)
        io_kwargs = self.merged_io_kwargs(request.io_kwargs)
        asked = _Asked(kwargs, io_kwargs, _background(io_kwargs), request.salt, next(self._serial))
        return {
            kind: [self._item(kind, index, entry, asked) for index, entry in enumerate(media)]
            for kind, media in request.media.items()
        }

    def _kwargs(self, request: Request) -> dict[str, Any]:
        """Engine and request kwargs together, the request's winning; keys the processor does not know are dropped."""
        assert self.processor is not None  # counts were checked: no processor, no media
        merged = {**self.processor_kwargs, **request.processor_kwargs}
        check_options(merged)
        for name in merged.keys() - self.processor.accepts:
            if name not in self._warned:
                self._warned.add(name)
                log.warning("mm_processor_kwargs: %r is not used by this model and dropped", name)
        return {name: value for name, value in merged.items() if name in self.processor.accepts}

    def _item(self, kind: str, index: int, media: Media, asked: _Asked) -> MediaItem:
        data, io_kwargs = media.data, asked.io_kwargs.get(kind, {})
        if data is not None and not isinstance(data, Embeds):
            bounds.check(kind, data, self.limits)
        if not self.named:
            key = f"{asked.serial}-{kind}-{index}"
        elif media.uuid is not None:
            key = named_id(self.model_id, kind, media.uuid, asked.salt, asked.kwargs, io_kwargs)
        else:
            content = data.fields if isinstance(data, Embeds) else data
            key = content_id(self.model_id, kind, content, asked.kwargs, io_kwargs)
        passing = isinstance(data, Embeds) and media.uuid is None  # rows cost nothing to make again
        item = None if passing else self.cache.get(key)
        if item is None:
            if data is None:
                raise RequestError(f"Cache miss for {kind} at index {index} but data is not provided.", "cache_miss")
            item = self._process(kind, index, data, asked)
            if not passing:
                self.cache.put(key, item)
        if self.max_item_rows is not None and item.rows > self.max_item_rows:
            raise RequestError(
                f"The {kind} item at index {index} with length {item.rows} exceeds the pre-allocated encoder cache "
                f"size {self.max_item_rows}. Reduce the input resolution, or raise `max_num_batched_tokens` to "
                f"at least {item.rows}.",
                "item_too_large",
            )
        most = self.max_item_units.get(kind, item.units)
        if item.units > most:
            raise RequestError(
                f"The {kind} item at index {index} has {item.units} parts to encode, but at most {most} are encoded at "
                "once. Reduce its resolution, length or number of frames.",
                "item_too_large",
            )
        return MediaItem(kind, key, item)

    def _process(self, kind: str, index: int, data: Any, asked: _Asked) -> Item:
        """Decode and process one item. What goes wrong in there is about this item; its content stays out of words."""
        assert self.processor is not None
        try:
            if isinstance(data, Embeds):
                assert self.embeds is not None  # parsed, so allowed
                return self.embeds.item(kind, index, data, asked.kwargs)
            return self.processor.item(kind, self._decode(kind, data, asked.background), asked.kwargs)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(
                f"Failed to apply {type(self.processor).__module__} on {kind} item {index} ({type(error).__name__}).",
                "processing_failed",
            ) from error

    def _decode(self, kind: str, data: Any, background: image.Color) -> Any:
        assert self.processor is not None
        if kind == "image":
            return image.decode(data, background=background, limits=self.limits)
        if kind == "video":
            return video.decode(data, background=background, limits=self.limits)
        return audio.decode(data, self.processor.sampling_rate, limits=self.limits)


def _background(io_kwargs: Mapping[str, Mapping[str, Any]]) -> image.Color:
    """What shows where an image is transparent. RequestError for what is no colour."""
    return image.background_color(io_kwargs.get("image", {}).get("rgba_background_color", image.WHITE))
