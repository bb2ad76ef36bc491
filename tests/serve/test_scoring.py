"""POST /score, /rerank and /pooling, and their forms at vLLM, Jina and Cohere."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from api_server import client_over
from http_server import listening_server
from mmjax import AsyncLLM
from prompts import base64_image, image_url_part, random_image, user_messages

Json = dict[str, Any]
TEXTS = ["the lazy dog", "a cat", "the quick brown fox"]


def vectors_of(client: TestClient, *texts: str) -> np.ndarray:
    data = client.post("/v1/embeddings", json={"input": list(texts)}).json()["data"]
    return np.array([entry["embedding"] for entry in data])


def post(client: TestClient, path: str, **body: Any) -> Json:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_scores_are_cosines(vector_client: TestClient) -> None:
    expected = vectors_of(vector_client, *TEXTS) @ vectors_of(vector_client, "the dog")[0]
    whole = post(vector_client, "/score", model="tiny", text_1="the dog", text_2=TEXTS)
    assert [entry["index"] for entry in whole["data"]] == [0, 1, 2] and whole["object"] == "list"
    assert {entry["object"] for entry in whole["data"]} == {"score"} and whole["id"].startswith("score-")
    np.testing.assert_allclose([entry["score"] for entry in whole["data"]], expected, atol=1e-5)
    lengths = [vector_client.post("/tokenize", json={"prompt": text}).json()["count"] for text in (*TEXTS, "the dog")]
    assert whole["usage"]["prompt_tokens"] == whole["usage"]["total_tokens"] == sum(lengths)
    for names in (("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):
        again = post(vector_client, "/v1/score", **dict(zip(names, (["the dog"], TEXTS), strict=True)))
        assert again["data"] == whole["data"]
    pairs = post(vector_client, "/score", text_1=TEXTS, text_2=TEXTS)
    np.testing.assert_allclose([entry["score"] for entry in pairs["data"]], 1, atol=1e-5)


def test_documents_are_ordered(vector_client: TestClient) -> None:
    scores = [entry["score"] for entry in post(vector_client, "/score", text_1="the dog", text_2=TEXTS)["data"]]
    order = sorted(range(3), key=lambda i: -scores[i])
    given = {"model": "tiny", "query": "the dog", "documents": TEXTS}
    jina = post(vector_client, "/v1/rerank", **given)
    assert [entry["index"] for entry in jina["results"]] == order and jina["usage"]["total_tokens"] > 0
    assert [entry["document"] for entry in jina["results"]] == [{"text": TEXTS[i]} for i in order]
    assert [entry["relevance_score"] for entry in jina["results"]] == sorted(scores, reverse=True)
    two = post(vector_client, "/rerank", **given, top_n=2, return_documents=False)["results"]
    assert two == [{"index": i, "relevance_score": scores[i]} for i in order[:2]]
    cohere = post(vector_client, "/v2/rerank", **given, top_n=2)
    assert cohere["results"] == two and cohere["meta"]["api_version"] == {"version": "2"}
    named = post(vector_client, "/v2/rerank", **{**given, "documents": [{"text": text} for text in TEXTS]}, top_n=0)
    assert [entry["index"] for entry in named["results"]] == order
    cut = post(vector_client, "/v2/rerank", **{**given, "documents": ["the dog barks"]}, max_tokens_per_doc=2)
    assert (
        cut["usage"]["total_tokens"]
        < post(vector_client, "/score", text_1="the dog", text_2="the dog barks")["usage"]["total_tokens"]
    )


def test_images(vector_client: TestClient) -> None:
    one, other = image_url_part(random_image(1)), image_url_part(random_image(2))
    vectors = [
        vector_client.post("/v1/embeddings", json={"messages": user_messages(part)}).json()["data"][0]["embedding"]
        for part in (one, other)
    ]
    expected = [1.0, float(np.dot(*vectors))]
    raw = {"image": base64_image(random_image(2))}
    for documents in ([{"content": [one]}, {"content": [other]}], {"content": [one, other]}, [{"content": [one]}, raw]):
        found = post(vector_client, "/score", queries={"content": [one]}, documents=documents)["data"]
        np.testing.assert_allclose([entry["score"] for entry in found], expected, atol=1e-5)
    [best] = post(vector_client, "/rerank", query=raw, documents=[{"content": [one]}, raw], top_n=1)["results"]
    assert best["index"] == 1 and best["document"]["multi_modal"][0]["type"] == "image_url"


def test_pooling(vector_client: TestClient, pooling: AsyncLLM) -> None:
    whole = post(vector_client, "/pooling", model="tiny", input=TEXTS[:2])
    entry = whole["data"][1]
    tokens = vector_client.post("/tokenize", json={"prompt": TEXTS[1]}).json()["count"]
    rows = np.array(entry["data"])
    assert entry["object"] == "pooling" and entry["index"] == 1 and rows.shape[0] == tokens
    assert whole["id"].startswith("pool-") and whole["usage"]["prompt_tokens"] > tokens
    coded = post(vector_client, "/pooling", input=TEXTS[1], encoding_format="base64")["data"][0]["data"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4").reshape(rows.shape), rows, atol=1e-5)
    [last] = vectors_of(vector_client, TEXTS[1])
    vector = post(vector_client, "/pooling", input=TEXTS[1], task="embed")["data"][0]["data"]
    np.testing.assert_allclose(vector, last, atol=1e-5)
    plain = post(vector_client, "/pooling", input=TEXTS[1], task="embed", use_activation=False)["data"][0]["data"]
    np.testing.assert_allclose(np.array(plain) / np.linalg.norm(plain), last, atol=1e-5)
    seen = post(vector_client, "/pooling", messages=user_messages(image_url_part(random_image(1)), "a"))
    assert len(seen["data"][0]["data"]) == seen["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "words", "body"),
    [
        ("/score", "give two fields", {}),
        ("/score", "give two fields", {"text_1": "a", "documents": "b"}),
        ("/score", "give two fields", {"text_1": "a", "text_2": "b", "data_1": "c"}),
        ("/score", "score compares 1 prompt with N", {"text_1": ["a", "b"], "text_2": ["a"]}),
        ("/score", "score compares 1 prompt with N", {"text_1": "a", "text_2": []}),
        ("/score", "at most 2048", {"text_1": "a", "text_2": ["a"] * 2048}),
        ("/score", "cannot be empty", {"text_1": "a", "text_2": [""]}),
        ("/score", "a document is a text, or an object", {"text_1": "a", "text_2": [{"title": "b"}]}),
        ("/score", "maximum context length", {"text_1": "a", "text_2": "long " * 3000}),
        ("/rerank", "query: Field required", {"documents": ["a"]}),
        ("/v1/rerank", "documents: Field required", {"query": "a"}),
        ("/v2/rerank", "got 1 and 0", {"query": "a", "documents": []}),
        ("/v2/rerank", "top_n", {"query": "a", "documents": ["a"], "top_n": -1}),
        ("/pooling", "task", {"input": "a", "task": "plugin"}),
        ("/pooling", "give either `input` or `messages`", {}),
        ("/classify", "no model here has a classification head", {"input": "a"}),
    ],
)
def test_refusals(vector_client: TestClient, path: str, words: str, body: Json) -> None:
    response = vector_client.post(path, json=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    "path", ["/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/classify"]
)
def test_models_that_generate_say_so(client: TestClient, speech_client: TestClient, path: str) -> None:
    for of in (client, speech_client):
        response = of.post(path, json={})
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(f"{path} is only supported for pooling models.")


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client, about its own types
def test_coheres_client(pooling: AsyncLLM) -> None:
    cohere = pytest.importorskip("cohere")
    with listening_server(client_over(pooling, keys=("sesame",)).app) as address:
        for of in (cohere.Client, cohere.ClientV2):
            with httpx.Client() as connection:
                client = of(base_url=address, api_key="sesame", httpx_client=connection)
                whole = client.rerank(model="tiny", query="the dog", documents=TEXTS, top_n=2)
                assert len(whole.results) == 2
                assert whole.results[0].relevance_score > whole.results[1].relevance_score
                with pytest.raises(cohere.BadRequestError):
                    client.rerank(model="tiny", query="the dog", documents=[])
