"""The page's section on embedding inputs, offline: embeddings give the same outputs as the media."""

import base64
import io
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from engine_inputs import IMAGE, chat_text, greedy
from mmjax import LLM
from prompts import chat_one, encoder_embeds, generate_one, random_chord, random_image, same_outputs, user_messages

Shared = Callable[[str], LLM]
IMAGES = [random_image(1), random_image(2)]
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CLIP = np.random.default_rng(5).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)


def file_of(array: np.ndarray) -> str:
    """The array as an .npy file in base64."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_embeddings_of_different_sizes(shared_llm: Shared) -> None:
    """LLaVA-OneVision: the number of rows depends on the image's size."""
    llm = shared_llm("llava_onevision")
    asked = {
        "prompt": "<image><image>Compare.",
        "multi_modal_data": {"image": [random_image(1, 20, 30), random_image(2, 30, 20)]},
    }
    assert same_outputs(
        generate_one(llm, asked),
        generate_one(llm, {**asked, "multi_modal_data": {"image": encoder_embeds(llm, asked)}}),
    )


def test_embeddings_without_sizes(shared_llm: Shared) -> None:
    """A tensor (items, rows, hidden) of torch, JAX or NumPy; lists of (rows, hidden); one alone; a dictionary."""
    llm = shared_llm("llava")
    mark = "<image>"
    asked = {"prompt": f"{mark}{mark}Compare.", "multi_modal_data": {"image": IMAGES}}
    raw, rows = generate_one(llm, asked), np.stack(encoder_embeds(llm, asked))
    forms = [
        rows,
        jnp.asarray(rows),
        rows.astype(np.float64),
        list(rows),
        [jnp.asarray(row) for row in rows],
        {"image_embeds": rows},
        {"image_embeds": list(rows)},
        [{"image_embeds": row} for row in rows],
        [IMAGES[0], rows[1]],
        [rows[:1], IMAGES[1]],
    ]
    for form in forms:
        assert same_outputs(raw, generate_one(llm, {**asked, "multi_modal_data": {"image": form}}))
    one = {"prompt": f"{mark}What?", "multi_modal_data": {"image": IMAGES[0]}}
    assert same_outputs(generate_one(llm, one), generate_one(llm, {**one, "multi_modal_data": {"image": rows[0]}}))
    fewer = generate_one(llm, {**one, "multi_modal_data": {"image": rows[0, :5]}})  # as many tokens as rows
    assert len(fewer.prompt_token_ids or []) == len(generate_one(llm, one).prompt_token_ids or []) - len(rows[0]) + 5


def test_embeddings_with_grids(qwen: LLM) -> None:
    """Qwen2-VL: concatenated `image_embeds` with `image_grid_thw`, or item by item; images of different sizes."""
    images = [random_image(1), random_image(2, 84, 112)]
    asked = {"prompt": chat_text(IMAGE * 2 + "Compare."), "multi_modal_data": {"image": images}}
    raw, rows = generate_one(qwen, asked), encoder_embeds(qwen, asked)
    grids = np.array([[1, 4, 6], [1, 6, 8]])
    items = [{"image_embeds": row, "image_grid_thw": grid} for row, grid in zip(rows, grids, strict=True)]
    forms = [
        {"image_embeds": np.concatenate(rows), "image_grid_thw": grids},
        {"image_embeds": jnp.asarray(np.concatenate(rows)), "image_grid_thw": jnp.asarray(grids)},
        {"image_embeds": rows, "image_grid_thw": grids.tolist()},
        items,
        [images[0], items[1]],
        [items[0], images[1]],
    ]
    for form in forms:
        assert same_outputs(raw, generate_one(qwen, {**asked, "multi_modal_data": {"image": form}}))


def test_embeddings_of_a_video(qwen: LLM) -> None:
    asked = {
        "prompt": chat_text(VIDEO + IMAGE + "What?"),
        "multi_modal_data": {"video": [CLIP], "image": random_image(1)},
    }
    raw, (rows, _) = generate_one(qwen, asked), encoder_embeds(qwen, asked)
    embeds = {"video_embeds": rows, "video_grid_thw": np.array([[2, 4, 6]])}
    assert same_outputs(
        raw, generate_one(qwen, {**asked, "multi_modal_data": {"video": embeds, "image": random_image(1)}})
    )


def test_embeddings_with_sizes(shared_llm: Shared) -> None:
    """MiniCPM-V: `image_embeds` with `image_sizes` (width, height), which determine how the image was sliced."""
    llm = shared_llm("minicpmv")
    mark = "(<image>./</image>)"
    asked = {"prompt": f"{mark}{mark}Compare.", "multi_modal_data": {"image": IMAGES}}
    raw, rows = generate_one(llm, asked), encoder_embeds(llm, asked)
    sizes = [image.size for image in IMAGES]
    for form in (
        {"image_embeds": rows, "image_sizes": sizes},
        {"image_embeds": np.stack(rows), "image_sizes": np.array(sizes)},
        [IMAGES[0], {"image_embeds": rows[1], "image_sizes": sizes[1]}],
    ):
        assert same_outputs(raw, generate_one(llm, {**asked, "multi_modal_data": {"image": form}}))
    clip = {"prompt": "(<video>./</video>)What?", "multi_modal_data": {"video": CLIP}}
    (rows,) = [np.concatenate(encoder_embeds(llm, clip)[:1])]
    assert same_outputs(
        generate_one(llm, clip), generate_one(llm, {**clip, "multi_modal_data": {"video": {"video_embeds": rows}}})
    )


