"""qrank inside other libraries: their own pipelines give the order of `Reranker.rank`."""

import asyncio
import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qrank import Reranker
from qrank.errors import InputError
from qrank.integrations.cross_encoder import CrossEncoder
from qrank.integrations.lazy import LazyReranker

QUERY = "which planet is red?"
TEXTS = [
    "bread is baked in a hot oven",
    "venus is the hottest planet",
    "mars is called the red planet",
    "the red sea lies between africa and asia",
    "a planet is red if its dust holds iron, as that of mars does",
    "saturn has rings of ice",
]
OPTIONS: dict[str, Any] = {"backend": "onnx-int8"}


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    with Reranker("mini", backend="onnx-int8") as opened:
        yield opened


@pytest.fixture(scope="module")
def order(reranker: Reranker) -> list[str]:
    """The texts as `Reranker.rank` orders them."""
    return [each.text for each in reranker.rank(QUERY, TEXTS)]


# Opened at first use


def test_a_lazy_reranker_opens_once_closes_and_travels() -> None:
    lazy = LazyReranker("mini", OPTIONS)
    opened = lazy()
    assert lazy() is opened
    lazy.close()
    again = lazy()
    assert again is not opened
    for other in (pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy)):
        np.testing.assert_array_equal(
            other().score([(QUERY, TEXTS[0])]), again.score([(QUERY, TEXTS[0])])
        )


@pytest.mark.parametrize(
    ("module", "host"),
    [
        ("lazy", None),
        ("cross_encoder", None),
        ("langchain", "langchain_core"),
        ("llama_index", "llama_index"),
        ("haystack", "haystack"),
        ("lancedb", "lancedb"),
        ("mteb", "mteb"),
        ("ray", "ray"),
        ("ray_files", "ray"),
    ],
)
def test_an_integration_imports_its_host_alone(module: str, host: str | None) -> None:
    if host is not None:
        pytest.importorskip(host)
    hosts = ("langchain_core", "llama_index", "haystack", "lancedb", "mteb", "ray")
    code = (
        f"import qrank.integrations.{module}, sys, json;"
        f"print(json.dumps([h for h in {(*hosts, 'torch', 'transformers')} if h in sys.modules]))"
    )
    found = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    # LlamaIndex imports transformers itself if it is there.
    assert set(found) - {"torch", "transformers"} == ({host} if host else set())
    if host is None:
        assert found == []


# sentence-transformers' shape


@pytest.fixture(scope="module")
def encoder() -> CrossEncoder:
    return CrossEncoder("mini", backend="onnx-int8")


