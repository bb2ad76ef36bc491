"""Tool calls and reasoning in recorded outputs of each format: whole, and split into any deltas."""

# ruff: noqa: RUF001 - DeepSeek's marks have full-width bars

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from mmjax.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    OutputParser,
    Reasoning,
    ToolCall,
    reasoning_parser_for,
    tool_parser_for,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": ["string", "null"]},
                    "places": {"type": "array", "items": {"type": "string"}},
                    "exact": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                },
            },
        },
    }
]


class Case(NamedTuple):
    """What a model wrote, and what is in it; calls: (name, arguments as JSON text)."""

    tools: str | None
    text: str
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str = ""
    reasoner: str | None = None
    prompt: str | None = None


WEATHER = ("weather", '{"city": "Zürich", "days": 2}')
NOW = ("now", "{}")
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
DSV3 = (
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Zürich", "days": 2}\n```<｜tool▁call▁end｜>'
)
QWEN3 = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
CODE = "if a < b:\n    print('</parameter>')\n"
CASES = [
    Case("hermes", "no call at all", "no call at all"),
    Case("hermes", f"Let me see.\n\n{HERMES}\n{HERMES}\n", "Let me see.\n\n", (WEATHER, WEATHER)),
    Case("hermes", f"\n\n{HERMES}", "", (WEATHER,)),
    Case("hermes", f"{HERMES}\n\nDone.", "Done.", (WEATHER,)),
    Case("hermes", "\n\n a < b and <tool", "\n\n a < b and <tool"),
    Case("hermes", '<tool_call>{"name": "now"}', "", (NOW,)),
    Case("hermes", '<tool_call>{"name": "now"}}\n</tool_call>', "", (NOW,)),
    Case("hermes", '<tool_call>{"name": "now"}\n<tool_call>{"name": "now"}</tool_', "", (NOW, NOW)),
    Case("hermes", '<tool_call>{"name": "no', '<tool_call>{"name": "no'),
    Case("hermes", "<tool_call>not json</tool_call> after", "<tool_call>not json</tool_call> after"),
    Case("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>'),
    Case("hermes", f"<tool_call>[1]</tool_call>\n{HERMES}", "<tool_call>[1]</tool_call>\n", (WEATHER,)),
    Case(
        "hermes",  # the closing mark and escaped quotes in an argument; the model's own spaces and numbers
        '<tool_call>{"arguments":{"a":"</tool_call> \\"{\\"","b":1.0,  "c":1e3},"name":"f"}</tool_call>',
        "",
        (("f", '{"a":"</tool_call> \\"{\\"","b":1.0,  "c":1e3}'),),
    ),
    Case(  # a line break in a string is not JSON
        "hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', "", (("f", '{"a": "x\\ny"}'),)
    ),
    Case("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", (("f", '{"a": 1}'),)),
    Case("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", (("f", "{}"),)),
    Case(
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}, {"name": "now"}]',
        "",
        (WEATHER, NOW),
    ),
    Case(
        "mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Zürich", "days": 2}[TOOL_CALLS]now[ARGS]{}', "", (WEATHER, NOW)
    ),
    Case("mistral", "Look: [TOOL_CALLS]now{}", "Look: ", (NOW,)),
    Case("mistral", "[TOOL_CALLS]now[CALL_ID]abcDEF123[ARGS]{}", "", (NOW,)),
    Case("mistral", '[TOOL_CALLS] [{"name": "now"', '[TOOL_CALLS] [{"name": "now"'),
    Case("mistral", "[TOOL_CALLS] none, {} [TOOL", "[TOOL_CALLS] none, {} [TOOL"),
    Case("mistral", "[TOOL_CALLS] [1, 2]", "[TOOL_CALLS] [1, 2]"),
    Case("mistral", "[TOOL_CALLS]" + "a" * 300, "[TOOL_CALLS]" + "a" * 300),
    Case("llama3_json", '{"name": "weather", "parameters": {"city": "Zürich", "days": 2}}', "", (WEATHER,)),
    Case(
        "llama3_json",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Zürich", "days": 2}}; {"name": "now"}',
        "",
        (WEATHER, NOW),
    ),
    Case("llama3_json", '{"type": "function", "function": {"name": "now", "parameters": {}}}', "", (NOW,)),
    Case("llama3_json", 'I call it:\n{"name": "now", "parameters": {}}', "I call it:\n", (NOW,)),
    Case("llama3_json", 'as in C: {"name": "now"}', 'as in C: {"name": "now"}'),
    Case("llama3_json", '{"a": \n{"name": "now"}}\n{"b"', '{"a": \n{"name": "now"}}\n{"b"'),
    Case("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    Case("llama3_json", '{"name": "now"}; that is all', "; that is all", (NOW,)),
    Case("llama4_pythonic", '[weather(city="Zürich", days=2), now()]', "", (WEATHER, NOW)),
    Case("llama4_pythonic", '<|python_start|>[weather(city="Zürich", days=2)]<|python_end|>', "", (WEATHER,)),
    Case(
        "pythonic",
        "[a.f(x=[1, -2.5, None], y={'k': true}, z='a]\\')\"', t=())]",
        "",
        (("a.f", '{"x": [1, -2.5, null], "y": {"k": true}, "z": "a]\')\\"", "t": []}'),),
    ),
    Case("llama4_pythonic", "[1] see [f](https://a.b) and [f(x=1)]", "[1] see [f](https://a.b) and [f(x=1)]"),
    Case("llama4_pythonic", "[f(open('x'))]", "[f(open('x'))]"),
    Case("llama4_pythonic", "[f(x=open('x'))]", "[f(x=open('x'))]"),
    Case("llama4_pythonic", "[f(x=1", "[f(x=1"),
    Case("llama4_pythonic", "[f(**{'a': 1})] <|python_end|>", "[f(**{'a': 1})] <|python_end|>"),
    Case("qwen3_xml", f"I look.\n{QWEN3}\n{QWEN3}", "I look.\n", (WEATHER, WEATHER)),
    Case("qwen3_coder", QWEN3.removeprefix("<tool_call>\n"), "", (WEATHER,)),
    Case("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", (NOW,)),
    Case(
        "qwen3_xml",
        f"<function=edit>\n<parameter=text>\n{CODE}\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>",
        "",
        (("edit", json.dumps({"text": CODE, "n": "2"})),),
    ),
    Case(
        "qwen3_xml",
        "<function=weather><parameter=city>7</parameter><parameter=units>null</parameter>"
        "<parameter=places>['a', \"b\"]</parameter><parameter=exact>True</parameter><parameter=days>soon</parameter>"
        "</function>",
        "",
        (("weather", '{"city": "7", "units": null, "places": ["a", "b"], "exact": true, "days": "soon"}'),),
    ),
    Case(
        "qwen3_xml", "<tool_call>\n<function=weather>\n<parameter=ci", "<tool_call>\n<function=weather>\n<parameter=ci"
    ),
    Case(
        "qwen3_xml",
        "<tool_call>{}</tool_call> <function=> <function=a b>",
        "<tool_call>{}</tool_call> <function=> <function=a b>",
    ),
    Case(
        "phi4_mini_json", 'functools[{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}]', "", (WEATHER,)
    ),
    Case("phi4_mini_json", '<|tool_call|>[{"name": "now"}, {"name": "now"}]<|/tool_call|>', "", (NOW, NOW)),
    Case(
        "phi4_mini_json",
        "functools[0] is <|tool_call|>ing <|/tool_call|>",
        "functools[0] is <|tool_call|>ing <|/tool_call|>",
    ),
    Case("phi4_mini_json", 'functools[{"name"', 'functools[{"name"'),
    Case(
        "minicpm",
        '<|tool_call_start|>\n```python\nweather(city="Zürich", days=2)\nnow()\n```\n<|tool_call_end|>\nI look.',
        "I look.",
        (WEATHER, NOW),
    ),
    Case("minicpm", "<|tool_call_start|>\n```python\nnow()\n```\n", "", (NOW,)),
    Case("minicpm", "<|tool_call_start|>x = 1<|tool_call_end|>", "<|tool_call_start|>x = 1<|tool_call_end|>"),
    Case(
        "minicpm5",
        '<function name="weather"><param name="city">Zürich</param><param name="days">2</param></function>',
        "",
        (WEATHER,),
    ),
    Case(
        "minicpm5",
        '<function name="edit"><param name="text"><![CDATA[</function> </param>]]></param></function>',
        "",
        (("edit", '{"text": "</function> </param>"}'),),
    ),
    Case("minicpm5", '<function name="f"><b>1</b></function> <func', '<function name="f"><b>1</b></function> <func'),
    Case("deepseek_v3", f"Yes.<｜tool▁calls▁begin｜>{DSV3}\n{DSV3}<｜tool▁calls▁end｜>", "Yes.", (WEATHER, WEATHER)),
    Case(
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Zürich", "days": 2}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        (WEATHER,),
    ),
    Case("deepseek_v3", DSV3[:-30], DSV3[:-30]),
    Case("deepseek_v3", "<｜tool▁calls▁begin｜>?<｜tool▁calls▁end｜>", "<｜tool▁calls▁begin｜>?<｜tool▁calls▁end｜>"),
    Case(None, "<think>\nHm.\n\nYes.\n</think>\n\nIt is.", "It is.", (), "Hm.\n\nYes.", "qwen3"),
    Case(None, "It is </think> so.", "It is </think> so.", (), "", "qwen3"),
    Case(None, "Hm.\n</think>\n\nIt is.", "It is.", (), "Hm.", "qwen3", "<|im_start|>assistant\n<think>\n"),
    Case(None, " It is.", " It is.", (), "", "qwen3", "<think>\n\n</think>\n\n"),
    Case(None, "<think>\n\n</think>\n\nIt is.", "It is.", (), "", "qwen3"),
    Case(None, "<think>Hm, ", "", (), "Hm,", "qwen3"),
    Case(None, "<thin", "<thin", (), "", "qwen3"),
    Case(None, "Hm.</think>It is.", "It is.", (), "Hm.", "deepseek_r1"),
    Case(None, "Hm. <think", "", (), "Hm. <think", "deepseek_r1"),
    Case(None, "It is.", "It is.", (), "", "deepseek_r1", "<｜Assistant｜></think>"),
    Case("mistral", "[THINK]Hm.[/THINK]Look:[TOOL_CALLS]now[ARGS]{}", "Look:", (NOW,), "Hm.", "mistral"),
    Case(None, "<|channel>thought\nHm.<channel|>It is.", "It is.", (), "Hm.", "gemma4"),
    Case(
        "hermes", f"<think>\nI call <tool_call>.\n</think>\n\n{HERMES}", "", (WEATHER,), "I call <tool_call>.", "qwen3"
    ),
    Case("qwen3_xml", f"Hm.</think>\n{QWEN3}", "", (WEATHER,), "Hm.", "deepseek_r1"),
    Case(
        "deepseek_v3",
        f"Hm.</think>Yes.<｜tool▁calls▁begin｜>{DSV3}<｜tool▁calls▁end｜>",
        "Yes.",
        (WEATHER,),
        "Hm.",
        "deepseek_r1",
    ),
]


