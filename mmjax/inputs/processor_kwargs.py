"""Checks `mm_processor_kwargs`."""

from collections.abc import Mapping
from typing import Any

from mmjax.multimodal.video import MAX_NUMBER, MIN_RATE
from mmjax.processors.base import Processor, positive_int
from mmjax.types import RequestError

POSITIVE_INTS = frozenset({"min_pixels", "max_pixels", "num_frames", "num_crops", "max_slice_nums"})
BOOLS = frozenset(
    {
        "do_resize", "do_sample_frames", "keep_video_wrapper", "load_audio_from_video", "use_audio_in_video",
        "use_image_id",
    }
)  # fmt: skip
NESTED = frozenset({"size", "images_kwargs", "videos_kwargs"})
# sizes that every family accepts, whatever its patch size
TYPICAL_SIZES = {"image": (896, 896), "video": (2, 896, 896), "audio": (16_000,)}


def given_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that are None, at any depth: None means not given."""
    return {
        name: given_kwargs(value) if isinstance(value, Mapping) else value
        for name, value in kwargs.items()
        if value is not None
    }


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """RequestError for a value that no family accepts. None means not given."""
    for name, value in kwargs.items():
        if value is None:
            continue
        if name in NESTED:
            if not isinstance(value, Mapping):
                raise _invalid(name, "a dictionary", value)
            check_kwargs(value)
        elif name in POSITIVE_INTS:
            positive_int(kwargs, name)
        elif name in BOOLS and not isinstance(value, bool):
            raise _invalid(name, "true or false", value)
        elif name == "fps" and not all(map(_is_rate, value if isinstance(value, (list, tuple)) else [value])):
            raise _invalid(name, "a positive number, or a list with one for each video", value)


def _is_rate(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and MIN_RATE <= value <= MAX_NUMBER


def kwargs_of_items(kwargs: Mapping[str, Any], modality: str, count: int) -> list[dict[str, Any]]:
    """The options of each of the `count` items of a modality in a prompt. `fps` may be a list with a number for each
    video, as qwen_vl_utils returns it. RequestError where it has another length."""
    if modality == "video":
        return [_of_video(kwargs, index, count) for index in range(count)]
    return [_without_lists(kwargs)] * count


def _of_video(kwargs: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    own = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, Mapping):
            own[name] = _of_video(value, index, count)
        elif name == "fps" and isinstance(value, (list, tuple)):
            if len(value) != count:
                raise RequestError(
                    f"mm_processor_kwargs: fps has {len(value)} numbers for {count} videos. Pass one for each video, "
                    "in their order, or one number for all.",
                    "bad_kwargs",
                )
            own[name] = value[index]
    return own


def _without_lists(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that only videos have one by one."""
    return {
        name: _without_lists(value) if isinstance(value, Mapping) else value
        for name, value in kwargs.items()
        if not (name == "fps" and isinstance(value, (list, tuple)))
    }


def check_kwargs_for(processor: Processor, kwargs: Mapping[str, Any]) -> None:
    """`check_kwargs`, and RequestError for what this family refuses: contradictory bounds, unknown modes."""
    check_kwargs(kwargs)
    accepted = {name: value for name, value in _without_lists(kwargs).items() if name in processor.accepted_kwargs}
    for modality in processor.mm_limits:
        processor.num_embeds(modality, TYPICAL_SIZES[modality], accepted)


def _invalid(name: str, rule: str, value: Any) -> RequestError:
    return RequestError(f"mm_processor_kwargs: {name} must be {rule}, got {value!r}.", "bad_kwargs")
