"""Rankings as a table, TSV, JSON, JSONL or a TREC run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qrank.errors import InputError
from qrank.quality.records import id_of
from qrank.quality.rerank_run import LOGIT, TAG, falling
from qrank.scoring.ranking import Ranking

_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that break a line or a column, or control a terminal.

These are Unicode's categories Cc, Zl and Zp, and the characters of Cf that embed, isolate or
override the writing direction. Joiners, spaces, marks and unassigned characters are text.
"""


Names = str | list[str]
"""Of a model or a target; of several, those of a cascade."""


@dataclass(frozen=True)
class Result:
    """A ranked document and the fields its input line had.

    Attributes:
        ranking: as the reranker returned it.
        score: what to show: the score, or with --raw the logit.
        fields: of its JSON line; {} for plain lines.
    """

    ranking: Ranking
    score: float
    fields: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The JSON object: the input line's fields, overridden by the ranking's, except "text"."""
        ranking = self.ranking
        record = {
            **self.fields,
            "index": ranking.index,
            "score": self.score if ranking.scored else None,
        }
        record.setdefault("text", ranking.text)
        if ranking.truncated:
            record["truncated"] = True
        if ranking.part is not None:
            record["part"] = list(ranking.part)
        if ranking.stage is not None:
            record["stage"] = ranking.stage
        return record


def _table(
    results: Sequence[Result], model: Names, target: Names, scored_count: int | None
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    # rich narrows only columns that may wrap: the document, which then ends in an ellipsis.
    staged = isinstance(model, list)
    for name in ("rank", "score", "index", *["stage"] * staged):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("document")
    for rank, result in enumerate(results, 1):
        table.add_row(
            str(rank),
            f"{result.score:.4f}" if result.ranking.scored else "–",
            str(result.ranking.index),
            *[_stage(result) or "–"] * staged,
            Text(_line(result.ranking.text), no_wrap=True, overflow="ellipsis"),
        )
    console = Console()
    console.print(table)
    for stage in zip(_list(model), _list(target), strict=True):
        console.print(Text(", ".join(stage), style="dim"))


def _tsv(results: Sequence[Result], model: Names, target: Names, scored_count: int | None) -> None:
    for rank, result in enumerate(results, 1):
        columns = [str(rank), f"{result.score:.6g}", str(result.ranking.index)]
        if isinstance(model, list):
            columns.append(_stage(result))
        click.echo("\t".join([*columns, _line(result.ranking.text)]))


def _json(results: Sequence[Result], model: Names, target: Names, scored_count: int | None) -> None:
    kind = ("models", "targets") if isinstance(model, list) else ("model", "target")
    content: dict[str, Any] = dict(zip(kind, (model, target), strict=True))
    if scored_count is not None:
        content["scored_count"] = scored_count
    content["results"] = [result.record() for result in results]
    click.echo(json.dumps(content, ensure_ascii=False, indent=2))


def _jsonl(
    results: Sequence[Result], model: Names, target: Names, scored_count: int | None
) -> None:
    for result in results:
        click.echo(json.dumps(result.record(), ensure_ascii=False))


def _trec(results: Sequence[Result], model: Names, target: Names, scored_count: int | None) -> None:
    # Logits, as in `qrank.quality.rerank_run`: an evaluator sorts by them.
    numbers = falling([result.ranking for result in results])
    for rank, (result, number) in enumerate(zip(results, numbers, strict=True), 1):
        try:
            identity = id_of(result.fields, "document")
        except ValueError as error:
            raise InputError(f"{error}; a TREC run cannot hold it") from None
        if identity is None:
            identity = str(result.ranking.index)
        if identity.split() != [identity]:
            raise InputError(f"the id {identity!r} is no single word; a TREC run cannot hold it")
        click.echo(f"q Q0 {identity} {rank} {number:{LOGIT}} {TAG}")


def _stage(result: Result) -> str:
    return "" if result.ranking.stage is None else str(result.ranking.stage)


def _list(names: Names) -> list[str]:
    return names if isinstance(names, list) else [names]


def _line(text: str) -> str:
    """A text on one line, without characters that control a terminal or break a column."""
    return _BREAKING.sub(" ", text)


WRITERS: dict[str, Callable[[Sequence[Result], Names, Names, int | None], None]] = {
    "table": _table,
    "tsv": _tsv,
    "json": _json,
    "jsonl": _jsonl,
    "trec": _trec,
}
"""Value of `--format` -> function that prints (results, model, target, scored_count).

`scored_count` is the number of documents that were scored within the budget; None: no budget.
"""
