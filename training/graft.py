"""Initial weights of `mini`: a cross-encoder that computes its bi-encoder's similarity untrained.

A fresh head on a bi-encoder learns only slowly, from scored pairs, to compare two texts. Here the
comparison is written into the weights of an ordinary BERT before any training:

1. The backbone's six layers run as they did on one text: each segment attends to itself and
   `[CLS]`, and to a token of the other segment with at most `exp(-LEAK)` of the weight. `[CLS]`
   attends only to itself, and stays the anchor that the layers expect at position 0.
2. A seventh layer pools: every token becomes the mean of its segment, and `[CLS]` that of the
   query. The layer norm gives all means the same length.
3. An eighth layer compares: `[CLS]` adds the passage's mean to its own. The length of the sum of
   two unit vectors gives their cosine: |a + b|^2 = 2 + 2ab. A constant next to the sum keeps the
   layer norm from hiding the length, the feed-forward squares the sum dimension by dimension, and
   the pooler reads the total.

The segments are distinguished by flags in four of the 384 dimensions, the least used ones (SIGNS).
Two of each head's 32 dimensions read the flags; the weakest directions of its query-key product
make room for them.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from embed import backbone
from model import kept_tokens, pair_ids, tokenizer
from sources import cache_folder
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

LEAK = 7.0
"""How much lower a token's attention logits are for the other side, if the flags of both are faint.

A higher value separates the texts better, but amplifies the rounding errors of the flags in int8
and Q5.
"""
LOUD = 1.0
"""A flag's size, twice that of a typical value in a state: more than int8 rounds away."""
POOL = 64.0
"""How much larger a text's mean is than the token state that it replaces."""
FAINT = 0.15
"""The share of tokens with flags below the size that readers are scaled to, called faint."""
SHAPES = ((8.0, 4.0), (8.0, 4.0), (11.0, 6.0))
"""For each flag: the slope with which its restoring units read it, and where the first bends."""
MARK = 0.1
"""Factor for the flags in the pooled states, relative to the means."""
WIDTH, HEADS, HEAD = 384, 12, 32
SIGNS = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1], [1, 1, -1, -1]])
"""The flags of the passage, of the query and of `[CLS]`, in the four dimensions.

Each sums to zero, so that no layer norm shifts the other dimensions, and each is orthogonal to the
others, because they are read by their signs.
"""
SQUARED = 0.5
"""Scale of a sum's values for gelu: gelu(x) + gelu(-x) is nearly 0.8 x^2 for small x."""
BESIDE = 48.0
"""The constant next to a sum whose values are about 1.7."""


class Case(NamedTuple):
    """A pair between two layers.

    states: [tokens, 384], `[CLS]` first.
    second: whether a token is the passage's.
    """

    states: Tensor
    second: Tensor

    @property
    def first(self) -> Tensor:
        """Whether a token is the query's, which includes `[CLS]`."""
        return ~self.second


def flags(model: nn.Module) -> list[int]:
    """The dimensions of the flags: all position embeddings are zero there."""
    rows = model.bert.embeddings.position_embeddings.weight
    return torch.nonzero(rows.abs().sum(0) == 0).flatten().tolist()


