"""Finds the code blocks of the documentation, and runs them in order."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line in the page, from 1. section: the heading of the second level above it.
    output: the content of a `text` block right after it, or None."""

    page: str
    section: str
    line: int
    language: str
    code: str
    output: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = PAGES[page].read_text()
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        code = "".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines(True))
        if match["language"] == "text" and found and not text[end : match.start()].strip():
            found[-1] = dataclasses.replace(found[-1], output=code)
        else:
            line = text.count("\n", 0, match.start("code")) + 1
            heads = re.findall(r"^## (.+)$", FENCE.sub("", text[: match.start()]), re.MULTILINE)
            found.append(Block(page, heads[-1] if heads else "", line, match["language"], code))
        end = match.end()
    return found


def sections_of(page: str, language: str = "python") -> list[str]:
    """The sections of a page with blocks of a language."""
    return list(dict.fromkeys(block.section for block in blocks_of(page) if block.language == language))


def commands_of(page: str) -> list[str]:
    """The command lines in the shell blocks of a page, continued lines joined, comments and variables removed."""
    found = []
    for block in blocks_of(page):
        if block.language in ("bash", "console", "sh"):
            lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
            found += [re.sub(r"\s+#.*$", "", line).strip() for line in lines if line.strip()]
    return [re.sub(r"^(uv run|\$) ", "", line) for line in found if not line.startswith("#")]


class Notebook:
    """The Python blocks of a page, run once each and in their order, in one namespace.

    serve: given a block's code, a context in which the servers that it speaks to listen, and the code with their
    addresses.
    """

    def __init__(self, page: str, serve: Callable[[str], AbstractContextManager[str]]) -> None:
        self.blocks = [block for block in blocks_of(page) if block.language == "python"]
        self.serve = serve
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.printed: dict[Block, str] = {}

    def run_to(self, section: str) -> Mapping[Block, str]:
        """Run all blocks up to the end of a section that have not run yet. Returns the output of the section's
        blocks."""
        last = max(i for i, block in enumerate(self.blocks) if block.section == section)
        for name in dict.fromkeys(block.section for block in self.blocks[: last + 1]):
            self._run_section([block for block in self.blocks if block.section == name])
        return {block: self.printed[block] for block in self.blocks if block.section == section}

    def _run_section(self, blocks: list[Block]) -> None:
        left = [block for block in blocks if block not in self.printed]
        if not left:
            return
        seam = "\0"
        with self.serve(seam.join(block.code for block in left)) as code:
            for block, there in zip(left, code.split(seam), strict=True):
                self.printed[block] = self._run(block, there)

    def _run(self, block: Block, code: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * (block.line - 1) + code, block.page, "exec"), self.namespace)
        return out.getvalue()
