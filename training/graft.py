"""How `mini` starts: a cross-encoder that computes its bi-encoder's similarity from the first step.

A fresh head on a bi-encoder has to learn from scored pairs, slowly, to compare two texts. Here the
comparison is put into the weights of an ordinary BERT before any training:

1. The backbone's six layers run as they did on one text: each segment sees itself and `[CLS]`, and
   no more of the other than `exp(-LEAK)` a token. `[CLS]` sees both, and stays the anchor that the
   layers expect at position 0.
2. A seventh layer compares. Half of its heads bring `[CLS]` the mean of the query's tokens, half
   the mean of the passage's, each in the directions in which texts differ most. Its feed-forward
   squares their sum and their difference, direction by direction, which makes their product; the
   pooler reads it.

What tells the segments apart lies in three dimensions of the 384 (flags), the least used ones, and
in two of each head's 32, whose products' smallest directions give way. The first says "not the
query's", the second "not the passage's", the third stays blank: a layer norm scales each token
differently, but what is seen shows the same as the blank one wherever it is.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from embed import backbone
from model import kept_tokens, pair_ids, tokenizer
from sources import cache_folder
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

LEAK = 30.0
"""How much less, in logits of attention, a token counts for the other side."""
LOUD = 1.0
"""A flag's size: twice that of a typical state."""
POOL = 64.0
"""How much louder the texts' means are than what stood at `[CLS]`."""
WIDTH, HEADS, HEAD = 384, 12, 32
COMPARED = WIDTH // 2
"""Directions in which the two texts are compared: six heads of 32 for each."""
PRODUCT = 4 * COMPARED + 2
"""Units of the last feed-forward that make the product."""
SQUARED = 0.3
"""How far into gelu a typical state reaches: gelu(x) + gelu(-x) is nearly 0.8 x^2 for small x."""


class Case(NamedTuple):
    """A pair on its way through the layers.

    states: [tokens, 384], `[CLS]` first.
    second: whether a token is the passage's.
    """

    states: Tensor
    second: Tensor

    @property
    def first(self) -> Tensor:
        """Whether a token is the query's, as `[CLS]` is too."""
        return ~self.second


def flags(model: nn.Module) -> list[int]:
    """The dimensions that were given to flags: no position has anything there."""
    rows = model.bert.embeddings.position_embeddings.weight
    return torch.nonzero(rows.abs().sum(0) == 0).flatten().tolist()


def hold(model: nn.Module) -> None:
    """Keep training off what was put in: the flags, their readers, and the comparison.

    These few weights work by being exactly what they are; noise from a step breaks them at once.
    """
    dims = flags(model)
    readers = [head * HEAD + at for head in range(HEADS) for at in (HEAD - 2, HEAD - 1)]
    model.bert.embeddings.requires_grad_(False)
    for layer in model.bert.encoder.layer[:-1]:
        for part in (layer.attention.output, layer.output):
            _fix(dims, part.dense.weight, part.dense.bias)
            _fix(dims, part.LayerNorm.weight, part.LayerNorm.bias)
        for part in (layer.attention.self.query, layer.attention.self.key):
            _fix(readers, part.weight, part.bias)
    last = model.bert.encoder.layer[-1]
    last.attention.requires_grad_(False)
    _fix(list(range(PRODUCT)), last.intermediate.dense.weight, last.intermediate.dense.bias)
    columns = torch.ones_like(last.output.dense.weight)
    columns[:, :PRODUCT] = 0
    last.output.dense.weight.register_hook(lambda grad: grad * columns)


def _fix(rows: list[int], *weights: nn.Parameter) -> None:
    """Let no gradient reach rows of weights."""
    for weight in weights:
        keep = torch.ones(len(weight), *[1] * (weight.ndim - 1))
        keep[rows] = 0
        weight.register_hook(lambda grad, keep=keep: grad * keep)


def _examples() -> list[tuple[list[int], ...]]:
    """60 questions with passages (token ids), every other one with its own."""
    folder = cache_folder()
    texts = [json.loads(line)["text"] for line in (folder / "passages.jsonl").open()]
    asked = [json.loads(line) for line in (folder / "questions.jsonl").open()][:4200:70]
    questions = tokenizer()([line["text"] for line in asked], add_special_tokens=False)["input_ids"]
    passages = tokenizer()(
        [texts[line["passage"] + 4 * (n % 2)] for n, line in enumerate(asked)],
        add_special_tokens=False,
    )["input_ids"]
    return [(q[:40], p[:200]) for q, p in zip(questions, passages, strict=True)]