@pytest.mark.parametrize(
    "given",
    [
        [(QUERY, text) for text in TEXTS],
        [[QUERY, text] for text in TEXTS],
        tuple((QUERY, text) for text in TEXTS),
        np.array([[QUERY, text] for text in TEXTS]),
    ],
)
def test_predict_takes_pairs_in_every_form(
    encoder: CrossEncoder, reranker: Reranker, given: Any
) -> None:
    found = encoder.predict(given, batch_size=2, show_progress_bar=False)
    expected = reranker.score([(QUERY, text) for text in TEXTS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_single_pair_gives_a_number(encoder: CrossEncoder) -> None:
    (first,) = encoder.predict([(QUERY, TEXTS[2])])
    for pair in ((QUERY, TEXTS[2]), [QUERY, TEXTS[2]], np.array([QUERY, TEXTS[2]])):
        found = encoder.predict(pair)
        assert np.ndim(found) == 0
        assert found == pytest.approx(first, abs=1e-6)
    assert encoder.predict([]).shape == (0,)


def test_activations_and_tensors_are_sentence_transformers(
    encoder: CrossEncoder, reranker: Reranker
) -> None:
    torch = pytest.importorskip("torch")
    pairs = [(QUERY, text) for text in TEXTS]
    logits = reranker.score(pairs, raw=True)
    raw = encoder.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(raw, logits, atol=1e-6)
    tensor = encoder.predict(pairs, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor.numpy(), torch.from_numpy(logits).sigmoid(), atol=1e-6)
    assert [type(x) for x in encoder.predict(pairs, convert_to_numpy=False)] == [torch.Tensor] * 6
    own = CrossEncoder("mini", activation_fn=torch.nn.Identity(), **OPTIONS)
    np.testing.assert_allclose(own.predict(pairs), logits, atol=1e-6)


def test_rank_gives_their_dictionaries(encoder: CrossEncoder, order: list[str]) -> None:
    found = encoder.rank(QUERY, TEXTS, return_documents=True)
    assert [each["text"] for each in found] == order
    assert [TEXTS[each["corpus_id"]] for each in found] == order
    assert {type(each["score"]) for each in found} == {float}
    assert encoder.rank(QUERY, TEXTS, top_k=2) == [
        {key: each[key] for key in ("corpus_id", "score")} for each in found[:2]
    ]
    assert encoder.rank(QUERY, []) == []


def test_rank_tells_documents_apart_whose_scores_are_one(
    encoder: CrossEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.array([20, 30, 25], np.float32)
    monkeypatch.setattr(encoder.reranker.engine, "logits", lambda inputs: logits)
    assert encoder.predict([(QUERY, text) for text in TEXTS[:3]]).tolist() == [1.0] * 3
    assert [each["corpus_id"] for each in encoder.rank(QUERY, TEXTS[:3])] == [1, 2, 0]


def test_a_cross_encoder_travels_and_says_what_it_does_not_take(encoder: CrossEncoder) -> None:
    again = pickle.loads(pickle.dumps(CrossEncoder("mini", **OPTIONS)))
    assert again.predict((QUERY, TEXTS[0])) == encoder.predict((QUERY, TEXTS[0]))
    with pytest.raises(InputError, match="prompt_name is 'query'; give the text itself"):
        encoder.predict([(QUERY, TEXTS[0])], prompt_name="query")
    with pytest.raises(InputError, match="take no instruction"):
        encoder.predict([(QUERY, TEXTS[0])], prompt="find planets")


def test_their_reranking_evaluator_runs_it(encoder: CrossEncoder) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    samples = [{"query": QUERY, "positive": [TEXTS[2], TEXTS[4]], "documents": TEXTS}]
    evaluator = CrossEncoderRerankingEvaluator(samples, at_k=3, show_progress_bar=False)
    found = evaluator(encoder)
    assert found["ndcg@3"] == pytest.approx(1.0)
    assert encoder.model_card_data.metrics


@pytest.mark.parametrize("many", [False, True])
def test_hard_negatives_are_mined_with_it(
    encoder: CrossEncoder, tmp_path: Path, many: bool
) -> None:
    pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from sentence_transformers.util import mine_hard_negatives

    trunk = modules.Transformer(str(tiny.bert(tmp_path / "trunk")))
    pooling = modules.Pooling(trunk.get_embedding_dimension())
    model = SentenceTransformer(modules=[trunk, pooling], device="cpu")
    data = datasets.Dataset.from_dict(
        {"query": [QUERY, "what is bread?"], "answer": [TEXTS[2], TEXTS[0]]}
    )
    found = mine_hard_negatives(
        data,
        model,
        corpus=TEXTS,
        cross_encoder=encoder,
        num_negatives=1,
        range_max=5,
        max_score=0.9,
        verbose=False,
        use_multi_process=["cpu"] if many else False,
    )
    assert set(found.column_names) == {"query", "answer", "negative"}
    assert all(row["negative"] in TEXTS for row in found)


# LangChain


def test_langchain_compresses_what_a_retriever_found(order: list[str]) -> None:
    pytest.importorskip("langchain_classic")
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    from qrank.integrations.langchain import QrankRerank

    given = [
        Document(page_content=text, metadata={"place": i}, id=str(i))
        for i, text in enumerate(TEXTS)
    ]

    class Everything(BaseRetriever):
        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun
        ) -> list[Document]:
            return given

    compressor = QrankRerank(top_n=4, options=OPTIONS)
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=Everything()
    )
    found = retriever.invoke(QUERY)
    assert [document.page_content for document in found] == order[:4]
    assert [document.id for document in found] == [str(TEXTS.index(text)) for text in order[:4]]
    again = asyncio.run(retriever.ainvoke(QUERY))
    assert [document.page_content for document in again] == order[:4]


def test_langchains_own_reranker_takes_the_cross_encoder(order: list[str]) -> None:
    pytest.importorskip("langchain_classic")
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_core.documents import Document

    from qrank.integrations.langchain import QrankCrossEncoder

    model = QrankCrossEncoder("mini", **OPTIONS)
    assert {type(score) for score in model.score([(QUERY, TEXTS[0])])} == {float}
    found = CrossEncoderReranker(model=model, top_n=3).compress_documents(
        [Document(page_content=text) for text in TEXTS], QUERY
    )
    assert [document.page_content for document in found] == order[:3]


# LlamaIndex


def test_llama_index_postprocesses_what_a_retriever_found(order: list[str]) -> None:
    pytest.importorskip("llama_index.core")
    from llama_index.core import QueryBundle, Settings
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler
    from llama_index.core.llms import MockLLM
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.response_synthesizers import get_response_synthesizer
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode

    from qrank.integrations.llama_index import QrankRerank

    given = [
        NodeWithScore(node=TextNode(text=text, metadata={"file": "a"}), score=0.5) for text in TEXTS
    ]

    class Everything(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return given

    Settings.llm = MockLLM()
    events: list[str] = []

    class Handler(BaseEventHandler):
        @classmethod
        def class_name(cls) -> str:
            return "Handler"

        def handle(self, event: Any, **_: Any) -> None:
            events.append(event.class_name())

    get_dispatcher().add_event_handler(Handler())
    postprocessor = QrankRerank(top_n=4, keep_retrieval_score=True, options=OPTIONS)
    assert isinstance(postprocessor, BaseNodePostprocessor)
    synthesizer = get_response_synthesizer(response_mode="no_text")
    engine = RetrieverQueryEngine(Everything(), synthesizer, node_postprocessors=[postprocessor])
    nodes = engine.query(QUERY).source_nodes
    assert [node.text for node in nodes] == order[:4]
    assert [node.score for node in nodes] == sorted((node.score for node in nodes), reverse=True)
    assert [node.node.metadata["retrieval_score"] for node in nodes] == [0.5] * 4
    assert [node.score for node in given] == [0.5] * 6
    assert all("retrieval_score" not in node.node.metadata for node in given)
    assert {"ReRankStartEvent", "ReRankEndEvent"} <= set(events)
    with pytest.raises(InputError, match="no query to rerank by"):
        postprocessor.postprocess_nodes(given)


# Haystack


def test_haystack_runs_it_behind_bm25(order: list[str]) -> None:
    pytest.importorskip("haystack")
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from haystack_integrations.components.rankers.qrank import QrankRanker

    store = InMemoryDocumentStore()
    given = [Document(content=text, meta={"title": "A"}) for text in TEXTS]
    store.write_documents(given)
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=6))
    pipeline.add_component("ranker", QrankRanker(top_k=4, options=OPTIONS))
    pipeline.connect("retriever.documents", "ranker.documents")
    asked = {"retriever": {"query": QUERY}, "ranker": {"query": QUERY}}
    found = pipeline.run(asked)["ranker"]["documents"]
    assert [document.content for document in found] == order[:4]
    scores = [document.score for document in found]
    assert scores == sorted(scores, reverse=True)

    ranker = QrankRanker(top_k=4, options=OPTIONS)
    ranker.warm_up()
    ranker.warm_up()
    alone = ranker.run(QUERY, [*given, given[0]])["documents"]
    assert [document.content for document in alone] == order[:4]
    assert all(document.score is None for document in given)
    logits = ranker.run(QUERY, given, scale_score=False, top_k=6)["documents"]
    assert ranker.run(QUERY, given, score_threshold=scores[1])["documents"] == alone[:2]
    assert max(document.score for document in logits) != pytest.approx(scores[0])
    assert asyncio.run(ranker.run_async(QUERY, given))["documents"] == alone
    with pytest.raises(InputError, match="has no text to read"):
        ranker.run(QUERY, [Document(content=None)])
    titled = QrankRanker(meta_fields_to_embed=["title"], options=OPTIONS)
    assert titled.run(QUERY, given[:1])["documents"][0].score != alone[0].score
    ranker.close()
    assert ranker.run(QUERY, given)["documents"] == alone

    stored = QrankRanker(top_k=4, options=OPTIONS)
    again = QrankRanker.from_dict(json.loads(json.dumps(stored.to_dict())))
    assert again.to_dict() == stored.to_dict()
    loaded = Pipeline.loads(pipeline.dumps())
    again_found = loaded.run(asked)["ranker"]["documents"]
    assert [document.content for document in again_found] == order[:4]


