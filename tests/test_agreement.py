"""The proof of ranking: its measures, its data, its size, its bound, and what it decides."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import contents, subset
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from test_selection import measurement

from qrank import Reranker
from qrank.backends import isolation
from qrank.bundle.agreement import LEAST, TOP, Agreement, RankingData
from qrank.bundle.manifest import MANIFEST, Manifest
from qrank.bundle.sequences import Logits, Sequences
from qrank.cli import main
from qrank.converters import fidelity, ranking
from qrank.converters.checkpoint.ranking import PASSAGES, ranking_data
from qrank.converters.convert import convert
from qrank.errors import BundleError, ConversionError, FidelityError, InputError
from qrank.select import losses
from qrank.select.losses import Loss
from qrank.select.measurements import remember as remember_speeds
from qrank.system import machine

FP32 = [("onnx", "fp32")]
Rankings = list[NDArray[np.float64]]


def qrank_(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# The measures

DISTINCT = st.lists(st.integers(-1000, 1000), min_size=11, max_size=40, unique=True).map(
    lambda numbers: np.array(numbers, np.float64) / 100
)
TIED = st.lists(st.integers(0, 3), min_size=11, max_size=40).filter(lambda x: len(set(x)) > 1)


def figures(found: Agreement) -> tuple[float, float, float]:
    return found.kendall, found.top10, found.ndcg


@given(st.lists(DISTINCT, min_size=1, max_size=4))
def test_the_same_scores_agree_wholly(reference: Rankings) -> None:
    found = Agreement.of(reference, reference, "ours")
    assert figures(found) == pytest.approx((1, 1, 1))
    assert (found.queries, found.pairs) == (len(reference), sum(map(len, reference)))
    assert found.shortfall(0.9999999) is None


@given(TIED)
def test_so_do_the_same_scores_with_ties(logits: list[int]) -> None:
    assert figures(Agreement.of([logits], [logits])) == pytest.approx((1, 1, 1))


@given(DISTINCT, st.sampled_from([np.exp, np.cbrt, lambda x: 3 * x - 7]))
def test_what_keeps_the_order_changes_nothing(
    reference: NDArray[np.float64], change: Callable[[Any], Any]
) -> None:
    assert figures(Agreement.of([change(reference)], [reference])) == pytest.approx((1, 1, 1))


@given(DISTINCT)
def test_the_opposite_order_has_the_lowest_tau(reference: NDArray[np.float64]) -> None:
    found = Agreement.of([-reference], [reference])
    assert found.kendall == pytest.approx(-1)
    assert found.ndcg < 1
    # Two sets of ten among n share 20 - n at least.
    assert found.top10 == pytest.approx(max(2 * TOP - len(reference), 0) / TOP)


@given(DISTINCT, st.randoms(use_true_random=False))
def test_the_order_of_the_passages_does_not_matter(
    reference: NDArray[np.float64], random: Any
) -> None:
    ours = reference[np.argsort(np.sin(reference * 7), kind="stable")]
    places = list(range(len(reference)))
    random.shuffle(places)
    one = Agreement.of([ours], [reference])
    other = Agreement.of([ours[places]], [reference[places]])
    assert figures(one) == pytest.approx(figures(other))
    assert one.kendall == pytest.approx(stats.kendalltau(ours, reference).statistic)


def test_ndcg_is_that_of_the_formula() -> None:
    reference = np.arange(12.0)
    ours = reference.copy()
    ours[[0, 11]] = ours[[11, 0]]  # the best becomes the worst, and the worst the best
    gains = np.arange(12.0) / 11
    discounts = 1 / np.log2(np.arange(2, 12))
    ideal, found = gains[:1:-1] @ discounts, gains[[0, *range(10, 1, -1)]] @ discounts
    agreement = Agreement.of([ours], [reference])
    assert agreement.ndcg == pytest.approx(found / ideal)
    assert agreement.top10 == pytest.approx(0.9)


def test_a_logit_that_is_none_is_no_agreement() -> None:
    reference = np.arange(12.0)
    with pytest.raises(ValueError, match="not finite"):
        Agreement.of([np.where(reference == 4, np.nan, reference)], [reference])


# The data


def test_the_data_are_of_many_languages_and_lengths() -> None:
    path = Path(ranking.__file__).parent / "checkpoint" / "ranking.jsonl"
    topics = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    texts = [text for topic in topics for text in topic["relevant"] + topic["hard"]]
    assert len(topics) >= 16
    assert len({topic["language"] for topic in topics}) >= 7
    assert len({topic["domain"] for topic in topics}) >= 8
    assert len({topic["query"] for topic in topics}) == len(topics)
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) < 40
    assert max(len(text.split()) for text in texts) > 250
    for topic in topics:
        assert 1 <= len(topic["relevant"]) <= 3
        assert len(topic["hard"]) >= 3
    first = topics[:3]
    assert len({topic["domain"] for topic in first}) == 3


def test_every_query_ranks_its_own_passages_and_easy_ones() -> None:
    queries = ranking_data().queries
    path = Path(ranking.__file__).parent / "checkpoint" / "ranking.jsonl"
    topics = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    firsts = 0
    for topic, (query, passages) in zip(topics, queries, strict=True):
        assert query == topic["query"]
        assert len(set(passages)) == len(passages) == PASSAGES
        assert {*topic["relevant"], *topic["hard"]} <= set(passages)
        firsts += passages[0] in topic["relevant"]
    assert firsts < len(topics) / 2  # ties must not favour what is relevant


# Its size


class Slow:
    """An original that takes a second for each token."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.now = 0.0

    def logits(self, work: Sequences) -> Logits:
        self.now += float(work.lengths.sum())
        return np.arange(len(work), dtype=np.float32)


