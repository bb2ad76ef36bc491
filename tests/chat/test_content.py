"""Detects which templates expect lists of parts."""

import pytest

from mmjax.chat.content import content_format
from mmjax.chat.templates import BASIC, CHATML, VLM2VEC

LOOP = "{% for part in %s %}{{ part.text }}{% endfor %}"

OPENAI = {
    "message": "{% for m in messages %}" + LOOP.replace("%s", "m.content") + "{% endfor %}",
    "subscript": "{% for m in messages %}" + LOOP.replace("%s", "m['content']") + "{% endfor %}",
    "filtered": "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "<image>{% endfor %}{% endfor %}",
    "condition": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}",
    "assigned": "{% for m in messages %}{% set c = m['content'] %}" + LOOP.replace("%s", "c") + "{% endfor %}",
    "choice": "{% for m in messages %}{% set c = m.content if m.content is not string else [] %}"
    + LOOP.replace("%s", "c")
    + "{% endfor %}",
    "list_alias": "{% set all = messages %}{% for m in all %}" + LOOP.replace("%s", "m.content") + "{% endfor %}",
    "slice": "{% set rest = messages[1:] %}{% for m in rest %}" + LOOP.replace("%s", "m.content") + "{% endfor %}",
    "first": LOOP.replace("%s", "messages[0].content"),
    "first_filter": "{% set m = messages | first %}" + LOOP.replace("%s", "m.content"),
    "macro": "{% macro show(content) %}" + LOOP.replace("%s", "content") + "{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "macro_keyword": "{% macro show(what='') %}" + LOOP.replace("%s", "what") + "{% endmacro %}"
    "{% for m in messages %}{{ show(what=m.content) }}{% endfor %}",
    "namespace": "{% set ns = namespace(c=[]) %}{% for m in messages %}{% set ns.c = m.content %}"
    + LOOP.replace("%s", "ns.c")
    + "{% endfor %}",
    "vlm2vec": VLM2VEC,
}
# how Mistral's templates find tool calls
TOOL_CALLS = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{% set calls = m.tool_calls %}{% else %}"
    "{% set calls = m.content %}{% endif %}{% for call in calls %}{{ call.function }}{% endfor %}{{ m.content }}"
    "{% endfor %}"
)
OPENAI["parts_and_tool_calls"] = (
    TOOL_CALLS + "{% for m in messages %}" + LOOP.replace("%s", "m.content") + "{% endfor %}"
)
STRING = {
    "tool_calls_in_content": TOOL_CALLS,
    "tool_calls_or_content": "{% for m in messages %}{% for call in m['tool_calls'] or m['content'] %}{{ call.id }}"
    "{% endfor %}{% endfor %}",
    "chatml": CHATML,
    "basic": BASIC,
    "no_messages": "{{ bos_token }}",
    "other_loop": "{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{{ m.content }}"
    "{% endfor %}",
    "tools": "{% for t in tools %}{% for c in t.content %}{{ c }}{% endfor %}{% endfor %}",
    "split": "{% for m in messages %}{% for w in m.content.split(' ') %}{{ w }}{% endfor %}{% endfor %}",
    "not_jinja": "{% for %}",
    "cut_off": "{% if messages %}",
}


@pytest.mark.parametrize("name", OPENAI)
def test_templates_that_loop_over_contents(name: str) -> None:
    assert content_format(OPENAI[name]) == "openai"


@pytest.mark.parametrize("name", STRING)
def test_templates_that_print_contents(name: str) -> None:
    assert content_format(STRING[name]) == "string"
