"""A checkpoint -> an ONNX graph that returns one logit per pair."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.bundle.family import Family
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.evening import even, scalings
from qrank.converters.checkpoint.logs import errors_only
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.graph_file import fits, save_graph
from qrank.converters.onnx.quantize import channel_maxima, quantize
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from transformers import PreTrainedModel

    from qrank.converters.checkpoint.scoring_graph import Scorer

MODULES = ("torch", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime")
"""Modules needed to convert and verify."""

MEMORY = 1.8
"""The minimum memory for converting, as a multiple of the size in fp32 (docs/benchmarks.md)."""

OPSET = 20
"""The first opset with Gelu, and old enough for every runtime in use."""

HEAD = frozenset({"pooler", "pre_classifier", "classifier", "head", "score"})
"""Names of the score head's modules in transformers' classes: they stay fp32 in every precision."""


def disk(number: float) -> float:
    """Disk bytes per weight during conversion, given `number` bytes afterwards.

    The graph in fp32 is written first.
    """
    return max(4.0, number)


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
    """Write `model.onnx` (and `model.onnx.data` above 2 GB) into a folder.

    Args:
        checkpoint: loaded here, in fp32.
        precision: one of the format's `made` precisions. The head's weights are always fp32.
        folder: exists and is empty.
        calibration: pairs whose activations int8 and int4 are calibrated on.

    Returns:
        "": there is no note.

    Raises:
        ConversionError: the graph cannot be exported.
    """
    path = folder / "model.onnx"
    quantized = precision in ("int8", "int4")
    found = scalings(checkpoint, calibration) if quantized else {}
    model = checkpoint.load()
    even(model, found)
    export(model, checkpoint, path, in_one_file=precision == "fp32")
    del model
    if precision == "fp32":
        return ""
    onnx = need("onnx")
    if precision == "fp16":
        graph = onnx.load(path)
        graph = _half(graph, head_nodes(graph))
    else:
        # In int4, an activation shares its scale with few neighbours.
        maxima = channel_maxima(path, calibration) if precision == "int8" else {}
        graph = onnx.load(path, load_external_data=False)
        quantize(graph, folder, precision, keep=head_nodes(graph), maxima=maxima)
    for file in folder.iterdir():
        file.unlink()
    save_graph(graph, path)
    return ""


def head_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the score head's nodes: those that use its weights, and all that follow.

    Raises:
        ConversionError: there are none.
    """
    weights = {i.name for i in model.graph.initializer if HEAD & set(i.name.split("."))}
    found: set[str] = set()
    after: set[str] = set()
    for node in model.graph.node:
        if any(name in weights or name in after for name in node.input):
            found.add(node.name)
            after.update(node.output)
    if not found:
        raise ConversionError("no score head was found in the exported graph")
    return found


def export(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    path: Path,
    *,
    in_one_file: bool = True,
    optimize: bool = True,
) -> None:
    """Write the fp32 graph.

    Args:
        model: the checkpoint's, in transformers' own class; it computes in fp32.
        checkpoint: where the model comes from.
        path: the graph's path.
        in_one_file: keep weights of up to 2 GB in the graph's file. This takes three times their
            size in memory; writing them next to the graph takes none.
        optimize: fold constants, including transposed or upcast weights. Takes memory.

    Raises:
        ConversionError: the exporter returns no program.
    """
    torch = need("torch")
    from qrank.converters.checkpoint.scoring_graph import scorer

    module = scorer(model, checkpoint.family)
    weights = module.state_dict()
    program = torch.onnx.ONNXProgram(_graph(module, checkpoint).clone(), None)
    initializers = program.model.graph.initializers
    program.apply_weights({name: weights[name] for name in initializers if name in weights})
    if optimize:
        with _quiet():
            program.optimize()
    _forget_places(program.model.graph)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if in_one_file and fits(size):
        save_graph(program.model_proto, path)
    else:
        program.save(path, external_data=True)


def _graph(module: Scorer, checkpoint: Checkpoint) -> onnx_ir.Model:
    """The graph of a checkpoint's model, without its weights.

    Tracing takes most of an export's time, and variants differ in weights alone: the last graph is
    kept. What it computed from weights while it was traced is in it: those must not differ.
    """
    dtypes = tuple((name, str(weight.dtype)) for name, weight in module.state_dict().items())
    key = (checkpoint.source, checkpoint.family, dtypes)
    if key not in _traced:
        _traced.clear()
        _traced[key] = _trace(module, checkpoint.family)
    return _traced[key]


