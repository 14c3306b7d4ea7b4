"""The server's dialects, limits and keys, over HTTP, with the bundled model."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import serving

from qrank import Ranking, Reranker
from qrank.errors import InputError
from qrank.serve import server
from qrank.serve.keys import read_keys
from qrank.serve.request import Limits

QUERY = "which planet is red?"
TEXTS = ["bread is baked", "mars is the red planet", "", "venus is a planet", "red wine"]
LONG = "mars is red. " * 300 + "bread. " * 300
JSON = {"content-type": "application/json"}
RERANK = ["/rerank", "/v1/rerank", "/v2/rerank", "/api/rerank"]
EVERY = [*RERANK, "/score", "/v1/score"]


@pytest.fixture(scope="module")
def mini() -> Iterator[Reranker]:
    with Reranker("mini") as opened:
        yield opened


@pytest.fixture(scope="module")
def client(mini: Reranker) -> Iterator[httpx.Client]:
    with (
        Reranker("mini", backend="fakes:length") as length,
        serving({"mini": mini, "length": length}, strict_models=True) as url,
        httpx.Client(base_url=url, timeout=60) as opened,
    ):
        yield opened


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def body(path: str, texts: list[str], query: str = QUERY) -> dict[str, Any]:
    """The minimal request in a path's dialect."""
    if path.endswith("score"):
        return {"text_1": query, "text_2": texts}
    return {"query": query, "texts" if path == "/rerank" else "documents": texts}


@pytest.fixture(scope="module")
def expected(mini: Reranker) -> list[Ranking]:
    return mini.rank(QUERY, TEXTS)


def test_tei_answers_a_bare_array(client: httpx.Client, expected: list[Ranking]) -> None:
    found = post(client, "/rerank", query=QUERY, texts=TEXTS)
    assert [set(item) for item in found] == [{"index", "score"}] * len(TEXTS)
    assert [item["index"] for item in found] == [item.index for item in expected]
    assert [x["score"] for x in found] == pytest.approx([x.score for x in expected], abs=1e-6)


def test_tei_options(client: httpx.Client, expected: list[Ranking]) -> None:
    found = post(client, "/rerank", query=QUERY, texts=TEXTS, raw_scores=True, return_text=True)
    assert [x["score"] for x in found] == pytest.approx([x.logit for x in expected], abs=1e-4)
    assert [x["text"] for x in found] == [x.text for x in expected]


