"""`qrank batch`: the answers of `qrank serve` to a file of requests, and its models' options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from serving import serving

from qrank import Reranker
from qrank.cli import main
from qrank.serve.batch import AT_ONCE
from qrank.serve.slices import next_slice

LENGTH = ["--backend", "fakes:length"]
DOCUMENTS = ["a", "a a a", "a a"]
VOLATILE = ("id", "created", "x-request-id")


def line(path: str = "/v1/rerank", *, custom_id: str = "one", **body: Any) -> str:
    if not body:
        body = {"query": "q", "documents": DOCUMENTS}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": path, "body": body})


def invoke(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(main, ["batch", *map(str, arguments)], input=input)


def run(text: str, *arguments: str) -> list[dict[str, Any]]:
    """The answers to a file of requests, through standard streams."""
    done = invoke("-i", "-", "-o", "-", *arguments, input=text)
    assert done.exit_code == 0, done.stderr
    return [json.loads(each) for each in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Reranker("mini", backend="fakes:length") as reranker, serving({"mini": reranker}) as url:
        yield url


REQUESTS = [
    line("/v1/rerank", custom_id="a"),
    line("/v1/score", custom_id="b", queries="q", documents=DOCUMENTS, use_activation=False),
    line("/v2/rerank", custom_id="c", query="q", documents=DOCUMENTS, top_n=1),
    line("/rerank", custom_id="d", query="q", texts=DOCUMENTS),
    line("/v1/rerank", custom_id="e", query=3, documents=DOCUMENTS),
    line("/score", custom_id="f", text_1=["q", "q"], text_2=["a"]),
    line("/v1/chat/completions", custom_id="g", messages=["hello"]),
    line("/v1/rerank", custom_id="h", query="\ud800", documents=DOCUMENTS),
]


def test_answers_are_those_of_the_server(url: str) -> None:
    found = run("\n".join(REQUESTS) + "\n\n", *LENGTH)
    assert [answer["custom_id"] for answer in found] == list("abcdefgh")
    assert len({answer["id"] for answer in found}) == len(found)
    for request, answer in zip(map(json.loads, REQUESTS), found, strict=True):
        assert set(answer) == {"id", "custom_id", "response", "error"}
        assert set(answer["response"]) == {"status_code", "request_id", "body"}
        content = json.dumps(request["body"])
        headers = {"content-type": "application/json"}
        served = httpx.post(url + request["url"], content=content, headers=headers)
        expected = served.json()
        assert answer["response"]["status_code"] == served.status_code
        good = served.status_code == 200
        body, none = answer["response"]["body"], answer["error"]
        if not good:
            body, none = none, body
        assert none is None
        for field in VOLATILE if isinstance(expected, dict) else ():
            expected.pop(field, None), body.pop(field, None)
        assert body == expected
    assert [a["response"]["status_code"] for a in found] == [200] * 4 + [422, 400, 404, 422]


def test_lines_that_are_no_requests_get_errors_in_their_places() -> None:
    wrong = [
        ("nonsense", None, "line 1: expected a request"),
        ("[1]", None, "line 2: expected a request"),
        ('{"url": "/rerank"}', None, "line 3: custom_id is missing"),
        ('{"custom_id": "x", "url": "/rerank", "method": "GET"}', "x", 'method is no "POST"'),
        ('{"custom_id": "x", "url": "https://here/rerank"}', "x", "url is missing or no path"),
        ('{"custom_id": "x"}', "x", "url is missing or no path"),
        (line(custom_id="good"), "good", None),
    ]
    found = run("\n".join(text for text, _, _ in wrong), *LENGTH)
    assert len(found) == len(wrong)
    for (_, custom_id, text), answer in zip(wrong, found, strict=True):
        assert answer["custom_id"] == custom_id
        if text is None:
            assert answer["error"] is None
        else:
            assert text in answer["error"]["message"]
            assert answer["response"]["status_code"] == 400
            assert answer["response"]["body"] is None


def test_many_keep_their_order_and_have_no_limits(tmp_path: Path) -> None:
    count = 3 * AT_ONCE
    texts = [[f"{'a ' * (i % 7)}{i}"] * (1 + i % 5) for i in range(count)]
    texts[1] = ["a"] * 2_500  # more than --max-documents of qrank serve
    requests = tmp_path / "in.jsonl"
    requests.write_text(
        "\n".join(
            line(custom_id=str(i), query="q", documents=each) for i, each in enumerate(texts)
        ),
        "utf-8",
    )
    done = invoke("-i", requests, "-o", tmp_path / "out.jsonl", *LENGTH)
    assert done.exit_code == 0, done.stderr
    assert "failed" not in done.stderr
    lines = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(each) for each in lines]
    assert [int(each["custom_id"]) for each in found] == list(range(count))
    sizes = [len(each["response"]["body"]["results"]) for each in found]
    assert sizes == [len(each) for each in texts]


def test_failed_requests_are_counted(tmp_path: Path) -> None:
    done = invoke("-i", "-", "-o", tmp_path / "out", *LENGTH, input=f"no\n{line()}\nno")
    assert done.exit_code == 0
    assert "2 of 3 requests failed; their lines have an error" in done.stderr


@pytest.mark.parametrize("arguments", [["--backend", "fakes:queue_breaking"], ["no-such-model"]])
def test_the_output_appears_whole_or_not_at_all(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrank.serve.batcher.next_slice", next_slice)  # restores what it breaks
    (tmp_path / "out").write_text("old", "utf-8")
    many = "\n".join(line(query="q", documents=["a"] * 30) for _ in range(9))
    done = invoke("-i", "-", "-o", tmp_path / "out", *arguments, input=many)
    assert done.exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text("utf-8") == "old"


def test_an_output_that_cannot_be_written_is_an_error_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    done = invoke("-i", "-", "-o", tmp_path / "no" / "out", "no-such-model", input=line())
    assert done.exit_code == 1
    assert "No such file or directory" in done.stderr


def only(text: str, *arguments: str) -> dict[str, Any]:
    """The answer's body to one request."""
    (answer,) = run(text, *arguments)
    assert answer["error"] is None, answer
    found: dict[str, Any] = answer["response"]["body"]
    return found


