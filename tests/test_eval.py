"""`qrank eval`: from files to figures, compared with ir_measures and scipy."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from click.testing import CliRunner, Result
from judged import Data, opened

from qrank import Reranker
from qrank.bundle.manifest import Manifest
from qrank.cli import main
from qrank.quality.bm25 import Run
from qrank.quality.evaluation import Evaluation, evaluate
from qrank.quality.metrics import MEASURES
from qrank.quality.score_cache import Setting
from qrank.select.losses import Loss, losses, remember


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the default collection."""
    return Data().write(tmp_path)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def evaluated(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def by_hand(folder: Path, bundle: Path, backend: str, candidates: Run) -> dict[str, dict[str, int]]:
    """Rerank candidates with `Reranker.rank`; each document's score is minus its rank."""
    with opened(folder) as collection, Reranker(bundle, backend=backend) as reranker:
        return {
            query: {
                list(found)[item.index]: -rank
                for rank, item in enumerate(
                    reranker.rank(
                        collection.queries[query], [collection.documents[d] for d in found]
                    )
                )
            }
            for query, found in candidates.items()
        }


def test_figures_are_those_of_ir_measures_and_scipy(data: Path, bundle: Path) -> None:
    backends = ("onnx-int8", "onnx-fp32")
    content = evaluated(bundle, "--data", data, *(x for b in backends for x in ("--backend", b)))
    with opened(data) as collection:
        candidates = collection.bm25()
        qrels = collection.qrels
    assert list(candidates) == ["q0", "q1", "q2", "q3"]
    names = ("nDCG@10", "RR@10", "AP", "R@10")
    values: dict[str, dict[str, list[float]]] = {}
    best: dict[str, list[set[str]]] = {}
    for backend in backends:
        ranked = by_hand(data, bundle, backend, candidates)
        best[backend] = [set(list(found)[:10]) for found in ranked.values()]
        values[backend] = {name: [0.0] * 4 for name in names}
        parsed = [ir_measures.parse_measure(name) for name in names]
        for found in ir_measures.iter_calc(parsed, qrels, ranked):
            values[backend][str(found.measure)][int(found.query_id[1])] = found.value
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["BM25", "onnx-fp32", "onnx-int8"]
    for backend in backends:
        expected = [np.mean(values[backend][name]) for name in names]
        assert list(rows[backend]["measures"].values()) == pytest.approx(expected)
    assert content["reference"] == "onnx-fp32"
    assert rows["onnx-fp32"]["difference"] is None
    ours, theirs = (values[b]["nDCG@10"] for b in backends)
    assert rows["onnx-int8"]["difference"]["mean"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    shares = [len(a & b) / len(a) for a, b in zip(*best.values(), strict=True)]
    assert rows["onnx-int8"]["overlap"] == pytest.approx(np.mean(shares))


def test_beirs_layout_is_the_same_data(bundle: Path, tmp_path: Path) -> None:
    """A title is read in front of its text."""
    for name in ("plain", "beir"):
        (tmp_path / name).mkdir()
    Data().write(tmp_path / "plain")
    Data().write_beir(tmp_path / "beir")
    found = []
    for name in ("plain", "beir"):
        content = evaluated(bundle, "--data", tmp_path / name, "--backend", "fakes:length")
        assert content.pop("data") == name
        found.append(content)
    assert found[0] == found[1]


def test_files_one_by_one_or_in_place_of_a_folders(data: Path, bundle: Path) -> None:
    named = ("--queries", data / "queries.jsonl", "--documents", data / "documents.jsonl")
    whole = evaluated(bundle, "--data", data, "--backend", "fakes:length")
    qrels = ("--qrels", data / "qrels.trec")
    assert evaluated(bundle, *named, *qrels, "--backend", "fakes:length") == whole
    (data / "other.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n", "utf-8")
    other = evaluated(
        bundle, "--data", data, "--qrels", data / "other.tsv", "--backend", "fakes:length"
    )
    assert other["queries"] == 1


def test_equal_logits_keep_the_first_stages_order(data: Path, bundle: Path) -> None:
    content = evaluated(bundle, "--data", data, "--backend", "fakes:ties")
    rows = {row["name"]: row["measures"] for row in content["rows"]}
    assert rows["fakes:ties"] == rows["BM25"]


def test_a_run_is_the_first_stage_by_its_scores(data: Path, bundle: Path) -> None:
    lines = ["q0 Q0 d1 1 1.5 x", "unjudged Q0 d1 1 1 x", "q0 Q0 d0 2 9e0 x", "q1 Q0 d3 1 0 x"]
    (data / "run.trec").write_text("\n".join(lines), "utf-8")
    options = ("--data", data, "--run", data / "run.trec", "--backend", "fakes:ties")
    result = run(bundle, *options, "--json")
    assert "none of 2 judged queries" in result.stderr
    content = json.loads(result.stdout)
    assert (content["queries"], content["depth"]) == (2, 2)
    assert content["rows"][0]["name"] == "first stage"
    assert content["rows"][0]["measures"]["MRR@10"] == 0.5
    shallow = evaluated(bundle, *options, "--depth", "1", "--max-queries", "1")
    assert (shallow["queries"], shallow["depth"]) == (1, 1)
    assert shallow["rows"][0]["measures"]["MRR@10"] == 1


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("qrels.trec", "q0 0 d0 2", "line 6: document 'd0' is judged 2 for query 'q0', and 1"),
        ("qrels.trec", "q0 0 d0 one", "line 6: expected query, 0, document, relevance"),
        ("qrels.trec", "q0 1", "line 6: expected query, 0, document, relevance"),
        ("queries.jsonl", '{"id": "q9"}', 'line 6: expected the text of a query in one of "text"'),
        ("documents.jsonl", "no json", 'line 13: expected a document as {"id"'),
        ("run.trec", "q0 Q0 d1 1 high x", "line 2: the score 'high' is no finite number"),
        ("run.trec", "q0 Q0 d1 1 nan x", "line 2: the score 'nan' is no finite number"),
        ("run.trec", "q0 Q0 d99 1 1 x", "line 2: the documents file lacks 'd99'"),
        ("run.trec", "q0 Q0 d0 1 1 x", "line 2: document 'd0' stands there twice"),
        ("run.trec", "q0 d0", "line 2: expected 6 columns"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(
    data: Path, bundle: Path, name: str, line: str, message: str
) -> None:
    (data / "run.trec").write_text("q0 Q0 d0 1 1 x\n", "utf-8")
    with (data / name).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    result = run(bundle, "--data", data, "--run", data / "run.trec", "--backend", "fakes:length")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{name}, {message}" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.trec", "", "names no query that is judged"),
        ("run.trec", "unjudged Q0 d1 1 1 x\n", "names no query that is judged"),
        ("qrels.trec", "", "holds no judgement"),
        ("qrels.trec", None, "no qrels: "),
        ("documents.jsonl", None, "corpus.jsonl, queries.jsonl, qrels/test.tsv or documents.jsonl"),
    ],
)
def test_nothing_to_evaluate(
    data: Path, bundle: Path, name: str, content: str | None, message: str
) -> None:
    (data / "run.trec").write_text("q0 Q0 d0 1 1 x\n", "utf-8")
    if content is None:
        (data / name).unlink()
    else:
        (data / name).write_text(content, "utf-8")
    result = run(bundle, "--data", data, "--run", data / "run.trec", "--backend", "fakes:length")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_missing_file_is_named_by_its_option(data: Path, bundle: Path) -> None:
    result = run(bundle, "--queries", data / "queries.jsonl")
    assert result.exit_code == 2
    assert "no documents: give --documents FILE, or all by --data FOLDER" in result.stderr