def test_embeddings_of_audio(shared_llm: Shared) -> None:
    """Ultravox: the page writes `<audio>`, which is not this model's placeholder, and passes a tensor per clip."""
    llm = shared_llm("ultravox")
    asked = {
        "prompt": "USER: <audio>\nWhat is in this audio?\nASSISTANT:",
        "multi_modal_data": {"audio": (random_chord(1), 16000)},
    }
    raw, (rows,) = generate_one(llm, asked), encoder_embeds(llm, asked)
    for form in (jnp.asarray(rows)[None], [jnp.asarray(rows)], {"audio_embeds": rows}, rows[None]):
        assert same_outputs(raw, generate_one(llm, {**asked, "multi_modal_data": {"audio": form}}))
    own = {**asked, "prompt": str(asked["prompt"]).replace("<audio>", "<|audio|>")}
    assert same_outputs(raw, generate_one(llm, own))


@pytest.mark.parametrize("family", ["qwen2_5_omni"])
def test_audio_features(family: str, shared_llm: Shared) -> None:
    """Omni: `input_audio_features` with `audio_feature_lengths` are the encoder's inputs."""
    llm = shared_llm(family)
    mark = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    sounds = [random_chord(1), random_chord(2, 0.9)]
    asked = {"prompt": f"{mark}{mark}Compare.", "multi_modal_data": {"audio": [(sound, 16000) for sound in sounds]}}
    mel = [llm.model.input_processor.processor.mel.zero_padded(sound) for sound in sounds]  # type: ignore[union-attr]
    lengths = [m.shape[1] for m in mel]
    padded = np.stack([np.pad(m, [(0, 0), (0, max(lengths) - m.shape[1])]) for m in mel])
    items = [{"input_audio_features": m, "audio_feature_lengths": n} for m, n in zip(mel, lengths, strict=True)]
    raw = generate_one(llm, asked)
    for form in (
        {"input_audio_features": np.concatenate(mel, axis=1), "audio_feature_lengths": np.array(lengths)},
        {"input_audio_features": padded, "audio_feature_lengths": lengths},
        items,
        [(sounds[0], 16000), items[1]],
    ):
        assert same_outputs(raw, generate_one(llm, {**asked, "multi_modal_data": {"audio": form}}))
    for wrong in (
        {"input_audio_features": mel[0][:9], "audio_feature_lengths": [lengths[0]]},
        {"input_audio_features": mel[0], "audio_feature_lengths": [10**6]},
        {"input_audio_features": mel[0], "audio_feature_lengths": [1.5]},
        {"input_audio_features": mel[0] * np.nan, "audio_feature_lengths": [lengths[0]]},
        {"input_audio_features": mel[0], "audio_feature_lengths": [1]},
    ):
        with pytest.raises(ValueError, match=r"input_audio_features|audio_feature_lengths|too short"):
            generate_one(llm, {"prompt": mark, "multi_modal_data": {"audio": wrong}})
    assert same_outputs(raw, generate_one(llm, asked))


def test_parts_with_embeddings(qwen: LLM) -> None:
    """`image_embeds` parts: arrays, base64 of a tensor file, and from the cache under their `uuid`."""
    raw = chat_one(qwen, user_messages({"type": "image_pil", "image_pil": random_image(1)}, "What?"))
    (rows,) = encoder_embeds(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(1)}})
    grid = np.array([1, 4, 6])
    parts: list[dict[str, Any]] = [
        {"type": "image_embeds", "image_embeds": {"image_embeds": rows, "image_grid_thw": grid}},
        {"image_embeds": {"image_embeds": file_of(rows), "image_grid_thw": file_of(grid)}, "uuid": "rows"},
        {"type": "image_embeds", "image_embeds": {"image_embeds": rows[None], "image_grid_thw": grid[None]}},
        {"type": "image_embeds", "image_embeds": None, "uuid": "rows"},
        {"image_embeds": None, "uuid": "rows"},
        {"type": "image_embeds", "image_embeds": {"image_embeds": None, "image_grid_thw": None}, "uuid": "rows"},
    ]
    assert same_outputs(raw, *(chat_one(qwen, user_messages(part, "What?")) for part in parts))
    both = chat_one(
        qwen, user_messages(parts[0], parts[3], {"type": "image_pil", "image_pil": random_image(1)}, "What?")
    )
    assert same_outputs(
        both, chat_one(qwen, user_messages(*[{"type": "image_pil", "image_pil": random_image(1)}] * 3, "What?"))
    )


