"""Checks the form of prompts, before any work is done.

RequestTypeError for objects of the wrong type, RequestError for wrong values. Media are split into items, but neither
decoded nor hashed.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.inputs.media_embeds import EmbedsInput, MediaEmbedsReader
from mmjax.inputs.prompt_embeds import read_prompt_embeds
from mmjax.multimodal.arrays import is_array, is_tensor, to_numpy
from mmjax.multimodal.image import unwrap
from mmjax.types import MODALITIES, UNLIMITED, RequestError, RequestTypeError, read_limit

MAX_ITEMS = 1 << 16  # in one array, since a broadcast array can have a shape far beyond memory


@dataclasses.dataclass(frozen=True, eq=False)
class MediaInput:
    """One media item as given. data: an `EmbedsInput` for embeddings; None for an item that the processor cache has
    under its uuid."""

    data: Any
    uuid: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ParsedPrompt:
    """A prompt of checked form. The model reads prompt_embeds [T, D] if there are any, else token_ids if there are any,
    else text.

    For encoder-decoder models all three belong to the decoder; encoder_text is the text of an explicit encoder prompt.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    media: Mapping[str, tuple[MediaInput, ...]] = dataclasses.field(default_factory=dict)
    processor_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    io_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache_salt: str | None = None
    encoder_text: str | None = None
    prompt_embeds: np.ndarray | None = None


def split_prompts(prompts: Any) -> list[Any]:
    """The prompts of a call: a dict, a str or a non-empty list of ints is one prompt, any other sequence is many."""
    if isinstance(prompts, (Mapping, str, bytes)) or (_is_list(prompts) and prompts and all(map(_is_int, prompts))):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise _not_a_prompt(prompts)
    return list(prompts)


def parse_prompt(
    prompt: Any,
    *,
    encoder_decoder: bool = False,
    embeds: MediaEmbedsReader | None = None,
    prompt_embeds_dim: int | None = None,
) -> ParsedPrompt:
    """Check the form of one prompt. RequestTypeError for an object of the wrong type, RequestError for wrong values.

    embeds: reads embeddings in place of media; None refuses them. prompt_embeds_dim: width of embeddings in place of a
    whole prompt; None refuses them.
    """
    if isinstance(prompt, Mapping) and prompt.get("prompt_embeds") is not None and not encoder_decoder:
        return _parse_embeds(prompt, prompt_embeds_dim)
    if isinstance(prompt, Mapping) and "encoder_prompt" in prompt:
        if not encoder_decoder:
            raise RequestTypeError("Cannot pass encoder-decoder prompt to decoder-only models")
        return _parse_explicit(prompt, embeds)
    return _parse_single(prompt, encoder_decoder, embeds)


def _parse_explicit(prompt: Mapping[str, Any], embeds: MediaEmbedsReader | None) -> ParsedPrompt:
    """An encoder prompt and a decoder prompt."""
    if "decoder_prompt" not in prompt:
        raise RequestTypeError("An encoder-decoder prompt needs the key `decoder_prompt`; its value may be None")
    encoder, decoder = _parse_single(prompt["encoder_prompt"], True, embeds), prompt["decoder_prompt"]
    if isinstance(decoder, Mapping) and decoder.get("multi_modal_data"):
        raise RequestTypeError("Cannot pass multi-modal inputs to decoder prompt: they belong to `encoder_prompt`")
    parsed = ParsedPrompt(text="") if decoder is None else _parse_single(decoder, True, embeds)
    return dataclasses.replace(
        encoder,
        text=parsed.text,
        token_ids=parsed.token_ids,
        encoder_text=encoder.text,
        cache_salt=encoder.cache_salt or parsed.cache_salt,
    )


def _parse_embeds(prompt: Mapping[str, Any], width: int | None) -> ParsedPrompt:
    """A prompt of embeddings. Its text, if there is one, is only copied to the output."""
    if width is None:
        raise RequestError(
            "You must set `--enable-prompt-embeds` to input `prompt_embeds`; else pass `prompt` or `prompt_token_ids`.",
            "embeds_disabled",
        )
    if prompt.get("prompt_token_ids") is not None or prompt.get("multi_modal_data"):
        raise RequestError(
            "`prompt_embeds` is the whole prompt: pass no `prompt_token_ids` beside it, and the rows of media within.",
            "bad_embeds",
        )
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise RequestTypeError(f"`prompt` beside `prompt_embeds` should be a string, got {type(text).__name__}")
    return ParsedPrompt(
        text=text,
        prompt_embeds=read_prompt_embeds(prompt["prompt_embeds"], width),
        cache_salt=_salt(prompt.get("cache_salt")),
    )


