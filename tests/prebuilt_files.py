"""Tiny models in the layouts that other programs write, as found in hub repositories.

The libraries themselves (torch, openvino, nncf, onnxruntime) make the graphs; inputs, outputs and
states have the names that optimum uses. Each function writes into a folder.
"""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from qrank.bundle.sequences import Logits
from qrank.system.extras import need

TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def describe(checkpoint: Path, target: Path) -> Path:
    """Write the files that accompany prebuilt files (configuration and tokenizer) to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(checkpoint / name, target / name)
    return target


class CausalLM(torch.nn.Module):
    """A causal model that returns vocabulary logits for every token, with or without a KV cache."""

    def __init__(self, folder: Path, *, cache: bool) -> None:
        super().__init__()
        self.model = _load(AutoModelForCausalLM, folder)
        self.cache = cache

    @property
    def past_names(self) -> list[str]:
        layers = range(self.model.config.num_hidden_layers) if self.cache else range(0)
        return [f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> Any:
        """See the class."""
        length, total = input_ids.shape[1], attention_mask.shape[1]
        places = torch.arange(length) + (total - length)
        seen = torch.arange(total)[None] <= places[:, None]
        shown = seen[None, None] & (attention_mask[:, None, None, :] > 0)
        cache = _Cache(past)
        states = self.model.base_model(
            input_ids=input_ids,
            attention_mask=torch.where(shown, 0.0, torch.finfo(torch.float32).min),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(states)
        return (logits, *cache.present) if self.cache else logits


class _Cache:
    """The KV cache object that transformers' attention reads from and writes to."""

    def __init__(self, past: Sequence[torch.Tensor]) -> None:
        self._past = past
        self.present: list[torch.Tensor] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, both of shape [batch, heads, length, width], to the past ones."""
        if self._past:
            keys = torch.cat((self._past[2 * layer], keys), 2)
            values = torch.cat((self._past[2 * layer + 1], values), 2)
        self.present += [keys, values]
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """Number of tokens in the cache."""
        return self._past[0].shape[2] if self._past else 0


class Classifier(torch.nn.Module):
    """A model with a score head: one logit per label for each pair."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        super().__init__()
        self.model = _load(AutoModelForSequenceClassification, folder)
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """See the class."""
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _load(kind: Any, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def openvino_causal(
    checkpoint: Path, target: Path, *, cache: bool = True, stateful: bool = True, int8: bool = False
) -> Path:
    """Save a causal model like optimum-intel: by default stateful, with the KV cache as a state."""
    model = CausalLM(checkpoint, cache=cache)
    graph = _traced(model, ["input_ids", "attention_mask", "position_ids", *model.past_names])
    if cache and stateful:
        _make_stateful(graph, model.past_names)
    return _save(graph, describe(checkpoint, target), int8=int8)


def openvino_from_onnx(folder: Path, *, int8: bool = False) -> None:
    """Save the graph of `onnx/model.onnx` in the same repository as optimum-intel would."""
    _save(ov.convert_model(folder / "onnx" / "model.onnx"), folder, int8=int8)


def onnx_causal(checkpoint: Path, target: Path, *, cache: bool = True) -> Path:
    """Save a causal model like optimum-onnx."""
    model = CausalLM(checkpoint, cache=cache)
    names = ["input_ids", "attention_mask", "position_ids", *model.past_names]
    return _exported(model, names, checkpoint, target)


def onnx_classifier(checkpoint: Path, target: Path, names: Sequence[str]) -> Path:
    """Save a cross-encoder in the layout of Xenova's repositories."""
    return _exported(Classifier(checkpoint, names), names, checkpoint, target)


def _exported(model: Any, names: Sequence[str], checkpoint: Path, target: Path) -> Path:
    batch, free = torch.export.Dim("batch", min=1), torch.export.Dim.AUTO
    shapes = [{0: batch, 2 if "past" in name else 1: free} for name in names]
    past = [name for name in names if "past" in name]
    single = 0 if isinstance(model, Classifier) else 3
    rest = [tuple(shapes[single:])] if shapes[single:] else []
    describe(checkpoint, target)
    (target / "onnx").mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch's own dependencies
        torch.onnx.export(
            model,
            _example(model, names),
            target / "onnx" / "model.onnx",
            dynamo=True,
            external_data=False,
            input_names=list(names),
            output_names=["logits", *(n.replace("past_key_values", "present") for n in past)],
            dynamic_shapes=(*shapes[:single], *rest),
            verbose=False,
        )
    return target


def _traced(model: Any, names: Sequence[str]) -> ov.Model:
    example = _example(model, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's deprecation warnings
        graph = ov.convert_model(model, example_input=example)
    for node, name, tensor in zip(graph.inputs, names, example, strict=True):
        node.get_tensor().set_names({name})
        free = [-1 if i in (0, 2) or tensor.ndim == 2 else n for i, n in enumerate(tensor.shape)]
        node.get_node().set_partial_shape(ov.PartialShape(free))
    presents = [name.replace("past_key_values", "present") for name in names if "past" in name]
    for node, name in zip(graph.outputs, ["logits", *presents], strict=True):
        node.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def _example(model: Any, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
    config = model.model.config
    ids = torch.arange(2 * 8).reshape(2, 8) + 5
    past = 3 if any("past" in name for name in names) else 0
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 8 + past, dtype=torch.int64),
        "position_ids": torch.arange(past, 8 + past)[None].repeat(2, 1),
        "token_type_ids": torch.zeros(2, 8, dtype=torch.int64),
    }
    if past:
        width = getattr(config, "head_dim", None) or config.hidden_size // 4
        made |= dict.fromkeys(names[3:], torch.randn(2, config.num_key_value_heads, past, width))
    return tuple(made[name].clone() for name in names)


def _make_stateful(graph: ov.Model, past: Sequence[str]) -> None:
    """Make the KV cache a state like optimum-intel: reads gather the batch rows in `beam_idx`."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    op = ov.opset13
    beams = op.parameter([-1], ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    for name in past:
        parameter = graph.input(name).get_node()
        users = parameter.output(0).get_target_inputs()
        chosen = op.gather(parameter, beams, np.int64(0))
        for user in users:
            user.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    pairs = {name: name.replace("past_key_values", "present") for name in past}
    apply_make_stateful_transformation(graph, pairs)
    batch = op.gather(op.shape_of(graph.input("input_ids").get_node()), np.array([0]), np.int64(0))
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            heads, width = node.output(0).partial_shape[1], node.output(0).partial_shape[3]
            sizes = [heads.get_length(), 0, width.get_length()]
            empty = op.broadcast(np.float32(0), op.concat([batch, np.array(sizes)], 0))
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()


def _save(graph: ov.Model, folder: Path, *, int8: bool) -> Path:
    if int8:
        nncf = need("nncf")
        with redirect_stdout(io.StringIO()):
            graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    ov.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
    return folder


def onnx_int8(source: Path, target: Path) -> None:
    """Quantize dynamically with onnxruntime."""
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(source)
    # Otherwise onnxruntime's shape inference fails on the shapes that torch recorded.
    del model.graph.value_info[:]
    quantize_dynamic(model, target, per_channel=True)


def onnx_int4(source: Path, target: Path) -> None:
    """Pack weights into 4 bits with onnxruntime."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def onnx_fp16(source: Path, target: Path) -> None:
    """Convert to fp16, inputs and outputs included, like onnxconverter-common and similar tools."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(
        onnx.load(source), keep_io_types=False, disable_shape_infer=True
    )
    onnx.save(model, target)


def onnx_toy(
    checkpoint: Path,
    target: Path,
    inputs: Sequence[str],
    width: Sequence[int] = (1,),
    end: str = "",
) -> Path:
    """Write a graph that another program could have written but that is not a reranker.

    Args:
        checkpoint: source of the configuration and tokenizer.
        target: the folder to write to.
        inputs: names of the graph's inputs.
        width: the dimensions after `batch` in the shape of the logits.
        end: the operation that produces the logits; identity by default.
    """
    helper, kinds = onnx.helper, onnx.TensorProto
    described = describe(checkpoint, target)
    weights = np.ones((1, *width), np.float32)
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["numbers"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Reshape", ["mean", "shape"], ["shaped"]),
        helper.make_node("Mul", ["shaped", "weights"], ["product"]),
        helper.make_node(end or "Identity", ["product"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(n, kinds.INT64, ["batch", "length"]) for n in inputs],
        [helper.make_tensor_value_info("logits", kinds.FLOAT, ["batch", *width])],
        [
            onnx.numpy_helper.from_array(weights, "weights"),
            onnx.numpy_helper.from_array(np.array([-1, *[1] * len(width)]), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, described / "model.onnx")
    return described


def rewrite_gguf(
    source: Path,
    target: Path,
    *,
    tensors: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Copy a GGUF file with other tensors or metadata; None leaves one out."""
    gguf = need("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.get_field("general.architecture").contents()))
    for name, field in reader.fields.items():
        value = (fields or {}).get(name, field.contents())
        if name.startswith("GGUF.") or name == "general.architecture" or value is None:
            continue
        kinds = field.types
        inner = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kinds[0], inner)
    for tensor in reader.tensors:
        data = (tensors or {}).get(tensor.name, tensor.data)
        if data is None:
            continue
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def runner(path: Path) -> Callable[[NDArray[np.int64]], Logits]:
    """A function that runs a graph in its own runtime, in fp32, on one sequence, with no past."""
    if path.suffix == ".xml":
        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        settings["KV_CACHE_PRECISION"] = "f32"
        compiled = ov.Core().compile_model(path, "CPU", settings)
        shapes = {
            node.get_any_name(): [0 if d.is_dynamic else d.get_length() for d in node.partial_shape]
            for node in compiled.inputs
        }

        def run(inputs: dict[str, Any]) -> Any:
            request = compiled.create_infer_request()
            return request.infer(inputs)["logits"]

    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        shapes = {
            node.name: [d if isinstance(d, int) else 0 for d in node.shape]
            for node in session.get_inputs()
        }

        def run(inputs: dict[str, Any]) -> Any:
            return session.run(["logits"], inputs)[0]

    def logits(ids: NDArray[np.int64]) -> Logits:
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
            "last": np.array([ids.shape[1] - 1]),
            "keep": np.empty(0, np.int64),
        }
        found: Logits = run(
            {
                name: known.get(
                    name,
                    np.zeros(
                        [1 if n == 0 and i == 0 else n for i, n in enumerate(shape)], np.float32
                    ),
                )
                for name, shape in shapes.items()
            }
        )
        return found

    return logits
