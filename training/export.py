"""Step 4: turn a training state into a checkpoint folder: calibrated, in fp16, self-describing."""

import json
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from graft import config
from model import tokenizer
from numpy.typing import NDArray
from scipy.optimize import minimize
from sources import cache_folder
from train import HELD_OUT, Lists, forward
from transformers import BertForSequenceClassification

# The backbone's tokenizer settings as an embedder: its short limit, and its source.
NOT_OURS = (
    "is_local",
    "max_length",
    "pad_to_multiple_of",
    "stride",
    "truncation_side",
    "truncation_strategy",
)


def calibration(own: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float]:
    """Scale and offset with which a sigmoid separates queries' own passages from the others.

    Platt's logistic fit with equal weights for both sides, so that zero lies between them.
    """

    def cost(pair: NDArray[np.float64]) -> float:
        scale, offset = pair
        right = np.logaddexp(0, -(scale * own + offset)).mean()
        return float(right + np.logaddexp(0, scale * others + offset).mean())

    scale, offset = minimize(cost, np.array([1.0, 0.0])).x
    return float(scale), float(offset)


@torch.no_grad()
def calibrate(model: BertForSequenceClassification, lists: Lists) -> tuple[float, float]:
    """Fit the scale and offset on the held-out lists and put them into the classifier."""
    own, others = [], []
    for begin in range(0, HELD_OUT, 16):
        batch = lists.batch(lists.rows[begin : begin + 16])
        got = forward(model, batch)[0][batch.labelled].double().numpy()
        own.append(got[:, 0])
        others.append(got[:, 1:].ravel())
    scale, offset = calibration(np.concatenate(own), np.concatenate(others))
    model.classifier.weight.mul_(scale)
    model.classifier.bias.mul_(scale).add_(offset)
    return scale, offset


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--name", default="mini", help="Name of the checkpoint folder that train.py wrote.")
@click.option("--seed", default=0, help="That mine.py was given.")
def main(target: Path, name: str, seed: int) -> None:
    """Write the model of a training state to the folder TARGET, each file in one move."""
    state = torch.load(cache_folder() / name / "state.pt", weights_only=True)
    model = BertForSequenceClassification(config()).eval()
    model.load_state_dict(state["model"])
    scale, offset = calibrate(model, Lists(cache_folder(), seed))
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        model.half().save_pretrained(made)
        tokenizer().save_pretrained(made)
        settings = Path(made) / "tokenizer_config.json"
        kept = {
            key: value
            for key, value in json.loads(settings.read_text()).items()
            if key not in NOT_OURS
        }
        settings.write_text(json.dumps(kept, indent=2) + "\n")
        spaced = Path(made) / "tokenizer.json"  # a third of the file is indentation
        spaced.write_text(
            json.dumps(json.loads(spaced.read_text()), separators=(",", ":"), ensure_ascii=False)
        )
        for path in Path(made).iterdir():
            path.chmod(0o644)
            path.replace(target / path.name)
    click.echo(
        f"{state['lists']} lists, {state['used'] / 60:.0f} minutes; "
        f"logits times {scale:.3f} plus {offset:.3f}"
    )


if __name__ == "__main__":
    main()
