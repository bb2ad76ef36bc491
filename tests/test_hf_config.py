"""One name for each thing of config.json, the overrides of users, and the options of processors."""

from typing import Any

import pytest

from mmjax.hf_config import (
    HfConfig,
    MissingNameError,
    audio_options,
    canonical,
    image_options,
    override,
    unread_changes,
    video_options,
)
from mmjax.types import ValidationError

YARN = {"rope_type": "yarn", "factor": 4.0}
PAIRED = [
    ("stale rope_theta", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, {"rope_theta": 1e6}),
    ("rope_theta alone", {"rope_theta": 5e5}, {"rope_theta": 5e5}),
    ("null rope_scaling", {"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
    ("null beside parameters", {"rope_scaling": None, "rope_parameters": YARN}, YARN),
    ("rope_scaling alone", {"rope_theta": 2.0, "rope_scaling": {"type": "su"}}, {"rope_type": "su", "rope_theta": 2.0}),
    (
        "rope_scaling over rope_parameters",
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        YARN | {"rope_theta": 1e6},
    ),
    (
        "both spellings of the type",
        {"rope_scaling": {"type": "mrope", "rope_type": "default"}},
        {"rope_type": "default"},
    ),
]


@pytest.mark.parametrize(("given", "wanted"), [case[1:] for case in PAIRED], ids=[case[0] for case in PAIRED])
def test_rope_parameters(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert canonical(given) == {"rope_parameters": wanted}
    nested = canonical({"thinker_config": {"text_config": given}})
    assert nested["thinker_config"]["text_config"]["rope_parameters"] == wanted


def test_pairs_of_names() -> None:
    old = {
        "torch_dtype": "float16", "num_local_experts": 8, "image_token_index": 7, "audio_token_index": 8,
        "text_config": {"torch_dtype": "bfloat16"}, "audio_config": None,
    }  # fmt: skip
    new = {"dtype": "float16", "num_experts": 8, "image_token_id": 7, "audio_token_id": 8}
    assert canonical(old) == new | {"text_config": {"dtype": "bfloat16"}}
    both = {"dtype": "float32", "num_experts": 4, "image_token_id": 1, "audio_token_id": None}
    assert canonical(old | both) == new | {
        "dtype": "float32", "num_experts": 4, "image_token_id": 1, "text_config": {"dtype": "bfloat16"}
    }  # fmt: skip
    assert canonical(config := canonical(old)) is config


def test_a_missing_name_says_where() -> None:
    config = canonical({"vision_config": {"depth": 1}})
    with pytest.raises(MissingNameError, match=r"config\.json has no vision_config\.window_size"):
        config["vision_config"]["window_size"]
    with pytest.raises(MissingNameError, match=r"config\.json has no text_config"):
        config["text_config"]


# -- overrides ---------------------------------------------------------------------------------------------------------

FLAT = {"hidden_size": 8, "num_hidden_layers": 4, "rope_theta": 1e6, "vision_config": {"depth": 2}}
NESTED = {
    "hidden_size": 99, "dtype": "float16", "tie_word_embeddings": True, "architectures": ["A"],
    "text_config": {
        "num_hidden_layers": 4, "hidden_size": 8, "dtype": "float16", "rope_theta": 1e6, "architectures": ["B"],
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
    },
    "vision_config": {"depth": 2, "num_heads": 3},
}  # fmt: skip
OVERRIDES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # config, overrides, what changes at the top, what changes in the text's part
    (NESTED, {"num_hidden_layers": 1}, {}, {"num_hidden_layers": 1}),
    (NESTED, {"hidden_size": 1}, {"hidden_size": 1}, {}),  # two things of one name
    (NESTED, {"torch_dtype": "x"}, {"dtype": "x"}, {"dtype": "x"}),  # one thing, told twice
    (NESTED, {"architectures": ["C"]}, {"architectures": ["C"]}, {}),
    (NESTED, {"text_config": {"max_position_embeddings": 9}}, {}, {"max_position_embeddings": 9}),
    (NESTED, {"head_dim": 5}, {"head_dim": 5}, {"head_dim": 5}),  # a default, wherever it is read
    (NESTED, {"quantization_config": {"a": 1}}, {"quantization_config": {"a": 1}}, {}),
    (
        NESTED,
        {"rope_scaling": YARN},
        {},
        {"rope_parameters": YARN | {"mrope_section": [1, 2, 3], "rope_theta": 1e6}},
    ),
    (
        NESTED,
        {"rope_theta": 3.0},
        {},
        {"rope_parameters": {"rope_type": "mrope", "mrope_section": [1, 2, 3], "rope_theta": 3.0}},
    ),
    (FLAT, {"text_config": {"num_hidden_layers": 1}}, {"num_hidden_layers": 1}, {}),
    (FLAT, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    (FLAT, {"vision_config": None}, {}, {}),
]


@pytest.mark.parametrize(("config", "overrides", "top", "text"), OVERRIDES)
def test_overrides_reach_their_place(
    config: dict[str, Any], overrides: dict[str, Any], top: dict[str, Any], text: dict[str, Any]
) -> None:
    before = canonical(config)
    after = override(before, overrides)
    wanted = dict(before) | top
    if "text_config" in config:
        wanted["text_config"] = dict(before["text_config"]) | text
    if overrides == {"vision_config": None}:
        del wanted["vision_config"]
    assert after == wanted and before == canonical(config)
    assert override(before, None) is before


def test_sections_are_merged_deeply() -> None:
    after = override(canonical(NESTED), {"vision_config": {"depth": 5}})
    assert after["vision_config"] == {"depth": 5, "num_heads": 3}
    thinker = {"thinker_config": {"text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 2}}}
    after = override(canonical(thinker), {"num_hidden_layers": 1, "vision_config": {"depth": 1}})
    assert after["thinker_config"] == {"text_config": {"num_hidden_layers": 1}, "vision_config": {"depth": 1}}


def test_a_function_changes_the_config() -> None:
    """Written for transformers' objects: attributes, update and get_text_config."""

    def change(config: Any) -> Any:
        config.update({"architectures": ["C"]})
        config.hidden_size += 1
        config.get_text_config().num_hidden_layers = 2
        config.vision_config.depth = config.text_config.hidden_size
        assert not hasattr(config, "no_such_name")
        return config

    before = canonical(NESTED)
    after = override(before, change)
    assert (after["architectures"], after["hidden_size"], after["vision_config"]["depth"]) == (["C"], 100, 8)
    assert after["text_config"]["num_hidden_layers"] == 2 and before == canonical(NESTED)
    with pytest.raises(ValidationError, match="return config"):
        override(before, lambda config: None)


def test_a_name_that_nobody_reads_is_known() -> None:
    before = canonical(NESTED)
    after = override(
        before, {"num_hidden_layers": 1, "max_positon": 5, "rope_theta": 3.0, "vision_config": {"depth": 3, "x": 1}}
    )
    assert set(unread_changes(before, after)) == {"num_hidden_layers", "max_positon", "rope_theta", "depth", "x"}
    text = {"num_hidden_layers": 32, "eps": 1} | after["text_config"]
    assert isinstance(text, HfConfig) and text["num_hidden_layers"] == 1
    assert text.get("rope_parameters", {})["rope_theta"] == 3.0 and "depth" in after["vision_config"]
    assert set(unread_changes(before, after)) == {"max_positon", "x"}
    assert unread_changes(before, override(before, {"tie_word_embeddings": True})) == []  # nothing is changed
    assert {**after["vision_config"]}["x"] == 1  # a copy may be read anywhere
    assert unread_changes(before, after) == ["max_positon"]


# -- processors --------------------------------------------------------------------------------------------------------


def test_nested_options_win_over_older_files() -> None:
    old = {"preprocessor_config.json": {"a": 1}, "video_preprocessor_config.json": {"a": 2}}
    assert (image_options(old)["a"], audio_options(old)["a"], video_options(old)["a"]) == (1, 1, 2)
    nested = {"image_processor": {"a": 3}, "feature_extractor": {"a": 4}, "video_processor": {"a": 5}}
    for files in ({"processor_config.json": nested}, old | {"processor_config.json": nested}):
        assert (image_options(files)["a"], audio_options(files)["a"], video_options(files)["a"]) == (3, 4, 5)
    assert image_options(old | {"processor_config.json": {"patch_size": 14}})["a"] == 1  # as transformers 4 wrote it
    del old["video_preprocessor_config.json"]
    assert video_options(old)["a"] == 1  # one file for both
    with pytest.raises(MissingNameError, match=r"processor_config\.json has no image_processor\.image_mean"):
        image_options({"processor_config.json": nested})["image_mean"]


@pytest.mark.parametrize("options", [image_options, audio_options, video_options])
def test_without_options_the_error_says_what_to_do(options: Any) -> None:
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json.*save_pretrained"):
        options({"config.json": {}, "processor_config.json": {"chat_template": "x"}})
