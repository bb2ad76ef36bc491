"""The model that ships, through mmjax and through transformers (torch): how many answers are the same, word for word.

    python benchmarks/demo_peer.py [--count 200] [--model DIR]

Held-out questions of every skill, in equal parts, answered greedily in float32: by mmjax all at once, by transformers'
Qwen2_5OmniThinkerForConditionalGeneration one by one, from pixels and spectra that its own processors make. Differences
are told with both answers; the aim is at least 99 % equal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import LLM, SamplingParams
from mmjax.demo import DIRECTORY, ask, heldout, measure

AIM = 0.99
TOKENS = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}
AROUND = {"image": "vision", "video": "vision", "audio": "audio"}


class Peer:
    """The same checkpoint in transformers."""

    def __init__(self, directory: Path) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self.model: Any = model.eval()
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.pixels = Qwen2VLImageProcessorPil.from_pretrained(directory)
        self.spectrum = WhisperFeatureExtractor.from_pretrained(directory)
        self.ends = self.tokenizer.encode("<|im_end|><|endoftext|>").ids

    def inputs(self, question: heldout.MediaQuestion) -> tuple[dict[str, Any], list[int]]:
        """(what the model takes of the media, placeholders of each)."""
        import torch

        if question.modality == "audio":
            ((samples, rate),) = question.media
            made = self.spectrum(
                samples, sampling_rate=rate, padding="max_length", return_attention_mask=True, return_tensors="pt"
            )
            mask = made["attention_mask"]
            frames = int(mask.sum())
            features = {"input_features": made["input_features"], "feature_attention_mask": mask}
            return features, [((frames - 1) // 2 + 1 - 2) // 2 + 1]
        if question.modality == "image":
            made = self.pixels(images=question.media, return_tensors="pt")
            return dict(made), [int(grid.prod()) // 4 for grid in made["image_grid_thw"]]
        (clip,) = question.media
        made = self.pixels(images=list(clip), return_tensors="pt")
        rows, columns = made["image_grid_thw"][0, 1:].tolist()
        # a picture is a pair of equal frames there: take the first of one and the second of the next
        frames = made["pixel_values"].reshape(len(clip), rows * columns, 3, 2, -1)
        paired = torch.stack([frames[0::2, :, :, 0], frames[1::2, :, :, 1]], dim=3)
        grid = torch.tensor([[len(clip) // 2, rows, columns]])
        features = {
            "pixel_values_videos": paired.reshape(-1, made["pixel_values"].shape[1]),
            "video_grid_thw": grid,
            "video_second_per_grid": torch.tensor([1.0]),  # two frames, of two per second
        }
        return features, [int(grid.prod()) // 4]

    def answer(self, question: heldout.MediaQuestion) -> list[int]:
        """Token ids, without the one that ends them."""
        import torch

        features, counts = self.inputs(question)
        around, token = AROUND[question.modality], TOKENS[question.modality]
        media = "".join(f"<|{around}_bos|>{token * count}<|{around}_eos|>" for count in counts)
        ids = torch.tensor([self.tokenizer.encode(heldout.PROMPT.format(media + question.qa.question)).ids])
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=measure.MAX_TOKENS,
                do_sample=False,
                eos_token_id=self.ends,
                pad_token_id=self.ends[1],
                **features,
            )
        return until_end(made[0, ids.shape[1] :].tolist(), self.ends)


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """What comes before the first end token."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:at])


def compare(directory: Path, count: int) -> float:
    """Share of equal answers to `count` questions; prints what differs."""
    each = -(-count // len(ask.SKILLS))
    questions = [one for skill in ask.SKILLS for one in heldout.questions(skill, each)][:count]
    llm = LLM(str(directory), dtype="float32", max_model_len=512, max_num_seqs=16, enforce_eager=True)
    params = SamplingParams(temperature=0.0, max_tokens=measure.MAX_TOKENS)
    outputs = llm.generate([one.prompt for one in questions], params, use_tqdm=False)
    peer, equal, right = Peer(directory), [], np.zeros(2)
    begin = time.perf_counter()
    for question, output in zip(questions, outputs, strict=True):
        ours, theirs = until_end(output.outputs[0].token_ids, peer.ends), peer.answer(question)
        told = [peer.tokenizer.decode(ids) for ids in (ours, theirs)]
        right += [ask.correct(question.qa, text) for text in told]
        equal.append(ours == theirs)
        if ours != theirs:
            print(f"{question.qa.skill}: {question.qa.question} mmjax {told[0]!r}, transformers {told[1]!r}")
    share = sum(equal) / len(equal)
    print(f"transformers took {time.perf_counter() - begin:.0f} s")
    print(f"{sum(equal)} of {len(equal)} answers are equal: {share:.1%} (aim {AIM:.0%})")
    print(f"right: mmjax {right[0] / len(equal):.1%}, transformers {right[1] / len(equal):.1%}")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="another checkpoint of the demo model")
    arguments = parser.parse_args()
    raise SystemExit(compare(arguments.model, arguments.count) < AIM)


if __name__ == "__main__":
    main()