def parser_of(case: Case) -> OutputParser:
    reasoning = REASONING_PARSERS[case.reasoner](case.prompt) if case.reasoner else None
    return OutputParser(reasoning, TOOL_PARSERS[case.tools](TOOLS) if case.tools else None)


def joined(case: Case, deltas: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, calls) of an output that arrives in deltas; the last may be empty."""
    parser, pieces = parser_of(case), []
    for number, delta in enumerate(deltas, 1):
        pieces += parser.feed(delta, last=number == len(deltas))
    reasoning = "".join(piece for piece in pieces if isinstance(piece, Reasoning))
    content = "".join(piece for piece in pieces if isinstance(piece, str) and not isinstance(piece, Reasoning))
    assert "" not in pieces
    return reasoning, content, [(piece.name, piece.arguments) for piece in pieces if isinstance(piece, ToolCall)]


def splits(text: str, chance: random.Random, count: int) -> Iterator[list[str]]:
    """All characters on their own; everything at once, with the end in a delta of its own; random deltas."""
    yield [*text, ""]
    yield [text, ""]
    for _ in range(count):
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(1, 8)))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_every_format_has_cases() -> None:
    assert {case.tools for case in CASES} - {None} >= set(TOOL_PARSERS) - {"llama4_json"}
    assert {case.reasoner for case in CASES} - {None} == set(REASONING_PARSERS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tools or case.reasoner}-{case.text[:24]!r}")
def test_recorded_outputs(case: Case) -> None:
    reasoning, content, calls = parser_of(case).read(case.text)
    assert (reasoning, content) == (case.reasoning, case.content)
    assert [(call.name, call.arguments) for call in calls] == list(case.calls)
    wanted = (case.reasoning, case.content, list(case.calls))
    for deltas in splits(case.text, random.Random(case.text), 12):
        assert joined(case, deltas) == wanted, deltas


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tools or case.reasoner}-{case.text[:24]!r}")
def test_every_prefix_and_damaged_outputs(case: Case) -> None:
    """Half an output, and one with pieces missing, doubled or swapped, never fails, and never depends on the deltas."""
    chance = random.Random(case.text)
    text = case.text[:400]
    damaged = [text[:end] for end in range(0, len(text), 7)]
    for _ in range(6):
        a, b, c = sorted(chance.choices(range(len(text) + 1), k=3))
        damaged += [text[:a] + text[b:], text[:b] + text[a:], text[b:c] + text[:b] + text[c:]]
    for broken in damaged:
        wanted = joined(case, [broken])
        if not case.reasoner and not wanted[2]:
            assert wanted[1] == broken, "without a call nothing is lost"
        for deltas in splits(broken, chance, 1):
            assert joined(case, deltas) == wanted, deltas


def test_any_text_at_all() -> None:
    """Random sequences of every mark and bracket: no parser fails, loses a delta, or depends on the deltas."""
    chance = random.Random(0)
    words = ['"', "'", "\\", "{", "}", "[", "]", "(", ")", " ", "\n", ",", ";", ":", "a", "1", "f(", "name", "```"]
    words += [mark for parser in {*TOOL_PARSERS.values()} for mark in parser.marks]
    words += [mark for parser in {*REASONING_PARSERS.values()} for mark in (parser.open, parser.close)]
    words += ['{"name": "f"}', "</function>", "<parameter=a>", "</parameter>", "[f(a=1)]", "<![CDATA[", "</param>"]
    for name in TOOL_PARSERS:
        for reasoner in (None, *REASONING_PARSERS):
            case = Case(name, "", reasoner=reasoner)
            for _ in range(8):
                text = "".join(chance.choices(words, k=chance.randint(1, 14)))
                wanted = joined(case, [text])
                for deltas in splits(text, chance, 2):
                    assert joined(case, deltas) == wanted, (name, reasoner, deltas)


def test_deep_nesting_is_content() -> None:
    deep = "[" * 20_000 + "]" * 20_000
    for name, text in (
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {deep}}}</tool_call>'),
        ("mistral", f"[TOOL_CALLS]f[ARGS]{{{deep}}}"),
        ("llama4_pythonic", f"[f(x={deep})]"),
        ("phi4_mini_json", f"functools[{deep}]"),
    ):
        assert TOOL_PARSERS[name]().read(text) == (text, [])


def test_content_is_not_held_back() -> None:
    """What cannot become a call or a mark is passed on at once."""
    for name, parser in TOOL_PARSERS.items():
        assert list(parser().feed("Hello, ")) == ["Hello, "], name
    for name, reasoner in REASONING_PARSERS.items():
        assert [*reasoner().feed("Hello,")] == ["Hello,"], name


def test_ids() -> None:
    [call] = TOOL_PARSERS["mistral"]().read("[TOOL_CALLS]now[CALL_ID]abcDEF123[ARGS]{}")[1]
    assert call.id == "abcDEF123"
    [call] = TOOL_PARSERS["mistral"]().read("[TOOL_CALLS]now[ARGS]{}")[1]
    assert len(call.id) == 9 and call.id.isalnum(), "Mistral's templates refuse other ids"
    [call] = TOOL_PARSERS["hermes"]().read(HERMES)[1]
    assert call.as_json()["type"] == "function" and call.id.startswith("chatcmpl-tool-")


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ '<|im_start|>' }}", "hermes", None),
        ("<tool_call>\n{'name': ...} ... content.split('</think>')", "hermes", "qwen3"),
        ("<tool_call>\n<function=example_function_name>\n<parameter=a>", "qwen3_xml", None),
        ("[SYSTEM_PROMPT] [TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<｜tool▁calls▁begin｜> <｜Assistant｜><think>\\n </think>", "deepseek_v3", "qwen3"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}.', "llama3_json", None),
        ("<|python_start|>", "llama4_pythonic", None),
        ("<|tool|>", "phi4_mini_json", None),
        ("<|tool_call_start|>```python", "minicpm", None),
        ("<|channel>thought", "hermes", "gemma4"),
    ],
)
def test_the_template_says_the_format(template: str, tools: str, reasoning: str | None) -> None:
    assert tool_parser_for(template) == tools and reasoning_parser_for(template) == reasoning


def test_long_outputs_cost_linear_time() -> None:
    """20 000 deltas of one long argument, and of text: each character is looked at once."""
    parser: Any = TOOL_PARSERS["hermes"]()
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 20_000 + '"}}</tool_call>'
    calls = [piece for delta in text for piece in parser.feed(delta)]
    assert len(calls) == 1 and parser._scanner._start is None
