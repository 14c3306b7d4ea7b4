"""qrank inside other libraries: whether each gives the order of `Reranker.rank`, and what it costs.

For every integration, a retriever of its library or BM25 finds candidates for judged queries, and
the library's own pipeline reranks them; the order must be that of `Reranker.rank` on the same
candidates. Then: the time that importing the integration takes after its library's own modules, in
fresh processes; and the speed of qrank's `CrossEncoder` beside sentence-transformers' own, on the
same checkpoint. The exit code is 1 if an order differs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import alternate, arguments, report

from qrank import Reranker
from qrank.bundle.locate import locate
from qrank.quality.collection import Collection
from qrank.system.machine import processors

CHECKPOINT = Path(__file__).parent.parent / "models" / "mini"

Ranked = tuple[list[str], list[str]]
"""Ids of a query's candidates as the retriever found them, and as the pipeline ordered them."""


@dataclass(frozen=True)
class Task:
    """What every integration is asked.

    Attributes:
        documents: id -> text.
        queries: id -> text.
        found: id of a query -> ids of BM25's best documents.
        limit: candidates for a query.
        model: as for `Reranker`.
        options: other arguments of `Reranker`.
    """

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    found: Mapping[str, Sequence[str]]
    limit: int
    model: str
    options: dict[str, Any]

    def candidates(self, query: str) -> list[str]:
        """Ids that BM25 found for a query, given by its text."""
        (key,) = (key for key, text in self.queries.items() if text == query)
        return list(self.found[key])


def cross_encoder(task: Task) -> list[Ranked]:
    """`CrossEncoder.rank` on BM25's documents."""
    from qrank.integrations.cross_encoder import CrossEncoder

    encoder = CrossEncoder(task.model, **task.options)
    results = []
    for query in task.queries.values():
        ids = task.candidates(query)
        found = encoder.rank(query, [task.documents[i] for i in ids])
        results.append((ids, [ids[each["corpus_id"]] for each in found]))
    return results


def langchain(task: Task) -> list[Ranked]:
    """A `ContextualCompressionRetriever` over a retriever of BM25's documents."""
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    from qrank.integrations.langchain import QrankRerank

    class Words(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            ids = task.candidates(query)
            return [Document(page_content=task.documents[i], id=i) for i in ids]

    retriever = ContextualCompressionRetriever(
        base_compressor=QrankRerank(model=task.model, top_n=None, options=task.options),
        base_retriever=Words(),
    )
    return [
        (task.candidates(query), [str(document.id) for document in retriever.invoke(query)])
        for query in task.queries.values()
    ]


def llama_index(task: Task) -> list[Ranked]:
    """A query engine with the postprocessor, over a retriever of BM25's documents."""
    from llama_index.core import QueryBundle, Settings
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.response_synthesizers import get_response_synthesizer
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode

    from qrank.integrations.llama_index import QrankRerank

    class Words(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            ids = task.candidates(query_bundle.query_str)
            return [NodeWithScore(node=TextNode(id_=i, text=task.documents[i])) for i in ids]

    Settings.llm = MockLLM()
    reranker = QrankRerank(model=task.model, top_n=None, options=task.options)
    silent = get_response_synthesizer(response_mode="no_text")
    engine = RetrieverQueryEngine(Words(), silent, node_postprocessors=[reranker])
    return [
        (task.candidates(query), [node.node.node_id for node in engine.query(query).source_nodes])
        for query in task.queries.values()
    ]


def haystack(task: Task) -> list[Ranked]:
    """A pipeline of Haystack's own BM25 and the ranker."""
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from haystack_integrations.components.rankers.qrank import QrankRanker

    store = InMemoryDocumentStore()
    store.write_documents([Document(id=i, content=text) for i, text in task.documents.items()])
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=task.limit))
    pipeline.add_component("ranker", QrankRanker(task.model, top_k=None, options=task.options))
    pipeline.connect("retriever.documents", "ranker.documents")
    results = []
    for query in task.queries.values():
        asked = {"retriever": {"query": query}, "ranker": {"query": query}}
        found = pipeline.run(asked, include_outputs_from={"retriever"})
        parts = [[each.id for each in found[n]["documents"]] for n in ("retriever", "ranker")]
        results.append((parts[0], parts[1]))
    return results


