"""How good the choice of `qrank tune` is: every target measured again, in turns.

"behind" is how far the chosen target's median speed is below that of the best target. "bar met"
means 5 % or less, or within the noise of the rounds (the 95 % interval of the ratio of the two
medians, by resampling rounds). Variants that are taken last whatever their speed
(`selection.deprioritized`) do not take part.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from common import arguments, report

from qrank.backends import formats
from qrank.bundle.locate import locate
from qrank.measure.candidates import Candidate, candidates
from qrank.measure.discover import survey
from qrank.measure.profiles import documents
from qrank.measure.tournament import Tournament, in_turns
from qrank.measure.tuning import tune
from qrank.select.measurements import PROFILES, Measurement
from qrank.select.selection import TIE_MARGIN, Criteria, deprioritized, order
from qrank.system import machine

COLUMNS = {
    "bundle": "",
    "profile": "",
    "chosen": "",
    "pairs/s": ".1f",
    "best": "",
    "best pairs/s": ".1f",
    "behind": ".1%",
    "bar met": "",
}


def main() -> None:
    """Tune every bundle, measure its targets again, and print which was the best."""
    parser = arguments(__doc__)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=7, help="[default: %(default)s]")
    parser.add_argument("--pairs", type=int, default=20, help="at most  [default: %(default)s]")
    options = parser.parse_args()
    rows = [row for bundle in options.bundles for row in examined(bundle, options)]
    title = f"The choice of qrank tune, {options.rounds} rounds"
    report(title, COLUMNS, rows, as_json=options.json)


def examined(bundle: str, options: Any) -> list[dict[str, object]]:
    """One row per profile."""
    opened = locate(bundle)
    manifest = opened.manifest
    threads = machine.processors()
    measured = tune(opened)
    last = deprioritized(manifest, Criteria())
    found = [survey(f, 60.0) for f in formats()]
    every = [c for c in candidates(manifest, found, threads) if c.target.variant.name not in last]
    for profile in PROFILES:
        best = order(measured, Criteria(profile=profile), last)[0]
        if not any(_is(candidate, best) for candidate in every):
            base = next(c for c in every if c.target.key == best.target)
            setting = (best.compute_dtype, best.threads, best.max_batch_tokens)
            every.append(Candidate(base.target, *setting))
    contest = Tournament(opened.folder, {})
    rows = []
    with ExitStack() as stack:
        running = [stack.enter_context(contest.opened(candidate)) for candidate in every]
        for profile in PROFILES:
            best = order(measured, Criteria(profile=profile), last)[0]
            texts = documents(opened, profile)[: options.pairs]
            cases = {n: partial(contest.rank, one, texts) for n, one in enumerate(running)}
            in_turns(cases, (1, 1), 0)
            times, failed = in_turns(cases, (options.rounds, options.rounds), 0)
            assert not failed, failed
            fastest = min(times, key=lambda number: np.median(times[number]))
            taken = next(n for n, candidate in enumerate(every) if _is(candidate, best))
            speeds = {n: len(texts) / float(np.median(times[n])) for n in (fastest, taken)}
            behind = 1 - speeds[taken] / speeds[fastest]
            low = _least_behind(np.array(times[taken]), np.array(times[fastest]))
            rows.append(
                {
                    "bundle": manifest.name,
                    "profile": profile,
                    "chosen": every[taken].name,
                    "pairs/s": speeds[taken],
                    "best": every[fastest].name,
                    "best pairs/s": speeds[fastest],
                    "behind": behind,
                    "bar met": "yes" if behind <= TIE_MARGIN or low <= 0 else "no",
                }
            )
    return rows


def _is(candidate: Candidate, best: Measurement) -> bool:
    return (
        candidate.target.key,
        candidate.compute_dtype,
        candidate.threads,
        candidate.max_batch_tokens,
    ) == (
        best.target,
        best.compute_dtype,
        best.threads,
        best.max_batch_tokens,
    )


def _least_behind(taken: Any, fastest: Any) -> float:
    """The lower end of the 95 % interval of `behind`; a round's two times stay together."""
    rounds = np.random.default_rng(0).integers(0, len(taken), (2000, len(taken)))
    ratios = np.median(fastest[rounds], axis=1) / np.median(taken[rounds], axis=1)
    return 1 - float(np.percentile(ratios, 97.5))


if __name__ == "__main__":
    main()