def _parse_single(prompt: Any, encoder_decoder: bool, embeds: MediaEmbedsReader | None) -> ParsedPrompt:
    if isinstance(prompt, str):
        return ParsedPrompt(text=prompt)
    if _is_list(prompt):
        return ParsedPrompt(token_ids=_token_ids(prompt))
    if not isinstance(prompt, Mapping):
        raise _not_a_prompt(prompt)
    text, tokens = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if prompt.get("prompt_embeds") is not None:
        raise RequestTypeError("Cannot pass embeddings prompt to encoder-decoder models")
    if tokens is None and text is None:
        raise RequestTypeError(
            "Prompt dictionary must contain text, tokens, or embeddings: "
            "`prompt`, `prompt_token_ids` or `prompt_embeds`"
        )
    if text is not None and not isinstance(text, str):
        raise RequestTypeError(
            f"Prompt should be a string, list of tokens, or dictionary; `prompt` is a {type(text).__name__}"
        )
    kwargs, io_kwargs = (prompt.get(name) or {} for name in ("mm_processor_kwargs", "media_io_kwargs"))
    for name, value in (("mm_processor_kwargs", kwargs), ("media_io_kwargs", io_kwargs)):
        if not isinstance(value, Mapping):
            raise RequestTypeError(f"{name} should be a dictionary, got {type(value).__name__}")
    return ParsedPrompt(
        text=text,
        token_ids=None if tokens is None else _token_ids(tokens),
        media=parse_media(prompt.get("multi_modal_data"), prompt.get("multi_modal_uuids"), embeds),
        processor_kwargs=dict(kwargs),
        io_kwargs=dict(io_kwargs),
        cache_salt=_salt(prompt.get("cache_salt")),
    )


def _token_ids(tokens: Any) -> tuple[int, ...]:
    if not _is_list(tokens) or not all(map(_is_int, tokens)):
        raise RequestTypeError("Token prompt should be a list of integers")
    return tuple(map(int, tokens))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _not_a_prompt(prompt: Any) -> RequestTypeError:
    return RequestTypeError(f"Prompt should be a string, list of tokens, or dictionary, got {type(prompt).__name__}")


def _salt(salt: Any) -> str | None:
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError("cache_salt must be a non-empty string.", "bad_cache_salt")
    try:
        (salt or "").encode()
    except UnicodeEncodeError:
        raise RequestError("cache_salt must be valid Unicode, without lone surrogates.", "bad_cache_salt") from None
    return salt


def parse_media(
    data: Any, uuids: Any = None, embeds: MediaEmbedsReader | None = None
) -> dict[str, tuple[MediaInput, ...]]:
    """The items of `multi_modal_data`, by modality, with their `multi_modal_uuids`."""
    data, uuids = data or {}, uuids or {}
    for name, value in (("multi_modal_data", data), ("multi_modal_uuids", uuids)):
        if not isinstance(value, Mapping):
            raise RequestTypeError(f"{name} should be a dictionary by modality, got {type(value).__name__}")
        for modality in value:
            if modality not in MODALITIES:
                raise RequestError(
                    f"Unsupported modality: {modality}. Known are {', '.join(MODALITIES)}.", "unknown_modality"
                )
    media = {}
    for modality in MODALITIES:
        names = _uuids(modality, uuids.get(modality))
        if modality in data or names:
            items = split_items(modality, data.get(modality), embeds)
            if items or names or data.get(modality) is None:  # an empty list is no media
                media[modality] = _with_uuids(modality, items, names)
    return media


def _with_uuids(modality: str, items: list[Any], uuids: list[str | None] | None) -> tuple[MediaInput, ...]:
    """Every item with its uuid. uuids: None where not given. RequestError for an item with neither data nor a uuid."""
    data_field, uuid_field = f"multi_modal_data['{modality}']", f"multi_modal_uuids['{modality}']"
    if not items:
        if not uuids:
            raise RequestError(f"{data_field} is empty but {uuid_field} is missing.", "missing_media")
        items = [None] * len(uuids)
    if uuids is not None and len(uuids) != len(items):
        raise RequestError(
            f"If given, {uuid_field} must have same length as {data_field}, but got {len(uuids)} vs {len(items)}.",
            "uuid_mismatch",
        )
    uuids = [None] * len(items) if uuids is None else uuids
    for index, (item, uuid) in enumerate(zip(items, uuids, strict=True)):
        if item is None and uuid is None:
            raise RequestError(f"{data_field}[{index}] is empty but {uuid_field}[{index}] is missing.", "missing_media")
    return tuple(map(MediaInput, items, uuids))


def _uuids(modality: str, given: Any) -> list[str | None] | None:
    uuids = [given] if isinstance(given, str) else given
    if uuids is None:
        return None
    if not _is_list(uuids) or not all(uuid is None or (isinstance(uuid, str) and uuid) for uuid in uuids):
        raise RequestError(
            f"multi_modal_uuids['{modality}'] must be a string, or a list of non-empty strings and None.", "bad_uuid"
        )
    return list(uuids)


