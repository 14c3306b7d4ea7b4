"""Step 2: queries, hard negatives and teacher scores.

For each query, candidates come from the top of BM25 and of the bi-encoder over the whole pool,
and the teacher scores a list of them. Writes `lists.jsonl`, in the order of training:
{"query", "passages": [index...], "first": text read instead of the first passage or null,
"labelled": whether the first is the query's own passage, "scores": [teacher logit...]}.
"""

import json
import random
from pathlib import Path

import bm25s
import click
import numpy as np
import torch
from embed import embed
from numpy.typing import NDArray
from queries import Query, made
from sources import cache_folder

LIST = 8
BLOCK = 128  # queries whose cosines with the whole pool are computed at once
# Ranges of ranks to draw a list's negatives from, and how many from each: the nearest are the
# hardest, the others cover the whole scale of relevance. The last negative comes from anywhere.
RANKS = ((0, 6, 2), (6, 25, 2), (25, 100, 2))


def embedded(path: Path, texts: list[str]) -> NDArray[np.float32]:
    """Embeddings of texts, cached in a file: computing them is the only slow part of this step."""
    if not path.exists():
        np.save(path, embed(texts))
    vectors: NDArray[np.float32] = np.load(path)
    if len(vectors) != len(texts):
        raise click.ClickException(f"{path} is of other texts: delete it")
    return vectors


def teacher(
    cosine: NDArray[np.float32], lexical: NDArray[np.float32], labelled: bool
) -> NDArray[np.float32]:
    """Teacher logits of a list: mostly the cosine, a little BM25, and the label.

    The cosine's slope and zero make the sigmoid sensible for this bi-encoder (unrelated texts are
    near 0, related ones above 0.45); `lexical` is BM25 divided by its maximum in the pool. The
    label outweighs any hard negative that the bi-encoder prefers.
    """
    logits = 14 * (cosine - 0.45) + 2 * (lexical - 0.5)
    if labelled:
        logits[0] = max(logits[0] + 1, logits[1:].max() + 1)
    return logits.astype(np.float32)


def pick(query: Query, tops: list[list[int]], pool: int, rng: random.Random) -> list[int]:
    """The indices of one list: the query's own passage first if it is read, then negatives."""
    taken = [query.passage]
    for low, high, count in RANKS:
        near = {i for top in tops for i in top[low:high]} - set(taken)
        taken += rng.sample(sorted(near), min(count, len(near)))
    while len(taken) < LIST + (not query.reads):
        taken = list(dict.fromkeys([*taken, rng.randrange(pool)]))
    return taken if query.reads else taken[1:]


@click.command()
@click.option("--count", default=30_000, help="Queries made from passages, beside the questions.")
@click.option("--seed", default=0)
def main(count: int, seed: int) -> None:
    """Make the lists that `train.py` reads."""
    folder, rng = cache_folder(), random.Random(seed)
    passages = [json.loads(line) for line in (folder / "passages.jsonl").open()]
    texts = [passage["text"] for passage in passages]
    queries = list(made(passages, count, seed))
    for line in map(json.loads, (folder / "questions.jsonl").open()):
        queries.append(Query(line["text"], line["passage"], texts[line["passage"]]))
    rng.shuffle(queries)
    pool = torch.from_numpy(embedded(folder / "passages.npy", texts))
    asked = torch.from_numpy(embedded(folder / f"queries-{seed}.npy", [q.text for q in queries]))
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(
        [q.text for q in queries], stopwords="en", return_ids=False, show_progress=False
    )
    with (folder / "lists.jsonl").open("w") as out:
        for row, query in enumerate(queries):
            if row % BLOCK == 0:
                cosines = asked[row : row + BLOCK] @ pool.T
                near = cosines.topk(100).indices.tolist()
            lexical = torch.zeros(len(texts))
            if words[row]:
                lexical = torch.from_numpy(index.get_scores(words[row]))
            best = lexical.topk(100)
            taken = pick(query, [best.indices.tolist(), near[row % BLOCK]], len(texts), rng)
            share = lexical[taken] / max(float(best.values[0]), 1e-6)
            scores = teacher(cosines[row % BLOCK, taken].numpy(), share.numpy(), bool(query.reads))
            differs = query.reads != texts[query.passage]
            line = dict(
                query=query.text,
                passages=taken,
                labelled=bool(query.reads),
                first=query.reads if query.reads and differs else None,
                scores=[round(float(score), 3) for score in scores],
            )
            out.write(json.dumps(line) + "\n")
    click.echo(f"{len(queries)} lists of {LIST}")


if __name__ == "__main__":
    main()
