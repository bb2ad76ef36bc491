"""mmjax beside transformers (torch) on the CPU: one process, the same threads, the same inputs, the same weights.

    python benchmarks/peer_cpu.py --whisper DIR --audio FILE [--threads 2] [--repeats 3]

Two workloads. Speech: 8 clips of 30 s through a Whisper checkpoint, in float32 and bfloat16. Images: 16 requests of
one 224x224 image and 32 tokens of answer through a Qwen2-VL of about 100M parameters; its random weights are made here.
Times include preprocessing. Each side runs once unmeasured; then they take turns, on inputs none has seen, and the
medians are compared. Transformers runs twice: given the requests one by one, as they come, and given all of them as
one padded batch, which a caller of it must put together himself. Tokens must agree in float32; in bfloat16 the two
round differently, and the share is told.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
CLIP_S = 30
CLIPS = 8
SPEECH_TOKENS = 128
IMAGE_REQUESTS = 16
IMAGE_SIDE = 224
IMAGE_TOKENS = 32
VOCABULARY = 151_936  # the published one: with it a model of 100M parameters is mostly embedding, as small models are
SIZES = {
    "layers": 10, "width": 384, "mlp": 1536, "heads": 6, "kv_heads": 2,
    "tower_layers": 8, "tower_width": 384, "tower_mlp": 1536, "tower_heads": 6,
}  # fmt: skip
TARGETS = {"speech float32": 0.4, "speech bfloat16": 0.4, "images float32": 0.5}

Tokens = list[list[int]]
Side = Callable[[Any], Tokens]


@dataclass(frozen=True)
class Result:
    """Median seconds of each side, and the share of answers of theirs, one by one, that ours equal token by token."""

    name: str
    ours_s: float
    single_s: float
    batch_s: float
    equal: float

    def __str__(self) -> str:
        theirs = "   ".join(
            f"transformers {how} {spent:7.3f} s, ratio {self.ours_s / spent:.2f}"
            for how, spent in (("one by one", self.single_s), ("as a batch", self.batch_s))
        )
        times = f"mmjax {self.ours_s:7.3f} s   {theirs}"
        return f"{self.name:16} {times} (target {TARGETS[self.name]})   equal answers {self.equal:.0%}"


def compare(name: str, ours: Side, theirs: Side, make: Callable[[int], Any], repeats: int) -> Result:
    """Run all sides on `make(seed)` for as many seeds; seed 0 is for warming up."""

    def single(inputs: Any) -> Tokens:
        return [theirs([one])[0] for one in inputs]

    sides: dict[str, Side] = {"ours": ours, "single": single, "batch": theirs}
    times: dict[str, list[float]] = {side: [] for side in sides}
    equal = []
    for seed in range(repeats + 1):
        inputs, tokens = make(seed), {}
        for side in list(sides) if seed % 2 else reversed(sides):
            begin = time.perf_counter()
            tokens[side] = sides[side](inputs)
            if seed:
                times[side].append(time.perf_counter() - begin)
        equal += [a == b for a, b in zip(tokens["ours"], tokens["single"], strict=True)]
    medians = {side: statistics.median(spent) for side, spent in times.items()}
    return Result(name, medians["ours"], medians["single"], medians["batch"], sum(equal) / len(equal))


def answers(outputs: Sequence[Any]) -> Tokens:
    return [list(output.outputs[0].token_ids) for output in outputs]


def speech(model: str, wave: np.ndarray, dtype: str, repeats: int) -> Result:
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    from mmjax import LLM, SamplingParams

    samples = CLIP_S * RATE
    tiled = np.tile(wave, -(-2 * samples // len(wave)))
    extractor = WhisperFeatureExtractor.from_pretrained(model)
    peer = WhisperForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    plain = peer.generation_config  # the tokens it would suppress are a matter of taste, not of speed
    plain.suppress_tokens = plain.begin_suppress_tokens = plain.forced_decoder_ids = None
    end = plain.eos_token_id
    start = [plain.decoder_start_token_id, plain.no_timestamps_token_id]
    llm = LLM(model, dtype=dtype, max_num_seqs=CLIPS)
    params = SamplingParams(temperature=0.0, max_tokens=SPEECH_TOKENS)

    def make(seed: int) -> list[np.ndarray]:
        return [np.roll(tiled, -(seed * 5 + clip * 3) * RATE // 2)[:samples] for clip in range(CLIPS)]

    def until_end(tokens: Sequence[int]) -> list[int]:
        tokens = list(tokens)
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def ours(clips: list[np.ndarray]) -> Tokens:
        prompts = [{"prompt_token_ids": start, "multi_modal_data": {"audio": (clip, RATE)}} for clip in clips]
        return [until_end(tokens) for tokens in answers(llm.generate(prompts, params, use_tqdm=False))]

    def theirs(clips: list[np.ndarray]) -> Tokens:
        features = extractor(clips, sampling_rate=RATE, return_tensors="pt").input_features.to(peer.dtype)
        first = torch.tensor([start] * len(clips))
        with torch.inference_mode():
            made = peer.generate(features, decoder_input_ids=first, max_new_tokens=SPEECH_TOKENS, do_sample=False)
        rows = [row[len(start) :] if row[: len(start)] == start else row for row in made.tolist()]
        return [until_end(row) for row in rows]

    return compare(f"speech {dtype}", ours, theirs, make, repeats)


def write_qwen2_vl(folder: Path) -> int:
    """A checkpoint of SIZES with random weights; its tokenizer is that of the tests' tiny model. Returns parameters."""
    from safetensors.numpy import load_file, save_file

    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    import tiny

    tiny.make("qwen2_vl", folder, **SIZES)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    small = weights["model.embed_tokens.weight"]
    embed = np.random.default_rng(0).standard_normal((VOCABULARY, small.shape[1]), np.float32) * small.std()
    embed[: len(small)] = small
    weights["model.embed_tokens.weight"] = embed
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(value.size for value in weights.values())