def hold(model: nn.Module) -> None:
    """Exclude the written weights from training: the flags, their readers, and the comparison.

    These weights work only with their exact values; the noise of one step breaks them.
    """
    dims = flags(model)
    readers = [head * HEAD + at for head in range(HEADS) for at in (HEAD - 2, HEAD - 1)]
    model.bert.embeddings.requires_grad_(False)
    for layer in model.bert.encoder.layer[:-2]:
        for part in (layer.attention.output, layer.output):
            _fix(dims, part.dense.weight, part.dense.bias)
            _fix(dims, part.LayerNorm.weight, part.LayerNorm.bias)
        restoring = torch.nonzero(layer.output.dense.weight[dims].abs().sum(0)).flatten().tolist()
        _fix(restoring, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        for part in (layer.attention.self.query, layer.attention.self.key):
            _fix(readers, part.weight, part.bias)
    pool, compare = model.bert.encoder.layer[-2:]
    pool.attention.requires_grad_(False)
    _fix(dims, pool.output.dense.weight, pool.output.dense.bias)
    _fix(dims, pool.output.LayerNorm.weight, pool.output.LayerNorm.bias)
    compare.requires_grad_(False)


def _fix(rows: list[int], *weights: nn.Parameter) -> None:
    """Zero the gradients of rows of weights."""
    for weight in weights:
        keep = torch.ones(len(weight), *[1] * (weight.ndim - 1))
        keep[rows] = 0
        weight.register_hook(lambda grad, keep=keep: grad * keep)


def _examples() -> list[tuple[list[int], ...]]:
    """60 questions with passages (token ids); every other passage is the question's own."""
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
    """Statistics of single texts in the backbone.

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


def _least_used(
    model: BertModel, moments: dict[str, Tensor], texts: Sequence[list[int]]
) -> list[int]:
    """The four dimensions whose removal changes the embeddings least.

    All are in one block of 128, because a quantized runtime may scale a state's values by blocks,
    and flags are compared. Each is in another block of 32, because a format may scale weights by
    these, and a flag's reader then has only one weight in each.
    """
    batch = tokenizer().pad({"input_ids": [ids[:64] for ids in texts]}, return_tensors="pt")
    exact = _pooled(model, batch)
    moved = torch.empty(WIDTH)
    for dim in range(WIDTH):
        without = copy.deepcopy(model)
        for number, layer in enumerate(without.encoder.layer):
            _spare(layer, number, moments, [dim])
        _blank(without.embeddings, [dim])
        moved[dim] = 1 - nn.functional.cosine_similarity(_pooled(without, batch), exact).mean()
    best, at = moved.view(-1, 4, 32).min(2)
    first = 4 * int(best.sum(1).argmin())
    return [32 * (first + i) + int(at.view(-1)[first + i]) for i in range(4)]


def _pooled(model: BertModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean-pooled states [texts, 384]."""
    mask = batch["attention_mask"][..., None]
    return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


def _spare(layer: nn.Module, number: int, moments: dict[str, Tensor], dims: list[int]) -> None:
    """Make a layer of the backbone neither read nor write some dimensions."""
    name, part = f"encoder.layer.{number}.", layer.attention.self
    for reader in (part.query, part.key, part.value):
        _deaf(reader, dims, moments[name + "attention.self"])
    _deaf(layer.intermediate.dense, dims, moments[name + "intermediate"])
    for writer in (layer.attention.output.dense, layer.output.dense):
        writer.weight[dims] = 0
        writer.bias[dims] = 0


def _blank(embeddings: nn.Module, dims: list[int]) -> None:
    """Set dimensions of the embeddings to zero."""
    for name in ("word", "position", "token_type"):
        getattr(embeddings, f"{name}_embeddings").weight[:, dims] = 0


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
    """Stop reading dimensions, and predict them from the others instead (least squares)."""
    rest = [i for i in range(WIDTH + 1) if i not in dims]  # the last is the constant 1
    gram = moment[rest][:, rest].clone()
    gram.diagonal()[:-1].add_(1e-4 * gram.diagonal()[:-1].mean())
    guess = torch.linalg.solve(gram, moment[rest][:, dims]).T.float()
    said = reader.weight[:, dims] @ guess
    reader.weight[:, rest[:-1]] += said[:, :-1]
    reader.bias += said[:, -1]
    reader.weight[:, dims] = 0


def _make_room(layer: nn.Module, moment: Tensor) -> None:
    """Remove the two weakest directions from each head's query-key product."""
    part = layer.attention.self
    centred = moment[:-1, :-1] - torch.outer(moment[:-1, -1], moment[:-1, -1])
    (left, unleft), (right, unright) = _root(moment), _root(centred)
    for head in range(HEADS):
        rows, kept = (
            slice(head * HEAD, (head + 1) * HEAD),
            slice(head * HEAD, (head + 1) * HEAD - 2),
        )
        # A key's bias adds the same to a whole row of the softmax, so it can be dropped.
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
    """Rows [2, 384] that make keys -1 for the side that must not attend to them, else 0.

    They are differences of dimensions, all of which a layer norm shifts and divides equally.
    """
    weight = torch.zeros(2, WIDTH)
    for row, sees in enumerate(("second", "first")):
        states = torch.cat([case.states[getattr(case, sees)][1:, dims] for case in cases])
        weight[row, dims] = -SIGNS[row] / (states @ SIGNS[row]).quantile(FAINT)
    return weight


def _asking(unseen: Tensor, dims: list[int], hidden: tuple[int, ...]) -> Tensor:
    """Rows [2, 384] that make queries attend to their own side, to match the rows of `_unseen`.

    `[CLS]`, to which both sides attend, must not attend to the `hidden` ones of (passage, query).
    Its weights are larger, because integer multiples of one weight survive rounding.
    """
    asking = -unseen.flip(0)
    for row in hidden:
        asking[row, dims] += SIGNS[2] * asking[row, dims].max()
    return asking


def _put(reader: nn.Linear, offset: int, rows: Tensor) -> None:
    """Write the same rows into every head, at an offset in the head, so that -1 times 1 is -LEAK.

    A head divides its products by the root of its width.
    """
    gain = (LEAK * HEAD**0.5) ** 0.5
    for head in range(HEADS):
        begin = head * HEAD + offset
        reader.weight[begin : begin + len(rows)] = gain * rows
        reader.bias[begin : begin + len(rows)] = 0


def _forward(layer: nn.Module, case: Case) -> Case:
    """Run a layer with the exact mask that the flags approximate."""
    allowed = case.second[:, None] == case.second[None, :]
    allowed[0] = False
    allowed[:, 0] = True
    return case._replace(
        states=_run(layer, case.states, torch.where(allowed, 0.0, -1e9)[None, None])
    )


def _run(layer: nn.Module, states: Tensor, mask: Tensor | None) -> Tensor:
    out = layer(states[None], mask)
    return (out[0] if isinstance(out, tuple) else out)[0]


def config() -> BertConfig:
    """The backbone's sizes, with the kept tokens, two more layers, one label and no dropout."""
    sizes = BertConfig.from_pretrained(backbone())
    sizes.update(
        dict(
            num_labels=1,
            vocab_size=len(kept_tokens()),
            pad_token_id=tokenizer().pad_token_id,
            num_hidden_layers=sizes.num_hidden_layers + 2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return sizes


@torch.no_grad()
def start() -> BertForSequenceClassification:
    """The grafted cross-encoder, in fp32."""
    torch.manual_seed(0)
    source = BertModel.from_pretrained(backbone(), dtype=torch.float32).eval()
    source.set_input_embeddings(
        nn.Embedding.from_pretrained(
            source.embeddings.word_embeddings.weight[kept_tokens()], padding_idx=0
        )
    )
    examples = _examples()
    moments, pooled = _moments(source, [text for pair in examples for text in pair])
    dims = _least_used(source, moments, [text for pair in examples[:8] for text in pair])
    model = BertForSequenceClassification(config()).eval()
    _embeddings(model, source, moments, dims)
    cases = [_case(model, *pair) for pair in examples]
    for number, layer in enumerate(model.bert.encoder.layer[:-2]):
        _keep(layer, source, number, moments, dims)
        _level(layer, cases, dims)
        part = layer.attention.self
        unseen = _unseen(cases, dims)
        _put(part.key, HEAD - 2, unseen)
        _put(part.query, HEAD - 2, _asking(unseen, dims, (0, 1)))
        cases = [_forward(layer, case) for case in cases]
    pool, compare = model.bert.encoder.layer[-2:]
    _pool(pool, cases, dims)
    cases = [case._replace(states=_run(pool, case.states, None)) for case in cases]
    _compare(compare, cases, dims)
    _read(model, [_run(compare, case.states, None)[0] for case in cases], pooled, dims)
    return model


def _embeddings(
    model: nn.Module, source: BertModel, moments: dict[str, Tensor], dims: list[int]
) -> None:
    """Set the embeddings to the backbone's, with the flags."""
    new, old = model.bert.embeddings, source.embeddings
    new.load_state_dict(old.state_dict())
    # The backbone was never trained on type 1.
    new.token_type_embeddings.weight[1] = new.token_type_embeddings.weight[0]
    _blank(new, dims)
    spread = _spread(moments["embeddings.LayerNorm"])
    new.token_type_embeddings.weight[:, dims] = spread * SIGNS[[1, 0]]
    new.word_embeddings.weight[tokenizer().cls_token_id, dims] = spread * (SIGNS[2] - SIGNS[1])
    new.LayerNorm.weight[dims] = LOUD
    new.LayerNorm.bias[dims] = 0


def _keep(
    layer: nn.Module, source: BertModel, number: int, moments: dict[str, Tensor], dims: list[int]
) -> None:
    """Set a layer to the backbone's, without access to the flags, with room for their readers."""
    layer.load_state_dict(source.encoder.layer[number].state_dict())
    _spare(layer, number, moments, dims)
    _make_room(layer, moments[f"encoder.layer.{number}.attention.self"])


def _level(layer: nn.Module, cases: list[Case], dims: list[int]) -> None:
    """Make the layer return the flags clean, and as large as they were.

    A layer norm divides a token's flags along with the rest, so some would become faint, most of
    all those of `[CLS]`, whose state is by far the largest. Per flag, two of the least needed units
    of the feed-forward bring the value, v times the usual one, to the usual one if v is well above
    a half. Below that gelu is zero, so rounding errors at a token without the flag do not grow.
    """
    norm, feed, into = layer.attention.output.LayerNorm, layer.output, layer.intermediate.dense
    norm.weight[dims] = _met(norm, layer, cases).std(1).median()
    norm.bias[dims] = 0
    within = _met(feed.dense, layer, cases)
    cost = within.var(0) * feed.dense.weight.square().sum(0)
    # One per block of 32, whose weights a format may scale together.
    least, at = cost.view(-1, 32).min(1)
    blocks = least.argsort()[: 2 * len(SIGNS)]
    spare = 32 * blocks + at[blocks]
    feed.dense.bias += feed.dense.weight[:, spare] @ within[:, spare].mean(0)
    feed.dense.weight[:, spare] = 0
    into.weight[spare] = 0
    states = _met(into, layer, cases)[:, dims]
    spreads = _met(feed.LayerNorm, layer, cases).std(1)
    second = torch.cat([case.second for case in cases])
    start = torch.cat([torch.arange(len(case.states)) == 0 for case in cases])
    for signs, which, (steep, bend), units in zip(
        SIGNS, (second, ~second & ~start, start), SHAPES, spare.view(-1, 2), strict=True
    ):
        read = signs / signs.square().sum()
        usual = (states[which] @ read).quantile(FAINT)
        wanted = LOUD * spreads[which].median() / spreads.median()
        into.weight[units[:, None], torch.tensor(dims)] = steep * read / usual
        into.bias[units] = -torch.tensor([bend, bend + 1])
        # Above both bends, where gelu is a straight line, they give wanted - v * usual.
        later = bend * usual / steep - wanted
        given = torch.stack([-usual / steep - later, later])
        feed.dense.weight[torch.tensor(dims)[:, None], units] += torch.outer(signs, given)
    feed.LayerNorm.weight[dims] = spreads.median()
    feed.LayerNorm.bias[dims] = 0


def _met(part: nn.Module, layer: nn.Module, cases: list[Case]) -> Tensor:
    """The inputs of a part of a layer [tokens of all cases, width]."""
    met: list[Tensor] = []
    hook = part.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0][0]))
    for case in cases:
        _forward(layer, case)
    hook.remove()
    return torch.cat(met)