def lancedb(task: Task) -> list[Ranked]:
    """A table with LanceDB's own full-text index."""
    import lancedb as library
    from lancedb.index import FTS
    from lancedb.query import MatchQuery

    from qrank.integrations.lancedb import QrankReranker

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"id": i, "text": text} for i, text in task.documents.items()]
        table = library.connect(folder).create_table("documents", rows)
        table.create_index("text", config=FTS())
        reranker = QrankReranker(task.model, **task.options)
        results = []
        for query in task.queries.values():

            def search(query: str = query) -> Any:
                return table.search(MatchQuery(query, "text"), query_type="fts").limit(task.limit)

            before = [row["id"] for row in search().to_list()]
            after = search().rerank(reranker).to_list()
            results.append((before, [row["id"] for row in after]))
    return results


def mteb(task: Task) -> list[Ranked]:
    """The predictions of MTEB's search class for cross-encoders, over BM25's documents."""
    from datasets import Dataset
    from mteb.mocks import MockRerankingTask
    from mteb.models.search_wrappers import SearchCrossEncoderWrapper

    from qrank.integrations.mteb import QrankCrossEncoder

    search = SearchCrossEncoderWrapper(QrankCrossEncoder(task.model, **task.options))
    place: dict[str, Any] = {
        "task_metadata": MockRerankingTask.metadata,
        "hf_split": "test",
        "hf_subset": "default",
        "encode_kwargs": {"batch_size": 32},
    }
    documents = [{"id": i, "text": text} for i, text in task.documents.items()]
    search.index(Dataset.from_list(documents), **place)
    queries = Dataset.from_list([{"id": i, "text": text} for i, text in task.queries.items()])
    top_ranked = {query: list(ids) for query, ids in task.found.items()}
    scores = search.search(queries, top_k=task.limit, top_ranked=top_ranked, **place)
    return [
        (ids, sorted(ids, key=lambda i, found=scores[query]: -found[i]))
        for query, ids in top_ranked.items()
    ]


@dataclass(frozen=True)
class Integration:
    """One integration.

    Attributes:
        library: its name in the tables.
        module: what users import.
        own: the library's modules that it imports; "" if it has none.
        run: candidates and order of every query.
    """

    library: str
    module: str
    own: str
    run: Callable[[Task], list[Ranked]]


INTEGRATIONS = [
    Integration(
        "sentence-transformers", "qrank.integrations.cross_encoder", "numpy", cross_encoder
    ),
    Integration(
        "LangChain",
        "qrank.integrations.langchain",
        # Its packages load these when their names are used.
        "langchain_core.callbacks.base, langchain_core.cross_encoders, "
        "langchain_core.documents.compressor",
        langchain,
    ),
    Integration(
        "LlamaIndex",
        "qrank.integrations.llama_index",
        "llama_index.core.postprocessor.types",
        llama_index,
    ),
    Integration("Haystack", "haystack_integrations.components.rankers.qrank", "haystack", haystack),
    Integration("LanceDB", "qrank.integrations.lancedb", "lancedb.rerankers.base", lancedb),
    Integration("MTEB", "qrank.integrations.mteb", "mteb.models.model_meta", mteb),
]

ORDERS = {
    "library": "",
    "equal": "d",
    "of": "d",
    "its own import s": ".2f",
    "qrank's s": ".2f",
}
SPEEDS = {"CrossEncoder": "", "pairs/s": ",.1f", "vs theirs": ".2f", "max Δ score": ".5f"}
THEIRS = "sentence-transformers, fp32"


