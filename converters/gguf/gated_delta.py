"""Qwen3.5's gated delta nets as llama.cpp stores them (conversion/qwen.py of llama.cpp).

Three of four layers have no attention but a state that each token changes. Several value heads
share a key head. The checkpoint stores the value heads of each key head together; llama.cpp stores
the first of every key head, then the second of every key head, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from qrank.bundle.sequences import Floats
from qrank.errors import ConversionError

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

MODULE = ".linear_attn."
"""What the names of their weights contain."""


def describe(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Write the hyperparameters of the gated delta nets and of partial rotary positions.

    Raises:
        ConversionError: the layers follow another pattern than llama.cpp's.
    """
    found = [*config.layer_types, "full_attention"]
    interval = found.index("full_attention") + 1
    kinds = [
        "linear_attention" if (number + 1) % interval else "full_attention"
        for number in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds or interval == len(found):
        raise ConversionError(
            "llama.cpp knows models in which every n-th layer is full_attention; config.json has "
            f"layer_types = {list(config.layer_types)}"
        )
    writer.add_full_attention_interval(interval)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)
    # Text has the same position in all three sections; together they must cover what is rotated.
    sections = [len(range(first, rotated // 2, 3)) for first in range(3)]
    writer.add_rope_dimension_sections([*sections, 0])


def tensor_name(name: str, known: Callable[[str], str | None]) -> str:
    """The tensor of a weight of a gated delta net.

    Args:
        name: the weight's name, such as `model.layers.0.linear_attn.A_log`.
        known: from `Layout.tensor_names`.
    """
    name = name.replace(".dt_bias", ".dt_proj.bias")  # as llama.cpp's own converter
    module, _, parameter = name.rpartition(".")
    return known(name) or f"{known(module)}.{parameter}"


def stored(
    name: str, rows: Callable[[str], Iterator[Floats]], config: PretrainedConfig
) -> Iterator[Floats]:
    """A weight of a gated delta net as llama.cpp stores it, in one piece.

    Args:
        name: the weight's name, such as `model.layers.0.linear_attn.A_log`.
        rows: reads a weight in pieces.
        config: the checkpoint's.
    """
    values = np.concatenate(list(rows(name)))
    parameter = name.partition(MODULE)[2]
    width = config.linear_value_head_dim
    if parameter == "A_log":
        values = -np.exp(_tiled(values, config, 1))
    elif parameter in ("dt_bias", "in_proj_a.weight", "in_proj_b.weight"):
        values = _tiled(values, config, 1)
    elif parameter == "in_proj_z.weight":
        values = _tiled(values, config, width)
    elif parameter == "out_proj.weight":
        values = np.ascontiguousarray(_tiled(values.T, config, width).T)
    elif parameter in ("in_proj_qkv.weight", "conv1d.weight"):
        # A convolution has a middle axis of one channel.
        values = values.reshape(len(values), -1)
        first = 2 * config.linear_key_head_dim * config.linear_num_key_heads
        values = np.concatenate([values[:first], _tiled(values[first:], config, width)])
    yield values


def _tiled(values: Floats, config: PretrainedConfig, width: int) -> Floats:
    """Value heads in llama.cpp's order; `width` rows of `values` belong to each."""
    keys = config.linear_num_key_heads
    grouped = values.reshape(keys, -1, width, *values.shape[1:])
    tiled: Floats = grouped.swapaxes(0, 1).reshape(values.shape)
    return tiled
