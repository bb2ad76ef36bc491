"""Embeddings of texts and conversations."""

import base64
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from mmjax import AsyncLLM
from prompts import image_url_part, random_image, user_messages


def embed(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/embeddings", json=body)


def test_texts(vector_client: TestClient, pooling: AsyncLLM) -> None:
    result = embed(vector_client, model="tiny", input=["the lazy dog", "a cat"]).json()
    assert result["object"] == "list" and [entry["index"] for entry in result["data"]] == [0, 1]
    vectors = np.array([entry["embedding"] for entry in result["data"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    tokens = vector_client.post("/tokenize", json={"prompt": "a cat"}).json()["tokens"]
    for same in ("a cat", tokens, [tokens]):
        [entry] = embed(vector_client, input=same).json()["data"]
        np.testing.assert_allclose(entry["embedding"], vectors[1], atol=1e-5)
    assert result["usage"]["prompt_tokens"] == result["usage"]["total_tokens"] > len(tokens)
    coded = embed(vector_client, input="a cat", encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), vectors[1], atol=1e-5)
    short = np.array(embed(vector_client, input="a cat", dimensions=8).json()["data"][0]["embedding"])
    np.testing.assert_allclose(short, vectors[1][:8] / np.linalg.norm(vectors[1][:8]), atol=1e-5)


def test_conversations(vector_client: TestClient) -> None:
    seen = embed(vector_client, messages=user_messages(image_url_part(random_image(1)), "What is this?")).json()
    unseen = embed(vector_client, messages=user_messages("What is this?")).json()
    assert seen["usage"]["prompt_tokens"] > unseen["usage"]["prompt_tokens"]
    assert seen["data"][0]["embedding"] != unseen["data"][0]["embedding"]


def test_refusals(vector_client: TestClient) -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"input": []},
        {"input": ""},
        {"input": "a", "messages": user_messages("a")},
        {"input": "a", "dimensions": 10**6},
        {"input": "a", "dimensions": 0},
        {"input": "a", "encoding_format": "int8"},
        {"input": "long " * 3000},
        {"input": [[10**8]]},
        {"input": ["a"] * 2049},
    ]
    for body in cases:
        response = embed(vector_client, **body)
        assert response.status_code == 400, (body, response.text)
    assert embed(vector_client, input="a", model="other").status_code == 404
    assert embed(vector_client, input="a").status_code == 200