def main() -> int:
    """Compare orders, time imports, and time both classes; 1 if an order differs."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("--model", default="mini", help="bundle  [default: %(default)s]")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="its original in fp32")
    parser.add_argument("--queries", type=int, default=20, help="[default: %(default)s]")
    parser.add_argument("--documents", type=int, default=20, help="[default: %(default)s]")
    parser.add_argument("--pairs", type=int, default=40, help="timed  [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[default: %(default)s]")
    parser.add_argument("--threads", type=int, default=processors())
    options = parser.parse_args()
    collection = Collection.read(options.data)
    found = collection.bm25(options.documents)
    queries = list(collection.qrels)[: options.queries]
    task = Task(
        {i: collection.documents[i] for i in collection.documents},
        {query: collection.queries[query] for query in queries},
        {query: list(found[query]) for query in queries},
        options.documents,
        options.model,
        {"threads": options.threads},
    )
    with Reranker(task.model, **task.options) as reranker:

        @cache
        def ranked(query: str, ids: tuple[str, ...]) -> list[str]:
            found = reranker.rank(query, [task.documents[i] for i in ids])
            return [ids[each.index] for each in found]

        rows = [
            _row(each, task, ranked, options.rounds) for each in INTEGRATIONS if _installed(each)
        ]
    title = f"Orders on {options.data.name}: {options.documents} candidates for each query"
    report(title, ORDERS, rows, as_json=options.json)
    if (options.checkpoint / "model.safetensors").exists():
        _speeds(options, task)
    else:
        sys.stderr.write(f"no checkpoint in {options.checkpoint}: speeds are left out\n")
    return 0 if all(row["equal"] == row["of"] for row in rows) else 1


def _installed(each: Integration) -> bool:
    there = find_spec(each.own.partition(".")[0]) is not None
    if not there:
        sys.stderr.write(f"left out, not installed: {each.library}\n")
    return there


def _row(
    each: Integration,
    task: Task,
    ranked: Callable[[str, tuple[str, ...]], list[str]],
    rounds: int,
) -> dict[str, Any]:
    results = each.run(task)
    equal = sum(
        order == ranked(query, tuple(candidates))
        for query, (candidates, order) in zip(task.queries.values(), results, strict=True)
    )
    seconds = np.array([_imports(each) for _ in range(rounds)])
    own, added = np.median(seconds, axis=0).tolist()
    return {
        "library": each.library,
        "equal": equal,
        "of": len(results),
        "its own import s": own,
        "qrank's s": added,
    }


def _imports(each: Integration) -> list[float]:
    """Seconds to import the library's modules, and after them the integration."""
    code = (
        "from time import perf_counter as now\n"
        f"start = now(); import {each.own}; middle = now(); import {each.module}; end = now()\n"
        "print(middle - start, end - middle)"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    return [float(number) for number in printed.split("\n")[-2].split()]


def _speeds(options: Any, task: Task) -> None:
    """Their class and ours, on one query's candidates."""
    import torch
    from sentence_transformers import CrossEncoder as Theirs

    from qrank.integrations.cross_encoder import CrossEncoder

    torch.set_num_threads(options.threads)
    pairs = [
        (query, task.documents[i])
        for query in task.queries.values()
        for i in task.candidates(query)
    ][: options.pairs]
    folder = str(options.checkpoint)
    encoders: dict[str, Any] = {
        THEIRS: Theirs(
            folder,
            device="cpu",
            local_files_only=True,
            max_length=512,
            model_kwargs={"dtype": torch.float32},
        ),
        "qrank torch-fp32": CrossEncoder(folder, backend="torch-fp32", **task.options),
    }
    for variant in locate(options.model).manifest.variants:
        encoders[f"qrank {variant}"] = CrossEncoder(options.model, backend=variant, **task.options)
    scores = {
        name: np.asarray(encoder.predict(pairs, show_progress_bar=False))
        for name, encoder in encoders.items()
    }
    cases = {
        name: partial(encoder.predict, pairs, show_progress_bar=False)
        for name, encoder in encoders.items()
    }
    seconds = {name: median(each) for name, each in alternate(cases, options.rounds).items()}
    rows = [
        {
            "CrossEncoder": name,
            "pairs/s": len(pairs) / seconds[name],
            "vs theirs": seconds[THEIRS] / seconds[name],
            "max Δ score": float(np.abs(scores[name] - scores[THEIRS]).max()),
        }
        for name in encoders
    ]
    title = f"CrossEncoder.predict: {len(pairs)} pairs of {options.data.name}"
    report(title, SPEEDS, rows, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
