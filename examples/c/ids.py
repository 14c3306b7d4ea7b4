"""Pairs as lines of token ids and token types, after a bundle's activation: python ids.py BUNDLE.

Reads pairs from stdin, a line each, query and document separated by a tab.
"""

import sys

from qrank.bundle.locate import locate
from qrank.scoring.pair_tokenizer import PairTokenizer

bundle = locate(sys.argv[1] if len(sys.argv) > 1 else "mini")
family = bundle.manifest.family
tokenizer = PairTokenizer(bundle.tokenizer, family)
sys.stdout.write(f"{family.activation} {family.temperature}\n")
for line in sys.stdin:
    for row in tokenizer.whole(*line.rstrip("\n").split("\t", 1)):
        sys.stdout.write(" ".join(map(str, () if row is None else row)) + "\n")
