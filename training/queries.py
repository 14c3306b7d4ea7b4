"""Queries made from passages: headings, sentences cut out of them, and questions shaped from both.

A quarter to a half of the headings and sentences are phrased as questions, so that neither a
question word nor its absence tells the model anything.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Query(NamedTuple):
    """A query, the passage (an index) it is from, and what the model reads of that passage.

    `reads` differs from the passage if the query is from a sentence that was cut out of it. It is
    empty if the passage is left out of the list, which then only the teacher ranks.
    """

    text: str
    passage: int
    reads: str


_ABOUT = (
    "what is known about {}",
    "what are the main properties of {}",
    "how does {} work",
    "where can i find information on {}",
    "what is meant by {}",
    "tell me about {}",
    "what methods are available for {}",
    "how is {} used",
    "what is the purpose of {}",
    "has anyone investigated {}",
    "what problems arise with {}",
    "what is {}",
    "what are {}",
    "papers dealing with {}",
    "how does one deal with {}",
    "what has been done on {}",
)
_CLAIM = (
    "is it true that {}",
    "has anyone shown that {}",
    "can it be said that {}",
    "why is it that {}",
    "under what conditions can one say that {}",
    "how do we know that {}",
    "what evidence is there that {}",
    "does anything indicate that {}",
)
_VAGUE = frozenset(
    "introduction|overview|notes|note|description|detailed description|see also|examples|example|"
    "summary|parameters|usage|name|results|general|details|index|synopsis|author|authors|"
    "references|background|motivation|conclusion|remarks|limitations|options|features|"
    "member function documentation|function documentation|the commented program".split("|")
)
_STOP = frozenset(
    "the of and to in a is that for it as with be by on this or an from at if".split()
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, cut at full stops that a capital follows."""
    return re.split(r"(?<=[a-z0-9)][.?!])\s+(?=[A-Z])", text)


def _trim(words: Sequence[str]) -> list[str]:
    """Words without the stop words at both ends, so that a span reads like a noun phrase."""
    start, end = 0, len(words)
    while start < end and words[start].lower() in _STOP:
        start += 1
    while end > start and words[end - 1].lower().strip(".,;") in _STOP:
        end -= 1
    return list(words[start:end])


def _from_sentence(sentence: str, rng: random.Random) -> str:
    """A query from a sentence: itself, a question about it or about a span of it, or keywords."""
    words = sentence.rstrip(".?!").split()
    kind = rng.random()
    if kind < 0.35:
        return " ".join(words)
    if kind < 0.5:
        return rng.choice(_CLAIM).format(" ".join([words[0].lower(), *words[1:]]))
    length = rng.randint(4, 14)
    start = rng.randint(0, max(0, len(words) - length))
    span = _trim([word.strip(',;:()"') for word in words[start : start + length]])
    if len(span) < 3:
        return " ".join(words)
    if kind < 0.85:
        return rng.choice(_ABOUT).format(" ".join(span))
    return " ".join(word for word in span if word.lower() not in _STOP)


def _from_title(title: str, rng: random.Random) -> str:
    if title.endswith("?") or rng.random() < 0.55:
        return title
    return rng.choice(_ABOUT).format(title[0].lower() + title[1:])


def made(passages: Sequence[Mapping[str, str]], count: int, seed: int) -> Iterator[Query]:
    """About `count` queries: a quarter from headings, the rest from sentences.

    One sentence in six, and each that leaves fewer than 15 words of its passage, is used without
    the passage, so that only the teacher ranks the list. A reranker often meets this case: its
    first stage missed the best passage.
    """
    rng = random.Random(seed)
    chosen = [i for i, passage in enumerate(passages) if passage["source"] != "squad"]
    rng.shuffle(chosen)
    left = count
    for index in chosen * 3:
        if left == 0:
            return
        title, text = passages[index]["title"], passages[index]["text"]
        parts = sentences(text)
        usable = [part for part in parts if 7 <= len(part.split()) <= 32]
        if title and title.lower() not in _VAGUE and (rng.random() < 0.25 or not usable):
            yield Query(_from_title(title, rng), index, text)
        elif usable and len(parts) > 1:
            sentence = rng.choice(usable)
            query = _from_sentence(sentence, rng)
            rest = " ".join(part for part in parts if part is not sentence)
            orphan = rng.random() < 1 / 6 or len(rest.split()) < 15
            yield Query(query, index, "" if orphan else rest)
        else:
            continue
        left -= 1