def test_embeddings_are_copied(qwen: LLM) -> None:
    """Later changes of the caller's array have no effect."""
    (rows,) = (
        np.array(x)
        for x in encoder_embeds(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(1)}})
    )
    asked = {"prompt": chat_text(IMAGE + "What?"), "multi_modal_uuids": {"image": ["mine"]}}
    embeds = {"image_embeds": rows, "image_grid_thw": np.array([[1, 4, 6]])}
    first = generate_one(qwen, {**asked, "multi_modal_data": {"image": embeds}})
    rows[:] = 7
    assert same_outputs(first, generate_one(qwen, {**asked, "multi_modal_data": {"image": None}}))
    image = np.array(random_image(4))
    first = generate_one(
        qwen, {**asked, "multi_modal_data": {"image": image}, "multi_modal_uuids": {"image": ["other"]}}
    )
    image[:] = 0
    assert same_outputs(
        first,
        generate_one(qwen, {**asked, "multi_modal_data": {"image": None}, "multi_modal_uuids": {"image": "other"}}),
    )


def test_many_embeddings_in_a_batch(qwen: LLM) -> None:
    """More rows than one dispatch takes, in chunks, beside text and raw images: the same outputs as alone."""
    images = [random_image(i, 140, 168) for i in range(3)]
    raw = [
        {"prompt": chat_text(IMAGE + f"{i}?"), "multi_modal_data": {"image": image}} for i, image in enumerate(images)
    ]
    rows = [encoder_embeds(qwen, prompt)[0] for prompt in raw]
    embedded = [
        {**prompt, "multi_modal_data": {"image": {"image_embeds": row, "image_grid_thw": [[1, 10, 12]]}}}
        for prompt, row in zip(raw, rows, strict=True)
    ]
    alone = [generate_one(qwen, prompt) for prompt in raw]
    qwen.reset_mm_cache()
    mixed = qwen.generate([embedded[0], chat_text("Hi"), raw[1], embedded[2], embedded[1]], greedy(6), use_tqdm=False)
    assert all(same_outputs(mixed[i], alone[j]) for i, j in ((0, 0), (2, 1), (3, 2), (4, 1)))


def test_embeds_only(make_llm: Callable[..., LLM], qwen: LLM) -> None:
    """A limit of 0 with embeddings allowed: any number of embeddings, no raw media, text as usual."""
    rows = encoder_embeds(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(1)}})[0]
    raw = generate_one(qwen, {"prompt": chat_text(IMAGE * 2), "multi_modal_data": {"image": [random_image(1)] * 2}})
    llm = make_llm("qwen2_vl", limit_mm_per_prompt={"image": 0, "video": 0}, enforce_eager=False, max_num_seqs=1)
    embeds = {"image_embeds": np.concatenate([rows, rows]), "image_grid_thw": [[1, 4, 6]] * 2}
    asked = {"prompt": chat_text(IMAGE * 2), "multi_modal_data": {"image": embeds}}
    assert same_outputs(raw, generate_one(llm, asked)) and generate_one(llm, chat_text("Hi")).finished
    with pytest.raises(ValueError, match=r"At most 0 image\(s\)"):
        generate_one(llm, {**asked, "multi_modal_data": {"image": [random_image(1)] * 2}})
    with pytest.raises(ValueError, match=r"At most 0 image\(s\)"):
        chat_one(llm, user_messages({"type": "image_pil", "image_pil": random_image(1)}))
    assert llm.counters()["compiles_after_warmup"] == 0
    runner = llm.model.engines[0].runner  # the tower stays off the device
    assert all(leaf.size == 0 for path, leaf in zip(runner.paths, runner.params, strict=True) if path[:5] != "text.")


def test_embeds_must_be_allowed(make_llm: Callable[..., LLM], shared_llm: Shared) -> None:
    llm = make_llm("llava", enable_mm_embeds=False)
    rows = np.zeros((1, 4, 64), np.float32)
    words = "You must set `--enable-mm-embeds` to input `image_embeds`"
    for form in (jnp.asarray(rows), [rows[0]], {"image_embeds": rows}, [random_image(1), {"image_embeds": rows}]):
        with pytest.raises(ValueError, match=words):
            generate_one(llm, {"prompt": "<image>", "multi_modal_data": {"image": form}})
    for value in (rows[0], None):
        with pytest.raises(ValueError, match=words):
            chat_one(llm, user_messages({"type": "image_embeds", "image_embeds": value, "uuid": "u"}))
    with pytest.raises(ValueError, match="takes no audio embeddings"):
        generate_one(shared_llm("whisper"), {"prompt": "", "multi_modal_data": {"audio": jnp.zeros((1, 4, 64))}})
    assert generate_one(shared_llm("whisper"), {"prompt": "", "multi_modal_data": {"audio": random_chord(1)}}).finished
