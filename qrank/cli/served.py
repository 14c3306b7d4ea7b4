"""The models of `qrank serve` and `qrank batch`: their options, and how they are opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from qrank.backends import Options
from qrank.bundle.locate import DEFAULT
from qrank.bundle.manifest import Manifest
from qrank.bundle.opened import Bundle
from qrank.cli.common import FiniteRange, opening_options
from qrank.cli.names import parse_aliases, split_name
from qrank.cli.obtain import located, opened, revision_option, runs_checkpoint
from qrank.errors import InputError
from qrank.reranker import Reranker
from qrank.scoring import arguments
from qrank.scoring.inputs import LongDocuments
from qrank.select.selection import Criteria, choices
from qrank.system.extras import need

if TYPE_CHECKING:  # it takes the packages of extra `serve`
    from qrank.serve.residence import ServedModel

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.argument("models", nargs=-1, metavar="[[NAME=]MODEL]..."),
    click.option(
        "--served-model-name",
        "served_names",
        multiple=True,
        metavar="NAME",
        help="Name of the first model in requests and answers; can be repeated, answers have the "
        "first.",
    ),
    click.option(
        "--alias",
        "aliases",
        multiple=True,
        metavar="ALIAS=NAME",
        help="Another name for the model NAME in requests; can be repeated.",
    ),
    click.option(
        "--strict-models",
        is_flag=True,
        help="Refuse unknown names of models. By default, they stand for the first model.",
    ),
    click.option(
        "--instruction", help="Default instruction of requests, for models that take one."
    ),
    click.option(
        "--long-documents",
        type=click.Choice(get_args(LongDocuments)),
        default="truncate",
        show_default=True,
        help="Default of requests: of a document that is too long, read the beginning, the end, or "
        "the best part.",
    ),
    click.option(
        "--budget-ms",
        type=FiniteRange(min=0, min_open=True),
        help="Default time limit of requests in milliseconds; documents that were not scored in "
        "time come last.",
    ),
    click.option("--raw", is_flag=True, help="Scores are logits, without the model's activation."),
    click.option("--family", help="A checkpoint's family card, if it does not identify itself."),
    click.option(
        "--score-cache",
        "cached_scores",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Keep the scores of the last N pairs, and do not score these again.",
    ),
    revision_option,
    opening_options,
)


def served_options(command: Command) -> Command:
    """The models, their names, how they are opened, and the defaults of requests."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def open_served(
    stack: ExitStack,
    models: Sequence[str],
    *,
    served_names: Sequence[str],
    aliases: Sequence[str],
    strict_models: bool,
    instruction: str | None,
    long_documents: LongDocuments,
    budget_ms: float | None,
    raw: bool,
    cached_scores: int,
    revision: str | None,
    **opening: Any,
) -> tuple[list[ServedModel], dict[str, Any]]:
    """Open the models of `served_options`; if a bound holds for several, only find them.

    Arguments are the options. `stack` closes the models.

    Returns:
        The models, and more arguments for `qrank.serve.app.build`.

    Raises:
        click.UsageError: options do not go together.
        QrankError: a model cannot be opened.
    """
    for module in ("fastapi", "prometheus_client"):
        need(module)
    from qrank.serve.request import Defaults

    if revision is not None and len(models) != 1:
        raise click.UsageError("--revision goes with one MODEL; or write owner/name@REVISION")
    if raw and opening["calibrated"]:
        raise click.UsageError("--raw returns logits: give --scores calibrated or --raw")
    names = [split_name(model) for model in models or (DEFAULT,)]
    if served_names:
        if names[0][0]:
            raise click.UsageError(f"give {names[0][0]}=MODEL or --served-model-name, not both")
        names[0] = (served_names[0], names[0][1])
    bound = opening["max_memory"] if len(names) > 1 else None
    if bound is None:
        found = _opened(stack, names, revision, opening)
    else:
        found = _within(stack, names, bound, opening)
    known = [*(f"{name}={found[0].name}" for name in served_names[1:]), *aliases]
    settings = {
        "aliases": parse_aliases(known, [model.name for model in found]),
        "strict_models": strict_models,
        "defaults": Defaults(
            _instructed(found, instruction),
            long_documents,
            None if budget_ms is None else budget_ms / 1000,
            raw,
        ),
        "max_memory": bound,
        "cached_scores": cached_scores,
    }
    return found, settings


def _opened(
    stack: ExitStack,
    names: Sequence[tuple[str, str]],
    revision: str | None,
    opening: dict[str, Any],
) -> list[ServedModel]:
    """Open all models."""
    found: dict[str, ServedModel] = {}
    for name, source in names:
        engine = opened(source, revision, **opening).engine
        model = _described(name, source, engine.bundle, opening)
        model.take(engine)
        stack.callback(model.close)
        _add(found, model, source)
    return list(found.values())


def _within(
    stack: ExitStack, names: Sequence[tuple[str, str]], bound: int, opening: dict[str, Any]
) -> list[ServedModel]:
    """Find models that share a bound on memory; they are opened at their first request."""
    from qrank.serve.residence import batch_memory

    if runs_checkpoint(opening["backend"]):
        raise click.UsageError(
            "--max-memory bounds several bundles, not checkpoints: convert them, or serve one"
        )
    bundles = [located(source, None, **opening) for _, source in names]
    sizes = [_size(bundle.manifest, opening) for bundle in bundles]
    batches = batch_memory(bound, sizes)
    found: dict[str, ServedModel] = {}
    for (name, source), bundle, size in zip(names, bundles, sizes, strict=True):
        model = _described(name, source, bundle, {**opening, "max_memory": size + batches})
        stack.callback(model.close)
        _add(found, model, source)
    return list(found.values())


def _described(name: str, source: str, bundle: Bundle, opening: dict[str, Any]) -> ServedModel:
    from qrank.serve.residence import ServedModel

    return ServedModel(
        # A folder's path is not a usable name: the bundle has one.
        name or (bundle.manifest.name if Path(source).is_dir() else source),
        bundle.manifest,
        lambda: Reranker(bundle, **opening).engine,
        max_length=opening["max_length"],
        memory=opening["max_memory"] or 0,
    )


def _add(found: dict[str, ServedModel], model: ServedModel, source: str) -> None:
    if model.name in found:
        raise click.UsageError(f"two models are called {model.name!r}; name one: NAME={source}")
    found[model.name] = model


def _size(manifest: Manifest, opening: dict[str, Any]) -> int:
    """Bytes of the files of the variant that is tried first."""
    names = ("backend", "device", "policy", "min_kendall", "max_loss", "profile")
    criteria = Criteria(**{name: opening[name] for name in names})
    options = Options(arguments.threads(opening["threads"]), opening["compute_dtype"])
    return choices(manifest, criteria, options)[0].target.variant.bytes


def _instructed(models: Sequence[ServedModel], instruction: str | None) -> dict[str, str]:
    """The instruction for each model that takes one."""
    if instruction is None:
        return {}
    found: dict[str, str] = {}
    refusal: InputError | None = None
    for model in models:
        try:
            if model.engine is None:
                model.manifest.family.asked(instruction)
            else:  # also finds that it leaves no room for text
                model.engine.prepare([("", "")], instruction)
        except InputError as error:
            refusal = error
        else:
            found[model.name] = instruction
    if not found and refusal is not None:
        raise InputError(f"--instruction: {refusal}")
    return found
