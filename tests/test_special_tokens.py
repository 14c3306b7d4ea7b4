"""Special tokens inside a text are text; everything else is tokenized as in transformers."""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from odd_texts import odd_texts
from tokenizers import Tokenizer

from qrank.bundle.manifest import TOKENIZER
from qrank.converters.checkpoint.read import Checkpoint, read_checkpoint
from qrank.converters.checkpoint.tokenizer import strip_special_tokens
from qrank.errors import ConversionError
from qrank.scoring.pair_tokenizer import PairTokenizer

SPECIAL = [
    *("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "[unused0]"),
    *("<s>", "</s>", "<pad>", "<unk>", "<mask>"),
    *("<|endoftext|>", "<|padding|>", "<think>", "</tool_call>", "<|im_end|>"),
]
REAL = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, qrank's tokenizer for it, and the ids that no text may produce."""

    checkpoint: Checkpoint
    tokenizer: PairTokenizer
    control: frozenset[int]

    def pair(self, query: str, document: str) -> list[int]:
        """The ids of a pair by qrank's tokenizer."""
        return [int(number) for number in self.tokenizer.whole(query, document)[0]]


@cache
def _case(kind: str, folder: Path, work: Path) -> Case:
    checkpoint = read_checkpoint(str(folder))
    path = work / f"{kind}.json"
    path.write_text(json.dumps(checkpoint.text_tokenizer()), "utf-8")
    control = checkpoint.tokenizer.convert_tokens_to_ids(list(checkpoint.control))
    return Case(checkpoint, PairTokenizer(path, checkpoint.family), frozenset(control))


@pytest.fixture(scope="session")
def case(
    kind: str, checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    """Each kind of checkpoint in turn."""
    return _case(kind, checkpoint_of(kind), tmp_path_factory.mktemp("tokenizers"))


def test_a_bundle_holds_the_tokenizer_tested_here(
    bundle: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    held = json.loads((bundle / TOKENIZER).read_text("utf-8"))
    assert held == read_checkpoint(str(checkpoint_of("bert"))).text_tokenizer()


@given(
    st.lists(
        st.sampled_from(
            [*SPECIAL, *(s.lower() for s in SPECIAL), "mars", " ", "  ", "\n", ".", "x"]
        )
    ).map("".join)
)
def test_special_tokens_in_text_are_text(case: Case, text: str) -> None:
    template = [item for item in case.checkpoint.family.template if isinstance(item, int)]
    for query, document in ((text, "mars"), ("mars", text)):
        found = [number for number in case.pair(query, document) if number in case.control]
        assert found == template


@pytest.mark.parametrize("special", SPECIAL)
def test_each_special_token_is_read_and_not_dropped(case: Case, special: str) -> None:
    for text in (special, f"red {special} mars", f"red{special}mars", f" {special} ", special * 3):
        (ids,) = case.tokenizer.ids([text])
        assert not case.control & set(ids.tolist())
        assert len(ids) >= 3


def ordinary(text: str) -> bool:
    """Whether a text contains no special token, even after normalization."""
    forms = [text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFKC"))]
    return not any(special in form for special in SPECIAL for form in forms)


# Short enough for both texts to fit: a character may take up to four byte tokens.
ORDINARY = st.text(st.characters(exclude_categories=["Cs"]), max_size=16).filter(ordinary)
PLAIN = st.lists(
    st.sampled_from(
        ["Mars", "planète", "火星", "don't", "\n", "\t", "é", "#", *(" " * n for n in (1, 2, 3, 7))]
    ),
    max_size=9,
).map("".join)


@given(ORDINARY | PLAIN, ORDINARY | PLAIN | PLAIN.map(lambda text: text * 20))
def test_ordinary_text_is_read_as_transformers_reads_it(
    case: Case, query: str, document: str
) -> None:
    # Use a batch of one: without a batch, an empty document counts as no document.
    (theirs,) = case.checkpoint.tokenizer(
        [query], [document], truncation="only_second", max_length=tiny.MAX_LENGTH
    )["input_ids"]
    assert case.pair(query, document) == theirs


@pytest.mark.parametrize("kind", ["modernbert-mean"], scope="session")
@pytest.mark.parametrize("spaces", [1, 2, 3, 12, 24, 25, 60])
def test_runs_of_spaces_keep_their_tokens(case: Case, spaces: int) -> None:
    """ModernBERT's tokenizer has added tokens for 2 to 24 spaces that are not special."""
    text = f"if mars:{' ' * spaces}return\n{' ' * spaces}x"
    original = case.checkpoint.tokenizer.backend_tokenizer
    theirs = original.encode(text, add_special_tokens=False).ids
    assert case.tokenizer.ids([text])[0].tolist() == theirs


def test_an_unknown_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(ConversionError, match="WordLevel"):
        strip_special_tokens({"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": []})


TEXTS = [
    "Which planet is known as the Red Planet?",
    "Der Mars wird wegen seiner rötlichen Farbe auch der Rote Planet genannt – seit jeher.",
    "火星は太陽系の太陽に近い方から4番目の惑星である。",
    "يُعرف المريخ بالكوكب الأحمر",
    "मंगल सौरमंडल का चौथा ग्रह है।",
    "  two  spaces,\ttabs\n\nand lines  ",
    "a < b && c > d; x</y> if s<t> <S> 🪐👩‍🚀",
    "",
    " ",
]


def real(name: str) -> tuple[Tokenizer, Tokenizer]:
    """A real tokenizer, and the one made from it."""
    path = REAL / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"the real tokenizer of {name} is not at {path}")
    original: dict[str, Any] = json.loads(path.read_text("utf-8"))
    made = Tokenizer.from_str(json.dumps(strip_special_tokens(original)))
    return Tokenizer.from_file(str(path)), made


def test_the_real_tokenizer_of_xlm_roberta() -> None:
    original, made = real("xlm-roberta")
    assert made.get_vocab_size() == original.get_vocab_size()
    for text in [*TEXTS, *odd_texts(2000)]:
        assert made.encode(text).ids == original.encode(text, add_special_tokens=False).ids
    for special in ("<s>", "<pad>", "</s>", "<mask>"):
        for text in (special, f"red {special} mars", f"red{special}mars", special * 2):
            ids = made.encode(text).ids
            assert not {0, 1, 2, 250001} & set(ids)
            assert len(ids) >= 2


def test_the_real_tokenizer_of_qwen() -> None:
    original, made = real("qwen")
    added = set(original.get_added_tokens_decoder())
    for text in [*TEXTS, *odd_texts(2000)]:
        assert made.encode(text).ids == original.encode(text, add_special_tokens=False).ids
    for special in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"):
        for text in (special, f"red {special} mars", f"red{special}mars", special * 2):
            ids = made.encode(text).ids
            assert not added & set(ids)
            assert len(ids) >= 2
