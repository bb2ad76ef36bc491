"""`mmjax chat`: a conversation in the terminal, with pictures, sound and videos."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.chat.parts import media_part
from mmjax.entrypoints.async_llm import AsyncLLM
from mmjax.entrypoints.llm import LLM
from mmjax.types import SamplingParams

HELP = """\
/image PATH|URL   show a picture with the next message; /audio and /video likewise, and as many as you like
/system TEXT      begin again, with an instruction
/clear            begin again
/quit             leave (as does the end of input); Ctrl-C cuts an answer short"""
MEDIA = ("image", "audio", "video")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    group = parser.add_argument_group("chat")
    group.add_argument("--system", metavar="TEXT", help="instruction that the conversation begins with")
    group.add_argument("--temperature", type=float, help="0 always takes the likeliest token (default: the model's)")
    group.add_argument("--max-tokens", type=int, help="longest answer (default: as long as there is room)")


def run(arguments: argparse.Namespace, engine: Mapping[str, Any]) -> None:
    """Load the model and talk until the input ends."""
    served = AsyncLLM(LLM(arguments.model, **engine))
    try:
        defaults = served.llm.get_default_sampling_params()
        temperature = defaults.temperature if arguments.temperature is None else arguments.temperature
        params = SamplingParams(
            temperature=temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            repetition_penalty=defaults.repetition_penalty,
            max_tokens=arguments.max_tokens,
        )
        print(f"{arguments.model} listens. /help tells what else there is.")
        Terminal(served, params, arguments.system).talk(input, _print)
    finally:
        served.close()


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Terminal:
    """A conversation. What goes wrong with a turn is told, and the turn forgotten with its media."""

    def __init__(self, served: AsyncLLM, params: SamplingParams, system: str | None = None) -> None:
        self.served = served
        self.params = params
        self.messages: list[dict[str, Any]] = []
        self.media: list[dict[str, Any]] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget everything."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.media = []

    def talk(self, read: Callable[[str], str], write: Callable[[str], None]) -> None:
        """Turn by turn until the input ends. read: a line, given a prompt; write: text as it comes."""
        with asyncio.Runner() as runner:
            while True:
                try:
                    line = read("> ").strip()
                except (EOFError, KeyboardInterrupt):
                    write("\n")
                    return
                if line in ("/quit", "/exit"):
                    return
                try:
                    if line.startswith("/"):
                        write(self.command(line))
                    elif line:
                        runner.run(self.turn(line, write))
                except KeyboardInterrupt:
                    write(" [cut short]\n")
                except (ValueError, OSError, NotImplementedError) as error:
                    write(f"{error}\n")

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; what to tell about it."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in MEDIA and rest:
            self.media.append(media_part(name, rest))
            return f"[{len(self.media)} with the next message]\n"
        if name in ("clear", "system"):
            self.begin(rest or None)
            return "[from the beginning]\n"
        return HELP + "\n"

    async def turn(self, text: str, write: Callable[[str], None]) -> None:
        """Ask, and write the answer as it comes."""
        content: Any = [*self.media, {"type": "text", "text": text}] if self.media else text
        self.media = []
        messages = [*self.messages, {"role": "user", "content": content}]
        engine_input = await self.served.prepare_chat(messages)
        stream = self.served.submit(engine_input, self.params, streaming=True)
        said = []
        try:
            async for delta in self.served.stream(stream):
                said.append(delta.text)
                write(delta.text)
            write("\n")
        finally:
            self.served.drop(stream)
            if said:
                self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
