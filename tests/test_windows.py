"""Long texts: the same tokens as for the whole text, with bounded memory and threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_decoders
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from qrank.bundle.locate import locate
from qrank.bundle.manifest import TOKENIZER
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.checkpoint.tokenizer import strip_special_tokens
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.scoring.windows import WINDOW, Tokens, Windows

HERE = Path(__file__).parent


def text_only(path: Path, normalizer: object = None, pre_tokenizer: object = None) -> Tokenizer:
    """A checkpoint's tokenizer as in a bundle, or with other parts."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.normalizer = normalizer or tokenizer.normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizer.pre_tokenizer
    return Tokenizer.from_str(json.dumps(strip_special_tokens(json.loads(tokenizer.to_str()))))


def gemma() -> Tokenizer:
    """A tokenizer like Gemma's: BPE over the whole text, with spaces like any other character."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(tiny.texts(), trainer)
    return Tokenizer.from_str(json.dumps(strip_special_tokens(json.loads(tokenizer.to_str()))))


KINDS: dict[str, Callable[[Callable[[str], Path]], Tokenizer]] = {
    "mini": lambda of: Tokenizer.from_file(str(locate("mini").tokenizer)),
    "bert": lambda of: text_only(of("bert")),
    "xlm-roberta": lambda of: text_only(of("xlm-roberta")),
    "unigram, no words": lambda of: text_only(
        of("xlm-roberta"), None, pre_tokenizers.Metaspace(split=False)
    ),
    "unigram, white space joined": lambda of: text_only(
        of("xlm-roberta"),
        normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
    ),
    "modernbert": lambda of: text_only(of("modernbert-mean")),
    "qwen3": lambda of: text_only(of("qwen3")),
    "gemma": lambda of: gemma(),
}


@cache
def tokenizer_of(kind: str, of: Callable[[str], Path]) -> Tokenizer:
    return KINDS[kind](of)


def encoded(tokenizer: Tokenizer, text: str) -> Tokens:
    found = tokenizer.encode(text, add_special_tokens=False)
    spans = np.array(found.offsets, np.int32).reshape(-1, 2)
    return Tokens(np.array(found.ids, np.int32), spans)


# Text that some tokenizer splits, drops, joins, counts or reorders.
PIECES = (
    *("mars is red ", "planet", "m", "ab", "aab", "zq", "don't ", "é", "ﬁ", "한", "का"),
    *(" ", "\n", "  \n", "\t", "\u00a0", "\u3000", "\u200b", "a\u200b", "\ufffd"),
    *(
        "火星是红色的",
        "哈",
        "🪐",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "e\u0301",
        "\u0301",
        "\u0323",
        "\u1112\u1161\u11ab",
    ),
    *("7", "12", "0x3f", "...", "=", "-", "x" * 99 + " ", "y" * 101 + " "),
)
RUNS = st.tuples(st.sampled_from(PIECES), st.integers(1, 2500)).map(
    lambda run: (run[0] * run[1])[:3000]
)
MIXED = st.lists(st.sampled_from(PIECES), min_size=1, max_size=300).map("".join)
LONG = st.lists(RUNS | MIXED, min_size=2, max_size=6).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(text=LONG, window=st.sampled_from([1500, 2500]), most=st.sampled_from([1, 5, 50, 400]))
def test_windows_have_the_tokens_of_the_whole_text(
    checkpoint_of: Callable[[str], Path], kind: str, text: str, window: int, most: int
) -> None:
    tokenizer = tokenizer_of(kind, checkpoint_of)
    unigram = isinstance(tokenizer.model, models.Unigram)
    windows = Windows(
        lambda part: encoded(tokenizer, part),
        window=window,
        longest=(lambda: max(map(len, tokenizer.get_vocab()))) if unigram else None,
    )
    whole = encoded(tokenizer, text)
    found = windows.read(text)
    assert found.ids.tolist() == whole.ids.tolist()
    # If blanks are joined, the one in the token's offsets depends on how many were read.
    strays = 1 if "joined" in kind else 0
    assert (np.abs(found.spans - whole.spans) <= strays).all()
    some = windows.read(text, most).ids
    assert len(some) > most or len(some) == len(whole.ids)
    assert some.tolist() == whole.ids[: len(some)].tolist()
    beginning = windows.beginning(text, most)
    ids = encoded(tokenizer, beginning).ids
    sure = windows.sure(beginning, ids) if len(beginning) < len(text) else len(ids)
    assert ids[:sure].tolist() == whole.ids[:sure].tolist()


@pytest.fixture(scope="module", params=["bert", "xlm-roberta", "modernbert-mean", "qwen3"])
def pieces(
    request: pytest.FixtureRequest,
    checkpoint_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PairTokenizer, Tokenizer]:
    """A pair tokenizer of each kind, and its inner tokenizer."""
    kind: str = request.param
    folder = checkpoint_of(kind)
    tokenizer = text_only(folder)
    path = tmp_path_factory.mktemp("tokenizer") / TOKENIZER
    tokenizer.save(str(path))
    family = read_checkpoint(str(folder), family=tiny_decoders.FAMILIES.get(kind)).family
    return PairTokenizer(path, family, threads=2), tokenizer


TEXTS = {
    "words": "Mars is the 4th planet, é and 火星; " * 4000,
    "one word": "m" * (WINDOW + 5000) + " red planet",
    "blanks": "red" + " " * 2 * WINDOW + "planet",
    "surrogates": "mars \ud800 " * 10_000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_long_document_is_read_as_if_at_once(
    pieces: tuple[PairTokenizer, Tokenizer], name: str
) -> None:
    """Its head, tail and chunks; also next to another document."""
    ours, tokenizer = pieces
    text = TEXTS[name]
    prompt = ours.prompt("which planet?")
    clean = (prompt.lead_in + text).replace("\ud800", "\ufffd")
    whole = tokenizer.encode(clean, add_special_tokens=False)
    ids, lead = whole.ids, sum(end <= len(prompt.lead_in) for _, end in whole.offsets)
    short, long = ours.documents(["mars", text], most=prompt.capacity)
    assert short.tolist() == ours.documents(["mars"])[0].tolist()
    assert long.tolist() == ids[: len(long)]
    assert len(long) > prompt.capacity or len(long) == len(ids)
    assert ours.tail(text, prompt, lead + 40).tolist() == ids[:lead] + ids[lead:][-40:]
    first, *_, last = ours.chunks(text, prompt) * 2
    assert first.ids.tolist() == ids[: len(first.ids)]
    assert last.ids.tolist() == ids[:lead] + ids[lead:][lead - len(last.ids) :]
    assert last.end == whole.offsets[-1][1] - len(prompt.lead_in)
    few = ours.chunks(text, prompt, 50)
    assert [n for part in few for n in part.ids.tolist()] == ids[: lead + 50]


MEMORY = """
import resource, sys
from qrank import Reranker

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

