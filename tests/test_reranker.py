"""The public API: results, their order, and error messages."""

import tracemalloc
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest

from qrank import Reranker
from qrank.backends import Options, onnx
from qrank.bundle.manifest import TOKENIZER, Manifest, Probes
from qrank.bundle.sequences import Sequences
from qrank.errors import BundleError, InputError, ModelNotFoundError, TargetError
from qrank.scoring.inputs import LongDocuments
from qrank.scoring.pair_tokenizer import PairTokenizer

QUERY = "which planet is red?"
DOCUMENTS = ["bread is baked in an oven", "mars is the red planet", "", "the sky", " \t "]


def words(*counts: int) -> list[str]:
    """Documents with the given numbers of one-letter words."""
    return [" ".join("a" * count) for count in counts]


# Results


def test_rank_sorts_and_keeps_what_was_given(reranker: Reranker) -> None:
    ranking = reranker.rank(QUERY, DOCUMENTS)
    logits = [item.logit for item in ranking]
    assert logits == sorted(logits, reverse=True)
    assert sorted(item.index for item in ranking) == list(range(len(DOCUMENTS)))
    for item in ranking:
        assert item.text == DOCUMENTS[item.index]
        assert not item.truncated
        assert item.part is None
        assert type(item.score) is type(item.logit) is float


def test_score_keeps_the_callers_order_and_agrees_with_rank(reranker: Reranker) -> None:
    scores = reranker.score([(QUERY, document) for document in DOCUMENTS])
    assert scores.dtype == np.float64
    for item in reranker.rank(QUERY, DOCUMENTS):
        assert scores[item.index] == pytest.approx(item.score, abs=1e-6)


