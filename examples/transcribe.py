"""Transcribe a sound file of any length with a Whisper model: `python examples/transcribe.py MODEL FILE`.

Whisper hears 30 seconds at a time. A longer recording is cut where it is quiet, and all pieces are decoded together.
"""

import argparse
from pathlib import Path

from mmjax import LLM, SamplingParams
from mmjax.multimodal.audio import decode, load, split_audio

RATE = 16_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory or hub id of a Whisper checkpoint, such as openai/whisper-tiny.en")
    parser.add_argument("file", type=Path, help="wav, flac, mp3, m4a, ogg, or a video with a sound track")
    parser.add_argument(
        "--prompt", default="", help="decoder prompt, such as '<|startoftranscript|><|de|><|transcribe|>'"
    )
    arguments = parser.parse_args()

    wave = decode(load(arguments.file), RATE)
    pieces = split_audio(wave, RATE, max_clip_duration_s=30.0, overlap_duration_s=1.0, min_energy_window_size=1600)
    llm = LLM(arguments.model)
    outputs = llm.generate(
        [{"prompt": arguments.prompt, "multi_modal_data": {"audio": (piece, RATE)}} for piece in pieces],
        SamplingParams(temperature=0.0, max_tokens=224),
    )
    print(" ".join(output.outputs[0].text.strip() for output in outputs))


if __name__ == "__main__":
    main()
