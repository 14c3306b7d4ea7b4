"""Text -> token ids: the template, truncation, and chunks."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fakes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrank import Reranker
from qrank.bundle.family import Family
from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.errors import InputError
from qrank.scoring.pair_tokenizer import PairTokenizer, Prompt

# Any string, including surrogates.
TEXT = st.text(st.characters(), max_size=60)
# One token per letter in any vocabulary: the letter itself or the unknown token.
LETTERS = st.lists(st.sampled_from("abcdefghij"), max_size=120).map(" ".join)


@pytest.fixture(scope="module")
def family(bundle: Path) -> Family:
    return Manifest.load(bundle).family


@pytest.fixture(scope="module")
def tokenizer(bundle: Path, family: Family) -> PairTokenizer:
    return PairTokenizer(bundle / TOKENIZER, family)


@pytest.fixture(scope="module", params=[5, 9, 33, None])
def recorder(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Reranker]:
    """A reranker that records its inputs in `fakes.recorded`, with several length limits."""
    with Reranker(bundle, backend="fakes:recording", max_length=request.param) as reranker:
        yield reranker


def with_capacity(tokenizer: PairTokenizer, capacity: int) -> Prompt:
    """A prompt that leaves `capacity` tokens for a document."""
    return replace(tokenizer.prompt("mars"), capacity=capacity)


def limit_of(recorder: Reranker, request: pytest.FixtureRequest) -> int:
    limit: int | None = request.node.callspec.params["recorder"]
    return limit or recorder.engine.manifest.family.max_length


@given(query=TEXT, document=TEXT)
def test_a_pair_is_the_template_filled_in(
    tokenizer: PairTokenizer, family: Family, query: str, document: str
) -> None:
    query_ids, document_ids = tokenizer.ids([query, document])
    ids, segments = tokenizer.pair(tokenizer.prompt(query), document_ids)
    slots = {"{query}": query_ids.tolist(), "{document}": document_ids.tolist()}
    parts = [slots[item] if isinstance(item, str) else [item] for item in family.template]
    assert ids.tolist() == [number for part in parts for number in part]
    assert family.segments is not None
    assert segments is not None
    types = [kind for kind, part in zip(family.segments, parts, strict=True) for _ in part]
    assert segments.tolist() == types


@settings(max_examples=40)
@given(query=LETTERS, document=LETTERS)
def test_only_the_document_gives_way(
    recorder: Reranker,
    tokenizer: PairTokenizer,
    request: pytest.FixtureRequest,
    query: str,
    document: str,
) -> None:
    limit = limit_of(recorder, request)
    (ranking,) = recorder.rank(query, [document])
    (ids,) = fakes.recorded[-1].ids
    query_ids, document_ids = tokenizer.ids([query, document])
    special = len(tokenizer.whole("", "")[0])
    kept = len(query_ids)
    if kept >= limit - special:
        kept = (limit - special) * 3 // 4
    room = limit - special - kept
    assert room >= 1
    # Each letter is one token.
    prompt = tokenizer.prompt(" ".join(query.split()[:kept]))
    assert ids.tolist() == tokenizer.pair(prompt, document_ids[:room])[0].tolist()
    assert len(ids) <= limit
    assert ranking.truncated == (len(document_ids) > room)


def test_a_query_beyond_the_limit_is_cut_with_a_warning(
    tokenizer: PairTokenizer, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qrank"):
        prompt = tokenizer.prompt("a " * family.max_length)
    assert prompt.capacity >= family.max_length // 5
    (record,) = caplog.records
    assert f"the query has {family.max_length} tokens" in record.getMessage()
    kept = family.max_length - len(tokenizer.whole("", "")[0]) - prompt.capacity
    assert f"only its first {kept} are read" in record.getMessage()


def test_documents_differ_beside_a_query_beyond_the_limit(reranker: Reranker) -> None:
    query = "red planet " * reranker.engine.manifest.family.max_length
    first, second = reranker.score([(query, "mars is red"), (query, "bread is baked")], raw=True)
    assert first != second


def test_a_query_that_fits_is_not_warned_of(
    tokenizer: PairTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.prompt("which planet is red?")
    assert not caplog.records


@given(text=LETTERS, capacity=st.integers(1, 40))
def test_chunks_of_words_are_what_their_characters_say(
    tokenizer: PairTokenizer, text: str, capacity: int
) -> None:
    for part in tokenizer.chunks(text, with_capacity(tokenizer, capacity)):
        (again,) = tokenizer.ids([text[part.start : part.end]])
        assert again.tolist() == part.ids.tolist()


@given(text=TEXT, capacity=st.integers(1, 20))
def test_chunks_cover_the_document_fit_and_overlap(
    tokenizer: PairTokenizer, text: str, capacity: int
) -> None:
    (ids,) = tokenizer.ids([text])
    parts = tokenizer.chunks(text, with_capacity(tokenizer, capacity))
    overlap = capacity // 8
    covered = parts[0].ids.tolist()
    for part in parts[1:]:
        assert covered[len(covered) - overlap :] == part.ids.tolist()[:overlap]
        covered += part.ids.tolist()[overlap:]
    assert covered == ids.tolist()
    for part in parts:
        assert len(part.ids) <= capacity
        assert 0 <= part.start <= part.end <= len(text)
    assert [part.start for part in parts] == sorted(part.start for part in parts)


def test_surrogates_do_not_shift_the_characters_of_a_chunk(tokenizer: PairTokenizer) -> None:
    text = "\ud83d\ude00 " * 5 + "a b c d"
    (*_, last) = tokenizer.chunks(text, with_capacity(tokenizer, 4))
    assert last.end == len(text)
    assert text[last.start : last.end].endswith("d")


@pytest.mark.parametrize("max_length", [-1, 0, 4, 10**6])
def test_a_max_length_out_of_range_is_refused(
    bundle: Path, family: Family, max_length: int
) -> None:
    expected = f".* 5 to {family.max_length}" if max_length > 0 else "give a whole number"
    with pytest.raises(InputError, match=rf"max_length is {max_length}; {expected}"):
        Reranker(bundle, max_length=max_length)


STRANGE = {
    "empty": "",
    "blank": " \t\n\u3000 ",
    "NUL bytes": "mars\0is\0red\0",
    "lone surrogate": "mars \ud800 is red",
    "surrogate pair": "mars \ud83d\ude00 is red",
    "emoji": "🪐👩‍👩‍👧‍👦🏳️‍🌈",
    "right to left": "المريخ كوكب أحمر \u202e",
    "combining": "e\u0301" * 50 + "Z\u0351\u036b\u0343",
    "noncharacters": "\ufffe\uffff\U0010ffff",
    "control": "\x1b[31mred\x07\x7f",
    "long": "mars is red " * 8334,
    "long word": "m" * 100_000,
    "long emoji": "🪐" * 100_000,
    "long Chinese": "火星是红色的" * 16_667,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_text_has_a_score_of_its_own(reranker: Reranker, kind: str) -> None:
    """As document, as query and in chunks: the score is finite, and other scores do not change."""
    text = STRANGE[kind]
    alone = reranker.score([("which planet is red?", "mars is red")], raw=True)
    ranking = reranker.rank("which planet is red?", [text, "mars is red"])
    assert sorted(item.index for item in ranking) == [0, 1]
    assert next(item.text for item in ranking if item.index == 0) == text
    (neighbour,) = [item.logit for item in ranking if item.index == 1]
    assert neighbour == pytest.approx(float(alone[0]), abs=1e-3)
    assert len(reranker.score([(text, text), (text, "mars")])) == 2


@pytest.mark.parametrize("kind", ["long", "long word", "lone surrogate", "blank"])
def test_strange_text_has_chunks(bundle: Path, kind: str) -> None:
    with Reranker(bundle, backend="fakes:length") as reranker:
        (item,) = reranker.rank("mars?", [STRANGE[kind]], long_documents="chunk")
    assert not item.truncated
    if item.part is not None:
        assert 0 <= item.part[0] < item.part[1] <= len(STRANGE[kind])


def test_tokenizing_on_several_threads_gives_the_same(bundle: Path, family: Family) -> None:
    texts = [f"document {i} of mars \ud800 🪐 " * 20 for i in range(100)]
    one = PairTokenizer(bundle / TOKENIZER, family, threads=1).ids(texts)
    two = PairTokenizer(bundle / TOKENIZER, family, threads=2).ids(texts)
    assert [ids.tolist() for ids in one] == [ids.tolist() for ids in two]
