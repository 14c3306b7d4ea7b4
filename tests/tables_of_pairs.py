"""Files of pairs in every form, written and read as lists of rows."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]

FORMS = (".jsonl", ".csv", ".tsv", ".parquet")
PACKED: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}


def rows_of(count: int, *, first: int = 0) -> Rows:
    """Rows of different lengths, in no order, each a few times."""
    return [
        {"id": str(n), "query": f"q{n % 7}", "document": "a " * (n * 5 % 13) + "é"}
        for n in range(first, first + count)
    ]


def write(path: Path, rows: Rows) -> Path:
    """Write rows in the form of a path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        schema = pa.schema({"id": pa.string(), "query": pa.string(), "document": pa.string()})
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=7)
        return path
    name = path.name
    packed = next((p for p in PACKED if name.endswith(p)), "")
    text = io.StringIO(newline="")
    if name.removesuffix(packed).endswith(".jsonl"):
        text.writelines(json.dumps(row) + "\n" for row in rows)
    elif name.removesuffix(packed).endswith(".tsv"):
        text.write("id\tquery\tdocument\n")
        text.writelines("\t".join(row.values()) + "\n" for row in rows)
    else:
        table = csv.DictWriter(text, ["id", "query", "document"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(PACKED[packed].compress(data) if packed else data)
    return path


def read(path: Path) -> Rows:
    """Read what `qrank score --pairs` wrote; scores are numbers."""
    if path.suffix == ".parquet":
        rows: Rows = pq.read_table(path).to_pylist()
        return rows
    name, data = path.name, path.read_bytes()
    for suffix, module in PACKED.items():
        if name.endswith(suffix):
            name, data = name.removesuffix(suffix), module.decompress(data)
    text = data.decode()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line]
    if name.endswith(".tsv"):
        header, *lines = (line.split("\t") for line in text.removesuffix("\n").split("\n"))
        found: Rows = [dict(zip(header, line, strict=True)) for line in lines]
    else:
        found = list(csv.DictReader(io.StringIO(text, newline="")))
    return [{**row, "score": float(row["score"])} for row in found]
