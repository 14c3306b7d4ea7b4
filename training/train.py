"""Step 3: train the cross-encoder on the lists; can be stopped and started again at any time.

The learning rate follows the share of `--minutes` that is used up, not a number of steps: on a
machine with other load, the number of steps per hour is unknown.
"""

import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.multiprocessing as torch_mp
from graft import flags, hold, start
from model import pair_ids, tokenizer
from numpy.typing import NDArray
from sources import cache_folder
from torch import Tensor, nn

# Forked, so that the lists are in memory only once.
mp = torch_mp.get_context("fork")
HELD_OUT = 128  # the first lists, never trained on
HOLD = 6.0  # initial weight of the pooled states' distance to the bi-encoder's embeddings


class Batch(NamedTuple):
    """The lists of one step.

    Token ids of every pair, and how many of them are the query's side; the teacher's logits
    [lists, candidates]; whether the first of a list is labelled; the bi-encoder's embeddings of
    query and passage [pairs, 2, width].
    """

    pairs: list[list[int]]
    segments: list[int]
    scores: Tensor
    labelled: Tensor
    means: Tensor


class Lists:
    """The lists of `lists.jsonl` as token ids. Passages are tokenized once, queries when read."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tokenizer = tokenizer()
        texts = [json.loads(line)["text"] for line in (folder / "passages.jsonl").open()]
        self.passages = self._ids([" ".join(text.split()[:300]) for text in texts])
        self.rows = [
            {**json.loads(line), "row": row}
            for row, line in enumerate((folder / "lists.jsonl").open())
        ]
        self.of_passages: NDArray[np.float32] = np.load(folder / "passages.npy")
        self.of_queries: NDArray[np.float32] = np.load(folder / f"queries-{seed}.npy")

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def batch(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Encode lists. One in six may be long: a long pair costs as much as three short ones."""
        queries = self._ids([row["query"] for row in rows])
        firsts = self._ids([row["first"] or "" for row in rows])
        pairs, segments, means = [], [], []
        for row, query, first in zip(rows, queries, firsts, strict=True):
            query = query[:64]
            limit = 320 if random.Random(row["query"]).random() < 1 / 6 else 112
            for place, index in enumerate(row["passages"]):
                document = first if place == 0 and first else self.passages[index]
                pairs.append(pair_ids(query, document, limit))
                segments.append(len(query) + 2)
                means.append((self.of_queries[row["row"]], self.of_passages[index]))
        return Batch(
            pairs,
            segments,
            torch.tensor([row["scores"] for row in rows]),
            torch.tensor([row["labelled"] for row in rows]),
            torch.from_numpy(np.array(means)),
        )


def forward(model: nn.Module, batch: Batch, pairs_at_once: int = 8) -> tuple[Tensor, Tensor]:
    """The model's logits [lists, candidates] and means [pairs, 2, width], run in groups by length.

    The means are those of the two sides' states before the last two layers, which compare them.
    """
    order = sorted(range(len(batch.pairs)), key=lambda i: len(batch.pairs[i]))
    found: list[Tensor] = []
    means: list[Tensor] = []
    for begin in range(0, len(order), pairs_at_once):
        group = order[begin : begin + pairs_at_once]
        length = max(len(batch.pairs[i]) for i in group)
        ids = torch.zeros(len(group), length, dtype=torch.long)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, i in enumerate(group):
            size = len(batch.pairs[i])
            ids[row, :size] = torch.tensor(batch.pairs[i])
            mask[row, :size] = 1
            types[row, batch.segments[i] : size] = 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(
                input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True
            )
        states = out.hidden_states[-3].float() * mask.unsqueeze(-1)
        second = types.unsqueeze(-1)
        sides = [states * (1 - second), states * second]
        found.append(out.logits.float().squeeze(1))
        # Sums serve as means, because they are compared by cosine.
        means.append(torch.stack([side.sum(1) for side in sides], 1))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(found)[back].view_as(batch.scores), torch.cat(means)[back]


def loss_of(got: Tensor, scores: Tensor) -> Tensor:
    """KL divergence from the teacher's distribution over a list, and a weak pull to its logits.

    The first trains the ranking. The second makes logits of different queries comparable, so that
    zero means the same everywhere, and gives every single pair a training signal.
    """
    log_p = torch.log_softmax(got, dim=1)
    divergence = (torch.softmax(scores, dim=1) * (torch.log_softmax(scores, 1) - log_p)).sum(1)
    return divergence.mean() + 0.05 * (got - scores.clamp(-7, 5)).square().mean()


def strayed(means: Tensor, wanted: Tensor, dims: list[int]) -> Tensor:
    """Distance of the pooled states from the bi-encoder's embeddings: 1 - cosine, without flags.

    This loss repairs what the graft removed: 384 numbers per text teach more than one per pair.
    """
    kept = torch.ones(means.shape[-1])
    kept[dims] = 0
    return (1 - nn.functional.cosine_similarity(means * kept, wanted * kept, dim=-1)).mean()