def test_tei_truncates_unless_told_not_to(client: httpx.Client, mini: Reranker) -> None:
    texts = [LONG, "bread"]
    for direction, way in [("Right", "truncate"), ("left", "tail")]:
        found = post(client, "/rerank", query=QUERY, texts=texts, truncation_direction=direction)
        wanted = {x.index: x.score for x in mini.rank(QUERY, texts, long_documents=way)}  # type: ignore[arg-type]
        assert {x["index"]: x["score"] for x in found} == pytest.approx(wanted, abs=1e-6)
    refused = client.post("/rerank", json={"query": QUERY, "texts": texts, "truncate": False})
    assert refused.status_code == 413
    assert refused.json()["error_type"] == "Validation"
    assert "text 0 does not fit" in refused.json()["error"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_v1_answers_what_jina_cohere_vllm_and_llama_cpp_do(
    client: httpx.Client, expected: list[Ranking], path: str
) -> None:
    found = post(client, path, model="mini", query=QUERY, documents=TEXTS, top_n=3)
    assert found["object"] == "list"
    assert found["model"] == "mini"
    assert isinstance(found["id"], str)
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0
    assert found["meta"]["api_version"] == {"version": "1"}
    assert found["meta"]["billed_units"] == {"search_units": 1}
    assert [x["index"] for x in found["results"]] == [x.index for x in expected[:3]]
    for item, ranking in zip(found["results"], expected, strict=False):
        assert set(item) == {"index", "relevance_score", "document"}
        assert item["relevance_score"] == pytest.approx(ranking.score, abs=1e-6)
        assert item["document"] == {"text": ranking.text}


def test_cohere_v2(client: httpx.Client, expected: list[Ranking]) -> None:
    found = post(client, "/v2/rerank", model="mini", query=QUERY, documents=TEXTS)
    assert set(found) == {"id", "results", "meta"}
    assert found["meta"]["api_version"] == {"version": "2"}
    assert [set(x) for x in found["results"]] == [{"index", "relevance_score"}] * len(TEXTS)
    assert [x["index"] for x in found["results"]] == [x.index for x in expected]


def test_ollama(client: httpx.Client, expected: list[Ranking]) -> None:
    found = post(client, "/api/rerank", model="mini", query=QUERY, documents=TEXTS)
    assert set(found) == {"model", "results", "total_duration", "prompt_eval_count"}
    assert [x["document"] for x in found["results"]] == [x.text for x in expected]
    assert [x["index"] for x in found["results"]] == [x.index for x in expected]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score_keeps_the_order(client: httpx.Client, expected: list[Ranking], path: str) -> None:
    found = post(client, path, model="mini", text_1=QUERY, text_2=TEXTS)
    scores = {item.index: item.score for item in expected}
    assert {x["index"]: x["score"] for x in found["data"]} == pytest.approx(scores, abs=1e-6)
    assert [x["index"] for x in found["data"]] == list(range(len(TEXTS)))
    assert {x["object"] for x in found["data"]} == {"score"}
    pairs = post(client, path, queries=[QUERY] * len(TEXTS), documents=TEXTS)
    assert pairs["data"] == found["data"]
    one = post(client, path, data_1=QUERY, data_2=TEXTS[1], use_activation=False)
    logits = {item.index: item.logit for item in expected}
    assert [x["score"] for x in one["data"]] == pytest.approx([logits[1]], abs=1e-4)
    refused = client.post(path, json={"text_1": [QUERY] * 2, "text_2": TEXTS})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("2 queries for 5 documents")


def test_top_n_and_return_documents(client: httpx.Client) -> None:
    for path in RERANK[1:]:
        for top_n, count in [(0, 5), (None, 5), (2, 2), (10**30, 5)]:
            asked = {"query": QUERY, "documents": TEXTS, "top_n": top_n}
            assert len(post(client, path, **asked)["results"]) == count
        for shown in (True, False):
            results = post(client, path, query=QUERY, documents=TEXTS, return_documents=shown)[
                "results"
            ]
            assert all(("document" in item) is shown for item in results)


def test_documents_may_be_objects(client: httpx.Client) -> None:
    documents = [
        {"text": "bread", "id": 7, "tags": ["a", None]},
        {"title": "mars", "text": "the red planet"},
        "venus",
    ]
    results = post(client, "/v1/rerank", query=QUERY, documents=documents)["results"]
    assert {x["index"]: x["document"] for x in results} == {
        0: documents[0],
        1: documents[1],
        2: {"text": "venus"},
    }
    fields = post(
        client, "/v1/rerank", query=QUERY, documents=documents[1:2], rank_fields=["title", "text"]
    )
    whole = post(client, "/v1/rerank", query=QUERY, documents=["mars\nthe red planet"])
    assert fields["results"][0]["relevance_score"] == whole["results"][0]["relevance_score"]
    nested: dict[str, Any] = {"text": "mars"}
    for _ in range(300):
        nested = {"text": "mars", "more": nested}
    content = json.dumps({"query": QUERY, "documents": [nested]})
    assert client.post("/v1/rerank", content=content, headers=JSON).status_code == 422
    content = json.dumps({"query": QUERY, "documents": [{"text": "mars", "x": float("nan")}]})
    assert '"x":null' in client.post("/v1/rerank", content=content, headers=JSON).text
    for wrong in ({"documents": [{"title": "mars"}]}, {"documents": ["a", {"text": None}]}):
        refused = client.post("/v1/rerank", json={"query": QUERY, **wrong})
        assert refused.status_code == 422
        assert "has no text" in refused.json()["detail"]


def test_max_tokens_per_doc_counts_the_documents_tokens(client: httpx.Client) -> None:
    """`length` returns a pair's number of tokens: [CLS] query [SEP] document [SEP]."""

    def length(**more: Any) -> float:
        asked = {"model": "length", "text_1": "mars", "text_2": LONG, "use_activation": False}
        data = post(client, "/score", **asked, **more)["data"]
        return float(data[0]["score"])

    assert length() == 512
    assert length(max_tokens_per_doc=0) == 512
    assert length(max_tokens_per_doc=10) == 14
    assert length(max_tokens_per_doc=10, long_documents="chunk") == 14
    assert length(max_tokens_per_doc=10, long_documents="tail") == 14


def test_what_was_cut_says_so(client: httpx.Client, mini: Reranker) -> None:
    results = post(client, "/v1/rerank", query=QUERY, documents=[LONG, "mars"])["results"]
    assert {x["index"]: x.get("truncated") for x in results} == {0: True, 1: None}
    chunked = post(
        client, "/v1/rerank", query=QUERY, documents=["bread", LONG], long_documents="chunk"
    )["results"]
    wanted = mini.rank(QUERY, ["bread", LONG], long_documents="chunk")
    assert [x["index"] for x in chunked] == [x.index for x in wanted]
    for item, ranking in zip(chunked, wanted, strict=True):
        assert item["relevance_score"] == pytest.approx(ranking.score, abs=1e-6)


def test_models_are_chosen_by_name(client: httpx.Client) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["mini", "length"]
    long_first = post(client, "/v1/rerank", model="length", query=QUERY, documents=["mars", LONG])
    assert long_first["model"] == "length"
    assert [x["index"] for x in long_first["results"]] == [1, 0]
    assert post(client, "/v1/rerank", query=QUERY, documents=TEXTS)["model"] == "mini"


def message(path: str, content: dict[str, Any]) -> str:
    """An error's message, from the keys of the path's dialect; there must be no other keys."""
    if path.endswith("score"):
        assert set(content) == {"error"}
        assert set(content["error"]) == {"message", "type", "param", "code"}
        return str(content["error"]["message"])
    keys = {
        "/rerank": {"error", "error_type"},
        "/v1/rerank": {"detail"},
        "/v2/rerank": {"id", "message"},
        "/api/rerank": {"error"},
    }[path]
    assert set(content) == keys
    return str(next(content[key] for key in ("error", "detail", "message") if key in content))


@pytest.mark.parametrize("path", EVERY)
def test_errors_are_in_the_dialects_shape(client: httpx.Client, path: str) -> None:
    good = body(path, TEXTS)
    wrong: list[tuple[int, str, dict[str, Any]]] = [
        (404, "there are: mini, length", {"json": {**good, "model": "gpt"}}),
        (422, "no instruction", {"json": {**good, "instruction": "x"}}),
        (422, "is missing", {"json": {k: v for k, v in good.items() if v == TEXTS}}),
        (422, "budget_ms", {"json": {**good, "budget_ms": 0}}),
        (422, "unicode", {"content": json.dumps(body(path, ["\ud800"])).encode()}),
        (422, "at least 1 item", {"json": body(path, [])}),
        (422, "body", {"json": [1]}),
        (400, "no JSON", {"content": b'{"query": '}),
        (400, "no UTF-8: byte 0xff at 11", {"content": b'{"query": "\xff\xfe"}'}),
        (400, "nested too deeply", {"content": b"[" * 100_000}),
        (400, "too many digits", {"content": b"[" + b"1" * 5_000 + b"]"}),
        (422, "content-type", {"content": b"hello", "headers": {"content-type": "text/plain"}}),
    ]
    for status, text, request in wrong:
        headers = {**JSON, **request.pop("headers", {})}
        response = client.post(path, headers=headers, **request)
        assert response.status_code == status, (request, response.text)
        if path == "/rerank" and set(response.json()) == {"detail"}:
            continue  # no `texts`, so an error of the other dialect
        assert text in message(path, response.json()), response.text


def test_documents_at_rerank_get_the_other_dialects_errors(client: httpx.Client) -> None:
    for wrong in ({"documents": 3}, {"documents": ["a"], "model": "gpt"}):
        response = client.post("/rerank", json={"query": QUERY, **wrong})
        assert set(response.json()) == {"detail"}


def test_what_is_not_there(client: httpx.Client) -> None:
    assert client.get("/nothing").status_code == 404
    assert client.get("/v1/rerank").status_code == 405


def test_no_document_in_errors_or_logs(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for path in EVERY:
        for more in ({}, {"model": "gpt"}, {"budget_ms": "soon"}, {"instruction": "x"}):
            response = client.post(path, json={**body(path, ["verysecret"]), **more})
            if response.status_code != 200:
                assert "verysecret" not in response.text
    requests = [record for record in caplog.records if record.name == "qrank.serve.access"]
    assert len(requests) == 4 * len(EVERY)
    for record in caplog.records:
        assert "verysecret" not in str(record.__dict__) or record.name.startswith("http")


def test_a_request_is_logged_with_its_id_and_figures(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qrank.serve.access")
    response = client.post(
        "/v1/rerank", json=body("/v1/rerank", TEXTS), headers={"x-request-id": "abc-1"}
    )
    assert response.headers["x-request-id"] == "abc-1"
    (record,) = [r for r in caplog.records if r.name == "qrank.serve.access"]
    fields = record.__dict__["fields"]
    assert fields["id"] == "abc-1"
    assert fields["status"] == 200
    assert (fields["model"], fields["pairs"]) == ("mini", len(TEXTS))
    assert fields["tokens"] == response.json()["usage"]["total_tokens"]
    strange = client.get("/health", headers={"x-request-id": 'a" b'})
    assert strange.headers["x-request-id"] != 'a" b'


def test_state(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    info = client.get("/info").json()
    assert info["model_id"] == "mini"
    assert info["model_type"]["reranker"]["id2label"]
    assert info["max_input_length"] == 512
    assert info["models"]["mini"]["target"] == "openvino-int8@cpu"
    assert client.get("/docs").status_code == 200
    assert {*EVERY, "/info"} <= set(client.get("/openapi.json").json()["paths"])


def test_answers_do_not_wait_for_acknowledgements(
    mini: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TCP_NODELAY, waiting for the headers' ACK takes 40 ms on a kept connection."""
    found = []

    class Seen(server.Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connection = transport.get_extra_info("socket")
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(server, "Protocol", Seen)
    with serving({"mini": mini}) as url:
        assert httpx.get(f"{url}/health").status_code == 200
    assert found == [1]


def sample(client: httpx.Client, name: str) -> float:
    """A value in /metrics, by its name with labels; 0 if missing."""
    lines = client.get("/metrics").text.splitlines()
    found = [line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")]
    return float(found[0]) if found else 0.0


def test_metrics_count(client: httpx.Client) -> None:
    names = [
        'qrank_pairs_total{model="mini"}',
        'qrank_tokens_total{model="mini"}',
        'qrank_requests_total{path="/v1/rerank",status="200"}',
        'qrank_request_seconds_count{path="/v1/rerank"}',
        'qrank_batch_pairs_sum{model="mini"}',
        'qrank_queue_seconds_count{model="mini"}',
    ]
    before = [sample(client, name) for name in names]
    tokens = post(client, "/v1/rerank", query=QUERY, documents=TEXTS)["usage"]["total_tokens"]
    grown = [sample(client, name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [len(TEXTS), tokens, 1, 1, len(TEXTS), 1]
    assert sample(client, 'qrank_target_info{model="mini",target="openvino-int8@cpu"}') == 1
    assert sample(client, 'qrank_queue_tokens{model="mini"}') == 0
    client.get("/one"), client.get("/two")
    assert "/one" not in client.get("/metrics").text


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with API keys, small limits and CORS."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("first-key\n\n  second-key \n", "utf-8")
    limits = Limits(documents=3, characters=100, body=2_000)
    with (
        Reranker("mini", backend="fakes:length") as length,
        serving(
            {"length": length}, limits=limits, keys=read_keys(path), cors=["https://here.org"]
        ) as url,
    ):
        yield url


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n", "utf-8")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize("path", EVERY)
def test_keys(strict: str, path: str) -> None:
    for header in ({}, {"authorization": "Bearer third"}, {"authorization": "Bearer first-ke"}):
        response = httpx.post(strict + path, json=body(path, TEXTS[:2]), headers=header)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer KEY" in message(path, response.json())
    for key in ("first-key", "second-key"):
        header = {"authorization": f"Bearer {key}"}
        response = httpx.post(strict + path, json=body(path, TEXTS[:2]), headers=header)
        assert response.status_code == 200


def test_only_probes_are_open(strict: str) -> None:
    open_paths = {"/health", "/ready"}
    for path in (*open_paths, "/info", "/metrics", "/docs", "/openapi.json", "/v1/models", "/no"):
        expected = 200 if path in open_paths else 401
        assert httpx.get(strict + path).status_code == expected


@pytest.mark.parametrize("path", EVERY)
def test_limits_are_named(strict: str, path: str) -> None:
    header = {"authorization": "Bearer first-key"}
    for texts, name in [(["a"] * 4, "--max-documents"), (["a" * 101], "--max-characters")]:
        response = httpx.post(strict + path, json=body(path, texts), headers=header)
        assert response.status_code == 413
        assert name in message(path, response.json())
    response = httpx.post(strict + path, json=body(path, ["a" * 2_000]), headers=header)
    assert response.status_code == 413
    assert "2,000 bytes" in message(path, response.json())


def test_cors_is_off_unless_asked_for(strict: str, client: httpx.Client) -> None:
    asked = {"origin": "https://here.org", "access-control-request-method": "POST"}
    assert client.options("/v1/rerank", headers=asked).status_code == 405
    allowed = httpx.options(f"{strict}/v1/rerank", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://here.org"
    other = httpx.options(f"{strict}/v1/rerank", headers={**asked, "origin": "https://there.org"})
    assert "access-control-allow-origin" not in other.headers
