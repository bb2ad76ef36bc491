"""Selection of templates, their variables, and what the sandbox forbids."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mmjax.chat import ChatTemplateResolutionError, StoredTemplates, load_template
from mmjax.chat.sandbox import MAX_OUTPUT, render
from mmjax.chat.template import apply
from mmjax.chat.templates import BASIC, CHATML, fallback
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

NONE = StoredTemplates({}, {}, {})
HI = [{"role": "user", "content": "hi"}]
OPTIONS: dict[str, Any] = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "tools": None,
    "documents": None,
    "kwargs": {},
}


def written(template: str, messages: Any = HI, stored: StoredTemplates = NONE, **options: Any) -> str:
    return apply(template, messages, stored, **{**OPTIONS, **options})


def test_sources_of_templates() -> None:
    both = StoredTemplates({"default": "P{}", "extra": "E{}"}, {"default": "T{}", "tool_use": "U{}"}, {}, "F{}")
    assert both.resolve(None, tools=False) == "P{}"  # the processor's has priority ...
    assert both.resolve(None, tools=True) == "U{}"  # ... but does not print tools
    assert both.resolve("extra", tools=False) == "E{}" and both.resolve("tool_use", tools=False) == "U{}"
    assert both.resolve("{{ 1 }}", tools=True) == "{{ 1 }}"
    assert StoredTemplates({}, {"default": "T{}"}, {}, "F{}").resolve(None, tools=True) == "T{}"
    assert StoredTemplates({}, {}, {}, "F{}").resolve(None, tools=False) == "F{}"
    with pytest.raises(ChatTemplateResolutionError, match="must provide a chat template"):
        NONE.resolve(None, tools=False)
    with pytest.raises(ChatTemplateResolutionError, match="or one of rag"):
        StoredTemplates({}, {"rag": "R{}"}, {}).resolve(None, tools=False)
    with pytest.raises(RequestError, match="neither Jinja text nor the name"):
        both.resolve("/etc/passwd", tools=False)  # text from a request is never a path


@pytest.mark.parametrize(
    "extra", [["<|im_start|>"], {"image_token": "<image>"}, None], ids=["of transformers 5", "by name", "null"]
)
def test_extra_special_tokens(extra: Any, tmp_path: Path, tiny_dir: Any) -> None:
    """A list since transformers 5, which names tokens in model_specific_special_tokens instead."""
    tokenizer = Tokenizer(tiny_dir("llava"))
    tokenizer.config |= {"extra_special_tokens": extra, "model_specific_special_tokens": {"audio_token": "<audio>"}}
    found = StoredTemplates.read(tmp_path, tokenizer, None).special_tokens
    assert found["bos_token"] == "<s>" and found["audio_token"] == "<audio>"
    assert found.get("image_token") == ("<image>" if isinstance(extra, dict) else None)


def test_reading_a_directory(tmp_path: Path, tiny_dir: Any) -> None:
    tokenizer = Tokenizer(tiny_dir("llava"))
    stored = StoredTemplates.read(tmp_path, tokenizer, "llava")
    assert stored.special_tokens["bos_token"] == "<s>" and stored.special_tokens["pad_token"] == "<pad>"
    assert stored.resolve(None, tools=False) == tokenizer.config["chat_template"] and stored.fallback is None
    tokenizer.config["chat_template"] = [
        {"name": "default", "template": "D{}"},
        {"name": "tool_use", "template": "U{}"},
    ]
    named = StoredTemplates.read(tmp_path, tokenizer, None)
    assert named.resolve(None, tools=False) == "D{}" and named.resolve(None, tools=True) == "U{}"
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": "P{}", "image_processor": {}}))
    assert StoredTemplates.read(tmp_path, tokenizer, "llava").resolve(None, tools=False) == "P{}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J{}"}))
    assert StoredTemplates.read(tmp_path, tokenizer, "llava").resolve(None, tools=False) == "J{}"
    (tmp_path / "chat_template.jinja").write_text("X{}")
    assert StoredTemplates.read(tmp_path, tokenizer, "llava").resolve(None, tools=False) == "X{}"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R{}")
    assert StoredTemplates.read(tmp_path, tokenizer, None).resolve("rag", tools=False) == "R{}"


def test_fallbacks() -> None:
    assert fallback("minicpmv", "x") == CHATML and fallback("fuyu", "x") == BASIC and fallback("llama", "x") is None
    assert fallback("qwen", "Qwen/Qwen-VL-Chat") == CHATML and fallback("qwen", "Qwen/Qwen-VL") == BASIC
    assert fallback(None, "") is None
    assert written(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" and written(BASIC) == "hi"


def test_templates_of_the_operator(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ 'file' }}")
    stored = StoredTemplates({}, {"rag": "R{}"}, {})
    assert load_template(str(file), stored) == load_template(file, stored) == "{{ 'file' }}"
    assert load_template("{{ 'inline' }}", stored) == "{{ 'inline' }}" and load_template("rag", stored) == "rag"
    assert load_template(None, stored) is None
    # the page's command names a file of vLLM's repository; mmjax ships the template
    assert "join" in str(load_template("vlm2vec_phi3v.jinja", stored))
    for wrong in ("missing.jinja", str(tmp_path), "a\0b"):
        with pytest.raises(RequestError, match="looks like a file path, but it failed to be opened"):
            load_template(wrong, stored)
    with pytest.raises(TypeError):
        load_template(3, stored)  # type: ignore[arg-type]


def test_vlm2vec() -> None:
    template = str(load_template("vlm2vec_phi3v.jinja", NONE))
    parts = [{"type": "image"}, {"type": "text", "text": "Represent the given image."}]
    assert written(template, [{"role": "user", "content": parts}]) == "<|image_1|> Represent the given image."
    assert written(template, [{"role": "user", "content": [parts[0], *parts]}]).startswith("<|image_1|> <|image_2|> R")
    with pytest.raises(RequestError, match="exactly one message"):
        written(template, [{"role": "user", "content": parts}] * 2)


def test_variables(caplog: pytest.LogCaptureFixture) -> None:
    stored = StoredTemplates({}, {}, {"bos_token": "<s>"})
    assert written("{{ bos_token }}{{ messages[0].content }}", stored=stored) == "<s>hi"
    assert written("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert written("{{ tools[0].name }}", tools=[{"name": "f"}]) == "f"
    assert written("{{ documents[0].text }}", documents=[{"text": "d"}]) == "d"
    assert written("{{ documents[0].text }}", kwargs={"documents": [{"text": "d"}]}) == "d"
    assert written("{{ enable_thinking }}", kwargs={"enable_thinking": False}) == "False"
    with caplog.at_level(logging.WARNING):
        assert written("x", kwargs={"enable_thinking": False}) == "x"
    assert "reads no 'enable_thinking'" in caplog.text
    assert written("{{ add_generation_prompt }}", kwargs={"add_generation_prompt": False}) == "True"
    for name in ("chat_template", "tokenize", "messages"):
        with pytest.raises(RequestError, match=f"cannot hold '{name}'"):
            written("x", kwargs={name: "y"})


def test_continuing() -> None:
    chatml = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ 'A:' if add_generation_prompt }}"
    messages = [*HI, {"role": "assistant", "content": "I am "}]
    goon: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert written(chatml, messages, **goon) == "<user>hi</><assistant>I am "
    trimming = chatml.replace("m.content", "m.content | trim")
    assert written(trimming, messages, **goon) == "<user>hi</><assistant>I am"
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}!{% endfor %}"
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    assert written(parts, [{"role": "assistant", "content": content}], **goon) == "ab"
    assert content[1] == {"type": "text", "text": "b"}
    for wrong in ([{"role": "assistant", "content": [{"type": "image"}]}], [{"role": "assistant", "content": None}]):
        with pytest.raises(RequestError, match="text to continue"):
            written(chatml, wrong, **goon)
    with pytest.raises(RequestError, match="does not print the last message"):
        written("{{ messages[0].content }}", messages, **goon)


SAME = {
    "trim_blocks": ("{% if true %}\na\n{% endif %}\nb", "a\nb"),
    "lstrip_blocks": ("  {% if true %}a{% endif %}", "a"),
    "loop_controls": ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
    "tojson": ("{{ {'b': '<ü>', 'a': 1} | tojson }}", '{"b": "<ü>", "a": 1}'),
    "tojson_indent": ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
    "generation": ("{% generation %}a{% set x = 1 %}{% endgeneration %}{{ x }}", "a"),
    "namespace": ("{% set n = namespace(a=1) %}{% for i in [1, 2] %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}", "4"),
    "dict": ("{{ dict(a=1)['a'] }}", "1"),
    "strftime_now": ("{{ strftime_now('%Y') | length }}", "4"),
    "string_methods": ("{{ 'a,b'.split(',')[-1].upper() }}", "B"),
}


@pytest.mark.parametrize("name", SAME)
def test_environment_is_that_of_published_templates(name: str) -> None:
    template, expected = SAME[name]
    assert render(template, {}) == expected


HOSTILE = {
    "raise_exception": ("{{ raise_exception('no system role') }}", "no system role"),
    "syntax": ("{% for %}", "not valid Jinja on line 1"),
    "break": ("{% break %}", "not valid Jinja: 'break' outside loop"),
    "blocks": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "not valid Jinja: too many statically nested blocks"),
    "digits": ("{{ " + "1" * 5000 + " }}", "not valid Jinja: Exceeds the limit"),
    "depth": ("{{ " + "+".join("1" * 3000) + " }}", "not valid Jinja: maximum recursion depth exceeded"),
    "undefined_call": ("{{ nothing() }}", "nothing"),
    "internals": ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|SecurityError"),
    "mutation": ("{% set _ = messages.append(1) %}", "SecurityError"),
    "import": ("{% include '/etc/passwd' %}", "cannot be applied"),
    "namespace_dunder": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "SecurityError|not valid|Attribute"),
    "long": ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", f"more than {MAX_OUTPUT}"),
    "product": ("{{ 'x' * 10**12 }}", "too large"),
    "power": ("{{ 10 ** (10 ** 8) }}", "too large"),
    "range": ("{{ range(10**9) | length }}", "Range too big"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_cannot_leave_the_sandbox(name: str) -> None:
    template, words = HOSTILE[name]
    with pytest.raises(RequestError, match=words):
        render(template, {"messages": [1]})
    assert render("fine", {}) == "fine"


@pytest.mark.parametrize("template", ["{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(1) }}"])
def test_internals_are_unreachable(template: str) -> None:
    assert render(template, {}) == ""


def test_templates_see_plain_data() -> None:
    class Name(str):
        def leak(self) -> str:
            return "leaked"

    with pytest.raises(RequestError, match="leak"):
        render("{{ name.leak() }}", {"name": Name("a")})
    with pytest.raises(RequestError, match="cannot be given a PosixPath"):
        render("{{ tools }}", {"tools": [Path("x")]})
