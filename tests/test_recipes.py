"""The recipes of docs/integrations.md and scale.md: their very lines, run with each library.

Those of large libraries, or whose requirements conflict with others', run where they are installed.
"""

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qrank import Reranker

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "integrations.md").read_text("utf-8")
SCALE = (DOCS / "scale.md").read_text("utf-8")
QUERY = "which planet is red?"
TEXTS = [
    "bread is baked in a hot oven",
    "venus is the hottest planet, and not red",
    "mars is called the red planet",
    "the red sea lies between africa and asia",
    "a planet is red if its dust holds iron, as that of mars does",
    "saturn is a planet that has rings of ice",
]

pytestmark = [
    # Their own, at their import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]


def blocks(heading: str, page: str = PAGE) -> list[str]:
    """The code blocks under a heading of a page."""
    section = re.search(rf"^##+ {heading}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None, f"no recipe for {heading}"
    return re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


def run(heading: str, **given: Any) -> dict[str, Any]:
    """Run a recipe with the names that its text says are given; return all names."""
    (block,) = blocks(heading)
    names = {"__name__": "recipe", **given}
    exec(compile(block, f"docs/integrations.md, {heading}", "exec"), names)
    return names


def embed(text: str) -> list[float]:
    """A vector for a text: its words, each with a place of its own."""
    words = sorted({word for each in (QUERY, *TEXTS) for word in re.findall(r"\w+", each)})
    found = re.findall(r"\w+", text)
    return [float(found.count(word)) for word in words]


@pytest.fixture(scope="module")
def order() -> Iterator[list[str]]:
    """The texts as `Reranker.rank` orders them."""
    with Reranker("mini") as reranker:
        yield [each.text for each in reranker.rank(QUERY, TEXTS)]


@pytest.fixture(scope="module")
def wanted() -> list[dict[str, Any]]:
    """The rows of the engines' recipes with their scores."""
    with Reranker("mini") as reranker:
        scores = reranker.score([(QUERY, text) for text in TEXTS]).tolist()
    rows = zip(PAIRS.to_pylist(), scores, strict=True)
    return [{**row, "score": pytest.approx(score, abs=1e-6)} for row, score in rows]


def test_txtai(order: list[str]) -> None:
    txtai = pytest.importorskip("txtai", reason="txtai pins transformers")
    embeddings = txtai.Embeddings(content=True, method="external", transform=_many)
    embeddings.index(TEXTS)
    found = run("txtai", embeddings=embeddings)["best"]
    assert [each["text"] for each in found] == order[:3]


def _many(texts: list[str]) -> Any:
    return np.array([embed(text) for text in texts], np.float32)


def test_rerankers(order: list[str]) -> None:
    pytest.importorskip("rerankers")
    names = run("rerankers", documents=TEXTS)
    assert [each.text for each in names["best"]] == order[:3]
    assert [each.doc_id for each in names["best"]] == [TEXTS.index(text) for text in order[:3]]
    ranker = names["QrankRanker"]()
    assert ranker.score(QUERY, order[0]) == pytest.approx(names["best"][0].score, abs=1e-6)
    assert ranker.rank(QUERY, []).results == []


def test_dspy(order: list[str]) -> None:
    dspy = pytest.importorskip("dspy")
    search = dspy.retrievers.Embeddings(TEXTS, _many, k=6)
    names = run("DSPy", search=search)
    assert names["best"] == order[:3]
    assert asyncio.run(names["Reranked"](search).acall(QUERY)).passages == order[:3]


def test_agno(order: list[str]) -> None:
    pytest.importorskip("agno")
    from agno.knowledge.document import Document

    class Everything:
        """A vector database of agno, as far as a search needs one."""

        def exists(self) -> bool:
            return True

        def search(self, query: str, limit: int, filters: object = None) -> list[Document]:
            return [Document(content=text) for text in TEXTS[:limit]]

    found = run("agno", vector_db=Everything())["best"]
    assert [each.content for each in found] == order[:3]
    assert {type(each.reranking_score) for each in found} == {float}


def test_mem0(order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEM0_TELEMETRY", "False")
    monkeypatch.setenv("MEM0_DIR", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "not used")
    mem0 = pytest.importorskip("mem0", reason="mem0ai takes an older protobuf than openvino")

    class Words:
        def embed(self, text: str, memory_action: object = None) -> list[float]:
            return embed(text)

        def embed_batch(self, texts: list[str], memory_action: object = None) -> list[list[float]]:
            return [embed(text) for text in texts]

    store = {"path": str(tmp_path / "store"), "embedding_model_dims": len(embed(QUERY))}
    memory = mem0.Memory.from_config(
        {"vector_store": {"provider": "qdrant", "config": store}, "history_db_path": ":memory:"}
    )
    memory.embedding_model = Words()
    for text in TEXTS:
        memory.add(text, user_id="me", infer=False)
    assert len(memory.search(QUERY, filters={"user_id": "me"}, top_k=6)["results"]) > 3
    found = run("mem0", memory=memory)["best"]
    texts = [each["memory"] for each in found]
    assert texts == [text for text in order if text in texts]
    assert len(texts) > 3
    assert {type(each["rerank_score"]) for each in found} == {float}


def test_pyterrier(order: list[str]) -> None:
    pt = pytest.importorskip("pyterrier", reason="PyTerrier downloads Terrier, and needs Java")
    import pandas as pd

    frame = pd.DataFrame({"docno": [f"d{i}" for i in range(6)], "text": TEXTS})
    frame = frame.assign(qid="1", query=QUERY, score=0.0, rank=range(6))
    found = run("PyTerrier", first_stage=pt.Transformer.from_df(frame))["best"]
    assert found.sort_values("rank")["text"].tolist() == order


def test_chroma(order: list[str]) -> None:
    chromadb = pytest.importorskip("chromadb", reason="chromadb brings grpc, kubernetes and more")

    class Words(chromadb.EmbeddingFunction):  # type: ignore[name-defined]
        def __init__(self) -> None:
            pass

        def __call__(self, input: list[str]) -> list[Any]:
            return [np.array(embed(text), np.float32) for text in input]

    client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
    collection = client.create_collection("texts", embedding_function=Words())
    collection.add(ids=[str(i) for i in range(6)], documents=TEXTS)
    found = run("Chroma", collection=collection)["best"]
    assert [text for _, text, _ in found] == order[:3]
    assert [TEXTS[int(place)] for place, _, _ in found] == order[:3]


def test_qdrant(order: list[str]) -> None:
    qdrant_client = pytest.importorskip("qdrant_client")
    from qdrant_client import models

    client = qdrant_client.QdrantClient(":memory:")
    size = models.VectorParams(size=len(embed(QUERY)), distance=models.Distance.COSINE)
    client.create_collection("texts", vectors_config=size)
    points = [
        models.PointStruct(id=i, vector=embed(text), payload={"text": text})
        for i, text in enumerate(TEXTS)
    ]
    client.upsert("texts", points)
    found = run("Qdrant", client=client, embed=embed)["best"]
    assert [point.payload["text"] for point in found] == order[:3]
    client.close()


@pytest.mark.parametrize(("number", "printed"), [(0, ["7"]), (1, ["mars is red"] * 4)])
def test_a_program_of_ones_own(number: int, printed: list[str], tmp_path: Path) -> None:
    """With asyncio, and with processes: a script of its own, which spawned processes read again."""
    script = tmp_path / "program.py"
    script.write_text(blocks("Your own program")[number], "utf-8")
    command = [sys.executable, "-W", "error", str(script)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[:-1] == printed


def test_every_recipe_is_run() -> None:
    section = PAGE.partition("\n## Recipes\n")[2]
    tests: dict[str, Callable[..., None]] = {
        name.removeprefix("test_"): value
        for name, value in globals().items()
        if name.startswith("test_")
    }
    assert {heading.lower() for heading in re.findall(r"^### (.*)$", section, re.M)} <= set(tests)


# Engines


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs the block with a text, in a folder with pairs and the module of the page."""
    code = blocks("On other engines", SCALE)
    (tmp_path / "scorer.py").write_text(code[0], "utf-8")
    (tmp_path / "in").mkdir()
    pq.write_table(PAIRS, tmp_path / "in/a.parquet", row_group_size=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run_block(text: str, **given: Any) -> None:
        (block,) = (each for each in code if text in each)
        exec(compile(block, f"docs/scale.md, {text}", "exec"), {"__name__": "recipe", **given})

    yield run_block
    sys.modules.pop("scorer", None)


PAIRS = pa.table({"id": list("abcdef"), "query": [QUERY] * 6, "document": TEXTS})


def scored() -> list[dict[str, Any]]:
    """The rows that an engine wrote, by id."""
    return sorted(pq.read_table("scored").to_pylist(), key=lambda row: str(row["id"]))


def test_dask(engine: Callable[..., None], wanted: list[dict[str, Any]]) -> None:
    pytest.importorskip("dask.dataframe")
    engine("dask")
    assert scored() == wanted


def test_daft(engine: Callable[..., None], wanted: list[dict[str, Any]]) -> None:
    pytest.importorskip("daft", reason="daft takes older versions of pyarrow and tqdm")
    engine("daft")
    assert scored() == wanted


def test_spark_without_spark(engine: Callable[..., None], wanted: list[dict[str, Any]]) -> None:
    class Frame:
        """As much of Spark as the block uses."""

        read = property(lambda self: self)
        write = property(lambda self: self)

        def parquet(self, folder: str) -> Any:
            if folder == "in":
                return self
            batches = [pa.record_batch(each.columns, self.names) for each in self.found]
            pq.write_table(pa.Table.from_batches(batches), "scored")
            return None

        def select(self, *names: str) -> Any:
            return self

        def mapInArrow(self, function: Any, schema: str) -> Any:  # noqa: N802
            self.names = [each.split()[0] for each in schema.split(",")]
            self.found = list(function(iter(PAIRS.to_batches(max_chunksize=4))))
            return self

    engine("mapInArrow", spark=Frame())
    assert scored() == wanted