def images(folder: Path, repeats: int) -> Result:
    import torch
    from PIL import Image
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    from mmjax import LLM, SamplingParams

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    peer = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    llm = LLM(str(folder), dtype="float32", max_num_seqs=IMAGE_REQUESTS, max_model_len=256)
    params = SamplingParams(temperature=0.0, max_tokens=IMAGE_TOKENS, ignore_eos=True, detokenize=False)
    config = peer.config
    question = [*range(40, 60)]

    def make(seed: int) -> list[Image.Image]:
        rng = np.random.default_rng(seed)
        shape = (IMAGE_REQUESTS, IMAGE_SIDE, IMAGE_SIDE, 3)
        return [Image.fromarray(pixels) for pixels in rng.integers(0, 256, shape, dtype=np.uint8)]

    def prompt(placeholders: int) -> list[int]:
        return [
            config.vision_start_token_id,
            *[config.image_token_id] * placeholders,
            config.vision_end_token_id,
            *question,
        ]

    def ours(pictures: list[Image.Image]) -> Tokens:
        prompts = [{"prompt_token_ids": prompt(1), "multi_modal_data": {"image": picture}} for picture in pictures]
        return answers(llm.generate(prompts, params, use_tqdm=False))

    def theirs(pictures: list[Image.Image]) -> Tokens:
        features = processor(images=pictures, return_tensors="pt")
        rows = features["image_grid_thw"].prod(dim=1) // 4
        ids = torch.tensor([prompt(int(count)) for count in rows])
        with torch.inference_mode():
            made = peer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == config.image_token_id).int(),
                **features,
                max_new_tokens=IMAGE_TOKENS,
                min_new_tokens=IMAGE_TOKENS,
                do_sample=False,
            )
        return [row[ids.shape[1] :] for row in made.tolist()]

    peer.generation_config.eos_token_id = None
    peer.generation_config.temperature = peer.generation_config.top_k = peer.generation_config.top_p = None
    return compare("images float32", ours, theirs, make, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", help="directory of a Whisper checkpoint; without it speech is left out")
    parser.add_argument("--audio", type=Path, help="a sound file with speech")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cpus)  # XLA takes one thread per CPU it may run on
    os.environ |= {"OMP_NUM_THREADS": str(len(cpus)), "JAX_PLATFORMS": "cpu"}
    os.environ |= {"MMJAX_PROGRESS": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

    import torch

    from mmjax.multimodal.audio import decode, load

    torch.set_num_threads(len(cpus))
    print(f"{len(cpus)} threads, median of {arguments.repeats}, preprocessing included")
    if arguments.whisper:
        wave = decode(load(arguments.audio), RATE)
        for dtype in ("float32", "bfloat16"):
            print(speech(arguments.whisper, wave, dtype, arguments.repeats), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(f"Qwen2-VL with {write_qwen2_vl(Path(folder)) / 1e6:.0f}M parameters")
        print(images(Path(folder), arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
