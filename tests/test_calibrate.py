"""`qrank calibrate` and its effect on scores; fits are compared with scipy's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import isotonic_regression, minimize

from qrank import Reranker
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Logits
from qrank.cli import main
from qrank.errors import InputError
from qrank.quality.reliability import THRESHOLDS, expected_calibration_error
from qrank.scoring.calibration import METHODS, Calibration, Isotonic, Labels, Platt

VARIANT = "onnx-fp32"
WORDS = ("mars", "bread", "planet", "river", "sugar", "light")
DOCUMENTS = {f"d{i}": f"{WORDS[i % 6]} {WORDS[(i * i + 1) % 6]} " * (i % 5 + 1) for i in range(12)}
QUERIES = {f"q{i}": f"{WORDS[i % 6]} {WORDS[(i + 2) % 6]}" for i in range(8)}


@pytest.fixture(scope="module")
def logits_of(bundle: Path) -> dict[str, dict[str, float]]:
    """The bundle's own logits for every pair."""
    with Reranker(bundle, backend=VARIANT) as reranker:
        return {
            query: dict(
                zip(
                    DOCUMENTS,
                    reranker.score([(text, d) for d in DOCUMENTS.values()], raw=True).tolist(),
                    strict=True,
                )
            )
            for query, text in QUERIES.items()
        }


