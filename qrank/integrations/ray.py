"""Ray: scores for a dataset of Ray Data, and for files on the nodes of a cluster.

import ray
from qrank.integrations.ray import score

score(ray.data.read_parquet("in"), model="mini").write_parquet("out")
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from qrank.errors import InputError
from qrank.integrations.ray_files import score_files
from qrank.integrations.ray_nodes import Placing, everywhere, nodes, pool
from qrank.pairs.job import ROWS, once, scores_of
from qrank.pairs.table import Columns, places, unusable
from qrank.reranker import Reranker
from qrank.scoring import arguments
from qrank.scoring.inputs import LongDocuments

__all__ = ["score", "score_files"]

log = logging.getLogger("qrank")


def score(
    ds: ray.data.Dataset,
    model: str | Path = "mini",
    *,
    query_column: str = "query",
    document_column: str = "document",
    score_column: str = "score",
    raw: bool = False,
    instruction: str | None = None,
    long_documents: LongDocuments = "truncate",
    rows: int = ROWS,
    concurrency: int | None = None,
    threads: int | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """Score the pairs in a dataset: the same rows with a column of scores, lazily as all of Ray.

    Each node has one actor with the model, and all of its CPUs but one, which Ray Data needs to
    read and to write; a node that is much larger than the others has several. On a device other
    than `cpu`, each GPU that Ray counts has an actor. The nodes that are there when this is called
    count. An actor that dies is started again where it fits.

    Args:
        ds: rows with texts.
        model: as for `Reranker`; a folder needs the same path on all nodes.
        query_column: column of the queries.
        document_column: column of the documents.
        score_column: column of the scores: float64.
        raw: logits instead of scores.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`.
        rows: rows of a block: what an actor is given at a time. Equal pairs in it are scored once.
        concurrency: number of actors.
        threads: of an actor.
        options: other arguments of `Reranker`: `backend`, `device`, ... Name the backend: each node
            chooses for itself otherwise.

    Returns:
        A dataset that has not been computed yet. A row without two texts makes it fail.

    Raises:
        InputError: a column is missing; or the actors would take every CPU, and Ray Data wait for
            ever.
    """
    columns = Columns(query_column, document_column, score_column)
    rows = arguments.whole("rows", rows, 1) or ROWS
    raw = arguments.flag("raw", raw)
    schema = ds.schema(fetch_if_missing=False)
    if schema is not None:
        places("the dataset", schema.names, columns)
    on_gpu = options.get("device") not in (None, "cpu")
    made = pool(
        nodes(),
        # With a checkpoint, an actor of Ray's leaves out what it has.
        spare=1 if ds.context.checkpoint_config is None else 2,
        on_gpu=on_gpu,
        size=arguments.whole("concurrency", concurrency, 1),
        threads=arguments.whole("threads", threads, 1),
    )
    log.info("%d actors of %d threads on the nodes of Ray", len(made.nodes), made.threads)
    scorer = {
        "model": everywhere(model),
        "options": {"device": "cpu", **options, "threads": made.threads},
        "columns": columns,
        "how": (raw, instruction, long_documents),
    }
    # A block is what an actor computes and, if it dies, loses; a small file would be one.
    return ds.repartition(target_num_rows_per_block=rows).map_batches(
        _Scorer,
        fn_constructor_kwargs=scorer,
        batch_format="pyarrow",
        batch_size=rows,
        compute=ray.data.ActorPoolStrategy(size=len(made.nodes)),
        ray_remote_args_fn=Placing(made),
        udf_modifying_row_count=False,
        **made.claim,
    )


class _Scorer:
    """An actor of Ray Data: holds the model."""

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        columns: Columns,
        how: tuple[bool, str | None, LongDocuments],
    ) -> None:
        self._reranker = Reranker(model, **options)
        self._columns = columns
        self._how = how

    def __call__(self, table: pa.Table) -> pa.Table:
        """The same rows with their scores."""
        names = self._columns
        texts = [
            table.column(at).to_pylist() for at in places("a block", table.column_names, names)
        ]
        pairs = list(zip(*texts, strict=True))
        for pair in pairs:
            for name, text in zip(names[:2], pair, strict=True):
                if (reason := unusable(name, text)) is not None:
                    raise InputError(f"a row cannot be scored, because {reason}: {pair!r:.300}")
        found = once(pairs, lambda unlike: scores_of(self._reranker, unlike, *self._how))
        scores = pa.array(found, pa.float64())
        return table.append_column(names.score, scores)
