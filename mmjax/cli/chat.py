"""`mmjax chat`: a conversation in the terminal, with images, audio and videos."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mmjax.types import MODALITIES, SamplingParams

if TYPE_CHECKING:
    from mmjax import AsyncLLM

HELP = """\
/image PATH|URL   add an image to the next message; /audio and /video do the same; use them as often as you like
/system TEXT      start over with a system message
/clear            start over
/quit             leave (so does the end of the input); Ctrl-C stops an answer"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_argument_group("chat")
    group.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    group.add_argument(
        "--temperature", type=float, help="0 always samples the most likely token (default: the model's)"
    )
    group.add_argument("--max-tokens", type=int, help="most tokens of an answer (default: as many as fit)")


def run(arguments: argparse.Namespace, engine_kwargs: Mapping[str, Any]) -> None:
    """Load the model and chat until the input ends."""
    from mmjax import LLM, AsyncLLM

    engine = AsyncLLM(LLM(arguments.model, **engine_kwargs))
    try:
        defaults = engine.llm.get_default_sampling_params()
        temperature = defaults.temperature if arguments.temperature is None else arguments.temperature
        params = SamplingParams(
            temperature=temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            repetition_penalty=defaults.repetition_penalty,
            max_tokens=arguments.max_tokens,
        )
        print(f"Chat with {arguments.model}. /help lists the commands.")
        Terminal(engine, params, arguments.system).run(input, _print)
    finally:
        engine.close()


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Terminal:
    """A conversation. If a turn fails, the error is printed and the turn is dropped with its media."""

    def __init__(self, engine: AsyncLLM, params: SamplingParams, system: str | None = None) -> None:
        self.engine = engine
        self.params = params
        self.messages: list[dict[str, Any]] = []
        self.media: list[dict[str, Any]] = []  # parts of the next message
        self.start(system)

    def start(self, system: str | None) -> None:
        """Start over, with a system message if there is one."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.media = []

    def run(self, read: Callable[[str], str], write: Callable[[str], None]) -> None:
        """Take turns until the input ends. read: shows a prompt and returns a line. write: prints text at once."""
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
                    write(" [stopped]\n")
                except (ValueError, OSError, NotImplementedError) as error:
                    write(f"{error}\n")

    def command(self, line: str) -> str:
        """Run a command, a line that begins with a slash. Returns what to print."""
        from mmjax.chat.parts import media_part

        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name in MODALITIES and argument:
            self.media.append(media_part(name, argument))
            return f"[{len(self.media)} with the next message]\n"
        if name in ("clear", "system"):
            self.start(argument or None)
            return "[new conversation]\n"
        return HELP + "\n"

    async def turn(self, text: str, write: Callable[[str], None]) -> None:
        """Send a message, and print the answer as it is generated."""
        content: Any = [*self.media, {"type": "text", "text": text}] if self.media else text
        self.media = []
        messages = [*self.messages, {"role": "user", "content": content}]
        engine_input = await self.engine.prepare_chat(messages)
        stream = self.engine.submit(engine_input, self.params, streaming=True)
        texts = []
        try:
            async for delta in self.engine.stream(stream):
                texts.append(delta.text)
                write(delta.text)
            write("\n")
        finally:
            self.engine.drop(stream)
            if texts:
                self.messages = [*messages, {"role": "assistant", "content": "".join(texts)}]