# LanceDB


def test_lancedb_reranks_every_kind_of_search(tmp_path: Path, order: list[str]) -> None:
    lancedb = pytest.importorskip("lancedb")
    from lancedb.index import FTS
    from lancedb.query import MatchQuery

    from qrank.integrations.lancedb import QrankReranker

    table = lancedb.connect(tmp_path).create_table(
        "texts",
        [{"text": text, "vector": [float(i), 1.0]} for i, text in enumerate(TEXTS)],
    )
    table.create_index("text", config=FTS())
    reranker = QrankReranker(**OPTIONS)
    near = table.search([0.0, 1.0]).rerank(reranker, query_string=QUERY).limit(6).to_list()
    assert [row["text"] for row in near] == order
    scores = [row["_relevance_score"] for row in near]
    assert scores == sorted(scores, reverse=True)
    assert "_distance" not in near[0]
    words = table.search(QUERY, query_type="fts").rerank(reranker).limit(6).to_list()
    assert [row["text"] for row in words] == [
        text for text in order if text in {row["text"] for row in words}
    ]
    assert len(words) > 1
    matched = table.search(MatchQuery(QUERY, "text"), query_type="fts").rerank(reranker)
    assert matched.limit(6).to_list() == words

    def both(given: QrankReranker) -> list[dict[str, Any]]:
        search = table.search(query_type="hybrid").vector([0.0, 1.0]).text(QUERY)
        rows: list[dict[str, Any]] = search.rerank(given).limit(6).to_list()
        return rows

    assert [row["text"] for row in both(reranker)] == order
    assert {"_distance", "_score"} <= set(both(QrankReranker(return_score="all", **OPTIONS))[0])
    with pytest.raises(InputError, match="no column 'body'; they have: text"):
        table.search([0.0, 1.0]).rerank(
            QrankReranker(column="body", **OPTIONS), query_string=QUERY
        ).to_list()


