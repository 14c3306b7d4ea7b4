"""Ray: two nodes on this machine. One that dies loses nothing, and nothing is scored twice."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import contents
from hypothesis import given
from hypothesis import strategies as st
from tables_of_pairs import Rows, write

from qrank import Reranker
from qrank import score_files as alone
from qrank.cli import main
from qrank.errors import InputError, QrankError
from qrank.pairs.job import Job

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

from ray.cluster_utils import Cluster  # noqa: E402

from qrank.integrations import ray_files  # noqa: E402
from qrank.integrations.ray import score, score_files  # noqa: E402
from qrank.integrations.ray_nodes import Node, pool  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    # Ray's own: its next versions, sockets that it leaves open, data for few actors.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:The minimum number of concurrent actors:UserWarning"),
]

CPUS = 2
STORE = 80 * 2**20

QUICK: dict[str, Any] = {"backend": "fakes:length"}
SLOW: dict[str, Any] = {"backend": "fakes:sleepy"}


class Nodes:
    """A cluster with a head without CPUs, and two nodes."""

    def __init__(self) -> None:
        # A node that was killed is noticed after three seconds instead of fifteen.
        often = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}
        head = {
            "num_cpus": 0,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_system_config": {**often, "health_check_failure_threshold": 3},
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self.cluster.address
        self.workers: list[Any] = []
        self.fill()
        self.connect()

    def connect(self) -> None:
        """Connect this process."""
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")

    def fill(self) -> None:
        """See that there are two nodes."""
        while len(self.workers) < 2:
            self.workers.append(self.cluster.add_node(num_cpus=CPUS, object_store_memory=STORE))

    def kill(self) -> None:
        """Kill one with its processes."""
        self.cluster.remove_node(self.workers.pop(), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the fakes
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found = Nodes()
        yield found
        ray.shutdown()
        found.cluster.shutdown()


def rows_of(count: int, first: int) -> Rows:
    """Rows of different pairs."""
    return [
        {"id": str(n), "query": f"q{n % 7}", "document": f"{n} " + "a " * (n * 5 % 13)}
        for n in range(first, first + count)
    ]


def four_files(folder: Path, count: int) -> Path:
    for number, form in enumerate((".parquet", ".jsonl", ".csv", ".parquet")):
        write(folder / f"x/{number}{form}", rows_of(count, count * number))
    return folder


def when(seen: Callable[[], bool], do: Callable[[], None]) -> threading.Thread:
    """Do something as soon as something is seen."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not seen():
            assert time.monotonic() < end
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def without_target(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A folder's files, and its settings without the target."""
    found = contents(folder)
    settings = json.loads(found.pop("_qrank.json"))
    return found, {**settings, "target": None}


# Files


def test_a_node_that_dies_loses_nothing(
    tmp_path: Path, nodes: Nodes, length: Reranker, caplog: pytest.LogCaptureFixture
) -> None:
    table = four_files(tmp_path / "in", 300)
    out = tmp_path / "out"
    told: list[tuple[int, int]] = []

    def both_have_begun() -> bool:
        kept = (path.stat().st_size for path in (out / "x").glob("_*.kept"))
        return sum(map(bool, kept)) == 2

    killer = when(both_have_begun, nodes.kill)
    done = score_files(
        table, out, options=SLOW, rows=20, progress=lambda _, *rows: told.append((rows[0], rows[1]))
    )
    killer.join()
    alone(length, table, tmp_path / "alone", rows=20)
    assert without_target(out) == without_target(tmp_path / "alone")
    assert len(done.written) == 4
    assert done.rows == 1200
    assert 0 < done.kept < 300, "the other node went on where the dead one ended"
    assert "is given to another one" in caplog.text
    assert told[-1] == (1200, 1200)
    nodes.fill()


def test_a_file_that_is_cut_is_that_of_the_shards(
    tmp_path: Path, nodes: Nodes, length: Reranker
) -> None:
    table = write(tmp_path / "a.jsonl", rows_of(50, 0))
    score_files(table, tmp_path / "out", options=QUICK, rows=8, shards=3)
    for number in range(3):
        alone(length, table, tmp_path / "alone", rows=8, shard=f"{number}/3")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_folder_has_one_model(tmp_path: Path, nodes: Nodes) -> None:
    """Even if nothing is left to be scored."""
    table = write(tmp_path / "a.csv", rows_of(5, 0))
    score_files(table, tmp_path / "out", options=QUICK)
    again = score_files(table, tmp_path / "out", options=QUICK)
    assert again.there == [tmp_path / "out/a.csv"]
    with pytest.raises(InputError, match=r"target: .*length.* now.*\(on \d+\.\d+\.\d+\.\d+\)"):
        score_files(table, tmp_path / "out", options={"backend": "fakes:ties"})


def test_an_error_of_a_node_is_ones_own(tmp_path: Path, nodes: Nodes) -> None:
    table = write(tmp_path / "a.jsonl", rows_of(5, 0))
    table.write_text(table.read_text("utf-8") + "no JSON\n", "utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl, line 6: .*--on-error reject"):
        score_files(table, tmp_path / "out", options=QUICK)
    done = score_files(table, tmp_path / "out", options=QUICK, on_error="reject")
    assert (done.rows, done.rejected, done.rejects) == (6, 1, [tmp_path / "out/_a.jsonl.rejects"])


def test_a_pair_that_ends_its_process_ends_the_job(tmp_path: Path, nodes: Nodes) -> None:
    rows = rows_of(60, 0)
    rows[45]["document"] = "a " * 300
    table = write(tmp_path / "a.csv", rows)
    with pytest.raises(QrankError, match=r"3 processes for a\.csv ended without"):
        score_files(table, tmp_path / "out", options={"backend": "fakes:deadly"}, rows=20)
    assert not (tmp_path / "out/a.csv").exists()


def test_all_nodes_must_see_the_folder_and_the_files(tmp_path: Path, nodes: Nodes) -> None:
    table = write(tmp_path / "a.csv", rows_of(5, 0))
    scorer = ray_files._Scorer(Job.of(table, tmp_path / "out"), tmp_path / "mark", "mini", {})
    with pytest.raises(InputError, match="out is not the folder that the driver writes to"):
        scorer.score([])

    gone = when((tmp_path / "out").exists, table.unlink)
    with pytest.raises(FileNotFoundError, match=r"\(on \d+\.\d+\.\d+\.\d+\): .*a\.csv"):
        score_files(table, tmp_path / "out", options=QUICK)
    gone.join()


def test_a_node_must_have_the_threads(tmp_path: Path, nodes: Nodes) -> None:
    table = write(tmp_path / "a.csv", rows_of(5, 0))
    with pytest.raises(InputError, match=r"no node .* has CPUs, 3 of them; they have: 2 CPUs"):
        score_files(table, tmp_path / "out", options={**QUICK, "threads": 3})
    with pytest.raises(InputError, match="has a GPU; they have"):
        score_files(table, tmp_path / "out", options={**QUICK, "device": "cuda"})


# Datasets of Ray Data


def read(folder: Path) -> dict[str, Any]:
    """The scores in a folder, by id; each id is there once."""
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    found = {row["id"]: row["score"] for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def expected(reranker: Reranker, rows: Rows) -> dict[str, Any]:
    pairs = [(row["query"], row["document"]) for row in rows]
    return dict(zip((row["id"] for row in rows), reranker.score(pairs).tolist(), strict=True))


def parquet(folder: Path, count: int) -> Path:
    for number in range(4):
        write(folder / f"{number}.parquet", rows_of(count, count * number))
    return folder


def test_rows_of_a_dataset_get_scores(nodes: Nodes) -> None:
    rows = rows_of(40, 0)
    ds = ray.data.from_items(rows + rows[:5])
    scored = score(ds, "mini", backend="onnx-int8", rows=16, score_column="s").to_pandas()
    assert list(scored.columns) == ["id", "query", "document", "s"]
    assert len(scored) == 45
    with Reranker("mini", backend="onnx-int8") as mini:
        wanted = expected(mini, rows)
    found = dict(zip(scored["id"], scored["s"], strict=True))
    assert found == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(InputError, match='no column "text"; there are: "id"'):
        score(ds, document_column="text")


def test_a_dataset_survives_a_node_and_is_not_scored_again(
    tmp_path: Path, nodes: Nodes, length: Reranker
) -> None:
    from ray.data.checkpoint import CheckpointConfig

    source, out = parquet(tmp_path / "in", 100), tmp_path / "out"
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=str(tmp_path / "done"),
        delete_checkpoint_on_success=False,
    )
    try:
        killer = when(lambda: len([*out.glob("*.parquet")]) >= 2, nodes.kill)
        scored = score(ray.data.read_parquet(str(source)), "mini", rows=20, **SLOW)
        scored.write_parquet(str(out))
        killer.join()
        assert read(out) == expected(length, rows_of(400, 0))
        nodes.fill()
        # An actor of Ray's that leaves out what is done holds a CPU.
        score(ray.data.read_parquet(str(source)), "mini", **QUICK).write_parquet(str(out))
        assert read(out) == expected(length, rows_of(400, 0))
    finally:
        context.checkpoint_config = None


def test_actors_that_would_take_every_cpu_are_refused(nodes: Nodes) -> None:
    ds = ray.data.from_items(rows_of(1, 0))
    with pytest.raises(InputError, match=r"room for 1 among .*\(2 CPUs, 2 CPUs\).* waits for ever"):
        score(ds, threads=2, concurrency=2)
    with pytest.raises(InputError, match="1 actors with GPUs are wanted, and there is room for 0"):
        score(ds, device="cuda")


clusters = st.lists(
    st.builds(Node, st.uuids().map(str), st.just(""), st.integers(1, 64)), min_size=1
)


@given(found=clusters, spare=st.integers(1, 2), threads=st.none() | st.integers(1, 8))
def test_actors_fit_on_their_nodes_and_leave_cpus(
    found: list[Node], spare: int, threads: int | None
) -> None:
    total = sum(node.cpus for node in found)
    try:
        made = pool(found, spare=spare, threads=threads)
    except InputError:
        least = threads or 1
        assert total < least + spare or all(node.cpus < least for node in found)
        return
    count, claim = Counter(made.nodes), made.claim["num_cpus"]
    assert all(count[node.id] * max(made.threads, claim) <= node.cpus for node in found)
    assert len(made.nodes) * max(made.threads, claim) + spare <= total
    if claim >= made.threads:  # whatever is started again on a node that is left
        assert all(node.cpus % claim >= spare for node in found if node.cpus >= claim)
    else:  # half of the nodes may go
        for node in found:
            assert 2 * count[node.id] * claim <= node.cpus
    best = sum(max(node.cpus - spare, 0) for node in found)
    if threads is None and best:
        assert len(made.nodes) * made.threads >= 0.9 * min(best, total - spare) - 1


@given(count=st.integers(1, 9), cpus=st.integers(3, 64))
def test_equal_nodes_have_one_actor_each(count: int, cpus: int) -> None:
    found = [Node(str(number), "", cpus) for number in range(count)]
    made = pool(found, spare=1)
    assert made.nodes == [node.id for node in found]
    assert made.threads == made.claim["num_cpus"] == cpus - 1


def test_actors_of_nodes_of_two_cpus_fit_beside_each_other() -> None:
    made = pool([Node("a", "", 2), Node("b", "", 2)], spare=1)
    assert (made.nodes, made.threads, made.claim) == (["a", "b"], 1, {"num_cpus": 0.5})


def test_a_small_head_changes_nothing() -> None:
    found = [Node("head", "", 2), *(Node(str(n), "", 16) for n in range(4))]
    made = pool(found, spare=1)
    assert (sorted(made.nodes), made.threads) == (["0", "1", "2", "3"], 15)


# The command; the last, because it connects anew.


def test_the_command(tmp_path: Path, nodes: Nodes, length: Reranker) -> None:
    source, out = four_files(tmp_path / "in", 10), tmp_path / "out"
    command = ["score", "-m", "mini", "--backend", "fakes:length", "--pairs", str(source)]
    ray.shutdown()
    ran = CliRunner().invoke(
        main, [*command, "-o", str(out), "--engine", "ray", "--address", nodes.address]
    )
    assert ran.exit_code == 0, ran.output
    assert "wrote 4 files of 40 rows" in ran.stderr
    alone(length, source, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--address", "auto"], "--address goes with --engine ray"),
        (["--shards", "2"], "--shards goes with --engine ray"),
        (["--engine", "ray", "--shard", "0/2"], "give --shards N instead of --shard"),
        (["--engine", "ray", "--measure"], "run qrank tune on one node"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, more: list[str], told: str) -> None:
    table = write(tmp_path / "a.csv", rows_of(1, 0))
    ran = CliRunner().invoke(main, ["score", "--pairs", str(table), "-o", str(tmp_path), *more])
    assert ran.exit_code == 2
    assert told in ran.output


def test_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **how: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    table = write(tmp_path / "a.csv", rows_of(1, 0))
    with pytest.raises(
        InputError, match=r"\(address auto\) cannot be reached: nobody there\. Start one"
    ):
        score_files(table, tmp_path / "out")