@pytest.fixture
def data(tmp_path: Path, logits_of: dict[str, dict[str, float]]) -> Path:
    """A collection: the top quarter of pairs by logit is relevant; every fifth label is wrong."""
    for name, texts in (("documents", DOCUMENTS), ("queries", QUERIES)):
        lines = [json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    least = np.quantile([list(found.values()) for found in logits_of.values()], 0.75)
    pairs = [(q, d, logit > least) for q, found in logits_of.items() for d, logit in found.items()]
    rows = [f"{q} 0 {d} {int(label ^ (i % 5 == 0))}\n" for i, (q, d, label) in enumerate(pairs)]
    (tmp_path / "qrels.trec").write_text("".join(rows), "utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder for calibrations, used by this test only."""
    folder = tmp_path / "own"
    monkeypatch.setenv("QRANK_DATA", str(folder))
    return folder


def calibrate(bundle: Path, data: Path, *more: str | Path, backend: str = VARIANT) -> Result:
    options = ("--backend", backend, "--data", data, "--judged")
    return CliRunner().invoke(main, ["calibrate", *map(str, (bundle, *options, *more))])


def report_of(bundle: Path, data: Path, *more: str | Path) -> dict[str, Any]:
    result = calibrate(bundle, data, "--json", *more)
    assert result.exit_code == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def score(bundle: Path, *more: str, backend: str = VARIANT) -> Result:
    command = ["score", "-m", str(bundle), "--backend", backend, "-q", QUERIES["q0"], *more]
    return CliRunner().invoke(main, command, input="\n".join(DOCUMENTS.values()))


@pytest.mark.parametrize("method", METHODS)
def test_report_and_scores(
    bundle: Path, data: Path, method: str, logits_of: dict[str, dict[str, float]]
) -> None:
    report = report_of(bundle, data, "--method", method)
    assert (report["method"], report["target"]) == (method, f"{VARIANT}@cpu")
    assert report["fit"]["queries"] == report["held_out"]["queries"] == 4
    assert report["fit"]["pairs"] == report["held_out"]["pairs"] == 48
    for measured in ("brier", "error"):
        assert 0 <= report["after"][measured] <= 1
    assert report["after"]["brier"] < report["before"]["brier"]
    assert [row["score"] for row in report["thresholds"]] == list(THRESHOLDS)
    recalls = [row["recall"] for row in report["thresholds"]]
    assert recalls == sorted(recalls, reverse=True)

    with Reranker(bundle, backend=VARIANT, calibrated=True) as reranker:
        pairs = [(QUERIES["q0"], text) for text in DOCUMENTS.values()]
        scores = reranker.score(pairs)
        assert ((scores >= 0) & (scores <= 1)).all()
        assert np.array_equal(reranker.score(pairs, raw=True), list(logits_of["q0"].values()))
        ranking = reranker.rank(QUERIES["q0"], list(DOCUMENTS.values()))
        assert [item.score for item in ranking] == pytest.approx([scores[i.index] for i in ranking])
        assert [item.score for item in ranking] == sorted((i.score for i in ranking), reverse=True)
    with Reranker(bundle, backend=VARIANT) as plain:
        order = [item.index for item in plain.rank(QUERIES["q0"], list(DOCUMENTS.values()))]
        assert [item.index for item in ranking] == order

    shown = [
        line.split("\t") for line in score(bundle, "--scores", "calibrated").stdout.split("\n")
    ]
    assert [float(row[1]) for row in shown[:-1]] == pytest.approx(
        [item.score for item in ranking], rel=1e-4
    )
    least = str(sorted(scores)[-4])
    cut = score(bundle, "--scores", "calibrated", "--min-score", least, "-f", "json")
    results = json.loads(cut.stdout)["results"]
    assert 4 <= len(results) < 12
    assert all(result["score"] >= float(least) for result in results)


def test_the_report_for_people(bundle: Path, data: Path, own_folder: Path) -> None:
    result = calibrate(bundle, data)
    assert result.exit_code == 0, result.stderr
    report = report_of(bundle, data)
    assert f"Brier score         {report['before']['brier']:6.4f}" in result.stdout
    # The last line is a path, which may have any length.
    *lines, last = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    file = Path(last.removeprefix("kept in "))
    assert file.is_relative_to(own_folder)
    assert json.loads(file.read_text("utf-8"))["method"] == "platt"


def test_held_out_figures_are_of_the_other_queries(
    bundle: Path, data: Path, logits_of: dict[str, dict[str, float]]
) -> None:
    """Recomputing the held-out figures from the kept fit gives the reported ones."""
    report = report_of(bundle, data)
    kept = json.loads(Path(report["file"]).read_text("utf-8"))
    qrels = [line.split() for line in (data / "qrels.trec").read_text("utf-8").splitlines()]
    labels = {(q, d): int(r) for q, _, d, r in qrels}
    order = np.random.default_rng(0).permutation(8)
    held = [f"q{i}" for i in sorted(order[4:])]
    logits = np.array([logits_of[q][d] for q in held for d in DOCUMENTS])
    truth = np.array([labels[q, d] for q in held for d in DOCUMENTS])
    p = 1 / (1 + np.exp(-(kept["slope"] * logits + kept["intercept"])))
    assert report["held_out"]["relevant"] == truth.sum()
    assert report["after"]["brier"] == pytest.approx(np.mean((p - truth) ** 2))
    for row in report["thresholds"]:
        chosen = p >= row["score"]
        assert row["kept"] == chosen.sum()
        assert row["recall"] == pytest.approx(truth[chosen].sum() / truth.sum())
        assert row["precision"] == (pytest.approx(truth[chosen].mean()) if chosen.any() else None)


def test_without_judged_the_first_stage_finds_the_pairs(bundle: Path, data: Path) -> None:
    lines = [f"{q} Q0 {d} 1 {-i} x\n" for q in QUERIES for i, d in enumerate(DOCUMENTS)]
    (data / "run.trec").write_text("".join(lines), "utf-8")
    options = ("--backend", VARIANT, "--data", data, "--run", data / "run.trec", "--depth", "6")
    command = ["calibrate", *map(str, (bundle, *options)), "--json"]
    report = json.loads(CliRunner().invoke(main, command).stdout)
    assert report["fit"]["pairs"] == 24
    assert calibrate(bundle, data, "--run", data / "run.trec").exit_code == 2


def test_relevant_is_what_the_user_says(bundle: Path, data: Path) -> None:
    text = (data / "qrels.trec").read_text("utf-8")
    (data / "qrels.trec").write_text(text.replace(" 1\n", " 2\n").replace(" 0\n", " 1\n"), "utf-8")
    assert "are relevant; both kinds are needed" in calibrate(bundle, data).stderr
    report = report_of(bundle, data, "--relevant", "2")
    (data / "qrels.trec").write_text(text, "utf-8")
    assert report == report_of(bundle, data)


def test_without_a_calibration_the_way_to_one_is_told(
    bundle: Path, data: Path, own_folder: Path
) -> None:
    result = score(bundle, "--scores", "calibrated")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "calibrated: none of its variants" in result.stderr
    assert f"qrank calibrate BUNDLE --backend {VARIANT}" in result.stderr
    report_of(bundle, data)
    other = score(bundle, "--scores", "calibrated", backend="onnx-int8")
    assert other.exit_code == 2
    assert f"calibrated: {VARIANT})" in other.stderr
    (file,) = own_folder.rglob("*.json")
    for content in ('{"method": "platt"}', "[]", "{", '{"method": "magic"}'):
        file.write_text(content, "utf-8")
        damaged = score(bundle, "--scores", "calibrated")
        assert damaged.exit_code == 2
        assert f"{file} is damaged" in damaged.stderr


def test_a_bundle_that_gains_a_variant_keeps_its_calibration(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = Manifest.load(copy)
    replace(manifest, variants={VARIANT: manifest.variants[VARIANT]}).save(copy)
    report_of(copy, data)
    manifest.save(copy)
    assert score(copy, "--scores", "calibrated").exit_code == 0


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_scored(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*arguments: object, **options: object) -> None:
        raise AssertionError("scored before what hinders was told")

    monkeypatch.setattr(Reranker, "score", score)
    monkeypatch.setenv("QRANK_DATA", "/dev/null/data")
    result = calibrate(bundle, data)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("qrank: error: /dev/null/data/calibrations: ")
    assert line.endswith("QRANK_DATA names another folder")


def test_options_that_do_not_go_together(bundle: Path, data: Path) -> None:
    assert "--raw prints logits" in score(bundle, "--raw", "--scores", "calibrated").stderr
    custom = calibrate(bundle, data, backend="fakes:length")
    assert custom.exit_code == 2
    assert "belongs to a variant" in custom.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [f"{r[:-1]}0" for r in rows], "are not relevant; both kinds are needed"),
        (
            lambda rows: [f"{r[:-1]}{1 - int(r[-1])}" for r in rows],
            "no more often relevant",
        ),
        (lambda rows: rows[:12], "1 queries have candidates; 2 or more are needed"),
    ],
)
def test_labels_that_nothing_can_be_fitted_to(
    bundle: Path,
    data: Path,
    own_folder: Path,
    change: Callable[[list[str]], list[str]],
    message: str,
) -> None:
    rows = (data / "qrels.trec").read_text("utf-8").splitlines()
    (data / "qrels.trec").write_text("\n".join(change(rows)), "utf-8")
    result = calibrate(bundle, data)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not own_folder.exists()


