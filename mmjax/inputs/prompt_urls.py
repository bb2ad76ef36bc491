"""Prompts in the form that JSON can carry: media as URLs, embeddings as tensors in base64."""

import asyncio
from collections.abc import Mapping
from typing import Any

from mmjax.inputs.input_processor import InputConfig
from mmjax.multimodal.connector import Connect, Connector
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.multimodal.tensor_codec import base642tensor
from mmjax.types import RequestError


async def fetch_prompt(prompt: Any, connect: Connect, config: InputConfig) -> Any:
    """The prompt as `LLM.generate` takes it: its URLs and base64 tensors replaced by media and arrays.

    Anything in another form is left as it is, for the input processor to refuse.
    """
    if not isinstance(prompt, Mapping):
        return prompt
    fetched: dict[str, Any] = {}
    data = prompt.get("multi_modal_data")
    if isinstance(data, Mapping):
        connector = connect({})
        fetched["multi_modal_data"] = {
            modality: await _fetch(connector, str(modality), value, config.media_limits)
            for modality, value in data.items()
        }
    if isinstance(prompt.get("prompt_embeds"), str) and config.prompt_embeds_dim:
        embeds = await asyncio.to_thread(base642tensor, prompt["prompt_embeds"], limits=config.media_limits)
        fetched["prompt_embeds"] = embeds
    return {**prompt, **fetched}


async def _fetch(connector: Connector, modality: str, value: Any, limits: MediaLimits) -> Any:
    """One entry of multi_modal_data: a URL, named tensors, None, or a list of these."""
    if isinstance(value, (list, tuple)):
        return [await _fetch(connector, modality, entry, limits) for entry in value]
    if isinstance(value, str):
        return await connector.fetch_async(modality, value)
    if isinstance(value, Mapping):
        return {
            name: await asyncio.to_thread(base642tensor, entry, limits=limits) if isinstance(entry, str) else entry
            for name, entry in value.items()
        }
    if value is None:
        return None
    raise RequestError(f"multi_modal_data[{modality!r}]: write media as URLs, got {type(value).__name__}.", "bad_media")
