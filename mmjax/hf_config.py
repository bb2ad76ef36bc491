"""The JSON files of a checkpoint: one name for each thing, overrides of config.json, and the options of its processors.

transformers renames the keys of config.json over time, and nests options that once had files of their own. Every family
reads config.json by the names that `canonical` leaves, and the processors' options by `image_options` and its like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmjax.types import ValidationError

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"

# (name that is read, other name of the same thing). Where a file has both, the first is right.
PAIRS = (("dtype", "torch_dtype"), ("num_experts", "num_local_experts"))
ROPE = ("rope_scaling", "rope_parameters", "rope_theta")  # see `_rope_parameters`
TOKEN_ID, TOKEN_INDEX = "_token_id", "_token_index"  # a pair of endings

Overrides = Mapping[str, Any] | Callable[[Any], Any]
"""Values that are merged into config.json, or a function of the configuration that returns it changed."""


class MissingNameError(ValueError):
    """A file has no value of a name that is needed."""


class HfConfig(dict[str, Any]):
    """A JSON object of a checkpoint, or a part of one. It records which names were read, and a missing name is a
    MissingNameError that says where. Names are attributes too, for functions that users pass as `hf_overrides`."""

    _file: str
    _path: tuple[str, ...]
    _reads: set[tuple[str, ...]]

    def __init__(
        self,
        values: Mapping[str, Any],
        file: str = "config.json",
        path: tuple[str, ...] = (),
        reads: set[tuple[str, ...]] | None = None,
    ) -> None:
        reads = set() if reads is None else reads
        self.__dict__.update(_file=file, _path=path, _reads=reads)
        items = values.items() if not isinstance(values, dict) else dict.items(values)
        super().__init__(
            {
                name: HfConfig(value, file, (*path, name), reads) if isinstance(value, Mapping) else value
                for name, value in items
            }
        )

    def __missing__(self, name: str) -> Any:
        raise MissingNameError(
            f"{self._file} has no {'.'.join((*self._path, name))}: it is incomplete, or of another architecture"
        )

    def __getitem__(self, name: str) -> Any:
        self._reads.add((*self._path, name))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._reads.add((*self._path, name))
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._reads.add((*self._path, str(name)))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:  # makes {**config} call __getitem__
        return super().__iter__()

    def __or__(self, other: Any) -> HfConfig:  # type: ignore[override]
        return HfConfig(dict(dict.items(self)) | other, self._file, self._path, self._reads)

    def __ror__(self, other: Any) -> HfConfig:  # type: ignore[override]
        return HfConfig(other | dict(dict.items(self)), self._file, self._path, self._reads)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not super().__contains__(name):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def origin(self) -> str:
        """The file that this comes from, with the section."""
        return ": ".join((self._file, *self._path))

    def get_text_config(self) -> HfConfig:
        """The part about the language model, as transformers' method of this name."""
        return _levels(self)[-1]


def canonical(config: Mapping[str, Any]) -> HfConfig:
    """config.json, or a part of it, with one name for each thing, in all its sections.

    `rope_parameters` holds everything about rotary positions: a `rope_scaling` replaces it, and a `rope_theta` beside
    it counts where it has none. `dtype`, `num_experts` and `*_token_id` replace their other names. Sections that are
    null are left out.
    """
    if isinstance(config, HfConfig):
        return config
    return HfConfig(_without_null_sections(_renamed(config)))


