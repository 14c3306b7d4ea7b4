"""What `qrank score --pairs` takes and keeps: memory, kills, shards, time.

- Memory: peak of a process that scores Parquet files of Cranfield abstracts, each with another
  beginning. A sum of the texts' bytes stands for tokenizer and model, so that a million pairs take
  less than a minute. Every row must be there with its columns and its score.
- Kills: a run that is killed (SIGKILL) ten times at random moments, and continued. Its files must
  be the same to the last byte as those of a run that is left alone.
- Shards: the outputs of 16 shards, two processes at a time, one shard given to two at once, are
  joined and compared with those of one run.
- Time: `score_files` from Parquet to Parquet beside `Reranker.score` of the same pairs in memory,
  by turns in one process. Pairs are short, because then reading and writing weigh most.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from common import Row, alternate, arguments, report

from qrank import Reranker, score_files
from qrank.backends import Backend, Options
from qrank.bundle.locate import DEFAULT
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.sequences import Logits, Sequences
from qrank.pairs.job import ROWS
from qrank.quality.collection import Collection
from qrank.system.machine import peak_memory, processors

HERE = Path(__file__).parent
DOUBLE = "pairs:double"
SHARDS = 16
SEED = 0


class _Double:
    """Gives the probes' logits, and for other pairs a number made of their token ids."""

    def __init__(self, folder: Path) -> None:
        probes = Manifest.load(folder).probes
        known = [ids.tobytes() for ids in probes.work.ids]
        self._known = dict(zip(known, probes.logits.tolist(), strict=True))

    def logits(self, work: Sequences) -> Logits:
        """See `qrank.backends.Backend`."""
        content = [ids.tobytes() for ids in work.ids]
        found = [self._known.get(each, zlib.crc32(each) / 2**32) for each in content]
        return np.array(found, np.float32)

    def close(self) -> None:
        """See `qrank.backends.Backend`."""


class _Quick(Reranker):
    """Scores a pair by a number made of its texts."""

    def score(self, pairs: Any, *more: object, **how: Any) -> Any:
        """See `Reranker.score`."""
        return np.array([zlib.crc32(repr(pair).encode()) / 2**32 for pair in pairs])