def split_items(modality: str, data: Any, embeds: MediaEmbedsReader | None = None) -> list[Any]:
    """The items in the value of one modality: one item, a list of items, or an array whose first axis counts them.

    Dictionaries are embeddings, and so are arrays for which `_is_embeds`; in a list they may be mixed with raw media.
    """
    if data is None:
        return []
    if modality == "image":
        data = [unwrap(member) for member in data] if isinstance(data, (list, tuple)) else unwrap(data)
    if isinstance(data, Mapping) or (is_array(data) and _is_embeds(modality, data, embeds, in_list=False)):
        return list(_require_embeds(modality, embeds).parse_items(modality, data))
    if is_array(data):
        axes = {"image": 3, "video": 4, "audio": 1}[modality]  # of one item
        if data.ndim == axes:
            return [data]
        if data.ndim == axes + 1:
            if data.shape[0] > MAX_ITEMS:
                raise RequestError(f"An array of shape {tuple(data.shape)} is too many {modality}s.", "too_many_items")
            return list(data if hasattr(data, "__getitem__") else to_numpy(data))
        raise RequestError(
            f"An array of shape {tuple(data.shape)} cannot be read as {modality}: one item has {axes} axes, several "
            f"have {axes + 1}.",
            "bad_media",
        )
    if not _is_list(data) or is_one_item(modality, data):
        return [data]
    if modality == "audio" and len(data) == 2 and is_array(data[0]) and isinstance(data[1], (int, float)):
        raise RequestError("Audio with its sampling rate must be a tuple (array, rate), not a list.", "bad_media")
    return [_list_item(modality, member, embeds) for member in data]


def _list_item(modality: str, data: Any, embeds: MediaEmbedsReader | None) -> Any:
    """One item of a list."""
    if isinstance(data, EmbedsInput):
        return data
    if isinstance(data, Mapping) or (is_array(data) and _is_embeds(modality, data, embeds, in_list=True)):
        return _require_embeds(modality, embeds).parse_item(modality, data)
    return data


def _is_embeds(modality: str, array: Any, embeds: MediaEmbedsReader | None, *, in_list: bool) -> bool:
    """Whether an array is embeddings and not raw media.

    Arrays with too few axes for raw media are embeddings: [embeds, W] for an image or a video. In ambiguous cases
    (three axes outside a list, two in a list of audio), arrays of torch and JAX are embeddings. NumPy arrays with three
    axes are an image and those with two a stereo clip, unless they hold floats of the model's width.
    """
    if array.ndim not in (2, 3):
        return False
    likely = is_tensor(array) or (embeds is not None and embeds.looks_like(modality, array))
    if array.ndim == 2:
        if modality == "audio":  # outside a list: clips of equal length; in a list: maybe the channels of one clip
            return likely and in_list
        return likely or in_list or embeds is not None
    if modality == "image" and in_list:
        return array.shape[0] == 1 and embeds is not None and embeds.looks_like(modality, array)
    return likely or (modality == "video" and embeds is not None)


def _require_embeds(modality: str, embeds: MediaEmbedsReader | None) -> MediaEmbedsReader:
    if embeds is None:
        raise embeds_disabled(modality)
    return embeds


def is_one_item(modality: str, data: Sequence[Any]) -> bool:
    """Whether a list or tuple is itself one item: a video's frames, audio samples, or media with metadata."""
    if not data or modality == "image":
        return False
    first = data[0]
    if isinstance(data, tuple) and len(data) == 2 and (is_array(first) or _is_list(first)):
        second = data[1]
        if modality == "video" and isinstance(second, Mapping):
            return True
        if modality == "audio" and (second is None or isinstance(second, numbers.Real)):
            return True
    if modality == "video":
        # a flat list of 3-D arrays or PIL images is one video; each array with four axes is a video of its own
        return all(isinstance(f, Image.Image) or (is_array(f) and f.ndim == 3) for f in data)
    return isinstance(first, numbers.Real) and not isinstance(first, bool)


def embeds_disabled(modality: str) -> RequestError:
    """The error for embeddings that the operator has not enabled."""
    return RequestError(
        f"You must set `--enable-mm-embeds` to input `{modality}_embeds`. (Three-axis arrays of torch or JAX, lists of "
        f"2-D arrays and dictionaries are read as embeddings; pass raw {modality} data as NumPy or PIL.)",
        "embeds_disabled",
    )


def mm_limits(limits: Mapping[str, Any] | None) -> dict[str, int]:
    """Most items per modality, from `limit_mm_per_prompt`; see `mmjax.types.read_limit`."""
    counts = dict.fromkeys(MODALITIES, UNLIMITED)
    return counts | {modality: read_limit(modality, limit) for modality, limit in (limits or {}).items()}


def check_count(modality: str, count: int, limit: int, model_limit: int | None) -> None:
    """RequestError if a prompt has more items than the operator's limit or the model's. model_limit: None for no
    limit."""
    most = limit if model_limit is None else min(limit, model_limit)
    if count > most:
        can_raise = model_limit is None or most < model_limit
        advice = " Set `--limit-mm-per-prompt` to increase this limit." if can_raise else ""
        raise RequestError(f"At most {most} {modality}(s) may be provided in one prompt.{advice}", "too_many_items")