@pytest.mark.parametrize("long_documents", ["truncate", "chunk"])
def test_many_pairs_are_scored_some_at_a_time(
    reranker: Reranker, long_documents: LongDocuments, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(QUERY, document * 300) for document in DOCUMENTS] + [("mars", "red")]
    whole = reranker.score(pairs, raw=True, long_documents=long_documents)
    monkeypatch.setattr("qrank.reranker.SCORED_AT_ONCE", 2)
    parts = reranker.score(iter(pairs), raw=True, long_documents=long_documents)
    assert parts.dtype == whole.dtype
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_token_ids_of_scored_pairs_are_not_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory grows by the pairs and their scores, not by their tokens."""
    monkeypatch.setattr("qrank.reranker.SCORED_AT_ONCE", 50)
    text = "mars is red " * 200

    def peak(count: int) -> int:
        pairs = [(QUERY, text)] * count
        tracemalloc.start()
        reranker.score(pairs)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    with Reranker(bundle, backend="fakes:ties") as reranker:
        peak(50)
        more = (peak(2000) - peak(1000)) / 1000
    assert more < 120  # bytes a pair; its 160 token ids take 640


def test_raw_gives_float32_logits_and_scores_are_their_activation(reranker: Reranker) -> None:
    pairs = [(QUERY, document) for document in DOCUMENTS]
    logits = reranker.score(pairs, raw=True)
    assert logits.dtype == np.float32
    assert reranker.engine.manifest.family.activation == "sigmoid"
    expected = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(reranker.score(pairs), expected, rtol=1e-12)


def test_equal_documents_keep_their_order(bundle: Path) -> None:
    with Reranker(bundle, backend="fakes:ties") as reranker:
        ranking = reranker.rank(QUERY, [str(i) for i in range(50)])
    assert [item.index for item in ranking] == list(range(50))


def test_ties_are_decided_on_logits_where_the_activation_saturates(bundle: Path) -> None:
    with Reranker(bundle, backend="fakes:saturated") as reranker:
        ranking = reranker.rank(QUERY, words(1, 3, 2))
    assert {item.score for item in ranking} == {1.0}
    assert [item.index for item in ranking] == [1, 2, 0]


@pytest.mark.parametrize(("top_k", "expected"), [(0, 0), (2, 2), (5, 5), (99, 5), (None, 5)])
def test_top_k(reranker: Reranker, top_k: int | None, expected: int) -> None:
    assert len(reranker.rank(QUERY, DOCUMENTS, top_k=top_k)) == expected


def test_nothing_in_nothing_out(reranker: Reranker) -> None:
    assert reranker.rank(QUERY, []) == []
    assert reranker.score([]).shape == (0,)
    assert reranker.score([]).dtype == np.float64
    assert reranker.score([], raw=True).dtype == np.float32


def test_ten_thousand_documents(bundle: Path) -> None:
    documents = [f"{i % 7} " * (i % 11) for i in range(10_000)]
    with Reranker(bundle, backend="fakes:length") as reranker:
        ranking = reranker.rank(QUERY, documents)
    assert sorted(item.index for item in ranking) == list(range(10_000))
    order = [(-item.logit, item.index) for item in ranking]
    assert order == sorted(order)


def test_queries_may_differ_and_be_in_several_languages(reranker: Reranker) -> None:
    pairs = [(QUERY, "mars is red"), ("Welcher Planet ist rot?", "mars is red"), ("火星?", "火星")]
    together = reranker.score(pairs, raw=True)
    alone = [float(reranker.score([pair], raw=True)[0]) for pair in pairs]
    assert len(set(alone)) == 3
    np.testing.assert_allclose(together, alone, atol=0.02 * max(1.0, float(np.ptp(alone))))


def test_truncated_says_that_the_end_was_not_read(bundle: Path) -> None:
    with Reranker(bundle, backend="fakes:length", max_length=30) as reranker:
        long, short = reranker.rank("a", words(500, 3))
    assert (long.index, long.truncated, long.logit) == (0, True, 30.0)
    assert (short.index, short.truncated) == (1, False)


# Long documents in chunks


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("fakes:length", (0, 51)), ("fakes:shortness", (276, 299))],
    ids=["first-of-equals", "last"],
)
def test_the_best_chunk_wins_and_says_where_it_is(
    bundle: Path, backend: str, expected: tuple[int, int]
) -> None:
    """150 words in chunks of 26 that overlap by 3; the last is shorter and begins at word 138."""
    (document,) = words(150)
    with Reranker(bundle, backend=backend, max_length=30) as reranker:
        (item,) = reranker.rank("a", [document], long_documents="chunk")
    assert item.part == expected
    assert not item.truncated
    assert item.text == document


def test_chunks_score_like_documents_of_their_own(reranker: Reranker, bundle: Path) -> None:
    document = " ".join("abcdefghij"[i * i % 10] for i in range(1200))
    family = reranker.engine.manifest.family
    tokenizer = PairTokenizer(bundle / TOKENIZER, family)
    chunks = tokenizer.chunks(document, tokenizer.prompt(QUERY))
    assert len(chunks) > 1
    texts = [document[chunk.start : chunk.end] for chunk in chunks]
    logits = reranker.score([(QUERY, text) for text in texts], raw=True)
    (item,) = reranker.rank(QUERY, [document], long_documents="chunk")
    assert item.logit == pytest.approx(float(logits.max()), abs=1e-4)
    assert item.part is not None
    assert document[slice(*item.part)] in texts
    scores = reranker.score([(QUERY, document)], raw=True, long_documents="chunk")
    assert float(scores[0]) == pytest.approx(item.logit, abs=1e-4)


def test_what_fits_is_not_cut_into_chunks(reranker: Reranker) -> None:
    ranking = reranker.rank(QUERY, DOCUMENTS, long_documents="chunk")
    assert [item.part for item in ranking] == [None] * len(DOCUMENTS)


# Refusals


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one string", "documents is one string"),
        (["a", "b", 3], "document 2 is int, not a string$"),
        ([None], 'document 0 is NoneType, not a string; give "" where'),
        (["a", ["b", "c"]], "document 1 is list, not a string; give one text"),
        (["a", {"body": "b"}], r"document 1 has no field 'text', only \['body'\]; .*text_key"),
        ([{"text": 3}], "field 'text' of document 0 is int, not a string"),
        ([b"bytes"], "document 0 is bytes, not a string; decode it"),
    ],
)
def test_documents_that_are_none(reranker: Reranker, documents: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reranker.rank(QUERY, documents)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("q",)], "pair 0 is no"),
        ([("q", "d"), ("q", "d", "e")], "pair 1 is no"),
        (["qd"], "pair 0 is no"),
        ([("q", "d"), None], "pair 1 is no"),
        (("q", "d"), "pair 0 is no"),
        ([(1, "d")], "query 0 is int"),
        ([("q", "d"), ("q", None)], "document 1 is NoneType"),
    ],
)
def test_pairs_that_are_none(reranker: Reranker, pairs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reranker.score(pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": -1}, "top_k is -1"), ({"long_documents": "drop"}, "long_documents is 'drop'")],
)
def test_arguments_out_of_range(
    reranker: Reranker, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        reranker.rank(QUERY, DOCUMENTS, **arguments)


def test_threads_out_of_range(bundle: Path) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        Reranker(bundle, threads=0)


@pytest.mark.parametrize("backend", ["fakes:nan_when_long", "fakes:inf_when_long"])
def test_a_number_that_is_not_finite_fails_the_call_and_not_the_next(
    bundle: Path, backend: str
) -> None:
    with Reranker(bundle, backend=backend) as reranker:
        with pytest.raises(TargetError, match=r"gave (nan|inf) for document 1"):
            reranker.rank(QUERY, words(3, fakes.LONG))
        assert len(reranker.rank(QUERY, words(3, 4))) == 2


def test_a_backend_that_loses_documents_is_refused(bundle: Path) -> None:
    with (
        Reranker(bundle, backend="fakes:forgetful") as reranker,
        pytest.raises(TargetError, match=r"shape \(99,\) for 100 inputs"),
    ):
        reranker.rank(QUERY, words(*range(100)))


def test_a_backend_that_computes_wrongly_here_is_refused_at_load(
    bundle: Path, reranker: Reranker
) -> None:
    """Even though the bundle's own backend was proven before."""
    fakes.closed.clear()
    with pytest.raises(TargetError, match=r"computes wrongly on this machine \(fakes:shifted\)"):
        Reranker(bundle, backend="fakes:shifted")
    assert fakes.closed == ["shifted"]