FLOATS = st.floats(-50, 50, width=32)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Logits, Labels]:
    """Logits and labels that a calibration can be fitted to."""
    size = draw(st.integers(4, 40))
    logits = draw(arrays(np.float32, size, elements=FLOATS))
    labels = draw(arrays(np.bool_, size))
    assume(labels.any() and not labels.all())
    assume(logits.std() > 1e-3)
    return logits, labels


@pytest.mark.parametrize("method", METHODS)
@given(pairs=labelled(), asked=arrays(np.float32, 20, elements=st.floats(-1e4, 1e4, width=32)))
def test_order_is_kept_and_scores_are_probabilities(
    method: str, pairs: tuple[Logits, Labels], asked: Logits
) -> None:
    logits, labels = pairs
    try:
        calibration: Calibration = METHODS[method].fit(logits, labels)
    except InputError:  # higher logits are not relevant more often
        return
    scores = calibration.apply(np.sort(asked))
    assert ((scores >= 0) & (scores <= 1)).all()
    # A segment between knots may end slightly above the next one, by rounding.
    assert (np.diff(scores) >= -1e-12).all()
    same = calibration.apply(np.repeat(asked[:1], 3))
    assert same[0] == same[1] == same[2]


@given(labelled())
def test_platt_is_the_least_loss(pairs: tuple[Logits, Labels]) -> None:
    logits, labels = pairs
    positive, negative = labels.sum(), (~labels).sum()
    targets = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
    x = (logits.astype(np.float64) - logits.mean()) / logits.std()

    def loss(weights: Any) -> float:
        z = weights[0] * x + weights[1]
        return float((np.logaddexp(0, z) - targets * z).mean())

    best = minimize(loss, [0, 0])
    try:
        found = Platt.fit(logits, labels)
    except InputError:
        assert x[labels].mean() <= x[~labels].mean() + 1e-6
        return
    slope = found.slope * logits.std()
    assert loss([slope, found.intercept + found.slope * logits.mean()]) <= best.fun + 1e-7


@given(labelled())
def test_isotonic_is_scipys(pairs: tuple[Logits, Labels]) -> None:
    logits, labels = pairs
    order = np.argsort(logits, kind="stable")
    x, weights = np.unique(logits, return_counts=True)
    means = [labels[logits == value].mean() for value in x]
    expected = isotonic_regression(means, weights=weights).x
    try:
        found = Isotonic.fit(logits, labels)
    except InputError:
        assert np.ptp(expected) == pytest.approx(0, abs=1e-12)
        return
    assert found.apply(x) == pytest.approx(expected)
    assert len(found.logits) <= 2 * len(np.unique(np.round(expected, 12)))
    # The mean score equals the share of relevant pairs.
    assert found.apply(logits[order]).mean() == pytest.approx(labels.mean())


def test_platt_of_separable_labels_is_finite() -> None:
    logits = np.arange(100, dtype=np.float32)
    found = Platt.fit(logits, logits >= 50)
    scores = found.apply(logits)
    assert np.isfinite([found.slope, found.intercept]).all()
    assert scores[0] < 0.05 < 0.95 < scores[-1]


def test_calibration_error_by_hand() -> None:
    scores = np.array([0.1, 0.15, 0.9, 1.0])
    labels = np.array([False, True, True, True])
    # Bins: 0.1 to 0.2 (mean 0.125, share 0.5), 0.9 to 1 (mean 0.95, share 1).
    assert expected_calibration_error(scores, labels) == pytest.approx(0.5 * 0.375 + 0.5 * 0.05)
