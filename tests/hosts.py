"""Every integration behind one interface, for the rules that all of them keep.

Documents carry their positions, so that equal texts can be told apart in the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

OPTIONS: dict[str, Any] = {"backend": "onnx-int8"}

Found = list[tuple[int, float | None]]
"""Results in order: a document's position, and its score."""


@dataclass(frozen=True)
class Host:
    """How one integration is used.

    Attributes:
        make: its component, keeping the best `top_n` within `budget_ms`, if it takes these.
        documents: texts -> its library's documents.
        run: the component, a query and documents -> results.
        stored: the component after its library's own storage or copy; None: it has none.
        scored: whether its results have scores.
    """

    make: Callable[[int | None, float | None], Any]
    documents: Callable[[list[str]], Any]
    run: Callable[[Any, str, Any], Found]
    stored: Callable[[Any], Any] | None = None
    scored: bool = True


def cross_encoder() -> Host:
    from qrank.integrations.cross_encoder import CrossEncoder

    def run(made: Any, query: str, documents: list[str]) -> Found:
        found = made.encoder.rank(query, documents, top_k=made.top_k)
        return [(each["corpus_id"], each["score"]) for each in found]

    return Host(
        lambda top_n, _: SimpleNamespace(encoder=CrossEncoder("mini", **OPTIONS), top_k=top_n),
        list,
        run,
    )


def _langchain_documents(texts: list[str]) -> Any:
    from langchain_core.documents import Document

    return [
        Document(page_content=text, metadata={"place": i}, id=str(i))
        for i, text in enumerate(texts)
    ]


def langchain() -> Host:
    from qrank.integrations.langchain import QrankRerank

    def run(made: QrankRerank, query: str, documents: Any) -> Found:
        found = made.compress_documents(documents, query)
        assert [each.id for each in found] == [str(each.metadata["place"]) for each in found]
        return [(each.metadata["place"], each.metadata["relevance_score"]) for each in found]

    return Host(
        lambda top_n, budget_ms: QrankRerank(top_n=top_n, budget_ms=budget_ms, options=OPTIONS),
        _langchain_documents,
        run,
        lambda made: QrankRerank.model_validate_json(made.model_dump_json()),
    )


def langchain_cross_encoder() -> Host:
    """Inside LangChain's own `CrossEncoderReranker`, which drops the scores."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker

    from qrank.integrations.langchain import QrankCrossEncoder

    def run(made: CrossEncoderReranker, query: str, documents: Any) -> Found:
        found = made.compress_documents(documents, query)
        return [(each.metadata["place"], None) for each in found]

    return Host(
        lambda *_: CrossEncoderReranker(model=QrankCrossEncoder("mini", **OPTIONS), top_n=99),
        _langchain_documents,
        run,
        scored=False,
    )


def llama_index() -> Host:
    from llama_index.core.schema import NodeWithScore, TextNode

    from qrank.integrations.llama_index import QrankRerank

    def documents(texts: list[str]) -> Any:
        return [
            NodeWithScore(node=TextNode(text=text, metadata={"place": i}), score=0.5)
            for i, text in enumerate(texts)
        ]

    def run(made: QrankRerank, query: str, nodes: Any) -> Found:
        found = made.postprocess_nodes(nodes, query_str=query)
        return [(each.node.metadata["place"], each.score) for each in found]

    return Host(
        lambda top_n, budget_ms: QrankRerank(
            top_n=top_n, budget_ms=budget_ms, keep_retrieval_score=True, options=OPTIONS
        ),
        documents,
        run,
        lambda made: QrankRerank.from_json(made.to_json()),
    )


def haystack() -> Host:
    from haystack import Document

    from haystack_integrations.components.rankers.qrank import QrankRanker

    def run(made: QrankRanker, query: str, documents: Any) -> Found:
        found = made.run(query, documents)["documents"]
        return [(each.meta["place"], each.score) for each in found]

    return Host(
        lambda top_n, budget_ms: QrankRanker(top_k=top_n, budget_ms=budget_ms, options=OPTIONS),
        lambda texts: [Document(content=t, meta={"place": i}) for i, t in enumerate(texts)],
        run,
        lambda made: QrankRanker.from_dict(made.to_dict()),
    )


def lancedb() -> Host:
    import pyarrow as pa

    from qrank.integrations.lancedb import QrankReranker

    def documents(texts: list[str]) -> Any:
        columns = {"place": pa.array(range(len(texts)), pa.int64()), "text": pa.array(texts, "str")}
        return pa.table(columns)

    def run(made: QrankReranker, query: str, rows: Any) -> Found:
        found = made.rerank_vector(query, rows).to_pylist()
        return [(row["place"], row["_relevance_score"]) for row in found]

    return Host(
        lambda _, budget_ms: QrankReranker(budget_ms=budget_ms, **OPTIONS),
        documents,
        run,
    )


def mteb() -> Host:
    from qrank.integrations.mteb import QrankCrossEncoder

    def run(made: QrankCrossEncoder, query: str, documents: list[str]) -> Found:
        logits = made.predict(
            [{"text": [query] * len(documents)}],
            [{"text": documents}],
            task_metadata=None,
            hf_split="test",
            hf_subset="default",
        )
        return [(int(i), None) for i in np.argsort(-logits, kind="stable")]

    return Host(
        lambda *_: QrankCrossEncoder("mini", **OPTIONS),
        list,
        run,
        scored=False,
    )


HOSTS: dict[str, tuple[str | None, Callable[[], Host]]] = {
    "cross_encoder": (None, cross_encoder),
    "langchain": ("langchain_core", langchain),
    "langchain_cross_encoder": ("langchain_classic", langchain_cross_encoder),
    "llama_index": ("llama_index.core", llama_index),
    "haystack": ("haystack", haystack),
    "lancedb": ("lancedb", lancedb),
    "mteb": ("mteb", mteb),
}
"""Name -> the package it needs, and the function that describes it."""