def test_probes_decide_about_the_bundles_own_backend(tmp_path: Path, bundle: Path) -> None:
    """A bundle whose probes contradict its graph, as if a kernel were wrong."""
    manifest = Manifest.load(bundle)
    probes = manifest.probes
    wrong = Probes(probes.work, probes.logits * -1 + 7, probes.reference)
    changed = Manifest(
        manifest.name, manifest.family, manifest.source, manifest.files, wrong, manifest.variants
    )
    for path in bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "qrank.json").unlink()
    changed.save(tmp_path)
    with pytest.raises(TargetError, match="computes wrongly on this machine"):
        Reranker(tmp_path)


def test_a_runtimes_own_error_is_a_target_error(bundle: Path) -> None:
    """Caused here by a token id outside the vocabulary; out of memory is raised the same way."""
    variant = next(iter(Manifest.load(bundle).variants.values()))
    backend = onnx.open(bundle, variant, "cpu", Options(1))
    work = Manifest.load(bundle).probes.work.take(np.array([0]))
    with pytest.raises(TargetError, match="onnxruntime failed: "):
        backend.logits(Sequences([work.ids[0] + 10**6], work.segments))
    assert backend.logits(work).shape == (1,)
    backend.close()


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model 'nano'.*bundled model \(.*hub id"):
        Reranker("nano")


def test_a_checkpoint_is_told_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(ModelNotFoundError, match=r"is a checkpoint.*qrank convert"):
        Reranker(tmp_path)


def test_any_other_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is no bundle: it holds no qrank\.json"):
        Reranker(tmp_path)


def test_a_bundle_without_its_files_is_damaged(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "qrank.json").write_bytes((bundle / "qrank.json").read_bytes())
    with pytest.raises(BundleError, match=r"lacks tokenizer\.json"):
        Reranker(tmp_path)


@pytest.mark.parametrize("backend", ["tflite", "onnx-q4", "int8"])
def test_an_unknown_backend_or_variant_is_told_what_there_is(bundle: Path, backend: str) -> None:
    variants = ", ".join(Manifest.load(bundle).variants)
    with pytest.raises(TargetError, match=f"{backend}.*it has: {variants}; backends are: onnx"):
        Reranker(bundle, backend=backend)


@pytest.mark.parametrize("backend", ["nowhere:open", "fakes:nothing", ":open", "fakes:", ".x:y"])
def test_a_backend_of_ones_own_that_is_not_there(bundle: Path, backend: str) -> None:
    with pytest.raises(TargetError, match="no backend"):
        Reranker(bundle, backend=backend)


@pytest.mark.parametrize("device", ["cuda", "tpu", "CPU"])
def test_an_absent_device_is_told_what_is_present(bundle: Path, device: str) -> None:
    if device in onnx.devices():
        pytest.skip(f"{device} is present here")
    with pytest.raises(TargetError, match=f"no device {device!r}; present are: .*cpu"):
        Reranker(bundle, backend="onnx", device=device)


def test_every_variant_can_be_named(bundle: Path) -> None:
    for name, variant in Manifest.load(bundle).variants.items():
        with Reranker(bundle, backend=name) as reranker:
            assert reranker.target.name == f"{name}@cpu"
            assert reranker.engine.format == variant.format
            assert len(reranker.rank(QUERY, DOCUMENTS)) == len(DOCUMENTS)
