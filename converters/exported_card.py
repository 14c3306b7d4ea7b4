"""The model card of an exported folder: what it is, how close to the original, how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qrank.bundle.description import Description
from qrank.bundle.family import Family
from qrank.bundle.manifest import Manifest, Source, Variant
from qrank.converters.checkpoint.configuration import OWN_CLASSES
from qrank.converters.exported_config import gives_types
from qrank.system.version import __version__

_HOW = {
    "onnx-fp32": "Not quantized.",
    "onnx-fp16": "Weights and arithmetic in fp16.",
    "onnx-int8": "Weights in 8 bits, one scale per column; words in 8 bits, one scale per row. "
    "Activations are quantized to 8 bits as the model runs, one scale per token, so a score does "
    "not depend on the rest of its batch. Weights are unsigned, so that onnxruntime's products are "
    "exact on x86 CPUs without VNNI too.",
    "onnx-int4": "Weights in 4 bits, in groups of 64 or 32 that share a scale and a zero point; "
    "the words, and matrices whose rounding costs the most, in 8 bits. onnxruntime computes with "
    "8-bit activations.",
    "openvino-fp16": "Weights in fp16.",
    "openvino-int8": "Weights in 8 bits, one scale and zero point per row. Activations are not "
    "quantized.",
    "openvino-int8-w8a8": "Weights in 8 bits, one scale per row; activations in 8 bits as the "
    "model runs, one scale per token, so a score does not depend on the rest of its batch. "
    "Wrong on x86 CPUs without VNNI or AMX: there OpenVINO's 8-bit products overflow.",
    "openvino-int4": "Weights in 4 bits, in groups of 64 or 32 that share a scale and a zero "
    "point; the words, and matrices whose rounding costs the most, in 8 bits.",
}
"""How the variants that qrank makes are quantized."""

_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
"""ONNX precision -> transformers.js' name of it."""


@dataclass(frozen=True)
class Exported:
    """A variant and its graph's place in the exported folder."""

    variant: Variant
    place: str


def model_card(
    manifest: Manifest,
    description: Description,
    tokenizer: dict[str, Any],
    exported: Sequence[Exported],
) -> str:
    """README.md of an exported folder, ready for the hub.

    Args:
        manifest: the bundle's.
        description: the bundle's.
        tokenizer: the exported tokenizer.json.
        exported: what the folder has.
    """
    parts = (
        _front_matter(manifest.source, description, exported),
        _origin(manifest, exported),
        _fidelity(manifest, exported),
        _making(exported),
        *_loading(manifest, description, tokenizer, exported),
        _differences(manifest.family),
    )
    return "\n".join(parts)


def _front_matter(source: Source, description: Description, exported: Iterable[Exported]) -> str:
    formats = dict.fromkeys(each.variant.format for each in exported)
    tags = ["cross-encoder", "reranker", *formats, "qrank"]
    if "onnx" in formats:
        tags.append("transformers.js")
    fields: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "text-ranking",
        **description.card,
    }
    if source.revision is not None:  # otherwise its id is the name of a folder
        fields |= {"base_model": source.id, "base_model_relation": "quantized"}
    # JSON is YAML, whatever the texts contain.
    lines = (f"{key}: {json.dumps(value)}" for key, value in (fields | {"tags": tags}).items())
    return "\n".join(["---", *lines, "---", ""])


def _origin(manifest: Manifest, exported: Iterable[Exported]) -> str:
    source = manifest.source
    origin = f"`{source.id}`"
    if source.revision is not None:
        origin = f"[{source.id}](https://huggingface.co/{source.id}), revision `{source.revision}`"
    tools = {f"{n} {v}" for e in exported for n, v in e.variant.tools.items() if n != "qrank"}
    return f"""# {manifest.name}

A reranker: it reads a query and a document together and returns one number, the document's
relevance. This is {origin}, converted and exported by qrank {__version__}.

- Reads up to {manifest.family.max_length} tokens, query and document together.
- Architecture: {manifest.family.architecture}.
- Fingerprint of the original (sha256 over weights, configuration and tokenizer):
  `{manifest.source.fingerprint}`.
- Converted with {", ".join(sorted(tools))}.
"""