def rate(share: float, peak: float) -> float:
    """The learning rate at a share of the time: it rises for the first 4 %, then falls to zero."""
    return peak * min(share / 0.04, (1 - share) / 0.96)


@torch.no_grad()
def held_out(model: nn.Module, lists: Lists) -> str:
    """Losses, and how often the labelled passage comes first, on lists that are not trained on."""
    model.eval()
    losses, astray, firsts, labelled, dims = 0.0, 0.0, 0, 0, flags(model)
    for begin in range(0, HELD_OUT, 16):
        batch = lists.batch(lists.rows[begin : begin + 16])
        got, means = forward(model, batch)
        losses += float(loss_of(got, batch.scores)) / (HELD_OUT / 16)
        astray += float(strayed(means, batch.means, dims)) / (HELD_OUT / 16)
        firsts += int(((got.argmax(1) == 0) & batch.labelled).sum())
        labelled += int(batch.labelled.sum())
    model.train()
    return f"held-out loss {losses:.4f} astray {astray:.3f} first {firsts / labelled:.3f}"


class Progress:
    """State shared by the workers: the weights, the number of lists handed out, the time used."""

    def __init__(self, model: nn.Module, lists: int, used: float) -> None:
        self.model = model.share_memory()
        self.lists = mp.Value("q", lists)
        self.used = mp.Value("d", used)

    def take(self, count: int) -> int:
        """The position of the next `count` lists, each handed out once."""
        with self.lists.get_lock():
            self.lists.value += count
            return int(self.lists.value) - count


def save(target: Path, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
    """Write the state atomically: an interruption never leaves half a file."""
    target.mkdir(exist_ok=True)
    state = dict(
        model=progress.model.state_dict(),
        optimizer=optimizer.state_dict(),
        lists=progress.lists.value,
        used=progress.used.value,
    )
    torch.save(state, target / "state.tmp")
    (target / "state.tmp").replace(target / "state.pt")


def work(
    first: bool,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    lists: Lists,
    target: Path,
    minutes: float,
    peak: float,
    a_step: int,
) -> None:
    """Take lists and step until the time is used up; the first worker keeps time and state."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    usable, mean, steps = len(lists.rows) - HELD_OUT, 0.0, 0
    dims = flags(progress.model)
    saved = tick = time.monotonic()
    while (used := progress.used.value) < minutes * 60:
        share = used / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = rate(share, peak)
        place = progress.take(a_step)
        rows = [lists.rows[HELD_OUT + (place + i) % usable] for i in range(a_step)]
        batch = lists.batch(rows)
        got, means = forward(progress.model, batch)
        # The pull to the bi-encoder fades, so that the pair can be read as one text in the end.
        held = HOLD * (1 - share) ** 2
        loss = loss_of(got, batch.scores) + held * strayed(means, batch.means, dims)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not first:
            continue
        steps += 1
        mean += (loss.item() - mean) / min(steps, 100)
        now = time.monotonic()
        progress.used.value += min(now - tick, 60)
        tick = now
        if steps % 25 == 0:
            click.echo(
                f"minutes {progress.used.value / 60:.1f} lists {progress.lists.value} "
                f"loss {mean:.4f} rate {rate(share, peak):.1e}"
            )
        if now - saved > 240:
            save(target, progress, optimizer)
            click.echo(held_out(progress.model, lists))
            saved = time.monotonic()
    if first:
        save(target, progress, optimizer)
        click.echo(held_out(progress.model, lists))


@click.command()
@click.option(
    "--minutes", required=True, type=float, help="Training time, over all starts; 0 is the graft."
)
@click.option("--peak", default=4e-5, help="Highest learning rate.")
@click.option("--lists", "a_step", default=4, help="Lists a step.")
@click.option("--name", default="mini", help="Name of the checkpoint folder.")
@click.option("--seed", default=0, help="That mine.py was given.")
@click.option("--workers", default=os.cpu_count(), help="Processes of one thread each.")
def main(minutes: float, peak: float, a_step: int, name: str, seed: int, workers: int) -> None:
    """Train until the minutes are used up, keeping `<cache folder>/<name>/` up to date.

    Workers update the same weights without waiting for each other (Hogwild), each with moments
    of its own: a model this small runs twice as fast on n processes of one thread as on one
    process of n threads, and goes on where other work takes a core away.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lists, target = Lists(cache_folder(), seed), cache_folder() / name
    model = start().train()
    hold(model)
    done, used, moments = 0, 0.0, None
    if (target / "state.pt").exists():
        state = torch.load(target / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        done, used, moments = state["lists"], state["used"], state["optimizer"]
    progress = Progress(model, done, used)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    if moments is not None:
        optimizer.load_state_dict(moments)
    else:
        click.echo(held_out(model, lists))
    rest = (progress, optimizer, lists, target, minutes, peak, a_step)
    others = [mp.Process(target=work, args=(False, *rest)) for _ in range(workers - 1)]
    for other in others:
        other.start()
    work(True, *rest)
    for other in others:
        other.join()


if __name__ == "__main__":
    main()