def _without_null_sections(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_null_sections(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value is not None or not name.endswith("_config")
    }


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    out = {
        name: _renamed(value) if isinstance(value, Mapping) and name not in ROPE else value
        for name, value in config.items()
    }
    pairs = [*PAIRS, *((n.removesuffix(TOKEN_INDEX) + TOKEN_ID, n) for n in out if n.endswith(TOKEN_INDEX))]
    for name, other in pairs:
        if other in out:
            value = out.pop(other)
            if out.get(name) is None:
                out[name] = value
    rope: dict[str, Any] = {name: out.pop(name) for name in ROPE if name in out}
    if rope:
        out["rope_parameters"] = _rope_parameters(rope)
    return out


def _rope_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """All that a config says about rotary positions. transformers 4 leaves a default rope_theta beside the
    rope_parameters of transformers 5."""
    scaling, parameters, theta = (given.get(name) for name in ROPE)
    is_null = "rope_scaling" in given or "rope_parameters" in given
    rope = dict(scaling or parameters or ({"rope_type": "default"} if is_null else {}))
    if "type" in rope:
        old = rope.pop("type")
        rope.setdefault("rope_type", old)
    theta = (parameters or {}).get("rope_theta") or theta
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    return rope


def override(config: HfConfig, overrides: Overrides | None) -> HfConfig:
    """config.json with the user's changes. Mappings are merged at any depth; a name that lives in the part about the
    language model reaches it. ValidationError for a function that returns no configuration."""
    reads = config._reads
    if overrides is None:
        return config
    if callable(overrides):
        changed = overrides(HfConfig(_renamed(_plain(config))))
        if not isinstance(changed, Mapping):
            raise ValidationError(
                f"hf_overrides must return the configuration, got {type(changed).__name__}: end the function with "
                "`return config`.",
                parameter="hf_overrides",
            )
        return HfConfig(_without_null_sections(_renamed(_plain(changed))), reads=reads)
    out, changes = _plain(config), _renamed(overrides)
    for section in ("thinker_config", "text_config"):
        if section in changes and not any(section in level for level in _levels(out)):
            changes |= changes.pop(section)  # a flat config.json has the section's names at its top
    for name, value in changes.items():
        for level in _homes(out, name):
            _merge(level, name, value)
    return HfConfig(_without_null_sections(out), reads=reads)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy in plain dictionaries."""
    items = dict.items(config) if isinstance(config, dict) else config.items()
    return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in items}


def _merge(target: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, Mapping) and isinstance(target.get(name), dict):
        for inner, each in value.items():
            _merge(target[name], inner, each)
    else:
        target[name] = _plain(value) if isinstance(value, Mapping) else value


def _levels(config: Any) -> list[Any]:
    """The whole, the thinker of an Omni model, and the language model: outermost first."""
    levels = [config]
    for name in ("thinker_config", "text_config"):
        if dict.__contains__(levels[-1], name):
            levels.append(dict.__getitem__(levels[-1], name))
    return levels


def _homes(config: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Where a top-level name is to be set: at the first level that has it, and at inner ones that repeat its value. A
    name that no level has may be a default at any of them."""
    levels = _levels(config)
    having = [level for level in levels if name in level]
    if not having:
        return [config] if name.endswith("_config") else levels
    return [having[0], *(level for level in having[1:] if level[name] == having[0][name])]


def unread_changes(before: HfConfig, after: HfConfig) -> list[str]:
    """The names whose values differ in `after`, and that nobody has read there."""
    read: dict[str, bool] = {}
    for path in _changed(before, after):
        read[path[-1]] = read.get(path[-1], False) or path in after._reads
    return [name for name, was_read in read.items() if not was_read]


def _changed(before: Any, after: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in dict.items(after):
        old = dict.get(before, name)
        if isinstance(value, dict):
            yield from _changed(old if isinstance(old, dict) else {}, value, (*path, name))
        elif old != value:
            yield (*path, name)


def image_options(files: Mapping[str, Mapping[str, Any]]) -> HfConfig:
    """The options of the image processor. ValueError where no file has them."""
    return _options(files, "image_processor", PREPROCESSOR)


def audio_options(files: Mapping[str, Mapping[str, Any]]) -> HfConfig:
    """The options of the feature extractor. ValueError where no file has them."""
    return _options(files, "feature_extractor", PREPROCESSOR)


def video_options(files: Mapping[str, Mapping[str, Any]]) -> HfConfig:
    """The options of the video processor, which in older repositories are those of the image processor."""
    if "video_processor" not in files.get(PROCESSOR, {}) and VIDEO_PREPROCESSOR not in files:
        return image_options(files)
    return _options(files, "video_processor", VIDEO_PREPROCESSOR)


def _options(files: Mapping[str, Mapping[str, Any]], section: str, name: str) -> HfConfig:
    """A section of processor_config.json, which transformers 5 writes, or else the older file."""
    nested = files.get(PROCESSOR, {}).get(section)
    if isinstance(nested, Mapping):
        return HfConfig(nested, PROCESSOR, (section,))
    if name not in files:
        raise ValueError(
            f"the checkpoint has no {name}, and no {PROCESSOR} with a section {section!r}. Download it from the "
            'model\'s repository, or write it with `transformers.AutoProcessor.from_pretrained("<model>")'
            '.save_pretrained("<directory>")`.'
        )
    return HfConfig(files[name], name)
