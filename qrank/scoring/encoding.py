"""Pairs of texts -> model inputs, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qrank.scoring.inputs import LongDocuments, ModelInput
from qrank.scoring.pair_tokenizer import PairTokenizer, Prompt


def encode_in_steps(
    tokenizer: PairTokenizer,
    pairs: Sequence[tuple[str, str]],
    stops: Iterable[int],
    instruction: str | None = None,
    long_documents: LongDocuments = "truncate",
    document_tokens: int | None = None,
) -> Iterator[list[ModelInput]]:
    """Encode (query, document) pairs.

    Args:
        tokenizer: the model's.
        pairs: queries may differ.
        stops: where each step ends: increasing indices into `pairs`.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`.
        document_tokens: maximum number of tokens read of a document. None: as many as fit.

    Yields:
        The inputs of a step's pairs, in order: one per pair, or with `chunk` one per part.

    Raises:
        InputError: the family takes no instruction.
    """
    prompts: dict[str, Prompt] = {}
    start = 0
    for stop in stops:
        some = pairs[start:stop]
        prompts = {
            query: prompts.get(query) or tokenizer.prompt(query, instruction)
            for query in dict.fromkeys(query for query, _ in some)
        }
        capacities = {q: tokenizer.capacity(p, document_tokens) for q, p in prompts.items()}
        texts = list(dict.fromkeys(document for _, document in some))
        found = tokenizer.documents(texts, instruction, max(capacities.values(), default=0))
        documents = dict(zip(texts, found, strict=True))
        inputs: list[ModelInput] = []
        for owner, (query, document) in enumerate(some, start):
            prompt, ids, capacity = prompts[query], documents[document], capacities[query]
            if len(ids) > capacity and long_documents == "chunk":
                for chunk in tokenizer.chunks(document, prompt, document_tokens):
                    pair, part = tokenizer.pair(prompt, chunk.ids), (chunk.start, chunk.end)
                    inputs.append(ModelInput(owner, prompt.prefix, *pair, False, part))
                continue
            truncated = len(ids) > capacity
            if truncated and long_documents == "tail":
                ids = tokenizer.tail(document, prompt, capacity)
            pair = tokenizer.pair(prompt, ids[:capacity])
            inputs.append(ModelInput(owner, prompt.prefix, *pair, truncated, None))
        yield inputs
        start = stop
