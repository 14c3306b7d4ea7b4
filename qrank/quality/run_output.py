"""Write a reranked run into a folder, query by query, so that a killed run goes on."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from qrank.pairs.folder import append, claimed, hidden, settle, whole
from qrank.pairs.job import settings_of
from qrank.pairs.plan import Shard, fingerprint
from qrank.quality.rerank_run import RunReranker
from qrank.reranker import Reranker
from qrank.scoring.inputs import LongDocuments
from qrank.system.steps import Progress, no_progress

_POLL = 0.5
"""Seconds between two attempts to take an output that another process writes."""

log = logging.getLogger("qrank")


def rerank_into(
    folder: Path,
    run: RunReranker,
    reranker: Reranker,
    *,
    shard: Shard | None = None,
    top_k: int | None = None,
    instruction: str | None = None,
    long_documents: LongDocuments = "truncate",
    progress: Progress = no_progress,
) -> tuple[Path, int]:
    """Write a reranked run into a folder; it has the run's name.

    A call that was interrupted is continued by the same call, and the result is the same.

    Args:
        folder: created if missing; see `qrank.pairs.folder`.
        run: all of it is reranked, or a shard's queries.
        reranker: see `RunReranker.rerank`.
        shard: a range of the queries; the output's name then ends in `.03-of-16`.
        top_k: as for `Reranker.rank`.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`.
        progress: called with the number of reranked queries, and of all.

    Returns:
        The output, and how many of its queries an earlier call had reranked.

    Raises:
        InputError: the folder has results of other settings.
        OSError: the output cannot be written.
    """
    first, stop = (0, run.count) if shard is None else shard.share(run.count)
    output = folder / (run.name if shard is None else shard.named(run.name))
    settings = {
        **settings_of(reranker, True, instruction, long_documents),
        "top_k": top_k,
        "shards": None if shard is None else shard.count,
        "inputs": fingerprint({str(n): path for n, path in enumerate(run.files) if path.is_file()}),
    }
    settle(folder, settings, iter([output]))
    told = False
    while not output.exists():
        with claimed(output) as file:
            if file is not None and not output.exists():
                before = _resumed(file, run.queries(first, stop))
                progress("reranking", before, stop - first)
                reranked = run.rerank(
                    reranker,
                    first=first + before,
                    stop=stop,
                    top_k=top_k,
                    instruction=instruction,
                    long_documents=long_documents,
                )
                for done, lines in enumerate(reranked, before + 1):
                    content = "".join(f"{line}\n" for line in lines)
                    append(file, content.encode(), hidden(output, ".kept"))
                    progress("reranking", done, stop - first)
                file.seek(0)
                with whole(output) as written:
                    shutil.copyfileobj(file, written)
                return output, before
        if not output.exists():
            if not told:
                log.warning("waiting for %s, which another process writes", output)
                told = True
            time.sleep(_POLL)
    return output, stop - first


def _resumed(file: IO[bytes], queries: Iterator[str]) -> int:
    """How many queries a file has; it is cut off where the next one begins.

    The last one may not be whole, so it counts as not there.
    """
    count = end = place = 0
    current = None
    file.seek(0)
    with open(file.fileno(), "rb", closefd=False) as buffered:
        for line in buffered:
            if not line.endswith(b"\n"):
                break  # the beginning of a query's name may look like another query
            query = line.partition(b" ")[0].decode("utf-8", "replace")
            if query != current:
                if current is not None:
                    count, end = count + 1, place
                if query != next(queries, None):
                    break
                current = query
            place += len(line)
    file.truncate(end)
    return count
