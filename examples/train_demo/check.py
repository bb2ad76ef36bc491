"""Compares the trainer's features, positions and logits with transformers' own: `python examples/train_demo/check.py`.

With the directory of a trained checkpoint, checks that one. Prints the largest differences and raises when one is not
small. Needs torchvision's absence or presence to be none of its business: only the image processor of PIL is used.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lessons
import numpy as np
import torch
from batches import Batch, Row, Rows, clips, hear, pictures, together
from forward import Fast
from train import build

from mmjax.demo import DIRECTORY, paint, scenes


def check(name: str, got: Any, wanted: Any, limit: float) -> None:
    worst = float((torch.as_tensor(got).double() - torch.as_tensor(wanted).double()).abs().max())
    print(f"{name}: differs by at most {worst:.2g}")
    assert worst <= limit, name


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def compare(model: Any, fast: Fast, batch: Batch, vision: Any, sound: Any) -> None:
    """Every step for one batch."""
    given = fast.given(batch)
    tokens = given["tokens"]
    mask = (torch.arange(tokens.shape[1])[None] < torch.from_numpy(batch.lengths)[:, None]).long()
    inputs: dict[str, Any] = {}
    if batch.kind == "audio":
        assert batch.sounds is not None
        waves = batch.sounds.astype(np.float32) / 32767
        made = sound(list(waves), sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        mel = given["mel"]
        frames = int(made["attention_mask"][0].sum())
        check("audio mel", mel, made["input_features"][:, :, :frames], 2e-4)
        inputs = {"input_features": made["input_features"], "feature_attention_mask": made["attention_mask"]}
        features = fast.listen(mel)
    else:
        torch.manual_seed(1)
        pixels = fast.pixels(batch.form, given)
        doubled = pixels if batch.kind == "video" else pixels.repeat_interleave(2, 0)
        patches = fast.patches(doubled)
        grid = torch.tensor([[batch.grid[0], 2 * batch.grid[1], 2 * batch.grid[2]]])
        if batch.kind == "image":
            made = vision([np.uint8((p * 255).round()) for p in pixels.numpy()], return_tensors="pt")
            check("image patches", patches.flatten(0, 1), made["pixel_values"], 1e-5)
            assert (made["image_grid_thw"] == grid).all()
        items = len(patches) // batch.grid[0]
        name = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
        inputs = dict(zip(name[batch.kind], (patches.flatten(0, 1), grid.repeat(items, 1)), strict=True))
        if batch.kind == "video":
            inputs["video_second_per_grid"] = torch.full((items,), batch.seconds)
        features = fast.see(patches, *batch.grid[1:])
    home = model.model if hasattr(model.model, "get_rope_index") else model
    lengths = inputs["feature_attention_mask"].sum(1) if batch.kind == "audio" else None
    wanted, _ = home.get_rope_index(
        tokens, inputs.get("image_grid_thw"), inputs.get("video_grid_thw"), mask, False, lengths,
        inputs.get("video_second_per_grid"),
    )  # fmt: skip
    known = mask.bool()
    check(f"{batch.kind} positions", given["positions"][:, known], wanted[:, known], 0)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=wanted, **inputs).logits
    mine = model.lm_head(fast.states(given, features)[0])
    check(f"{batch.kind} logits (deviation {logits[known].std():.2g})", mine[known], logits[known], 1e-3)


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def compare_turns(model: Any, fast: Fast, rng: np.random.Generator, rows: Rows) -> None:
    """Questions that are kept apart against the same questions, each alone."""
    shown = scenes.draw_scene(rng, things=3)
    media, turns = rows.media("image", 1, 36), lessons.about_picture(rng, [shown], 4)

    def logits(row: Row) -> torch.Tensor:
        things, ground = paint.table(dataclasses.replace(shown, noise=0.0))
        batch = together(
            "image", [row], grid=(1, 6, 6), things=things[None], ground=ground[None], noise=np.zeros(1, np.float32)
        )
        given = fast.given(batch)
        hidden, *_ = fast.states(given, fast.features(batch.form, given))
        return torch.as_tensor(model.lm_head(hidden)[0])

    whole = rows.row(media, turns, apart=True)
    got = logits(whole)
    for index, turn in enumerate(turns):
        alone = rows.row(media, [turn])
        mine = [place for place, owner in enumerate(whole.turns) if owner in (0, index + 1)]
        assert [whole.tokens[place] for place in mine] == alone.tokens
        check("one turn of several", got[mine], logits(alone)[: len(mine)], 1e-4)


def main() -> None:
    from transformers import WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = Qwen2VLImageProcessorPil.from_pretrained(str(DIRECTORY))
    sound = WhisperFeatureExtractor.from_pretrained(str(DIRECTORY))
    if len(sys.argv) > 1:
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
    else:
        model = build("cpu")
    model.eval()
    rng, rows = np.random.default_rng(4), Rows()
    fast = Fast(model, "cpu", rows.encode("<|im_end|>")[0])
    compare_turns(model, fast, rng, rows)
    for _ in range(3):
        compare(model, fast, pictures(rng, rows, 3, skill="count"), vision, sound)
        compare(model, fast, clips(rng, rows, 4), vision, sound)
        noise = [
            ("four two", rng.standard_normal(n).astype(np.float32) * 0.1)
            for n in (9000, 30000 + int(9e4 * rng.random()))
        ]
        compare(model, fast, hear(rng, rows, noise, test=True), vision, sound)


if __name__ == "__main__":
    main()
