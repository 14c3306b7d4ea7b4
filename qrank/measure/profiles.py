"""Made-up documents of a profile's length, for timing targets if the user gives none."""

from __future__ import annotations

from qrank.bundle.opened import Bundle
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.select.measurements import PROFILES, Profile

QUERY = "how do plants turn light into sugar?"

_WORDS = (
    "plants use the energy of light to make sugar from water and carbon dioxide which they take "
    "up by roots and leaves while a slow river carries sand past old towns whose people build "
    "boats bake bread and tell stories about winter storms that broke seven ships near the coast"
).split()


def documents(bundle: Bundle, profile: Profile) -> list[str]:
    """Made-up documents with the number and length of a profile."""
    encoder = PairTokenizer(bundle.tokenizer, bundle.manifest.family)
    count, tokens = PROFILES[profile]
    lengths = [len(ids) for ids in encoder.ids([f" {word}" for word in _WORDS])]
    room = tokens - len(encoder.ids([QUERY])[0])
    made = []
    for place in range(count):
        words, left = [], room
        while left > 0:
            words.append(_WORDS[place % len(_WORDS)])
            left -= lengths[place % len(_WORDS)]
            place += 1
        made.append(" ".join(words))
    return made