def test_queries_without_candidates_count_as_nothing_found(bundle: Path, tmp_path: Path) -> None:
    data = Data(queries={"q0": "mars", "q1": "!"}, qrels=["q0 0 d0 1", "q1 0 d0 1"])
    content = evaluated(bundle, "--data", data.write(tmp_path), "--backend", "fakes:length")
    assert content["queries"] == 2
    assert all(row["measures"]["MAP"] <= 0.5 for row in content["rows"])


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after a number of queries."""


def all_of(bundle: Path, folder: Path, stop_after: int | None = None) -> Evaluation:
    calls = 0

    def progress(target: str, done: int, total: int) -> None:
        nonlocal calls
        calls += done > 0
        if calls == stop_after:
            raise Interrupted

    backends = ("onnx-int8", "onnx-fp32")
    with opened(folder) as collection:
        found = collection.bm25()
        setting = Setting()
        return evaluate(bundle, collection, found, setting, backends=backends, progress=progress)


def figures(evaluation: Evaluation) -> list[Any]:
    return [(r.name, r.measures, r.difference, r.kendall, r.overlap) for r in evaluation.rows]


def test_interrupted_and_resumed_is_the_same(data: Path, bundle: Path, own_cache: Path) -> None:
    with pytest.raises(Interrupted):
        all_of(bundle, data, stop_after=6)
    resumed = all_of(bundle, data)
    assert [row.before for row in resumed.rows] == [0, 4, 2]
    # As if the process had died while writing.
    for file in (own_cache / "logits").iterdir():
        file.write_text(file.read_text("utf-8")[:-5], "utf-8")
    torn = all_of(bundle, data)
    assert [row.before for row in torn.rows] == [0, 3, 3]
    again = all_of(bundle, data)
    assert [row.before for row in again.rows] == [0, 4, 4]
    for file in (own_cache / "logits").iterdir():
        file.unlink()
    fresh = all_of(bundle, data)
    assert [row.before for row in fresh.rows] == [0, 0, 0]
    assert figures(resumed) == figures(torn) == figures(again) == figures(fresh)


def test_what_changes_a_logit_is_scored_again(data: Path, bundle: Path, own_cache: Path) -> None:
    def before(*more: str) -> list[int]:
        content = evaluated(bundle, "--data", data, "--backend", "onnx-fp32", *more)
        return [row["before"] for row in content["rows"][1:]]

    assert before() == [0]
    assert before("--threads", "1") == [4]
    assert before("--max-length", "12") == [0]
    with (data / "qrels.trec").open("a", encoding="utf-8") as file:
        file.write("q0 0 d7 1\n")
    assert before() == [4]
    text = (data / "queries.jsonl").read_text("utf-8").replace("mars sugar", "mars honey")
    (data / "queries.jsonl").write_text(text, "utf-8")
    assert before() == [3]


def test_ctrl_c_says_how_to_go_on(
    data: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reranker, "score", interrupt)
    result = run(bundle, "--data", data, "--backend", "fakes:length")
    assert result.exit_code == 130
    assert "\nqrank: interrupted: what was scored is kept, and the same command" in result.stderr


def test_scores_that_cannot_be_kept_are_told_once(
    data: Path, bundle: Path, own_cache: Path
) -> None:
    """A file in place of the folder simulates a full disk."""
    own_cache.mkdir()
    (own_cache / "logits").write_text("", "utf-8")
    result = run(bundle, "--data", data, "--backend", "onnx-fp32")
    assert result.exit_code == 0, result.stderr
    assert "nDCG@10" in result.stdout
    assert result.stderr.count("is not kept, and a stopped run begins anew: ") == 1
    assert "QRANK_CACHE names another folder" in result.stderr


def test_a_plot_that_cannot_be_written_costs_no_figure(
    data: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    result = run(bundle, "--data", data, "--backend", "fakes:length", "--plot", data / "p.png")
    assert result.exit_code == 1
    assert "fakes:length" in result.stdout
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"qrank: error: {data / 'p.png'}: No space left on device; ")
    assert line.endswith(" are free there; --plot names another place")
    assert not list(data.glob("*p.png*"))


@pytest.fixture
def without_fp32(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with only onnx-int8 and onnx-fp16."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = Manifest.load(copy)
    kept = {name: manifest.variants[name] for name in ("onnx-int8", "onnx-fp16")}
    replace(manifest, variants=kept).save(copy)
    return copy


def test_without_a_reference_the_closest_is_one(
    data: Path, without_fp32: Path, own_cache: Path
) -> None:
    content = evaluated(without_fp32, "--data", data)
    assert content["reference"] == "onnx-fp16"
    assert "no fp32 at hand" in content["why"]
    # The loss compared with fp32 is then unknown.
    assert losses(Manifest.load(without_fp32)) == {}


def test_a_checkpoint_is_the_reference(
    data: Path, bundle: Path, checkpoint_of: Callable[[str], Path], own_cache: Path
) -> None:
    options = ("--data", data, "--backend", "onnx-fp32", "--reference")
    content = evaluated(bundle, *options, checkpoint_of("bert"))
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["BM25", "torch-fp32", "onnx-fp32"]
    assert content["reference"] == "torch-fp32"
    assert rows["onnx-fp32"]["measures"] == rows["torch-fp32"]["measures"]
    assert rows["onnx-fp32"]["difference"] == {"mean": 0, "margin": 0, "p": 1}
    assert rows["onnx-fp32"]["kendall"] == pytest.approx(1)
    assert rows["onnx-fp32"]["overlap"] == 1
    assert losses(Manifest.load(bundle)) == {"onnx-fp32": Loss(0.0, 0.0, 4, data.name)}
    other = run(bundle, *options, checkpoint_of("xlm-roberta"))
    assert "is not what" in other.stderr
    # A reference that is not the original does not change the stored losses.
    assert losses(Manifest.load(bundle)) == {"onnx-fp32": Loss(0.0, 0.0, 4, data.name)}


def test_losses_are_remembered_for_whoever_chooses(
    data: Path, bundle: Path, own_cache: Path
) -> None:
    manifest = Manifest.load(bundle)
    assert losses(manifest) == {}
    content = evaluated(bundle, "--data", data, "--backend", "onnx-int8")
    rows = {row["name"]: row for row in content["rows"]}
    found = losses(manifest)
    assert found["onnx-fp32"] == Loss(0.0, 0.0, 4, data.name)
    difference = rows["onnx-int8"]["difference"]
    assert found["onnx-int8"] == Loss(-difference["mean"], difference["margin"], 4, data.name)
    # A result from fewer queries does not replace one from more.
    evaluated(bundle, "--data", data, "--backend", "onnx-int8", "--max-queries", "2")
    assert losses(manifest) == found
    remember(manifest, {"onnx-int8": Loss(1.0, 0.5, 4, "newer")})
    assert losses(manifest)["onnx-int8"].data == "newer"


def test_a_variant_that_cannot_run_is_left_out_or_an_error(
    data: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("openvino", "llama_cpp"):
        monkeypatch.setitem(sys.modules, package, None)
    named = run(bundle, "--data", data, "--backend", "openvino")
    assert (named.exit_code, named.stdout) == (3, "")
    result = run(bundle, "--data", data, "--max-queries", "1")
    assert result.exit_code == 0, result.stderr
    assert "left out openvino-int8: openvino is not installed" in result.stderr
    assert "openvino" not in result.stdout
    none = run(bundle, "--data", data, "--max-queries", "1", "--device", "nowhere")
    assert none.exit_code == 7
    assert "no variant of" in none.stderr
    names = Manifest.load(bundle).variants
    assert all(f"\n  {name}: " in none.stderr for name in names)


@pytest.mark.parametrize(
    ("package", "extra"),
    [("bm25s", "eval"), ("ir_measures", "eval"), ("scipy.stats", "eval"), ("matplotlib", "plot")],
)
def test_without_its_packages_it_says_what_to_install_first(
    data: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    def score(*arguments: object, **options: object) -> None:
        raise AssertionError("scored before what is missing was told")

    monkeypatch.setattr(Reranker, "score", score)
    monkeypatch.setitem(sys.modules, package, None)
    options = ("--backend", "fakes:length", "--plot", data / "plot.png")
    result = run(bundle, "--data", data, *options)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.rstrip().endswith(f'pip install "qrank[{extra}]"')


def test_an_unknown_backend_lists_those_there_are(data: Path, bundle: Path) -> None:
    result = run(bundle, "--data", data, "--backend", "onnx-int3")
    assert result.exit_code == 7
    assert "onnx-int8" in result.stderr


@pytest.mark.parametrize(("backend", "share"), [("shortness", 1.0), ("length", 0.3)])
def test_agreement_of_the_first_stage(
    without_fp32: Path, tmp_path: Path, backend: str, share: float
) -> None:
    """With 57 documents that the first stage ranks shortest first."""
    documents = {f"d{i}": "a " * i for i in range(57)}
    folder = Data(documents=documents, queries={"q": "a"}, qrels=["q 0 d0 1"]).write(tmp_path)
    lines = [f"q Q0 {document} 1 {-i} x\n" for i, document in enumerate(documents)]
    (folder / "run.trec").write_text("".join(lines), "utf-8")
    options = ("--data", folder, "--run", folder / "run.trec", "--backend", f"fakes:{backend}")
    result = run(without_fp32, *options)
    assert f"\n{share:.0%} of the reranked top 10 are in" in result.stdout
    assert ("embedder" in result.stderr) == (share < 0.6)
    assert evaluated(without_fp32, *options)["agreement"] == share
    assert evaluated(without_fp32, *options, "--depth", "50")["agreement"] is None


def test_the_table_has_80_columns(data: Path, bundle: Path) -> None:
    result = run(bundle, "--data", data)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[:5] == ["run", *MEASURES]
    assert [line.split()[0] for line in lines[1:3]] == ["BM25", "onnx-fp32"]
    # Even the longest name is not cut off.
    longest = max(Manifest.load(bundle).variants, key=len)
    assert any(line.startswith(f"{longest} ") for line in lines)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(data: Path, bundle: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot.{suffix}"
    result = run(bundle, "--data", data, "--backend", "fakes:length", "--plot", path)
    assert result.exit_code == 0, result.stderr
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start)
    if suffix == "svg":
        assert path.stat().st_size > 5000
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "nowhere/plot.png"])
def test_a_plot_that_cannot_be_drawn_is_refused_first(
    data: Path, bundle: Path, tmp_path: Path, name: str
) -> None:
    result = run(bundle, "--data", data, "--backend", "fakes:length", "--plot", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "plot" in result.stderr
