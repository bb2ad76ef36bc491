"""Tool calls in complete and streamed outputs, and forced calls."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from mmjax.serve.closed_schemas import close_objects, close_parameters
from mmjax.serve.tools import Arguments, ForcedToolCallParser, schema_of

from api_server import sse_events
from mmjax.parsers import TOOL_PARSERS, ToolCall

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Wien"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("no call at all", "no call at all", []),
        (CALL, "", ["weather"]),
        (f"Let me see.\n{CALL}\n{CALL}", "Let me see.\n", ["weather", "weather"]),
        ("a < b and <tool", "a < b and <tool", []),
        ("<tool_call>not json</tool_call> after", "<tool_call>not json</tool_call> after", []),
        ('<tool_call>{"name": "now"}', "", ["now"]),
        ('<tool_call>{"name": "no', '<tool_call>{"name": "no', []),
    ],
)
def test_parsing_in_pieces(text: str, content: str, names: list[str], size: int) -> None:
    parser, pieces = TOOL_PARSERS["hermes"](), []
    for at in range(0, len(text), size):
        pieces += parser.feed(text[at : at + size])
    pieces += parser.feed("", last=True)
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == content
    assert [piece.name for piece in pieces if isinstance(piece, ToolCall)] == names
    assert [call.name for call in TOOL_PARSERS["hermes"]().read(text)[1]] == names


def test_arguments_are_json_text() -> None:
    [call] = TOOL_PARSERS["hermes"]().read(CALL)[1]
    assert json.loads(call.arguments) == {"city": "Zürich"}
    assert call.as_json()["type"] == "function" and call.id.startswith("chatcmpl-tool-")


def test_forced_outputs() -> None:
    assert [call.name for call in ForcedToolCallParser(None).read('[{"name": "now", "parameters": {}}]')[1]] == ["now"]
    [truncated] = ForcedToolCallParser("weather").read('{"city": "Bern"')[1]
    assert truncated.arguments == '{"city": "Bern"', "the finish reason says that it is truncated"
    assert ForcedToolCallParser(None).read('[{"na') == ('[{"na', [])
    for choice, words in ((("sometimes"), "none of none"), ({"function": {"name": "fly"}}, "fly")):
        with pytest.raises(ValueError, match=words):
            schema_of(TOOLS, choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, "now"])
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_forced_outputs_in_pieces(size: int, name: str | None) -> None:
    """Streamed and whole are equal for every prefix."""
    arguments = ['{"a":"}],\\\\\\"{","b":[{}]}', "{}", "[1]", '"x"']
    names = ["now", 'a"b', "c", "d"]
    text = (
        "["
        + ",".join(f'{{"name":{json.dumps(n)},"parameters":{a}}}' for n, a in zip(names, arguments, strict=True))
        + "]"
    )
    for end in range(len(text) + 1):
        parser, pieces = ForcedToolCallParser(name), []
        for at in range(0, end, size):
            for piece in parser.feed(text[at : min(end, at + size)]):
                parser.calls += isinstance(piece, ToolCall)
                pieces.append(piece)
        pieces += parser.feed("", last=True)
        content, calls = ForcedToolCallParser(name).read(text[:end])
        assert [piece.name for piece in pieces if isinstance(piece, ToolCall)] == [call.name for call in calls]
        streamed = "".join(piece for piece in pieces if isinstance(piece, Arguments))
        assert streamed == "".join(call.arguments for call in calls)
        assert "".join(p for p in pieces if type(p) is str) == content and not (content and calls)
    assert [call.arguments for call in calls] == (arguments if name is None else [text])


def test_forced_calls(client: TestClient) -> None:
    pytest.importorskip("llguidance")

    def ask(**body: Any) -> Any:
        given = {"messages": [{"role": "user", "content": "Weather?"}], "temperature": 0, "max_tokens": 120}
        return client.post("/v1/chat/completions", json={**given, "tools": TOOLS, **body})

    named = {"type": "function", "function": {"name": "weather"}}
    [choice] = ask(tool_choice=named).json()["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] is None, "OpenAI's, for a named function"
    assert json.loads(call["function"]["arguments"])["city"] in ("Bern", "Wien")
    lines = ask(tool_choice=named, stream=True).text.split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    first, *more = [delta["delta"]["tool_calls"][0] for delta in deltas if "tool_calls" in delta["delta"]]
    assert first["index"] == 0 and first["function"] == {"name": "weather", "arguments": ""} and first["id"]
    assert len(more) > 1 and all(piece.keys() == {"index", "function"} and piece["index"] == 0 for piece in more)
    assert "".join(piece["function"]["arguments"] for piece in more) == call["function"]["arguments"]
    assert deltas[-1]["finish_reason"] == "stop"
    assert ask(tool_choice={"type": "function", "function": {"name": "fly"}}).status_code == 400
    assert ask(tool_choice="sometimes").status_code == 400


def test_forced_calls_are_limited(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr("mmjax.serve.chat.MAX_CALLS", 3)
    ends = [
        client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"][-1]
        for text in ("]", "}]", "}}]")
    ]
    never = {str(token): -100 for token in ends}
    body = {"messages": [{"role": "user", "content": "Time?"}], "temperature": 0, "max_tokens": 250, "tools": TOOLS[1:]}
    for more, count in (({}, 1), ({"parallel_tool_calls": True}, 3), ({"parallel_tool_calls": False}, 1)):
        given = {**body, "tool_choice": "required", "logit_bias": never, **more}
        [choice] = client.post("/v1/chat/completions", json=given).json()["choices"]
        assert choice["finish_reason"] == "tool_calls", choice
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"] * count


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time(client: TestClient, stream: bool) -> None:
    pytest.importorskip("llguidance")
    call = '<tool_call>{"name": "now"}</tool_call>'
    body = {
        "messages": [{"role": "user", "content": "Time?"}], "temperature": 0, "max_tokens": 120, "stream": stream,
        "tools": TOOLS, "structured_outputs": {"choice": [f"{call}\n{call}"]},
    }  # fmt: skip
    for parallel, count in ((None, 2), (True, 2), (False, 1)):
        response = client.post("/v1/chat/completions", json={**body, "parallel_tool_calls": parallel})
        if stream:
            last = [event["choices"][0] for event in sse_events(response)]
            calls = [made for choice in last for made in choice["delta"].get("tool_calls", ())]
            assert not any(choice["delta"].get("content") for choice in last)
            assert [made["index"] for made in calls] == list(range(count))
        else:
            last = response.json()["choices"]
            calls = last[0]["message"]["tool_calls"]
        assert [made["function"]["name"] for made in calls] == ["now"] * count
        assert last[-1]["finish_reason"] == "tool_calls" and last[-1]["stop_reason"] is None


@pytest.mark.parametrize(
    "named", [{}, {"function": "f"}, {"function": ["f"]}, {"function": {"name": ["f"]}}, {"name": "f"}]
)
def test_an_unknown_tool_choice_is_refused(client: TestClient, named: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [tool],
        "tool_choice": {"type": "function", **named},
    }
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and "is none of the tools, f" in response.json()["error"]["message"]


PYDANTIC: dict[str, Any] = {
    "$defs": {"Size": {"properties": {"w": {"type": "boolean"}}, "required": ["w"], "type": "object"}},
    "properties": {
        "red": {"type": "boolean"},
        "size": {"$ref": "#/$defs/Size"},
        "more": {"anyOf": [{"items": {"properties": {}, "type": "object"}, "type": "array"}, {"type": "null"}]},
        "free": {"additionalProperties": True, "type": "object"},
    },
    "required": ["red", "size"],
    "type": "object",
}


def test_closed_objects() -> None:
    closed = close_objects(PYDANTIC)
    assert closed["additionalProperties"] is closed["$defs"]["Size"]["additionalProperties"] is False
    assert closed["properties"]["more"]["anyOf"][0]["items"]["additionalProperties"] is False
    assert closed["properties"]["free"] == PYDANTIC["properties"]["free"] and "additionalProperties" not in PYDANTIC
    combined = {"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {}}}], "$defs": {"A": {"properties": {"a": {}}}}}
    assert close_objects(combined) == combined, "each part would exclude the properties of the other"
    for none in (None, {}, {"type": "object"}):
        assert close_parameters(none) == {"type": "object", "properties": {}, "additionalProperties": False}
    for opened in ({"properties": {}, "additionalProperties": True}, {"type": "string"}):
        assert close_parameters(opened) == opened


@pytest.mark.parametrize("how", ["named", "required", "strict", "responses"])
def test_schemas_of_pydantic_end(make_client: Callable[..., TestClient], how: str) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
    function = {"name": "Out", "parameters": schema}
    tools: dict[str, Any] = {"tools": [{"type": "function", "function": function}]}
    named = {"type": "json_schema", "json_schema": {"name": "Out", "strict": True, "schema": schema}}
    body = {
        "named": {**tools, "tool_choice": {"type": "function", "function": {"name": "Out"}}},
        "required": {**tools, "tool_choice": "required"},
        "strict": {"response_format": named},
        "responses": {"text": {"format": {"type": "json_schema", **named["json_schema"]}}},
    }[how]
    path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": "red?"}], "max_tokens": 120}
    if how == "responses":
        path, asked = "/v1/responses", {"input": "red?", "max_output_tokens": 120}

    def end(client: TestClient) -> str:
        """Why the output ends if the model writes a comma wherever it may."""
        [comma] = client.post("/tokenize", json={"prompt": ",", "add_special_tokens": False}).json()["tokens"]
        result = client.post(path, json={"temperature": 0, "logit_bias": {str(comma): 100}, **asked, **body}).json()
        return str(result["status"] if how == "responses" else result["choices"][0]["finish_reason"])

    expected = {"required": "tool_calls", "responses": "completed"}.get(how, "stop")
    assert end(make_client()) == expected
    assert end(make_client(closed_objects=False)) in ("length", "incomplete")