def _case(model: nn.Module, query: list[int], passage: list[int]) -> Case:
    ids = torch.tensor(pair_ids(query, passage, 512))
    second = torch.arange(len(ids)) > len(query) + 1
    states = model.bert.embeddings(input_ids=ids[None], token_type_ids=second.long()[None])[0]
    return Case(states, second)


def _pool(layer: nn.Module, cases: list[Case], dims: list[int]) -> None:
    """Turn each token into its segment's mean, of length sqrt(384), `[CLS]` into the query's."""
    part, mixer = layer.attention.self, layer.attention.output
    _clear(part.query, part.key, part.value, mixer.dense, layer.output.dense)
    part.value.weight.copy_(torch.eye(WIDTH))
    part.value.weight[dims] *= MARK
    mixer.dense.weight.copy_(POOL * torch.eye(WIDTH))
    unseen = _unseen(cases, dims)
    _put(part.key, 0, unseen)
    _put(part.query, 0, _asking(unseen, dims, (0,)))


def _compare(layer: nn.Module, cases: list[Case], dims: list[int]) -> None:
    """Set the first flag at `[CLS]` to the squared length of the means' sum, minus the median."""
    part, mixer, (found, _, beside, against) = layer.attention.self, layer.attention.output, dims
    _clear(part.query, part.key, part.value, mixer.dense, layer.intermediate.dense)
    _clear(layer.output.dense)
    # `[CLS]` attends only to the passage, and keeps its own state, the query's mean.
    part.query.bias[::HEAD] = 1
    part.key.weight[::HEAD] = LEAK * HEAD**0.5 * _unseen(cases, dims)[1]
    part.value.weight.copy_(torch.eye(WIDTH))
    part.value.weight[dims] = 0
    mixer.dense.weight.copy_(torch.eye(WIDTH))
    mixer.dense.bias[beside], mixer.dense.bias[against] = BESIDE, -BESIDE
    mixer.LayerNorm.weight[dims] = 0
    into, out = layer.intermediate.dense, layer.output.dense
    for i in range(WIDTH):
        into.weight[2 * i, i], into.weight[2 * i + 1, i] = SQUARED, -SQUARED
    out.weight[found, : 2 * WIDTH] = 1 / SQUARED**2 / 16
    met: list[Tensor] = []
    hook = out.register_forward_hook(lambda *args: met.append(args[2][0, 0, found]))
    for case in cases:
        _run(layer, case.states, None)
    hook.remove()
    out.bias[found] = -torch.stack(met).median()


def _read(model: nn.Module, states: list[Tensor], pooled: Tensor, dims: list[int]) -> None:
    """Set the pooler and the classifier to return the teacher's logits for the cosines."""
    pooler, head = model.bert.pooler.dense, model.classifier
    pooler.weight.normal_(0, 0.02)
    head.weight.zero_()
    pooler.weight[0] = 0
    pooler.weight[0, dims[0]] = 0.5 / torch.stack(states)[:, dims[0]].abs().max()
    pooler.bias.zero_()
    found = pooler(torch.stack(states))[:, :1].tanh()
    wanted = 14 * (nn.functional.cosine_similarity(pooled[::2], pooled[1::2]) - 0.45)
    line = torch.linalg.lstsq(_with_one(found), wanted[:, None]).solution
    head.weight[0, 0], head.bias[0] = line[0, 0], line[1, 0]
