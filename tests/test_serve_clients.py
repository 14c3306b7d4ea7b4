"""Real clients against a running server: SDKs, and the HTTP requests of others.

If a client cannot be installed next to the others (langchain-cohere needs an older cohere), the
test sends the client's requests and checks the fields that the client reads from the answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import serving

from qrank import Ranking, Reranker

# Set before litellm is imported: it would look up prices on the net.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

# Clients leave their sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

QUERY = "which planet is red?"
TEXTS = ["bread is baked", "mars is the red planet", "venus is a planet"]
KEY = "some-key"


@pytest.fixture(scope="module")
def mini() -> Iterator[Reranker]:
    with Reranker("mini") as opened:
        yield opened


@pytest.fixture(scope="module")
def url(mini: Reranker) -> Iterator[str]:
    with serving({"mini": mini}, keys=(KEY.encode(),)) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(mini: Reranker) -> list[Ranking]:
    return mini.rank(QUERY, TEXTS)


def check(found: list[tuple[int, float]], expected: list[Ranking]) -> None:
    assert [index for index, _ in found] == [item.index for item in expected]
    assert [s for _, s in found] == pytest.approx([x.score for x in expected], abs=1e-6)


def test_cohere_v2(url: str, expected: list[Ranking]) -> None:
    import cohere

    client = cohere.ClientV2(api_key=KEY, base_url=url)
    found = client.rerank(model="mini", query=QUERY, documents=TEXTS, top_n=2)
    check([(x.index, x.relevance_score) for x in found.results], expected[:2])
    assert found.id
    assert found.meta is not None
    assert found.meta.billed_units is not None
    assert found.meta.billed_units.search_units == 1
    found = client.rerank(model="mini", query=QUERY, documents=TEXTS, max_tokens_per_doc=4096)
    check([(x.index, x.relevance_score) for x in found.results], expected)


def test_cohere_v1(url: str, expected: list[Ranking]) -> None:
    import cohere

    client = cohere.Client(api_key=KEY, base_url=url)
    documents = [{"title": text} for text in TEXTS]
    found = client.rerank(
        model="mini",
        query=QUERY,
        documents=documents,
        rank_fields=["title"],
        return_documents=True,
    )
    check([(x.index, x.relevance_score) for x in found.results], expected)
    plain = client.rerank(model="mini", query=QUERY, documents=TEXTS, return_documents=True)
    for item in plain.results:
        assert item.document is not None
        assert item.document.text == TEXTS[item.index]


def test_a_hosted_services_model_names_stand_for_the_only_model(
    url: str, expected: list[Ranking]
) -> None:
    """Clients require a model name, and people keep the one they had."""
    import cohere

    client = cohere.ClientV2(api_key=KEY, base_url=url)
    found = client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS)
    check([(x.index, x.relevance_score) for x in found.results], expected)
    asked = {"query": QUERY, "documents": TEXTS, "model": "jina-reranker-v2-base-multilingual"}
    assert post(url, "/v1/rerank", asked)["model"] == "mini"
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v2/rerank", json=asked, headers=headers)
    assert answer.headers["x-qrank-model"] == "mini"


def test_an_unknown_name_stands_for_the_first_model_unless_the_server_is_strict(
    mini: Reranker,
) -> None:
    asked = {"query": QUERY, "documents": TEXTS, "model": "gpt"}
    for strict, status in [(False, 200), (True, 404)]:
        with serving({"one": mini, "two": mini}, strict_models=strict) as url:
            answer = httpx.post(f"{url}/v1/rerank", json=asked)
            assert answer.status_code == status
            assert answer.headers.get("x-qrank-model") == (None if strict else "one")
            unnamed = httpx.post(f"{url}/v1/rerank", json={**asked, "model": None})
            assert unnamed.headers["x-qrank-model"] == "one"
    with serving({"one": mini}, strict_models=True) as url:
        assert httpx.post(f"{url}/v1/rerank", json=asked).status_code == 404


def test_coheres_errors_are_told_apart(mini: Reranker, url: str) -> None:
    import cohere

    with serving({"mini": mini, "other": mini}, strict_models=True) as two:
        client = cohere.ClientV2(api_key=KEY, base_url=two)
        with pytest.raises(cohere.NotFoundError, match="there are: mini, other"):
            client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS)
    client = cohere.ClientV2(api_key=KEY, base_url=url)
    with pytest.raises(cohere.UnprocessableEntityError):
        client.rerank(model="mini", query=QUERY, documents=[])
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="wrong", base_url=url).rerank(
            model="mini", query=QUERY, documents=TEXTS
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("provider", "base"),
    [
        ("cohere", ""),
        ("jina_ai", "/v1/rerank"),
        ("hosted_vllm", ""),
        ("huggingface", ""),
        ("infinity", "/infinity"),
        ("voyage", "/v1/rerank"),
    ],
)
def test_litellm(url: str, expected: list[Ranking], provider: str, base: str) -> None:
    litellm = pytest.importorskip("litellm")
    found = litellm.rerank(
        model=f"{provider}/mini",
        query=QUERY,
        documents=TEXTS,
        top_n=3,
        api_base=url + base,
        api_key=KEY,
    )
    results = [(x["index"], x["relevance_score"]) for x in found.results]
    check(results, expected)


@pytest.mark.filterwarnings("ignore")
def test_litellms_nvidia_nim(url: str, expected: list[Ranking]) -> None:
    litellm = pytest.importorskip("litellm")
    found = litellm.rerank(
        model="nvidia_nim/nvidia/mini", query=QUERY, documents=TEXTS, api_base=url, api_key=KEY
    )
    assert [x["index"] for x in found.results] == [item.index for item in expected]
    logits = [x["relevance_score"] for x in found.results]
    assert logits == pytest.approx([item.logit for item in expected], abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_litellms_infinity_gets_documents_as_strings(url: str, expected: list[Ranking]) -> None:
    litellm = pytest.importorskip("litellm")
    found = litellm.rerank(
        model="infinity/mini",
        query=QUERY,
        documents=TEXTS,
        return_documents=True,
        api_base=f"{url}/infinity",
        api_key=KEY,
    )
    assert [item["document"]["text"] for item in found.results] == [x.text for x in expected]
    refused = ask(url, "/infinity/rerank", query=QUERY, documents=[])
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("documents is empty")


def post(url: str, path: str, content: dict[str, Any]) -> Any:
    headers = {"Authorization": f"Bearer {KEY}", "Content-type": "application/json"}
    response = httpx.post(url + path, json=content, headers=headers, timeout=60)
    response.raise_for_status()
    return response.json()


def test_langchains_jina_rerank(url: str, expected: list[Ranking]) -> None:
    """JinaRerank.rerank of langchain-community."""
    asked = {"query": QUERY, "documents": TEXTS, "model": "mini", "top_n": 3}
    answer = post(url, "/v1/rerank", asked)
    assert "results" in answer
    check([(x["index"], x["relevance_score"]) for x in answer["results"]], expected)


def test_langchains_cohere_rerank(url: str, expected: list[Ranking]) -> None:
    """CohereRerank.rerank of langchain-cohere: null for unset fields."""
    asked = {"query": QUERY, "documents": TEXTS, "model": "mini", "top_n": 3}
    answer = post(url, "/v2/rerank", {**asked, "max_tokens_per_doc": None})
    check([(x["index"], x["relevance_score"]) for x in answer["results"]], expected)


PLAIN = {"model": "mini", "query": QUERY, "documents": TEXTS}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "open-webui": ("/v1/rerank", {**PLAIN, "top_n": 3}),
    "lightrag": ("/v1/rerank", {**PLAIN, "top_n": 3, "return_documents": False}),
    "dify-compatible": ("/v1/rerank", {**PLAIN, "top_n": 3, "return_documents": True}),
    "dify-xinference": ("/v1/rerank", {**PLAIN, "top_n": 3, "return_documents": True}),
    "dify-localai": ("/rerank", {**PLAIN, "top_n": 3}),
    "dify-ollama": ("/api/rerank", {**PLAIN, "top_n": 3}),
    "ragflow-xinference": ("/v1/rerank", {**PLAIN, "return_documents": "true"}),
    "ragflow-gpustack": ("/v1/rerank", {**PLAIN, "top_n": 3}),
    "elasticsearch-custom": ("/v1/rerank", PLAIN),
    # connector.pre_process.cohere.rerank asks for as many as there are documents.
    "opensearch": ("/v1/rerank", {**PLAIN, "top_n": 3, "return_documents": None}),
}


@pytest.mark.parametrize("client", OTHERS)
def test_clients_that_read_index_and_relevance_score(
    url: str, expected: list[Ranking], client: str
) -> None:
    path, asked = OTHERS[client]
    results = post(url, path, asked)["results"]
    check([(x["index"], x["relevance_score"]) for x in results], expected)


def test_difys_tei_plugin(url: str, expected: list[Ranking]) -> None:
    """It asks /info whether the model is a reranker, and reads texts from the answer."""
    info = httpx.get(f"{url}/info", headers={"authorization": f"Bearer {KEY}"}).json()
    assert "reranker" in info["model_type"]
    answer = post(url, "/rerank", {"query": QUERY, "texts": TEXTS, "return_text": True})
    check([(x["index"], x["score"]) for x in answer], expected)
    assert [x["text"] for x in answer] == [x.text for x in expected]


def test_haystacks_tei_ranker(url: str, expected: list[Ranking]) -> None:
    """HuggingFaceTEIRanker of haystack: it expects a list, or a dict with an error."""
    asked = {"query": QUERY, "texts": TEXTS, "raw_scores": False, "truncation_direction": "Right"}
    answer = post(url, "/rerank", asked)
    assert isinstance(answer, list)
    check([(x["index"], x["score"]) for x in answer], expected)


def test_huggingface_hubs_client(url: str, expected: list[Ranking]) -> None:
    """InferenceClient has no rerank method; people post to its model URL with its token."""
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{url}/rerank", token=KEY)
    asked = httpx.post(
        str(client.model),
        json={"query": QUERY, "texts": TEXTS, "return_text": True, "truncate": True},
        headers={"Authorization": f"Bearer {client.token}"},
    )
    check([(x["index"], x["score"]) for x in asked.json()], expected)
    assert [x["text"] for x in asked.json()] == [x.text for x in expected]


def test_llama_cpps_tei_and_jina_forms(url: str, expected: list[Ranking]) -> None:
    """tools/server/tests/unit/test_rerank.py of llama.cpp."""
    jina = post(url, "/rerank", {"query": QUERY, "documents": TEXTS})
    check([(x["index"], x["relevance_score"]) for x in jina["results"]], expected)
    assert jina["usage"]["prompt_tokens"] == jina["usage"]["total_tokens"] > 0
    tei = post(url, "/rerank", {"query": QUERY, "texts": TEXTS, "return_text": True})
    check([(x["index"], x["score"]) for x in tei], expected)


def test_vllms_score_client(url: str, expected: list[Ranking]) -> None:
    """examples/online_serving/.../cross_encoder_score.py of vLLM."""
    answer = post(url, "/score", {"model": "mini", "queries": QUERY, "documents": TEXTS})
    found = [(x["index"], x["score"]) for x in answer["data"]]
    assert [index for index, _ in found] == [0, 1, 2]
    check(sorted(found, key=lambda item: -item[1]), expected)


def ask(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, headers={"authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize(
    "path", ["/v1/ranking", "/v1/reranking", "/reranking", "/rerank", "/v1/rerank"]
)
def test_nims_clients(url: str, expected: list[Ranking], path: str) -> None:
    """RAGFlow's and LangChain's NVIDIARerank read index and logit."""
    found = ask(
        url,
        path,
        model="mini",
        query={"text": QUERY},
        passages=[{"text": text} for text in TEXTS],
        truncate="END",
    ).json()["rankings"]
    assert [each["index"] for each in found] == [item.index for item in expected]
    logits = [each["logit"] for each in found]
    assert logits == pytest.approx([item.logit for item in expected], abs=1e-5)


def test_nims_truncate_none_refuses_what_does_not_fit(url: str) -> None:
    asked: dict[str, Any] = {"query": {"text": QUERY}, "passages": [{"text": "a " * 2000}]}
    assert ask(url, "/v1/ranking", **asked).status_code == 200
    refused = ask(url, "/v1/ranking", **asked, truncate="NONE")
    assert refused.status_code == 413
    assert refused.json()["object"] == "error"
    assert refused.json()["type"] == "invalid_request_error"


def test_weaviate(url: str, expected: list[Ranking]) -> None:
    """Its Go client: it waits for /.well-known/ready, reads /meta, and takes scores by position."""
    assert httpx.get(f"{url}/.well-known/ready").status_code == 200
    meta = httpx.get(f"{url}/meta", headers={"authorization": f"Bearer {KEY}"})
    assert isinstance(meta.json(), dict)
    found = ask(url, "/rerank", query=QUERY, documents=TEXTS, property="").json()
    assert (found["query"], found["property"]) == (QUERY, "")
    assert [each["document"] for each in found["scores"]] == TEXTS
    scores = {item.index: item.score for item in expected}
    assert [each["score"] for each in found["scores"]] == pytest.approx(
        [scores[i] for i in range(len(TEXTS))], abs=1e-6
    )
    refused = ask(url, "/rerank", query=QUERY, documents=[1], property="")
    assert refused.status_code == 422
    assert "documents[0] is a number; give a string" in refused.json()["error"]


@pytest.mark.parametrize("more", [{}, {"return_documents": True}])
def test_voyage(url: str, expected: list[Ranking], more: dict[str, Any]) -> None:
    found = ask(
        url,
        "/v1/rerank",
        query=QUERY,
        documents=TEXTS,
        model="mini",
        top_k=2,
        truncation=True,
        **more,
    ).json()
    check([(x["index"], x["relevance_score"]) for x in found["data"]], expected[:2])
    assert ("document" in found["data"][0]) == bool(more)
    assert found["object"] == "list"
    assert found["usage"]["total_tokens"] > 0
    everything = ask(url, "/v1/rerank", query=QUERY, documents=TEXTS, top_k=None).json()
    assert len(everything["data"]) == len(TEXTS)


def test_librechats_rag_api(url: str, expected: list[Ranking]) -> None:
    candidates = [{"id": str(i), "text": text, "base_score": 0.5} for i, text in enumerate(TEXTS)]
    found = ask(
        url, "/v1/rerank", profile="default", query=QUERY, candidates=candidates, top_n=2
    ).json()
    check([(x["index"], x["score"]) for x in found["results"]], expected[:2])


def test_openvino_model_server(url: str, expected: list[Ranking]) -> None:
    found = ask(url, "/v3/rerank", model="mini", query=QUERY, documents=TEXTS).json()
    check([(x["index"], x["relevance_score"]) for x in found["results"]], expected)


def test_content_parts(url: str, expected: list[Ranking]) -> None:
    """Dify sends documents so if the model may be one that sees."""
    documents = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    found = ask(url, "/v1/rerank", query=QUERY, documents=documents).json()
    check([(x["index"], x["relevance_score"]) for x in found["results"]], expected)
    documents[1]["content"].append({"type": "image_url", "image_url": {"url": "data:"}})  # type: ignore[dict-item]
    refused = ask(url, "/v1/rerank", query=QUERY, documents=documents)
    assert refused.status_code == 422
    assert "documents[1].content[1] is no part with a text" in refused.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/score"])
def test_vllms_truncation_is_honoured_or_refused(url: str, path: str) -> None:
    asked: dict[str, Any] = {"documents": ["bread " * 600 + "mars is the red planet"]}
    asked |= {"queries": [QUERY]} if path == "/score" else {"query": QUERY}

    def score(**more: Any) -> float:
        found = ask(url, path, **asked, **more).json()
        (only,) = found["data"] if path == "/score" else found["results"]
        value: float = only.get("score", only.get("relevance_score"))
        return value

    assert score(truncation_side="left") > score(truncation_side="right") == score()
    assert score(truncate_prompt_tokens=-1, max_tokens_per_query=0) == score()
    for field, value in (("truncate_prompt_tokens", 8), ("max_tokens_per_query", 8)):
        refused = ask(url, path, **asked, **{field: value})
        assert refused.status_code == 422
        assert f"{field} is 8" in refused.text


def test_fields_of_no_effect_are_named(url: str) -> None:
    more = {"colour": "red", "max_chunks_per_doc": 3, "bad name\n": 1}
    found = ask(url, "/v1/rerank", query=QUERY, documents=TEXTS, **more)
    assert found.headers["x-qrank-ignored"] == "colour, max_chunks_per_doc"
    found = ask(url, "/rerank", query=QUERY, texts=TEXTS)
    assert "x-qrank-ignored" not in found.headers


def test_a_wrong_path_is_told_the_right_ones(url: str) -> None:
    found = ask(url, "/v1", query=QUERY, documents=TEXTS)
    assert found.status_code == 404
    assert "requests go to /rerank, /v1/rerank" in found.json()["detail"]