# MTEB


def planets(relevant: str, instruction: str | None = None) -> Any:
    """A reranking task of one query with one relevant document."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    query = {"id": "q", "text": QUERY} | ({"instruction": instruction} if instruction else {})
    documents = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    ids = [each["id"] for each in documents]

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Planets",
            description="planets",
            reference=None,
            type="InstructionReranking" if instruction else "Reranking",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            dataset={"path": "none", "revision": "none"},
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation="",
        )

        def load_data(self, **_: Any) -> None:
            split = {
                "queries": Dataset.from_list([query]),
                "corpus": Dataset.from_list(documents),
                "relevant_docs": {"q": {f"d{TEXTS.index(relevant)}": 1}},
                "top_ranked": {"q": ids},
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Task()


def test_mteb_evaluates_it(order: list[str], tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb")
    from mteb.models import CrossEncoderProtocol

    from qrank.integrations.mteb import QrankCrossEncoder

    model = QrankCrossEncoder("mini", **OPTIONS)
    assert isinstance(model, CrossEncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.name, meta.framework, meta.max_tokens) == ("qrank/mini", ["ONNX"], 512)
    assert meta.is_cross_encoder
    assert meta.experiment_name == "qrank_onnx-int8@cpu"
    task = planets(order[1])
    found = mteb.evaluate(
        model,
        task,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        prediction_folder=tmp_path,
    )
    (result,) = found.task_results
    assert result.get_score() == pytest.approx(1 / np.log2(3), abs=1e-5)
    (stored,) = tmp_path.rglob("*.json")
    scores = json.loads(stored.read_text("utf-8"))["default"]["test"]["q"]
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    assert [TEXTS[int(name[1:])] for name in ranked] == order


def test_mteb_passes_a_querys_instruction_on(checkpoint_of: Callable[[str], Path]) -> None:
    """To models that take one; for others, MTEB's text has it after the query."""
    mteb = pytest.importorskip("mteb")
    from qrank.integrations.mteb import QrankCrossEncoder

    asked: list[tuple[list[tuple[str, str]], str | None]] = []

    class Listening(QrankCrossEncoder):
        def predict(self, *given: Any, **named: Any) -> Any:
            score = self.reranker.score

            def heard(pairs: Any, **more: Any) -> Any:
                asked.append((pairs, more["instruction"]))
                return score(pairs, **more)

            self.reranker.score = heard  # type: ignore[method-assign]
            return super().predict(*given, **named)

    quiet: dict[str, Any] = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    folder = checkpoint_of("qwen3")
    models = [
        Listening(str(folder), backend="torch", family="qwen3-reranker", threads=1),
        Listening("mini", **OPTIONS),
    ]
    for model in models:
        mteb.evaluate(model, planets(TEXTS[2], "find planets"), **quiet)
    assert [model.mteb_model_meta.use_instructions for model in models] == [True, False]
    assert asked == [
        ([(QUERY, text) for text in TEXTS], "find planets"),
        ([(f"{QUERY} find planets", text) for text in TEXTS], None),
    ]