_traced: dict[object, onnx_ir.Model] = {}


def _trace(module: Scorer, family: Family) -> onnx_ir.Model:
    """See `_graph`.

    Raises:
        ConversionError: the exporter returns no program.
    """
    torch = need("torch")
    from qrank.converters.checkpoint import deberta, distance_buckets, grouped_attention
    from qrank.converters.checkpoint.scoring_graph import DecoderScorer, input_names

    names = input_names(family)
    example = torch.ones(2, 8, dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1)
    shape = {0: batch, 1: torch.export.Dim("length", min=2, max=family.max_length)}
    examples, shapes = (example,) * len(names), (shape,) * len(names)
    if isinstance(module, DecoderScorer):
        layers, two, heads, _, width = module.prefix_shape
        prefix = torch.zeros(layers, two, heads, 3, width)
        before = {3: torch.export.Dim("before", min=0, max=family.max_length)}
        kept = {0: torch.export.Dim("kept", min=0, max=family.max_length)}
        examples = (example, example[:, 0], prefix, torch.arange(4))
        shapes = (shape, {0: batch}, before, kept)
    model, longest = module.model, family.max_length
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(deberta.exportable(model, longest))
        stack.enter_context(distance_buckets.exportable(model, longest))
        if family.decoder:
            stack.enter_context(grouped_attention.exportable(model))
        program = torch.onnx.export(
            module,
            tuple(x.clone() for x in examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["logits", "present"] if family.decoder else ["logits"],
            dynamic_shapes=shapes,
            verbose=False,
            optimize=False,
        )
    if program is None:
        raise ConversionError("torch.onnx.export gave no program")
    graph: onnx_ir.Model = program.model
    for name in module.state_dict():
        if name in graph.graph.initializers:
            graph.graph.initializers[name].const_value = None
    return graph


def _forget_places(graph: onnx_ir.Graph) -> None:
    """Remove notes of the exporter: the Python file and line that each node comes from."""
    nodes = list(graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    items: list[Any] = [graph, *nodes, *values, *graph.inputs, *graph.initializers.values()]
    for item in items:
        item.metadata_props.clear()
        item.doc_string = None


def _half(model: onnx.ModelProto, head: set[str]) -> onnx.ModelProto:
    """Convert to fp16; inputs, outputs, the head and nodes that fp16 would break stay fp32."""
    float16 = need("onnxruntime.transformers.float16", extra="onnx")
    with warnings.catch_warnings():
        # It warns about every weight too small for fp16; the probes decide whether that matters.
        warnings.simplefilter("ignore", UserWarning)
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=True,
            node_block_list=sorted(head | _exact_nodes(model)),
        )
    _straighten(converted)
    return converted


def _straighten(model: onnx.ModelProto) -> None:
    """Remove the fp16 converter's casts to fp16 and back between two nodes that stay in fp32.

    Also remove duplicates: it casts a value once per use, each time under the same name.
    """
    nodes = list({node.name: node for node in model.graph.node}.values())
    makers = {output: node for node in nodes for output in node.output}
    straight = {}
    for node in nodes:
        before = makers.get(node.input[0]) if node.op_type == "Cast" else None
        if (
            before is not None
            and before.op_type == "Cast"
            and before.name.endswith("_to_fp16_node")
        ):
            straight[node.output[0]] = before.input[0]
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = straight.get(name, name)
    used = {name for node in nodes for name in node.input} | {o.name for o in model.graph.output}
    del model.graph.node[:]
    model.graph.node.extend(node for node in nodes if used & set(node.output))


def _exact_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of nodes that fp16 would break; they are small.

    Rotary angles are as large as the position: above 2,048, fp16 cannot represent all whole
    numbers. The mean square of an RMS norm exceeds fp16's range if an activation is above 256.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    found: set[str] = set()

    def add(node: onnx.NodeProto, last: frozenset[str]) -> None:
        if node.name in found:
            return
        found.add(node.name)
        for name in node.input if node.op_type not in last else ():
            if name in makers:
                add(makers[name], last)

    for node in model.graph.node:
        if node.op_type in ("Cos", "Sin"):
            add(node, frozenset())
        elif node.op_type == "Sqrt":
            add(node, frozenset({"Pow"}))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's logs and warnings about its dependencies: users cannot act on them."""
    with errors_only("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
