"""Shards: disjoint, complete, the same for every process, numbered as in job arrays."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrank.errors import InputError
from qrank.pairs.plan import Piece, Shard, Source, fingerprint, pieces

SLURM = "SLURM_ARRAY_TASK_"


def slurm(task: int, count: int, least: int, most: int) -> dict[str, str]:
    values = {"ID": task, "COUNT": count, "MIN": least, "MAX": most}
    return {SLURM + name: str(value) for name, value in values.items()}


@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=9),
    count=st.integers(1, 20),
    rows=st.integers(1, 30),
)
def test_every_row_belongs_to_one_shard(sizes: list[int], count: int, rows: int) -> None:
    found = [Source(Path(f"{n}.csv"), f"{n}.csv") for n in range(len(sizes))]
    length = dict(zip(found, sizes, strict=True))
    cut = [pieces(found, Shard(n, count), rows, length.__getitem__) for n in range(count)]
    every = [piece for own in cut for piece in own]
    assert len({piece.name for piece in every}) == len(every)
    if count <= len(sizes):
        assert sorted(piece.source.name for piece in every) == [source.name for source in found]
        assert all(piece == Piece(piece.source, piece.source.name) for piece in every)
        assert max(map(len, cut)) - min(map(len, cut)) <= 1
        return
    for source, size in length.items():
        own = [piece for piece in sorted(every, key=lambda p: p.name) if piece.source == source]
        ranges = [range(piece.first, min(piece.stop or size, size)) for piece in own]
        assert [row for each in ranges for row in each] == list(range(size))
        assert all(piece.first % rows == 0 for piece in own)
    chunks = [sum(-(-((p.stop or 0) - p.first) // rows) for p in own) for own in cut]
    assert max(chunks) - min(chunks) <= 1


@given(total=st.integers(0, 1000), count=st.integers(1, 50))
def test_shares_differ_by_one_at_most(total: int, count: int) -> None:
    shares = [Shard(number, count).share(total) for number in range(count)]
    assert [row for share in shares for row in range(*share)] == list(range(total))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


def test_names_of_parts_are_in_order() -> None:
    names = [Shard(number, 12).named("x/a.b.jsonl.gz") for number in range(12)]
    assert names[3] == "x/a.b.03-of-12.jsonl.gz"
    assert names == sorted(names)
    assert Shard(0, 2).named("run") == "run.0-of-2"


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("3/16", {}, (3, 16)),
        ("auto", slurm(3, 16, 0, 15), (3, 16)),
        ("auto", slurm(3, 16, 1, 16), (2, 16)),
        ("auto", slurm(7, 4, 1, 7), (3, 4)),  # --array=1-7:2
        ("auto", slurm(5, 1, 5, 5), (0, 1)),
        ("auto/16", slurm(7, 2, 3, 7), (7, 16)),  # two tasks of an array, submitted again
        ("auto/16", {"JOB_COMPLETION_INDEX": "15"}, (15, 16)),
    ],
)
def test_what_a_task_does(text: str, environment: dict[str, str], shard: tuple[int, int]) -> None:
    found = Shard.parse(text, environment)
    assert (found.number, found.count) == shard


@pytest.mark.parametrize(
    ("text", "environment", "told"),
    [
        ("16/16", {}, "shards are numbered from 0, so that the last of 16 is 15/16"),
        ("0/0", {}, "no shard 0/0"),
        ("-1/3", {}, "expected a shard such as 3/16"),
        ("3", {}, "expected a shard such as 3/16"),
        ("auto", {}, "SLURM_ARRAY_TASK_ID is not set"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "SLURM_ARRAY_TASK_ID is not set"),
        ("auto/4", {}, "neither is set"),
        ("auto/4", {"JOB_COMPLETION_INDEX": ""}, "is '', not a whole number"),
        ("auto/16", slurm(16, 16, 1, 16), "there is no shard 16/16"),
        ("auto", slurm(5, 3, 1, 9), None),  # 1, 5, 9
        ("auto", slurm(5, 4, 1, 9), "with gaps"),
        ("auto", slurm(2, 4, 1, 7), "with gaps"),
    ],
)
def test_what_is_no_shard(text: str, environment: dict[str, str], told: str | None) -> None:
    if told is None:
        assert Shard.parse(text, environment) == Shard(1, 3)
        return
    with pytest.raises(InputError) as caught:
        Shard.parse(text, environment)
    assert told in str(caught.value)


def test_copies_of_the_files_are_the_same_files(tmp_path: Path) -> None:
    """By names and sizes: each machine may have its own copy."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("x" * 5, "utf-8")
    os.utime(tmp_path / "there/a", (1, 1))
    assert fingerprint({"a": tmp_path / "here/a"}) == fingerprint({"a": tmp_path / "there/a"})
    (tmp_path / "there/a").write_text("x" * 6, "utf-8")
    assert fingerprint({"a": tmp_path / "here/a"}) != fingerprint({"a": tmp_path / "there/a"})