def _fidelity(manifest: Manifest, exported: Iterable[Exported]) -> str:
    rows = []
    for each in exported:
        variant, found = each.variant, each.variant.fidelity
        ranking = variant.ranking
        ndcg = "not compared" if ranking is None else f"{ranking.ndcg:.4f} ({ranking.queries})"
        rows.append(
            f"| `{each.place}` | {variant.bytes / 1e6:.1f} MB | {found.max_abs:.2g} "
            f"({found.max_abs / found.spread if found.spread else 0.0:.1%}) | {found.kendall:.4f} "
            f"| {ndcg} |"
        )
    table = "\n".join(rows)
    compared = (
        f"Compared with the original ({manifest.probes.reference}) on "
        f"{len(manifest.probes.work)} pairs"
        if manifest.probes.verified
        else "**Not compared with the original**: the figures compare a converted model with itself"
    )
    return f"""## How close it is to the original

{compared}.

| file | size | largest difference of a logit (of their range) | Kendall's tau | nDCG@10 (queries) |
|---|---|---|---|---|
{table}

nDCG@10 compares rankings of 24 passages for each query; the original's scores are the gains, so 1
means the same order. None of this says how well the model ranks your documents.
"""


def _making(exported: Iterable[Exported]) -> str:
    lines = []
    for each in exported:
        how = each.variant.note
        if not how.startswith("prebuilt"):
            how = " ".join(filter(None, (_HOW.get(each.variant.name), how)))
            if each.variant.precision != "fp32":
                how += " The score head is in fp32."
        lines.append(f"- `{each.place}`: {how}")
    return "\n".join(["## How it was made", "", *lines, ""])


def _loading(
    manifest: Manifest,
    description: Description,
    tokenizer: dict[str, Any],
    exported: Sequence[Exported],
) -> Iterator[str]:
    """One section for each program that loads the folder."""
    family = manifest.family
    yield "## How to load it\n"
    yield "Replace `OWNER/NAME` by this repository's name, or by a folder; any graph of the table"
    yield "above takes the place of the one named here.\n"
    # These two look the class up by config.json, and others have none for it.
    known = description.config.get("model_type") not in OWN_CLASSES
    shown = _shown(exported)
    if known:
        yield _sentence_transformers(family, shown)
    graph = next((each for each in shown if each.variant.format == "onnx"), None)
    if graph is None:
        return
    yield _fastembed(manifest.name, graph.place)
    if (
        known
        and graph.variant.precision in _DTYPES
        and (family.segments is None or gives_types(family, tokenizer))
    ):
        yield _transformers_js(graph)
    yield _onnxruntime(family, graph.place)
    yield _text_embeddings_inference(graph.place)
    if (vespa := _vespa(family, graph.place)) is not None:
        yield vespa


def _shown(exported: Sequence[Exported]) -> list[Exported]:
    """The variant of each format that the examples load: int8 if there is one."""
    shown: dict[str, Exported] = {}
    for each in sorted(exported, key=lambda each: each.variant.precision != "int8"):
        shown.setdefault(each.variant.format, each)
    return list(shown.values())


def _sentence_transformers(family: Family, exported: Sequence[Exported]) -> str:
    calls = "\n".join(
        f'model = CrossEncoder("OWNER/NAME", backend="{each.variant.format}", '
        f'model_kwargs={{"file_name": "{each.place}"}})'
        for each in exported
    )
    applied = "a sigmoid of the logits" if family.activation == "sigmoid" else "the logits"
    extra = ",".join(dict.fromkeys(each.variant.format for each in exported))
    return f"""### sentence-transformers

```python
from sentence_transformers import CrossEncoder

{calls}
scores = model.predict([(query, document) for document in documents])
```

Scores are {applied}. It needs `pip install "sentence-transformers[{extra}]"`.
"""


