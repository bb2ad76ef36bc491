"""Requests generated from the published schema never cause a server error, valid or not; valid requests whose media and
names exist are answered. MMJAX_SCHEMA_EXAMPLES sets how many requests each route gets."""

import base64
import collections
import os
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from api_server import client_over
from mmjax import AsyncLLM
from prompts import base64_image, base64_wav, random_chord, random_image

requests = pytest.importorskip("requests")
schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

pytestmark = pytest.mark.clients

EXAMPLES = int(os.environ.get("MMJAX_SCHEMA_EXAMPLES", "12"))  # per operation, twice
CHECKS = (checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance)
Json = dict[str, Any]
Counter = collections.Counter[tuple[str, int]]

PICTURES = [f"data:image/png;base64,{base64_image(random_image(seed))}" for seed in range(3)]
CLIPS = [
    f"data:video/jpeg;base64,{','.join(base64_image(random_image(seed + i, 28, 28), 'JPEG') for i in range(2))}"
    for seed in (3, 5)
]
SOUNDS = [base64_wav(random_chord(seed, 0.3 * (seed + 1))) for seed in range(2)]
BASE64 = {"type": "base64", "media_type": "image/png", "data": base64_image(random_image(1))}
LINKS = {
    "ImageLink": PICTURES,
    "InputImagePart": PICTURES,
    "VideoLink": CLIPS,
    "AudioLink": [f"data:audio/wav;base64,{sound}" for sound in SOUNDS],
}
BOUNDS = {
    "/v1/audio/transcriptions": "max_completion_tokens",
    "/v1/audio/translations": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}
CONTENT_FIELDS = {"Message": "content", "MessageItem": "content", "CallOutputItem": "output", "UserMessage": "content"}
PARTS = {"TextPart", "ImagePart", "InputImagePart", "VideoPart", "TextBlock", "ImageBlock"}  # those of a Qwen2-VL
IMAGE_PROMPTS = [{"prompt": "What is <image>?", "multi_modal_data": {"image": picture}} for picture in PICTURES]
TEXT: Json = {"type": "string", "maxLength": 30}
IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 5, "maximum": 90}, "maxItems": 6}
# Values that a tiny engine accepts, for fields whose limits depend on the operator or the model.
FITTING: Json = {
    "model": {"enum": ["tiny", "alias"]},
    "n": {"enum": [1, 1, 2]},
    "max_tokens": {"enum": [1, 2]},
    "max_completion_tokens": {"enum": [1, 2]},
    "max_output_tokens": {"enum": [1, 2]},
    "min_tokens": {"enum": [0, 1]},
    "logprobs": {"enum": [0, 3]},
    "prompt_logprobs": {"enum": [0, 3]},
    "stop_token_ids": IDS,
    "allowed_token_ids": {**IDS, "minItems": 1},
    "tokens": IDS,
    "prompt_token_ids": {**IDS, "minItems": 1},
    "prompt": {**TEXT, "minLength": 1},
    "logit_bias": {"type": "object", "properties": {"7": {"type": "number"}}, "additionalProperties": False},
    "structured_outputs": {"enum": [{"choice": ["yes", "no"]}, {"regex": "[ab]{2}"}, {"json": {"type": "integer"}}]},
    "source": {"enum": [{"type": "url", "url": PICTURES[0]}, BASE64]},
    "stop_sequences": {"enum": [["a"], []]},
    "role": {"enum": ["system", "user", "assistant"]},
    "name": TEXT,
    "language": {"enum": ["en", "de"]},
    "to_language": {"enum": ["en"]},
    "chat_template": {"type": "null"},
    "previous_response_id": {"type": "null"},
    "mm_processor_kwargs": {"enum": [{}, {"min_pixels": 784}]},
    "dimensions": {"enum": [1, 8]},
    "arguments": {"enum": ["{}", '{"a": 1}']},
    "prompts": {
        "anyOf": [{**TEXT, "minLength": 1}, {**IDS, "minItems": 1}, {"enum": IMAGE_PROMPTS}, {"enum": [IMAGE_PROMPTS]}]
    },
}
DOCUMENT: Json = {"enum": ["a cat", {"text": "a dog"}, {"image": PICTURES[0]}]}
DOCUMENTS: Json = {"type": "array", "items": DOCUMENT, "minItems": 1, "maxItems": 2}
VECTORS = {
    "input": {**TEXT, "minLength": 1},
    "query": DOCUMENT,
    **dict.fromkeys(("text_1", "data_1", "queries"), DOCUMENT),
    **dict.fromkeys(("text_2", "data_2", "documents", "items"), DOCUMENTS),
    "truncation_side": {"enum": ["left", "right"]},
}
SPEECH = {
    "messages": {"not": {}},  # Whisper has no template
    "prompts": {"enum": [{"prompt": "", "multi_modal_data": {"audio": link}} for link in LINKS["AudioLink"]]},
}


