"""The nodes of a Ray cluster, and how many threads of each an actor takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qrank.bundle.locate import bundled
from qrank.errors import InputError

_NEARLY = 0.9
"""Share of the threads that the best plan uses: fewer and larger actors are worth a tenth, because
each holds the model."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that runs tasks.

    Attributes:
        id: Ray's.
        address: its IP address.
        cpus: how many CPUs Ray counts there.
        gpus: how many GPUs.
    """

    id: str
    address: str
    cpus: int
    gpus: int = 0


def nodes() -> list[Node]:
    """The nodes that are alive and have CPUs. A head node may have none."""
    found = []
    for each in ray.nodes():
        cpus, gpus = (int(each["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
        if each["Alive"] and cpus:
            found.append(Node(each["NodeID"], each["NodeManagerAddress"], cpus, gpus))
    return found


def everywhere(model: str | Path) -> str:
    """A model's name as other processes understand it, whatever their working directory."""
    path = Path(model)
    here = path.exists() and str(model) not in bundled()
    return str(path.absolute() if here else model)


@dataclass(frozen=True)
class Pool:
    """Equal actors of one operator of Ray Data.

    Attributes:
        nodes: of each actor; a node may be there several times.
        threads: of each actor.
        claim: what Ray counts for each actor.
    """

    nodes: list[str]
    threads: int
    claim: dict[str, float]


def pool(
    found: Sequence[Node],
    *,
    spare: int,
    on_gpu: bool = False,
    size: int | None = None,
    threads: int | None = None,
) -> Pool:
    """As many actors as leave CPUs to the operators that read and write.

    Args:
        found: the nodes.
        spare: CPUs that other operators hold or need. If possible, each node has so many.
        on_gpu: an actor has a GPU.
        size: how many actors. None: one a node, several on nodes that are much larger than the
            others, and one a GPU.
        threads: of an actor. None: the node's CPUs but `spare`, divided among its GPUs.

    Raises:
        InputError: there is no GPU; or the actors would take CPUs that others need.
    """
    total = sum(node.cpus for node in found)
    if on_gpu:
        having = [node for node in found if node.gpus]
        share = min((max((x.cpus - spare) // x.gpus, 1) for x in having), default=1)
        threads = threads or share
        # Ray counts a CPU for each.
        room = [node.id for node in having for _ in range(node.gpus)][: max(total - spare, 0)]
    else:
        threads = threads or _threads(found, spare)
        room = _room(found, spare, threads)
    if not room or (size or 0) > len(room):
        there = ", ".join(
            f"{each.cpus} CPUs" + f" and {each.gpus} GPUs" * bool(each.gpus) for each in found[:8]
        )
        what = "GPUs" if on_gpu else f"{threads} CPUs each"
        raise InputError(
            f"{size or 1} actors with {what} are wanted, and there is room for {len(room)} among "
            f"the cluster's {len(found)} nodes ({there}): {spare} of the {total} CPUs must be left "
            "to Ray Data, which otherwise waits for ever. Take fewer actors (concurrency) or "
            "threads, or start Ray with more"
        )
    placed = room[:size]
    claim = {"num_gpus": 1.0} if on_gpu else {"num_cpus": _claim(found, placed, spare, threads)}
    return Pool(placed, threads, claim)


def _room(found: Sequence[Node], spare: int, threads: int) -> list[str]:
    """Nodes of all actors that there is room for, in turn."""
    total = sum(node.cpus for node in found)
    each = {node.id: max(node.cpus - spare, 0) // threads for node in found}
    if not any(each.values()):  # all nodes are small: some of them are left to others
        each = {node.id: node.cpus // threads for node in found}
    rounds = range(max(each.values(), default=0))
    turns = [id for number in rounds for id, count in each.items() if number < count]
    return turns[: max(total - spare, 0) // threads]


def _threads(found: Sequence[Node], spare: int) -> int:
    """Threads of an actor: the most with which nearly as many are used as with any number.

    Where all nodes are alike: their CPUs but `spare`. A small head node changes nothing.
    """
    tried = range(1, max([2, *(node.cpus for node in found)]))
    used = {each: each * len(_room(found, spare, each)) for each in tried}
    return max(each for each in tried if used[each] >= _NEARLY * max(used.values()))


def _claim(found: Sequence[Node], placed: Sequence[str], spare: int, threads: int) -> float:
    """CPUs that Ray counts for an actor: so many that actors alone never fill a node.

    Ray starts an actor whose node is gone on any other where it fits. If it took the last CPUs,
    nothing would be left to read with. If it fits nowhere, it is started when others are done.
    """
    count = Counter(placed)
    for claim in range(threads, max(node.cpus for node in found)):
        fit = all(count[node.id] * claim + spare <= node.cpus for node in found if count[node.id])
        if fit and all(node.cpus % claim >= spare for node in found if node.cpus >= claim):
            return claim
    # On small nodes: the actors of one that is gone fit beside those of another one.
    return threads // 2 or 0.5


class Placing:
    """Ray's arguments for the next actor of a pool: its node, or another if that one is gone."""

    def __init__(self, made: Pool) -> None:
        self._nodes = made.nodes
        self._next = 0

    def __call__(self) -> dict[str, Any]:
        """See `ray_remote_args_fn` of Ray Data's `map_batches`."""
        node = self._nodes[self._next % len(self._nodes)]
        self._next += 1
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}