def _fastembed(name: str, place: str) -> str:
    return f"""### fastembed

```python
from fastembed.common.model_description import ModelSource
from fastembed.rerank.cross_encoder import TextCrossEncoder

TextCrossEncoder.add_custom_model(
    "{name}", sources=ModelSource(hf="OWNER/NAME"), model_file="{place}"
)
model = TextCrossEncoder("{name}")  # a folder: specific_model_path="FOLDER"
logits = list(model.rerank(query, documents))
```
"""


def _transformers_js(each: Exported) -> str:
    return f"""### transformers.js

```js
import {{ AutoModelForSequenceClassification, AutoTokenizer }} from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("OWNER/NAME");
const model = await AutoModelForSequenceClassification.from_pretrained("OWNER/NAME", {{
  dtype: "{_DTYPES[each.variant.precision]}",
}});
const inputs = tokenizer(documents.map(() => query), {{
  text_pair: documents,
  padding: true,
  truncation: true,
}});
const {{ logits }} = await model(inputs);
```
"""


def _onnxruntime(family: Family, place: str) -> str:
    types = ""
    if family.segments is not None:
        types = '\n    "token_type_ids": np.array([pair.type_ids for pair in pairs]),'
    return f"""### onnxruntime and tokenizers alone

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")  # cuts long pairs and pads the batch
session = onnxruntime.InferenceSession("FOLDER/{place}")
pairs = tokenizer.encode_batch([(query, document) for document in documents])
inputs = {{
    "input_ids": np.array([pair.ids for pair in pairs]),
    "attention_mask": np.array([pair.attention_mask for pair in pairs]),{types}
}}
(logits,) = session.run(["logits"], inputs)  # float32 [documents, 1]
```
"""


def _text_embeddings_inference(place: str) -> str:
    copied = "" if place == "onnx/model.onnx" else f"cp FOLDER/{place} FOLDER/onnx/model.onnx\n"
    return f"""### text-embeddings-inference

Its ONNX backend (the image for CPUs) reads `onnx/model.onnx` only.

```sh
{copied}text-embeddings-router --model-id FOLDER --auto-truncate
```
"""


def _vespa(family: Family, place: str) -> str | None:
    """Vespa puts one separator between the texts; None if the family has another template."""
    template = family.template
    if len(template) != 5 or template[2] != template[4] or template[1] != "{query}":
        return None
    start, end, length = template[0], template[2], family.max_length
    used, types = "", ""
    if family.segments is not None:
        used = "\n    input token_type_ids: token_type_ids"
        types = f"""
function token_type_ids() {{
    expression: tokenTypeIds({length}, query(q), attribute(tokens))
}}"""
    return f"""### Vespa

Copy the graph and `tokenizer.json` into `models/` of the application package. Vespa puts the pair
together itself; `query(q)` and `attribute(tokens)` are tokens of a `hugging-face-tokenizer` without
special tokens.

```
onnx-model reranker {{
    file: models/{place.rpartition("/")[2]}
    input input_ids: input_ids
    input attention_mask: attention_mask{used}
}}
function input_ids() {{
    expression: customTokenInputIds({start}, {end}, {length}, query(q), attribute(tokens))
}}
function attention_mask() {{
    expression: tokenAttentionMask({length}, query(q), attribute(tokens))
}}{types}
```

The logit is `onnx(reranker).logits{{d0:0,d1:0}}`.
"""


def _differences(family: Family) -> str:
    return f"""## What programs do differently

- **Scores.** sentence-transformers applies the model's activation; the others return logits, or as
  they say. The order is the same.
- **Long pairs** have more than {family.max_length} tokens. Most programs, and `tokenizer.json` by
  itself, shorten the longer text: the document, as in qrank, unless the query alone fills more than
  half of the limit. transformers.js cuts off the end, and with it the last special token.
- **Empty documents.** transformers.js reads an empty document as none.
- **Special tokens in texts**, such as a document that spells out a separator, are control tokens
  for all of these programs. qrank reads them as text.
"""