def ranked(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], seconds: float, probes: float = 0.0
) -> int:
    slow = Slow(probes)
    clock = SimpleNamespace(perf_counter=lambda: slow.now)
    monkeypatch.setattr(ranking, "time", clock)
    monkeypatch.setattr(ranking, "SECONDS", seconds)
    works = [Sequences([np.zeros(length, np.int32)]) for length in lengths]
    return len(ranking._ranked(slow, works))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lengths", "seconds", "probes", "count"),
    [
        ([10] * 9, 90, 0, 9),  # all fit
        ([10] * 9, 50, 0, 5),  # the sixth would not
        ([10] * 9, 50, 75, 7),  # the probes took longer
        ([10] * 9, 5, 1, 2),  # never fewer than two
        ([10, 10, 10, 80, 10], 60, 0, 3),  # a prefix: none is left out
        ([10], 1, 0, 1),
    ],
)
def test_as_many_queries_are_ranked_as_time_allows(
    lengths: list[int],
    seconds: float,
    probes: float,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ranked(monkeypatch, lengths, seconds, probes) == count


def test_two_queries_take_no_longer_than_the_probes(bundle: Path) -> None:
    """So that even the slowest model has a proof of ranking."""
    manifest = Manifest.load(bundle)
    data = ranking_data().queries[:2]
    letters = sum(len(query) + len(text) for query, texts in data for text in texts)
    probes = manifest.probes.work.lengths.sum()
    assert letters / 4 < probes  # about four letters a token


# The conversion


def test_a_bundle_holds_its_rankings(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.ranking is not None
    queries = len(manifest.ranking.logits)
    assert queries >= 2
    for variant in manifest.variants.values():
        found = variant.ranking
        assert found is not None
        assert (found.data, found.queries, found.pairs) == (
            manifest.ranking.data,
            queries,
            queries * PASSAGES,
        )
        assert found.ndcg >= LEAST
    exact = manifest.variants["onnx-fp32"].ranking
    assert exact is not None
    assert exact.kendall > 0.999
    assert manifest.variants["onnx-int8"].ranking != exact


def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give right logits for the probes, and those of other passages for rankings."""
    run = fidelity._run

    def wrong(
        folder: Path, variant: Any, works: list[Sequences], worker: isolation.Worker
    ) -> list[Logits]:
        probes, *rest = run(folder, variant, works, worker)
        return [probes, *(np.roll(logits, 5) for logits in rest)]

    monkeypatch.setattr(fidelity, "_run", wrong)


@pytest.mark.usefixtures("ready_graph")
def test_a_variant_that_ranks_otherwise_is_refused(
    without_fp32: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled(monkeypatch)
    before = contents(without_fp32)
    with pytest.raises(FidelityError) as caught:
        convert(bert, FP32, without_fp32)
    message = str(caught.value)
    for part in (
        "onnx-fp32 does not rank like the original: its rankings agree 0.",
        f"at least {LEAST:g} needed",
        "% of the top 10",
        "Kendall tau of",
        f"queries x {PASSAGES} passages (qrank's own)",
        "Convert to another precision",
        "--ranking-data",
        "--min-agreement 0.",
    ):
        assert part in message
    assert contents(without_fp32) == before
    # What the message advises helps.
    bound = float(message.partition("--min-agreement ")[2].rstrip(")"))
    made = convert(bert, FP32, without_fp32, min_agreement=bound)
    assert made.manifest.variants["onnx-fp32"].ranking is not None


@pytest.mark.usefixtures("ready_graph")
def test_the_command_refuses_with_the_figures(
    without_fp32: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled(monkeypatch)
    arguments = ["convert", bert, "--to", "onnx", "--precision", "fp32", "-o", without_fp32]
    result = qrank_(*arguments)
    assert result.exit_code == FidelityError.exit_code
    assert "its rankings agree 0." in result.stderr
    assert qrank_(*arguments, "--min-agreement", "0.1").exit_code == 0
    assert qrank_(*arguments, "--min-agreement", "1.5").exit_code == 2


def test_an_agreement_above_one_is_none(bert: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="min_agreement is 2"):
        convert(bert, FP32, tmp_path / "b", min_agreement=2)


@pytest.mark.usefixtures("ready_graph")
def test_a_variant_that_is_added_is_proven_on_the_same_rankings(
    without_fp32: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Manifest.load(without_fp32)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the original ran again")

    monkeypatch.setattr(ranking, "_ranked", refuse)
    made = convert(bert, FP32, without_fp32).manifest
    assert made.ranking == old.ranking
    assert made.variants["onnx-fp32"].ranking is not None


def without_ranking(folder: Path) -> None:
    """Make a bundle as it was before there were rankings."""
    manifest = Manifest.load(folder)
    variants = {name: replace(v, ranking=None) for name, v in manifest.variants.items()}
    replace(manifest, variants=variants, ranking=None).save(folder)


@pytest.mark.usefixtures("ready_graph")
def test_a_bundle_without_rankings_opens_and_gains_them(without_fp32: Path, bert: str) -> None:
    without_ranking(without_fp32)
    assert "ranking" not in (without_fp32 / "qrank.json").read_text("utf-8")
    with Reranker(without_fp32, backend="onnx-int8") as reranker:
        assert len(reranker.rank("a", ["b", "c"])) == 2
    shown = qrank_("inspect", without_fp32)
    assert shown.exit_code == 0
    assert "rankings" not in shown.stdout
    files = contents(without_fp32)
    made = convert(bert, [*FP32, ("onnx", "int8")], without_fp32).manifest
    assert made.ranking is not None
    assert made.variants["onnx-fp32"].ranking is not None
    # This one is proven as it is.
    assert made.variants["onnx-int8"].ranking is not None
    assert made.variants["onnx-fp16"].ranking is None
    after = contents(without_fp32)
    assert all(after[name] == content for name, content in files.items() if name != MANIFEST)


@pytest.mark.usefixtures("ready_graph")
def test_an_old_variant_that_ranks_otherwise_stays_and_is_told(
    copy: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ranking(copy)
    shuffled(monkeypatch)
    before = contents(copy)
    result = convert(bert, FP32, copy)
    assert "onnx-fp32 does not rank like the original" in str(result.failed["onnx-fp32"])
    assert contents(copy) == before


def test_a_tokenizer_that_reads_no_query_is_told(
    without_fp32: Path,
    bert: str,
    ready_graph: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    without_ranking(without_fp32)
    monkeypatch.setattr(ranking, "_UNKNOWN", -1.0)
    made = convert(bert, FP32, without_fp32).manifest
    assert made.ranking is None
    assert "onnx-fp32" in made.variants
    assert "no proof of ranking, because its tokenizer reads none" in caplog.text


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "an agreement above one": lambda c: c["variants"]["onnx-int8"]["ranking"].update(ndcg=2),
    "no number": lambda c: c["variants"]["onnx-int8"]["ranking"].update(kendall="1"),
    "no queries": lambda c: c["variants"]["onnx-int8"]["ranking"].update(queries=0),
    "no name": lambda c: c["variants"]["onnx-int8"]["ranking"].update(data=None),
    "a key of its own": lambda c: c["variants"]["onnx-int8"]["ranking"].update(eval=1),
    "few logits": lambda c: c["ranking"]["logits"].append([1.0, 2.0]),
    "equal logits": lambda c: c["ranking"]["logits"].append([1.0] * 20),
}


@pytest.mark.parametrize("forged", FORGED)
def test_forged_rankings_are_refused(forged: str, copy: Path) -> None:
    from test_bundle import resigned

    resigned(copy, FORGED[forged])
    with pytest.raises(BundleError, match="damaged"):
        Manifest.load(copy)


# The user's own data


def written(folder: Path, queries: dict[str, str], documents: dict[str, str]) -> tuple[Path, Path]:
    paths = folder / "my-queries.jsonl", folder / "my-documents.jsonl"
    for path, texts in zip(paths, (queries, documents), strict=True):
        lines = [json.dumps({"id": key, "text": text}) for key, text in texts.items()]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    return paths


DOCUMENTS = {
    f"d{i}": f"Planet {i} and its moons. " + "It is made of rock and ice. " * (i % 5)
    for i in range(30)
}


@pytest.mark.usefixtures("ready_graph")
def test_the_users_own_queries_are_ranked(without_fp32: Path, bert: str, tmp_path: Path) -> None:
    queries = {"a": "which planet is red?", "b": "nothing shared", "c": "a planet of ice"}
    paths = written(tmp_path, queries, DOCUMENTS)
    result = qrank_(
        *("convert", bert, "--to", "onnx", "--precision", "fp32", "-o", without_fp32),
        *("--ranking-data", *paths),
    )
    assert result.exit_code == 0, result.output
    found = Manifest.load(without_fp32).variants["onnx-fp32"].ranking
    assert found is not None
    assert (found.data, found.queries, found.pairs) == ("my-queries.jsonl", 2, 48)
    assert "my-queries.jsonl" in result.stdout


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        ({"a": "which planet?"}, {"d": "Mars is a planet."}, "more than 10 documents"),
        ({"a": "zebra"}, DOCUMENTS, "none of the 1 queries"),
        ({}, DOCUMENTS, "none of the 0 queries"),
        ({"a": "which planet?"}, {}, "more than 10 documents"),
    ],
)
def test_data_that_rank_nothing_are_refused(
    queries: dict[str, str],
    documents: dict[str, str],
    message: str,
    bert: str,
    tmp_path: Path,
) -> None:
    paths = written(tmp_path, queries, documents)
    result = qrank_("convert", bert, "-o", tmp_path / "b", "--ranking-data", *paths)
    assert result.exit_code == InputError.exit_code
    assert message in result.stderr
    assert not (tmp_path / "b").exists()


def test_a_bad_line_is_named(bert: str, tmp_path: Path) -> None:
    paths = written(tmp_path, {"a": "which planet?"}, DOCUMENTS)
    paths[1].write_text('{"id": "1", "text": "a"}\n{"id": "2"}\n', "utf-8")
    result = qrank_("convert", bert, "-o", tmp_path / "b", "--ranking-data", *paths)
    assert result.exit_code == InputError.exit_code
    assert "my-documents.jsonl, line 2: expected the text of a document" in result.stderr
    assert not (tmp_path / "b").exists()
    result = qrank_("convert", bert, "--ranking-data", paths[0], tmp_path / "absent")
    assert result.exit_code == 2


def test_force_does_not_replace_the_data(copy: Path, bert: str) -> None:
    paths = written(copy, {"a": "which planet?"}, DOCUMENTS)
    data = RankingData("mine", [("a", list(DOCUMENTS.values()))], paths)
    with pytest.raises(ConversionError, match="--force does not replace"):
        convert(bert, FP32, copy, force=True, ranking=data)


# What it decides


def agreeing(folder: Path, **ndcg: float) -> Manifest:
    """Set the agreement of a bundle's variants, named with underscores."""
    manifest = Manifest.load(folder)
    for name, value in ndcg.items():
        variant = manifest.variants[name.replace("_", "-")]
        assert variant.ranking is not None
        manifest = manifest.with_variant(
            replace(variant, ranking=replace(variant.ranking, ndcg=value))
        )
    manifest.save(folder)
    return manifest


def test_a_variant_that_ranks_otherwise_is_taken_last(copy: Path, own_cache: Path) -> None:
    names = ["onnx-int8", "onnx-fp32"]
    folder = subset(copy, copy.with_name("two"), names)
    speeds = {"onnx-int8@cpu": 9.0, "onnx-fp32@cpu": 5.0}

    def chosen(**criteria: Any) -> str:
        with Reranker(folder, **criteria) as reranker:
            return reranker.target.variant.name

    def measured(manifest: Manifest) -> None:
        found = [measurement(name, speed) for name, speed in speeds.items()]
        remember_speeds(manifest, machine.processors(), found)

    measured(agreeing(folder, onnx_int8=LEAST))
    assert chosen() == "onnx-int8"
    manifest = agreeing(folder, onnx_int8=LEAST - 0.01)
    measured(manifest)
    assert chosen() == "onnx-fp32"
    assert chosen(backend="onnx-int8") == "onnx-int8"
    # Judged queries count more.
    losses.remember(manifest, {"onnx-int8": Loss(0.001, 0.001, 100, "cranfield")})
    assert chosen() == "onnx-int8"


# What is shown


def test_tables_have_80_columns(copy: Path) -> None:
    manifest = Manifest.load(copy)
    variant = manifest.variants.pop("onnx-int8")
    assert variant.ranking is not None
    # The longest name of a variant, and a long one of a file.
    longest = replace(
        variant,
        format="openvino",
        precision="int8-w8a8",
        files={f"openvino-int8-w8a8/{n.split('/')[1]}": r for n, r in variant.files.items()},
        ranking=replace(variant.ranking, data="a-very-long-name-of-queries.jsonl", queries=99999),
    )
    shutil.move(copy / "onnx-int8", copy / "openvino-int8-w8a8")
    manifest.with_variant(longest).save(copy)
    result = qrank_("inspect", copy)
    assert result.exit_code == 0
    lines = result.stdout.partition("variant ")[2].splitlines()
    table = [line for line in lines if not line.startswith("gguf-q4_k_m:")]
    assert max(map(len, table)) <= 80
    (row,) = (line for line in lines if "a-very-long-name" in line)
    assert row.startswith("openvino-int8-w8a8")
    assert f"{variant.ranking.ndcg:.4f}" in row
    assert f"{variant.ranking.top10:.1%}" in row


def test_bench_shows_the_agreement(copy: Path) -> None:
    folder = subset(copy, copy.with_name("one"), ["onnx-int8"])
    agreeing(folder, onnx_int8=0.9876)
    result = qrank_("bench", folder, "--seconds", "0")
    assert result.exit_code == 0, result.output
    head, row, *_ = result.stdout.splitlines()
    assert head.split()[-1] == "nDCG"
    assert row.endswith("0.9876")
    assert max(map(len, result.stdout.splitlines())) <= 80