def double(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """A backend that takes no time: `--backend pairs:double`."""
    return _Double(folder)


def main() -> None:
    """Run what is asked for, and print the results."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=20_000, help="of the time")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[ROWS], help="of a chunk, of the time"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", help="(internal)")
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(_measured(Path(options.child))))
        return
    for name in options.only:
        with tempfile.TemporaryDirectory() as work:
            title, columns, rows = PARTS[name](options, Path(work))
        report(title, columns, rows, as_json=options.json)


def _pairs(options: Any) -> Iterator[dict[str, Any]]:
    """Cranfield's queries with its abstracts, over and over, each time with another beginning."""
    collection = Collection.read(options.data)
    queries = list(collection.queries.values())
    documents = [collection.documents[name] for name in collection.documents]
    number = 0
    while True:
        query, document = queries[number % len(queries)], documents[number % len(documents)]
        yield {"id": number, "query": query, "document": f"{number} {document}"}
        number += 1


def _write(rows: Iterator[dict[str, Any]], path: Path, count: int) -> None:
    """A Parquet file of so many rows."""
    schema = pa.schema({"id": pa.int64(), "query": pa.string(), "document": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        while count:
            some = list(islice(rows, min(count, 50_000)))
            writer.write_table(pa.Table.from_pylist(some, schema))
            count -= len(some)


def _memory(options: Any, work: Path) -> tuple[str, dict[str, str], list[Row]]:
    rows: list[Row] = []
    for count in options.counts:
        folder = work / str(count)
        folder.mkdir()
        _write(_pairs(options), folder / "in.parquet", count)
        command = [sys.executable, __file__, "--data", str(options.data), "--child", str(folder)]
        rows.append({"pairs": count, **json.loads(subprocess.check_output(command))})
        rows[-1] = {**rows[-1], "vs least": rows[-1]["peak MB"] / rows[0]["peak MB"] - 1}
        shutil.rmtree(folder)
    columns = {"pairs": ",d", "MB": ",.0f", "seconds": ",.0f", "peak MB": ",.0f"}
    columns |= {"vs least": "+.1%", "rows the same": ",d"}
    return "Memory: Parquet to Parquet, a sum for tokenizer and model", columns, rows


def _measured(folder: Path) -> dict[str, float]:
    """Score a file in this process; compare it afterwards, when the peak is known."""
    given, out = folder / "in.parquet", folder / "out"
    with _Quick(DEFAULT, backend=DOUBLE) as reranker:
        begun = time.perf_counter()
        score_files(reranker, given, out)
        found = {"MB": given.stat().st_size / 1e6, "seconds": time.perf_counter() - begun}
        found["peak MB"] = (peak_memory() or 0) / 1e6
        same = 0
        before, after = (pq.ParquetFile(path) for path in (given, out / "in.parquet"))
        for old, new in zip(before.iter_batches(), after.iter_batches(), strict=True):
            texts = zip(old["query"].to_pylist(), old["document"].to_pylist(), strict=True)
            scores = pa.array(reranker.score(list(texts)))
            same += len(old) if new.equals(old.append_column("score", scores)) else 0
    return {**found, "rows the same": same}


def _command(work: Path, out: str, *more: str) -> list[str]:
    files = ["--pairs", str(work / "in"), "-o", str(work / out)]
    return [sys.executable, "-m", "qrank", "score", "-m", DEFAULT, *files, *more]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE)}


def _run(*command: str) -> None:
    subprocess.run(command, env=_environment(), check=True, stderr=subprocess.DEVNULL)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _killed(options: Any, work: Path) -> tuple[str, dict[str, str], list[Row]]:
    """Parquet, compressed JSONL and CSV, scored by the real model."""
    (work / "in").mkdir()
    _write(_pairs(options), work / "in" / "a.parquet", 600)
    some = list(islice(_pairs(options), 600))
    lines = "".join(json.dumps(row) + "\n" for row in some)
    (work / "in" / "b.jsonl.gz").write_bytes(zlib.compress(lines.encode(), wbits=31))
    table = pa.Table.from_pylist(some)
    pa.csv.write_csv(table, work / "in" / "c.csv")
    limits = ["--rows", "50", "--max-length", "64"]
    begun = time.perf_counter()
    _run(*_command(work, "whole", *limits))
    seconds = time.perf_counter() - begun
    chance = random.Random(SEED)
    kills = 0
    while kills < options.kills:
        started = subprocess.Popen(
            _command(work, "killed", *limits), env=_environment(), stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(0, seconds * 0.4))
        if started.poll() is None:
            kills += 1
        started.send_signal(signal.SIGKILL)
        started.wait()
        if set(_contents(work / "in")) <= {path.name for path in (work / "killed").glob("*")}:
            shutil.rmtree(work / "killed")  # done before the last kill: once more
    _run(*_command(work, "killed", *limits))
    same = _contents(work / "whole") == _contents(work / "killed")
    row = {"pairs": 1800, "seconds": seconds, "kills": kills, "the same": str(same)}
    columns = {"pairs": ",d", "seconds": ".1f", "kills": "d", "the same": "s"}
    return f"Kills: {DEFAULT}, three files, chunks of 50 rows", columns, [row]


def _sharded(options: Any, work: Path) -> tuple[str, dict[str, str], list[Row]]:
    """Four files, fewer than shards: rows are shared out."""
    (work / "in").mkdir()
    rows = _pairs(options)
    for number, count in enumerate((5_000, 100, 12_345, 20_000)):
        _write(rows, work / "in" / f"{number}.parquet", count)
    how = ["--backend", DOUBLE, "--rows", "512", "--max-length", "64"]
    _run(*_command(work, "one", *how))
    todo = [*range(SHARDS), 3]
    todo.insert(0, todo.pop())  # 3 beside 0, then 3 again beside 2: also once it is being scored
    todo.insert(1, 3)
    running: list[subprocess.Popen[bytes]] = []
    for number in todo:
        command = _command(work, "many", *how, "--shard", f"{number}/{SHARDS}")
        running.append(subprocess.Popen(command, env=_environment(), stderr=subprocess.DEVNULL))
        if len(running) == 2:
            assert [each.wait() for each in running] == [0, 0]
            running.clear()
    assert all(each.wait() == 0 for each in running)
    same = []
    for path in sorted((work / "one").glob("*.parquet")):
        parts = sorted((work / "many").glob(f"{path.stem}.*.parquet"))
        joined = pa.concat_tables(pq.read_table(part) for part in parts)
        same.append(joined.equals(pq.read_table(path)))
    outputs = len(list((work / "many").glob("*.parquet")))
    row = {"files": 4, "shards": SHARDS, "outputs": outputs, "the same": str(all(same))}
    columns = {"files": "d", "shards": "d", "outputs": "d", "the same": "s"}
    return "Shards: 37,445 pairs, a function for the model", columns, [row]


def _timed(options: Any, work: Path) -> tuple[str, dict[str, str], list[Row]]:
    rows = list(islice(_pairs(options), options.pairs))
    for row in rows:
        for column, words in (("query", 8), ("document", 12)):
            row[column] = " ".join(row[column].split()[:words])
    _write(iter(rows), work / "in.parquet", len(rows))
    pairs = [(row["query"], row["document"]) for row in rows]
    with Reranker(DEFAULT) as reranker:
        number = iter(range(1000))

        def files(size: int) -> object:
            return score_files(reranker, work / "in.parquet", work / str(next(number)), rows=size)

        cases: dict[str, Callable[[], object]] = {"Reranker.score": lambda: reranker.score(pairs)}
        for size in options.rows:
            cases[f"score_files, chunks of {size:,}"] = partial(files, size)
        reranker.score(pairs[:500])
        seconds = alternate(cases, options.rounds)
        target = reranker.target.name
    least = {name: float(np.median(found)) for name, found in seconds.items()}
    found = [
        {
            "what": name,
            "seconds": each,
            "pairs/s": len(pairs) / each,
            "vs score": each / least["Reranker.score"] - 1,
        }
        for name, each in least.items()
    ]
    columns = {"what": "s", "seconds": ".2f", "pairs/s": ",.0f", "vs score": "+.1%"}
    title = f"Time: {len(pairs):,} pairs of 20 words, {target}, {processors()} threads"
    return title, columns, found


PARTS: dict[str, Callable[[Any, Path], tuple[str, dict[str, str], list[Row]]]] = {
    "memory": _memory,
    "kills": _killed,
    "shards": _sharded,
    "time": _timed,
}

if __name__ == "__main__":
    main()
