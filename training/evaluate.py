"""Evaluate a reranker checkpoint on a test collection, and on plain questions.

The collection's folder holds documents.jsonl and queries.jsonl ({"id", "text"}) and qrels.trec.
BM25's top 100 are reranked; every reranker sees the same 100. The paired t-test is over queries.
"""

import json
import multiprocessing as mp
import os
import random
from pathlib import Path
from typing import Any

import bm25s
import click
import ir_measures
import numpy as np
import torch
from embed import embed
from ir_measures import AP, RR, Qrel, R, ScoredDoc, nDCG
from numpy.typing import NDArray
from scipy.stats import ttest_rel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MEASURES = (nDCG @ 10, RR @ 10, AP, R @ 100)
SANITY = Path(__file__).with_name("sanity.jsonl")
Scores = NDArray[np.float32]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


class CrossEncoder:
    """A checkpoint folder, as transformers loads it."""

    def __init__(self, folder: Path, bf16: bool) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        self.model, self.bf16 = model.eval(), bf16

    @torch.inference_mode()
    def logits(self, query: str, documents: list[str], at_once: int = 16) -> Scores:
        """One logit per document, in the order given; documents are cut to pairs of 512 tokens."""
        order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
        found = np.empty(len(documents), np.float32)
        for begin in range(0, len(order), at_once):
            group = order[begin : begin + at_once]
            batch = self.tokenizer(
                [query] * len(group),
                [documents[i] for i in group],
                truncation="only_second",
                max_length=512,
                padding=True,
                return_tensors="pt",
            )
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                found[group] = self.model(**batch).logits.float().squeeze(1).numpy()
        return found


# Filled before the workers are forked, so that the checkpoint is read and held once.
_shared: list[CrossEncoder] = []


def _scores(query: str, documents: list[str]) -> Scores:
    """Score one query, in a worker."""
    return _shared[0].logits(query, documents)


def first_stage(
    documents: list[dict[str, Any]], queries: list[dict[str, Any]]
) -> tuple[NDArray[np.int64], Scores]:
    """BM25's top 100 of each query: document indices and scores [queries, 100]."""
    index = bm25s.BM25()
    texts = [document["text"] for document in documents]
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize([q["text"] for q in queries], stopwords="en", show_progress=False)
    top, scores = index.retrieve(words, k=100, show_progress=False)
    return top, scores


def sanity(model: CrossEncoder) -> tuple[int, int]:
    """The number of plain questions that rank their right document first, and of all of them."""
    groups = read(SANITY)
    right = 0
    for group in groups:
        scores = model.logits(group["query"], group["documents"])
        right += int(scores.argmax() == 0)
        mark = "right" if scores.argmax() == 0 else "WRONG"
        click.echo(f"{mark} {group['query']}  {[round(float(score), 1) for score in scores]}")
    return right, len(groups)


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="Folder of the test collection.",
)
@click.option("--queries", "count", default=0, help="A random sample of this many; 0 is all.")
@click.option("--bf16/--fp32", default=False)
@click.option("--workers", default=os.cpu_count(), help="Processes of one thread each.")
def main(checkpoint: Path, data: Path, count: int, bf16: bool, workers: int) -> None:
    """Print the table of BM25, bi-encoder and CHECKPOINT, with paired tests."""
    torch.set_num_threads(1)
    model = CrossEncoder(checkpoint, bf16)
    _shared.append(model)
    right, groups = sanity(model)
    documents, queries = read(data / "documents.jsonl"), read(data / "queries.jsonl")
    qrels: list[Qrel] = list(ir_measures.read_trec_qrels(str(data / "qrels.trec")))
    top, bm25 = first_stage(documents, queries)
    keep = sorted(random.Random(0).sample(range(len(queries)), count or len(queries)))
    texts = [document["text"] for document in documents]
    jobs = [(queries[i]["text"], [texts[j] for j in top[i]]) for i in keep]
    with mp.get_context("fork").Pool(workers) as pool:
        reranked = pool.starmap(_scores, jobs, chunksize=1)
    vectors = embed(texts)
    asked = embed([query["text"] for query in queries])
    systems: dict[str, list[Scores]] = {
        "BM25": [bm25[i] for i in keep],
        "all-MiniLM-L6-v2": [vectors[top[i]] @ asked[i] for i in keep],
        checkpoint.name: reranked,
    }
    ids = [queries[i]["id"] for i in keep]
    judged = [qrel for qrel in qrels if qrel.query_id in set(ids)]
    by_query: dict[str, Scores] = {}
    click.echo(f"{right}/{groups} plain questions right; {len(ids)} queries")
    click.echo("| | " + " | ".join(map(str, MEASURES)) + " |\n|---|---|---|---|---|")
    for name, scores in systems.items():
        run = [
            ScoredDoc(ids[n], documents[j]["id"], float(score))
            for n, i in enumerate(keep)
            for j, score in zip(top[i], scores[n], strict=True)
        ]
        total = ir_measures.calc_aggregate(MEASURES, judged, run)
        click.echo(f"| {name} | " + " | ".join(f"{total[m]:.4f}" for m in MEASURES) + " |")
        each = {m.query_id: m.value for m in ir_measures.iter_calc([nDCG @ 10], judged, run)}
        by_query[name] = np.array([each[i] for i in ids], np.float32)
    for name in ("BM25", "all-MiniLM-L6-v2"):
        test = ttest_rel(by_query[checkpoint.name], by_query[name])
        click.echo(f"{checkpoint.name} against {name}, nDCG@10 by query: p = {test.pvalue:.2g}")


if __name__ == "__main__":
    main()
