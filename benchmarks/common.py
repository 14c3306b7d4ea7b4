"""What the benchmarks share: alternating rounds, and tables."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qrank.backends import Options, onnx
from qrank.bundle.fidelity import Fidelity, Tolerance
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Sequences
from qrank.converters import fidelity
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.select import verify
from qrank.system.machine import cpu_name, instruction_sets, processors

Row = Mapping[str, Any]


def arguments(description: str | None, *, on_data: bool = False) -> argparse.ArgumentParser:
    """A parser with the common arguments; the first paragraph of a docstring describes it.

    Args:
        description: the docstring.
        on_data: whether `--data` is required.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, required=on_data, help="folder of the collection; see README.md"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    return parser


def encode(tokenizer: PairTokenizer, query: str, documents: Sequence[str]) -> Sequences:
    """One query's pairs as token ids, truncated as by `Reranker.rank`."""
    pairs = [tokenizer.whole(query, document) for document in documents]
    return Sequences(
        [ids for ids, _ in pairs], [types for _, types in pairs if types is not None] or None
    )


def join(works: Sequence[Sequences]) -> Sequences:
    """Several works as one."""
    segments = [types for work in works for types in work.segments or []]
    return Sequences([ids for work in works for ids in work.ids], segments or None)


def open_onnx(
    folder: Path, name: str, *, threads: int, streams: int | None = None
) -> onnx.OnnxBackend:
    """Open FOLDER/onnx-NAME/model.onnx in qrank's own backend, with a given number of streams.

    This sets a private attribute, and the benchmarks set one for the batch size, so that they
    measure the code and the session settings that users run.
    """
    variant = Variant("onnx", name, {}, Fidelity(0.0, 0.0, 0.0, 0.0), {})
    backend = onnx.open(folder, variant, "cpu", Options(threads))
    if streams is not None:
        backend._streams.shutdown()
        backend._streams = ThreadPoolExecutor(streams)
    return backend


def alternate(cases: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each case in each round.

    Cases take turns, in another order each round, so that other load on the machine affects all of
    them alike. A first round warms up and does not count. `machine` then says how much of the
    machine others took during all calls so far.
    """
    order = np.random.default_rng(0)
    keys = list(cases)
    seconds: dict[Any, list[float]] = {key: [] for key in keys}
    begun, before = time.perf_counter(), _processor_seconds()
    for number in range(rounds + 1):
        for i in order.permutation(len(keys)):
            start = time.perf_counter()
            cases[keys[i]]()
            if number:
                seconds[keys[i]].append(time.perf_counter() - start)
    if before is not None and (after := _processor_seconds()) is not None:
        everyone, ours = (late - early for late, early in zip(after, before, strict=True))
        whole = (time.perf_counter() - begun) * (os.cpu_count() or 1)
        _taken.append((max(everyone - ours, 0.0), whole))
    return seconds


_taken: list[tuple[float, float]] = []
"""Processor seconds that others took, and all there were, by call of `alternate`."""


def _processor_seconds() -> tuple[float, float] | None:
    """Processor time that everyone, and that this process with its children, has used so far.

    A neighbour of a virtual machine counts as everyone (`steal`). None without Linux's /proc.
    """
    if not Path("/proc/stat").exists():
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, *interrupts = map(
        int, Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()[1:9]
    )
    used, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text("utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        used[number] = sum(map(int, fields[11:15]))  # with that of children that have ended
    ours, more = {os.getpid()}, {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in more} - ours:
        ours |= more
    everyone = user + nice + system + sum(interrupts)
    return everyone / tick, sum(used.get(number, 0) for number in ours) / tick


def report(title: str, formats: Mapping[str, str], rows: Sequence[Row], *, as_json: bool) -> None:
    """Print rows as a Markdown table under a line that names the machine, or as JSON.

    Args:
        title: what the table shows.
        formats: column -> format specification of its cells, in order.
        rows: column -> value; None prints as nothing.
        as_json: one JSON object instead.
    """
    if as_json:
        content = {"title": title, "machine": machine(), "rows": [dict(row) for row in rows]}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    cells = [list(formats)] + [
        ["" if row.get(c) is None else format(row[c], spec) for c, spec in formats.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # The first column is text; the others are numbers, aligned right.
    lines = [
        [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ]
        for r in cells
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    sys.stdout.write(f"**{title}**\\\n{machine()}\n\n{text}\n\n")


def machine() -> str:
    """The CPU, how many this process may use, how busy others kept them, and versions.

    Names such as "AMD EPYC" are those of many CPUs: their instruction sets tell them apart.
    """
    versions = [f"{p} {metadata.version(p)}" for p in ("onnxruntime", "numpy")]
    others, whole = (sum(column) for column in zip(*_taken, strict=True)) if _taken else (0, 0)
    busy = [f"others took {others / whole:.0%} of them"] if whole else []
    return ", ".join(
        [
            f"{cpu_name()} ({instruction_sets()[-1]})" if instruction_sets() else cpu_name(),
            f"{processors()} CPUs",
            *busy,
            f"Python {platform.python_version()}",
            *versions,
        ]
    )


def tolerate_anything() -> None:
    """Accept every conversion of random weights: the benchmarks only measure them."""
    for module in (fidelity, verify):
        vars(module)["tolerance"] = lambda *name: Tolerance(math.inf)
