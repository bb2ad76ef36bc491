"""The openai package for Python against mmjax: an answer, a stream, a picture, an answer held to a schema, a tool call.

    pip install openai
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/clients/openai_client.py [PICTURE]

The package reads both variables itself. Where the server was started without --api-key, any key will do.
"""

import argparse
import base64
import io
import json
from pathlib import Path

from openai import BadRequestError, LengthFinishReasonError, OpenAI
from openai.types.chat import ChatCompletionToolParam
from PIL import Image
from pydantic import BaseModel

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"celsius": {"type": "boolean"}},
            "required": ["celsius"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """What the model has to fill in."""

    red: bool
    shape: bool


def picture_url(path: Path | None) -> str:
    """The file as a data: URL; without one, a red square."""
    if path is None:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (220, 30, 30)).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    kind = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}.get(path.suffix.lower(), "png")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def talk(client: OpenAI, model: str, picture: Path | None) -> None:
    whole = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is a cache?"}], max_tokens=24, temperature=0
    )
    print("answer:", repr(whole.choices[0].message.content))

    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is a cache?"}],
        max_tokens=24,
        temperature=0,
        stream=True,
        extra_body={"repetition_penalty": 1.0},  # what OpenAI's API does not know goes here
    ) as stream:
        print("streamed:", repr("".join(chunk.choices[0].delta.content or "" for chunk in stream)))

    seen = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture_url(picture)}},
                    {"type": "text", "text": "Which colour is this?"},
                ],
            }
        ],
        max_tokens=24,
    )
    print("picture:", repr(seen.choices[0].message.content))


def fill_in(client: OpenAI, model: str) -> None:
    """Answers held to a schema, and a tool call. The server needs mmjax[structured] for these."""
    try:
        parsed = client.chat.completions.parse(
            model=model, messages=[{"role": "user", "content": "A red square?"}], response_format=Verdict, max_tokens=64
        )
        print("parsed:", parsed.choices[0].message.parsed)
    except LengthFinishReasonError:  # as with OpenAI: JSON that max_tokens cuts short is not valid
        print("parsed: cut short")

    called = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Is it warm in Rome?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=64,
    )
    for call in called.choices[0].message.tool_calls or []:
        if call.type == "function":
            print("call:", call.function.name, json.loads(call.function.arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", nargs="?", type=Path)
    arguments = parser.parse_args()

    client = OpenAI()
    model = client.models.list().data[0].id
    talk(client, model, arguments.picture)
    try:
        fill_in(client, model)
    except BadRequestError as error:
        if "mmjax[structured]" not in str(error):
            raise
        print("no forms:", error)


if __name__ == "__main__":
    main()