def fitting(node: Any, values: Json, name_of_type: str = "") -> Any:
    """The schema with real media, and values that a tiny engine accepts."""
    if isinstance(node, list):
        return [fitting(entry, values) for entry in node]
    if not isinstance(node, dict):
        return node
    out = {key: fitting(value, values, key) for key, value in node.items()}
    if isinstance(node.get("properties"), dict):
        for name in out["properties"].keys() & values.keys():
            if out["properties"][name].get("type") != "null" and "const" not in out["properties"][name]:
                out["properties"][name] = values[name]
        talks, items = (out["properties"].get(name, {}) for name in ("messages", "input"))
        for talk in (talks, talks.get("items", {}), *items.get("anyOf", ())):
            if talk.get("type") == "array":
                talk["maxItems"] = 3
    if node.get("in") == "path":
        out["schema"] = {"enum": ["tiny"]}
    if name_of_type in LINKS:
        [name] = out["properties"].keys() & {"url", "image_url"}
        out["properties"][name] = {"enum": LINKS[name_of_type]}
    if name_of_type in CONTENT_FIELDS:
        _, parts, *_ = out["properties"][CONTENT_FIELDS[name_of_type]]["anyOf"]  # a text, parts, or null
        refs = parts["items"]["anyOf"]
        parts["items"]["anyOf"] = [ref for ref in refs if ref["$ref"].rpartition("/")[2] in PARTS]
        out["properties"][CONTENT_FIELDS[name_of_type]] = {
            "anyOf": [{**TEXT, "minLength": 1}, {**parts, "minItems": 1, "maxItems": 3}]
        }
    return out


def required(schema: Json) -> set[str]:
    """The required fields of a body, including alternatives."""
    return {*schema.get("required", ()), *(name for option in schema.get("oneOf", ()) for name in option["required"])}


def operations(published: Json) -> "dict[str, schemathesis.APIOperation]":
    """By method and path."""
    found = (each.ok() for each in schemathesis.openapi.from_dict(published).get_all_operations())
    return {operation.label: operation for operation in found}


def few(published: Json, operation: "schemathesis.APIOperation") -> "st.SearchStrategy[schemathesis.Case]":
    """Requests with few optional fields: most combinations of many fields are contradictory."""
    content = published["paths"][operation.path][operation.method].get("requestBody", {"content": {}})["content"]
    bodies = [
        published["components"]["schemas"][each["schema"]["$ref"].rpartition("/")[2]] for each in content.values()
    ]
    must = {name for body in bodies for name in required(body)}
    optional = sorted({name for body in bodies for name in body["properties"]} - must)

    def choose(case: "schemathesis.Case", kept: set[str]) -> "schemathesis.Case":
        if isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name in must | kept}
            if "file" in case.body:
                case.body["file"] = base64.b64decode(SOUNDS[len(kept) % 2])
        return case

    kept = st.sets(st.sampled_from(optional), max_size=4) if optional else st.just(set())
    return st.builds(choose, operation.as_strategy(), kept)


def answers(client: TestClient, count: int, **cases: "st.SearchStrategy[schemathesis.Case]") -> Counter:
    """How many requests of each sort got each status. None may be a server error, or missing in the schema."""
    answered: Counter = collections.Counter()

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of([st.tuples(st.just(sort), strategy) for sort, strategy in cases.items()]))
    def ask(drawn: "tuple[str, schemathesis.Case]") -> None:
        sort, case = drawn
        if isinstance(case.body, dict) and case.path != "/v1/embeddings":
            case.body[BOUNDS.get(case.path, "max_tokens")] = 2
        prepared = requests.Request(**case.as_transport_kwargs(base_url="http://testserver")).prepare()
        response = client.request(
            prepared.method or "GET", prepared.url or "", content=prepared.body, headers=prepared.headers
        )
        answered[sort, response.status_code] += 1
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        case.validate_response(response, checks=CHECKS)

    ask()
    return answered


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["served", "listening", "pooling"])
def test_no_request_causes_a_server_error(kind: str, request: pytest.FixtureRequest) -> None:
    engine: AsyncLLM = request.getfixturevalue(kind)
    client, looked_up = client_over(engine), engine.llm.counters()["mm_cache_queries"]
    published = client.get("/openapi.json").json()
    near = operations(fitting(published, FITTING | {"listening": SPEECH, "pooling": VECTORS}.get(kind, {})))
    for label, operation in operations(published).items():
        against = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        answered = answers(client, EXAMPLES, valid=operation.as_strategy(), against=against)
        answered += answers(client, EXAMPLES, fitting=few(published, near[label]))
        print(f"{kind} {label}:", ", ".join(f"{sort} {status} x{n}" for (sort, status), n in sorted(answered.items())))
        if "/v1/responses/{" in label:  # no response has the names that are tried
            continue
        asked = sum(count for (sort, _), count in answered.items() if sort == "fitting")
        assert answered["fitting", 200] >= 0.5 * asked > 0, (label, answered)
    engine.check()
    assert engine.llm.counters()["mm_cache_queries"] > looked_up, "media reached the processor"