def scores(text: str, *arguments: str) -> list[float]:
    return [item["score"] for item in only(text, *LENGTH, *arguments)["data"]]


def test_raw_scores_are_logits_for_every_request() -> None:
    request = line("/score", queries="q", documents=DOCUMENTS)
    raw = scores(request, "--raw")
    assert raw == [4.0 + 1, 4.0 + 3, 4.0 + 2]
    assert scores(request) != raw


def test_defaults_hold_for_requests_that_do_not_say() -> None:
    """Documents beyond the limit of 100 tokens: `plain` sees the tail, `chunk` several parts."""
    body: dict[str, Any] = {"query": "q", "documents": ["a " * 300]}
    limit = ["--max-length", "100", *LENGTH]
    tokens = only(line(**body), *limit)["usage"]["total_tokens"]
    chunked = only(line(**body), *limit, "--long-documents", "chunk")
    assert chunked["usage"]["total_tokens"] > 2 * tokens
    said = only(line(**body, long_documents="truncate"), *limit, "--long-documents", "chunk")
    assert said["usage"]["total_tokens"] == tokens
    slow = ["--backend", "fakes:plodding", "--budget-ms", "60"]
    many: dict[str, Any] = {"query": "q", "documents": ["a"] * 30}
    late = only(line(**many), *slow)["results"]
    assert any(item.get("scored") is False for item in late)
    more = only(line(**many, budget_ms=60_000), *slow)["results"]
    assert not any("scored" in item for item in more)


def test_the_first_models_names() -> None:
    body: dict[str, Any] = {"query": "q", "documents": DOCUMENTS}
    names = ["--served-model-name", "rerank-v3.5", "--served-model-name", "jina"]
    models = ["mini", "other=mini", *LENGTH, *names]
    asked = "\n".join(line(**body, model=name) for name in ("jina", "other", "gpt", "rerank-v3.5"))
    found = run(asked, *models)
    served = [answer["response"]["body"]["model"] for answer in found]
    assert served == ["rerank-v3.5", "other", "rerank-v3.5", "rerank-v3.5"]
    found = run(asked, *models, "--strict-models")
    assert [answer["response"]["status_code"] for answer in found] == [200, 200, 404, 200]
    assert "there are: rerank-v3.5, other, jina" in found[2]["error"]["detail"]


def test_the_score_cache_is_an_option() -> None:
    """Requests that run at a time cannot know each other's scores; the last one comes later."""
    body: dict[str, Any] = {"query": "q", "documents": DOCUMENTS}
    found = run("\n".join([line(**body)] * (AT_ONCE + 1)), *LENGTH, "--score-cache", "9")
    tokens = [answer["response"]["body"]["usage"]["total_tokens"] for answer in found]
    assert tokens[0] > tokens[-1] == 0


def test_options_that_do_not_go_together_say_so() -> None:
    for arguments, text in [
        (["--raw", "--scores", "calibrated"], "give --scores calibrated or --raw"),
        (["a=mini", "--served-model-name", "b"], "give a=MODEL or --served-model-name"),
        (["mini", "a=mini", "--max-memory", "1M"], "for all of them"),
        (["x", "y", "--max-memory", "1G", "--backend", "torch"], "bundles, not checkpoints"),
        (["mini", "mini", "--max-memory", "1G"], "two models are called 'mini'"),
        (["--served-model-name", "a", "--served-model-name", "a"], "the name of a model already"),
        (["mini", "b=mini", "--max-memory", "1G", "--instruction", "x"], "--instruction: "),
        (["--family", "no-such-card", "--backend", "torch", "/nowhere"], "/nowhere"),
    ]:
        done = invoke("-i", "-", "-o", "-", *arguments, input="")
        assert done.exit_code != 0, arguments
        assert text in done.stderr, done.stderr
        assert "Traceback" not in done.output
