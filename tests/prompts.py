"""Prompts with media, in the forms of the page: parts of messages, data URLs, embeddings."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from engine_inputs import greedy
from mmjax import LLM, RequestOutput


def random_image(seed: int, height: int = 56, width: int = 84) -> Image.Image:
    """A random image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_chord(seed: int, seconds: float = 0.6, rate: int = 16000) -> np.ndarray:
    """A random chord float32 [n]."""
    time = np.arange(int(seconds * rate)) / rate
    pitches = np.random.default_rng(seed).uniform(100, 2000, 4)
    return (np.sin(2 * np.pi * pitches[:, None] * time).sum(axis=0) / 8).astype(np.float32)


def base64_image(image: Image.Image, form: str = "PNG") -> str:
    """The image as a file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def base64_wav(samples: np.ndarray, rate: int = 16000) -> str:
    """The samples as a WAV file in base64."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return base64.b64encode(buffer.getvalue()).decode()


def image_url_part(image: Image.Image, **more: Any) -> dict[str, Any]:
    """An image_url part with the image in a data URL."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_image(image)}"}, **more}


def user_messages(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one message; strings are text parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def generate_one(llm: LLM, prompt: Any, n: int = 6) -> RequestOutput:
    """The greedy answer to one prompt."""
    return llm.generate(prompt, greedy(n), use_tqdm=False)[0]


def chat_one(llm: LLM, messages: Any, n: int = 6, **kwargs: Any) -> RequestOutput:
    """The greedy answer to one conversation."""
    return llm.chat(messages, greedy(n), use_tqdm=False, **kwargs)[0]


def same_outputs(*outputs: RequestOutput) -> bool:
    """Whether all outputs have the same prompt and output tokens."""
    seen = {(tuple(o.prompt_token_ids or ()), tuple(o.outputs[0].token_ids)) for o in outputs}
    return len(seen) == 1


def encoder_embeds(llm: LLM, prompt: dict[str, Any]) -> list[np.ndarray]:
    """The embeddings of each item of a prompt, float32 [rows, W], read from the device."""
    generate_one(llm, prompt, 1)
    renderer, engine = llm.model.input_processor, llm.model.engines[0]
    slab, found = np.asarray(engine.runner.state.mm_embeds), []
    for entry in renderer.process(renderer.parse(prompt)).items:
        places = engine.encoder_cache.get(entry.item_hash)
        assert places is not None
        found.append(slab[places])
    return found