text = "word 0 " * 1_000_000
long = text[:1_000_000]
with Reranker("mini", backend="fakes:length", max_memory=300 * 2**20, threads=2) as reranker:
    reranker.rank("red", ["word 0 " * 600] * 20)
    before = peak()
    reranker.rank("red", [text, text + "a", "m" * 2_000_000])
    reranker.rank(text, ["red"])
    for way in ("tail", "chunk"):
        reranker.rank("red", [long, long + "a"], long_documents=way)
    print((peak() - before) / len(text))
"""


def python(code: str, **variables: str) -> str:
    """Run code in a separate process; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(HERE), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_text_of_7_mb_takes_a_few_times_its_size() -> None:
    """As a document next to other long ones, and as a query; a part of it with tail and chunk."""
    pytest.importorskip("resource")
    assert float(python(MEMORY)) < 5


THREADS = """
import sys, threading, time
from pathlib import Path
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.bundle.locate import locate

mini = locate("mini")
tokenizer = PairTokenizer(mini.tokenizer, mini.manifest.family, threads=int(sys.argv[1]))
texts = ["which planet is red and why " * 400] * 100
done, running = threading.Event(), []

def watch():
    own = threading.get_native_id()
    while not done.wait(0.005):
        states = 0
        for task in Path("/proc/self/task").iterdir():
            if int(task.name) != own:
                states += (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
        running.append(states)

# A daemon: an error below ends the process.
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
tokenizer.ids(texts)
done.set()
watcher.join()
print(sorted(running)[len(running) // 2])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_tokenize_than_there_may(threads: int) -> None:
    """With a pool of 16 threads, as the library has on a machine with 16 cores."""
    code = f"import sys; sys.argv.append('{threads}')\n{THREADS}"
    assert int(python(code, RAYON_NUM_THREADS="16")) <= threads