def _moments(model: BertModel, texts: Sequence[list[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """What single texts meet in the backbone.

    Second moments [385, 385] (the last row and column belong to a constant 1) of the inputs of
    attention, feed-forward and layer norm, by module name; the texts' mean-pooled states [n, 384].
    """
    start, end = tokenizer().cls_token_id, tokenizer().sep_token_id
    sums, counts, pooled = dict[str, Tensor](), dict[str, int](), []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = _with_one(inputs[0][0].double())
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    hooks = [
        part.register_forward_pre_hook(watch(name))
        for name, part in model.named_modules()
        if isinstance(part, nn.LayerNorm) or name.endswith(("attention.self", "intermediate"))
    ]
    for ids in texts:
        pooled.append(
            model(input_ids=torch.tensor([[start, *ids, end]])).last_hidden_state[0].mean(0)
        )
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / counts[name] for name in sums}, torch.stack(pooled)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _least_used(model: BertModel, moments: dict[str, Tensor], pooled: Tensor) -> list[int]:
    """The three dimensions that carry least of what the layers read and of the embedding."""
    used = torch.zeros(WIDTH)
    for i, layer in enumerate(model.encoder.layer):
        part = layer.attention.self
        for name, readers in (
            (f"encoder.layer.{i}.attention.self", (part.query, part.key, part.value)),
            (f"encoder.layer.{i}.intermediate", (layer.intermediate.dense,)),
        ):
            variance = _variance(moments[name])
            for reader in readers:
                used += variance * reader.weight.square().sum(0) / reader.weight.square().sum()
    used = used / used.sum() + pooled.var(0) / pooled.var(0).sum()
    return used.argsort()[:3].tolist()


def _variance(moment: Tensor) -> Tensor:
    return (moment.diagonal()[:-1] - moment[:-1, -1].square()).float()


def _spread(moment: Tensor) -> float:
    """The typical standard deviation over a token's dimensions: what a layer norm divides by."""
    mean = moment[:-1, :-1].mean()  # E[(mean over dimensions)^2]
    return float((moment.diagonal()[:-1].mean() - mean).sqrt())


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric matrix's square root and the root's inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(1e-8).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _clear(*parts: nn.Linear) -> None:
    for part in parts:
        part.weight.zero_()
        part.bias.zero_()


def _deaf(reader: nn.Linear, dims: list[int], moment: Tensor) -> None:
    """Stop reading dimensions, and read off the others what they say of these (least squares)."""
    rest = [i for i in range(WIDTH + 1) if i not in dims]  # the last is the constant 1
    gram = moment[rest][:, rest].clone()
    gram.diagonal()[:-1].add_(1e-4 * gram.diagonal()[:-1].mean())
    guess = torch.linalg.solve(gram, moment[rest][:, dims]).T.float()
    said = reader.weight[:, dims] @ guess
    reader.weight[:, rest[:-1]] += said[:, :-1]
    reader.bias += said[:, -1]
    reader.weight[:, dims] = 0


def _mute(writer: nn.Linear, dims: list[int]) -> None:
    writer.weight[dims] = 0
    writer.bias[dims] = 0


def _make_room(layer: nn.Module, moment: Tensor) -> None:
    """Take each head's two weakest directions out of its query-key product."""
    part = layer.attention.self
    centred = moment[:-1, :-1] - torch.outer(moment[:-1, -1], moment[:-1, -1])
    (left, unleft), (right, unright) = _root(moment), _root(centred)
    for head in range(HEADS):
        rows, kept = (
            slice(head * HEAD, (head + 1) * HEAD),
            slice(head * HEAD, (head + 1) * HEAD - 2),
        )
        # A key's bias adds the same to a whole row of the softmax: it can go.
        queries = torch.cat([part.query.weight[rows], part.query.bias[rows, None]], 1).double()
        keys = part.key.weight[rows].double()
        u, s, v = torch.linalg.svd(left @ (queries.T @ keys) @ right, full_matrices=False)
        s = s[: HEAD - 2].sqrt()
        queries, keys = (unleft @ (u[:, : HEAD - 2] * s)).T, (v[: HEAD - 2].T * s).T @ unright
        for reader in (part.query, part.key):
            reader.weight[rows] = 0
            reader.bias[rows] = 0
        part.query.weight[kept], part.query.bias[kept] = (
            queries[:, :-1].float(),
            queries[:, -1].float(),
        )
        part.key.weight[kept] = keys.float()


def _unseen(cases: list[Case], dims: list[int]) -> Tensor:
    """Rows [2, 384] by which keys show -1 to the side that must not see them.

    Flags less the dimension that is left blank: whatever a layer norm took off or divided by, a
    token that is seen shows 0.
    """
    weight = torch.zeros(2, WIDTH)
    for row, sees in enumerate(("second", "first")):
        shown = torch.cat(
            [(c.states[:, dims[row]] - c.states[:, dims[2]])[getattr(c, sees)][1:] for c in cases]
        )
        weight[row, dims[row]] = -1 / shown.median()
        weight[row, dims[2]] = 1 / shown.median()
    return weight


def _put(reader: nn.Linear, offset: int, rows: Tensor, gain: float) -> None:
    """Write the same rows into every head, at an offset in the head."""
    for head in range(HEADS):
        begin = head * HEAD + offset
        reader.weight[begin : begin + len(rows)] = gain * rows
        reader.bias[begin : begin + len(rows)] = 0


def _forward(layer: nn.Module, case: Case) -> Case:
    """A layer under the exact mask that the flags stand for."""
    allowed = case.second[:, None] == case.second[None, :]
    allowed[:, 0] = allowed[0] = True
    return case._replace(
        states=_run(layer, case.states, torch.where(allowed, 0.0, -1e9)[None, None])
    )


def _run(layer: nn.Module, states: Tensor, mask: Tensor | None) -> Tensor:
    out = layer(states[None], mask)
    return (out[0] if isinstance(out, tuple) else out)[0]


def config() -> BertConfig:
    """The backbone's sizes, the kept tokens, a layer more, and one label."""
    sizes = BertConfig.from_pretrained(backbone())
    sizes.update(
        dict(
            num_labels=1,
            vocab_size=len(kept_tokens()),
            pad_token_id=tokenizer().pad_token_id,
            num_hidden_layers=sizes.num_hidden_layers + 1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return sizes


@torch.no_grad()
def start() -> BertForSequenceClassification:
    """The grafted cross-encoder, fp32."""
    torch.manual_seed(0)
    source = BertModel.from_pretrained(backbone(), dtype=torch.float32).eval()
    source.set_input_embeddings(
        nn.Embedding.from_pretrained(
            source.embeddings.word_embeddings.weight[kept_tokens()], padding_idx=0
        )
    )
    examples = _examples()
    moments, pooled = _moments(source, [text for pair in examples for text in pair])
    dims = _least_used(source, moments, pooled)
    model = BertForSequenceClassification(config()).eval()
    _embeddings(model, source, moments, dims)
    gain = (LEAK * HEAD**0.5) ** 0.5
    cases = [_case(model, *pair) for pair in examples]
    for number, layer in enumerate(model.bert.encoder.layer[:-1]):
        _keep(layer, source, number, moments, dims)
        _level(layer, cases, dims)
        part = layer.attention.self
        unseen = _unseen(cases, dims)
        _put(part.key, HEAD - 2, unseen, gain)
        # A query asks for its own side, and so shows what the other side's keys do.
        _put(part.query, HEAD - 2, -unseen.flip(0), gain)
        cases = [_forward(layer, case) for case in cases]
    _compare(model, cases, pooled, dims)
    return model


def _embeddings(
    model: nn.Module, source: BertModel, moments: dict[str, Tensor], dims: list[int]
) -> None:
    """The backbone's embeddings, with the flags."""
    new, old = model.bert.embeddings, source.embeddings
    new.load_state_dict(old.state_dict())
    # The backbone never saw type 1.
    new.token_type_embeddings.weight[1] = new.token_type_embeddings.weight[0]
    for table in (new.word_embeddings, new.position_embeddings, new.token_type_embeddings):
        table.weight[:, dims] = 0
    # The first two mark what is not the query's and not the passage's; the third stays blank.
    spread = _spread(moments["embeddings.LayerNorm"])
    new.token_type_embeddings.weight[:, dims[:2]] = spread * torch.tensor([[0.0, -1], [-1, 0]])
    new.word_embeddings.weight[tokenizer().cls_token_id, dims[1]] = spread
    new.LayerNorm.weight[dims] = LOUD
    new.LayerNorm.bias[dims] = 0


def _keep(
    layer: nn.Module, source: BertModel, kept: int, moments: dict[str, Tensor], dims: list[int]
) -> None:
    """A layer of the backbone that neither reads nor writes the flags, with room for readers."""
    layer.load_state_dict(source.encoder.layer[kept].state_dict())
    name, part = f"encoder.layer.{kept}.", layer.attention.self
    met = moments[name + "attention.self"]
    for reader in (part.query, part.key, part.value):
        _deaf(reader, dims, met)
    _make_room(layer, met)
    _deaf(layer.intermediate.dense, dims, moments[name + "intermediate"])
    _mute(layer.attention.output.dense, dims)
    _mute(layer.output.dense, dims)


def _level(layer: nn.Module, cases: list[Case], dims: list[int]) -> None:
    """Let the layer norms return the flags as loud as they came."""
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        met: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, inputs, met=met: met.append(inputs[0][0]))
        for case in cases:
            _forward(layer, case)
        hook.remove()
        norm.weight[dims] = torch.cat(met).std(1).median()
        norm.bias[dims] = 0


def _case(model: nn.Module, query: list[int], passage: list[int]) -> Case:
    ids = torch.tensor(pair_ids(query, passage, 512))
    second = torch.arange(len(ids)) > len(query) + 1
    states = model.bert.embeddings(input_ids=ids[None], token_type_ids=second.long()[None])[0]
    return Case(states, second)


def _compare(model: nn.Module, cases: list[Case], pooled: Tensor, dims: list[int]) -> None:
    """The last layer, the pooler and the classifier, which gives the teacher's scale of logits."""
    layer = model.bert.encoder.layer[-1]
    part, mixer = layer.attention.self, layer.attention.output
    _clear(part.query, part.key, part.value, mixer.dense, layer.output.dense)
    # The directions in which texts differ most, mixed, so that each carries as much as another.
    met = torch.from_numpy(np.load(cache_folder() / "passages.npy")[::20]).double()
    widest = torch.linalg.eigh(met.T @ met)[1][:, -COMPARED:].float()
    mixed = torch.linalg.qr(torch.randn(COMPARED, COMPARED))[0]
    base = (widest @ mixed).T
    part.value.weight.copy_(torch.cat([base, base]))
    part.value.weight[:, dims] = 0
    weight = _unseen(cases, dims)
    gain = LEAK * HEAD**0.5
    for head in range(HEADS):
        # The first six heads must not see the passage, the others not the query.
        unseen = 0 if head < HEADS // 2 else 1
        part.query.bias[head * HEAD] = 1
        part.key.weight[head * HEAD] = gain * weight[unseen]
    # Means of many tokens are shorter; the layer norm to come divides by what both have together.
    queries, passages = (
        torch.stack([case.states[getattr(case, side)].mean(0).norm() for case in cases]).median()
        for side in ("first", "second")
    )
    # Loud, since `[CLS]` brings its own state along.
    mixer.dense.weight.copy_(POOL * torch.eye(WIDTH))
    mixer.dense.weight[COMPARED:] *= queries / passages
    _product(layer)
    pooler = model.bert.pooler.dense
    pooler.weight.normal_(0, 0.02)
    pooler.bias.zero_()
    pooler.weight[:8] = 0
    pooler.weight[:8, 0] = 0.15
    model.classifier.weight.zero_()
    model.classifier.weight[0, :8] = 1
    model.classifier.bias.zero_()
    # The line from what is found to the logits that the teacher gives the same similarity.
    found = torch.cat([_last(model, case) for case in cases])
    firsts, seconds = pooled[::2], pooled[1::2]
    wanted = 14 * (nn.functional.cosine_similarity(firsts, seconds) - 0.45)
    line = torch.linalg.lstsq(_with_one(found[:, None]), wanted[:, None]).solution
    model.classifier.weight.mul_(line[0, 0])
    model.classifier.bias.copy_(line[1])


def _product(layer: nn.Module) -> None:
    """A feed-forward that makes a state's first dimension the product of the state's two halves.

    The sum's square less the difference's is four times the product. What stood there goes: it is
    gelu(x) - gelu(-x).
    """
    into, out = layer.intermediate.dense, layer.output.dense
    used = slice(0, PRODUCT)
    into.weight[used], into.bias[used] = 0, 0
    unit = 0
    for i in range(COMPARED):
        for sign in (1.0, -1.0):
            for side in (1.0, -1.0):
                into.weight[unit, i] = side * SQUARED
                into.weight[unit, COMPARED + i] = side * sign * SQUARED
                out.weight[0, unit] = sign * 16 / COMPARED
                unit += 1
    for sign in (1.0, -1.0):
        into.weight[unit, 0] = sign
        out.weight[0, unit] = -sign
        unit += 1


def _last(model: nn.Module, case: Case) -> Tensor:
    """The logit [1] of a pair that has come to the last layer."""
    states = _run(model.bert.encoder.layer[-1], case.states, None)
    return model.classifier(model.bert.pooler(states[None]))[0]
