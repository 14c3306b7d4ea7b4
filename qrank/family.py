"""Families: how one kind of checkpoint is read.

A `Card` is what `models/*.toml` declares about every checkpoint of a kind. A `Family` is a card
made concrete for one checkpoint by its own configuration: token ids instead of names, numbers
instead of "as the config says". The manifest of a bundle holds the family, so that nothing of
the checkpoint or the card is needed to score.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qrank.errors import FamilyError

ACTIVATIONS = ("identity", "sigmoid")
ROLES = ("cls", "sep")
SLOTS = ("query", "document")

POOLINGS = ("pooler", "cls", "mean")


@dataclass(frozen=True)
class Card:
    """One `models/*.toml`.

    Attributes:
        name: the family's name, as `--family` takes it.
        about: which models it reads, for people.
        architectures: values of `architectures` in the checkpoint's config.json it reads.
        template: the pair as a list of `{query}`, `{document}` and special-token roles (`{cls}`,
            `{sep}`), which the checkpoint's tokenizer configuration resolves.
        segments: the token type of each template item where the config has two or more types
            (`type_vocab_size`); empty for families without token types.
        pooling: `pooler` (first token, dense, tanh), `cls` (first token), or the name of the
            config's key that says `cls` or `mean`.
        positions_after_pad: whether positions are counted from `pad_token_id + 1` (RoBERTa), so
            that the longest input is that much shorter than `max_position_embeddings`.
        activation: what the published scores went through, unless the checkpoint names another.
    """

    name: str
    about: str
    architectures: tuple[str, ...]
    template: tuple[str, ...]
    pooling: str
    activation: str
    segments: tuple[int, ...] = ()
    positions_after_pad: bool = False

    @classmethod
    def read(cls, text: str, where: str) -> Card:
        """Parse and check a card.

        Args:
            text: TOML.
            where: the file's name, for messages.

        Raises:
            FamilyError: not TOML, an unknown or missing key, or a value out of its range.
        """
        import tomllib  # here, not above: scoring reads no card

        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise FamilyError(f"{where} is not valid TOML: {error}") from error
        known = cls.__dataclass_fields__
        required = {"name", "about", "architectures", "template", "pooling", "activation"}
        if unknown := sorted(content.keys() - known.keys()):
            raise FamilyError(
                f"{where} has unknown keys: {', '.join(unknown)}; known are: {', '.join(known)}"
            )
        if missing := sorted(required - content.keys()):
            raise FamilyError(f"{where} lacks: {', '.join(missing)}")
        for key, kind in (("architectures", str), ("template", str), ("segments", int)):
            value = content.get(key, [])
            if not isinstance(value, list) or not all(type(item) is kind for item in value):
                raise FamilyError(f"{where}: {key} must be a list of {kind.__name__}, not {value}")
            content[key] = tuple(value)
        for key in ("name", "about", "pooling", "activation"):
            if not isinstance(content[key], str):
                raise FamilyError(f"{where}: {key} must be a string, not {content[key]!r}")
        if not isinstance(content.get("positions_after_pad", False), bool):
            raise FamilyError(f"{where}: positions_after_pad must be true or false")
        card = cls(**content)
        card._check(where)
        return card

    def _check(self, where: str) -> None:
        items = [f"{{{name}}}" for name in (*ROLES, *SLOTS)]
        if bad := [item for item in self.template if item not in items]:
            raise FamilyError(f"{where}: template has {bad}; its items are: {', '.join(items)}")
        for slot in SLOTS:
            if self.template.count(f"{{{slot}}}") != 1:
                raise FamilyError(f"{where}: template must hold {{{slot}}} exactly once")
        if self.segments and len(self.segments) != len(self.template):
            raise FamilyError(
                f"{where}: segments has {len(self.segments)} items and template "
                f"{len(self.template)}; they go together"
            )
        if self.activation not in ACTIVATIONS:
            raise FamilyError(
                f"{where}: activation is {self.activation!r}; known are: {', '.join(ACTIVATIONS)}"
            )


def cards() -> list[Card]:
    """The cards that come with qrank, by name."""
    from importlib import resources  # here, not above: scoring reads no card

    files = [f for f in resources.files("qrank.models").iterdir() if f.name.endswith(".toml")]
    return sorted((Card.read(f.read_text("utf-8"), f.name) for f in files), key=lambda c: c.name)


def find_card(family: str | None, config: dict[str, Any]) -> Card:
    """The card that reads a checkpoint: the one named, or the one its config.json matches.

    Args:
        family: a card's name, or the path of a user's own card (`*.toml`); None to match.
        config: the checkpoint's config.json.

    Raises:
        FamilyError: no such card, or no card reads this architecture.
    """
    found = config.get("architectures") or []
    if family is not None and family.endswith(".toml"):
        path = Path(family)
        if not path.is_file():
            raise FamilyError(f"no card file {family}")
        return Card.read(path.read_text("utf-8"), path.name)
    known = cards()
    if family is not None:
        for card in known:
            if card.name == family:
                return card
        raise FamilyError(
            f"no family {family!r}; known are: {', '.join(c.name for c in known)}, "
            "or give the path of your own card (*.toml)"
        )
    for card in known:
        if any(name in card.architectures for name in found):
            return card
    supported = ", ".join(name for card in known for name in card.architectures)
    raise FamilyError(
        f"config.json names the architecture {', '.join(found) or '(none)'}; "
        f"supported are: {supported}. If one of the families reads it, say so with --family"
    )


@dataclass(frozen=True)
class Family:
    """A card made concrete for one checkpoint.

    Attributes:
        name: the card's name.
        architecture: the transformers class that is the reference.
        template: the pair as token ids and the slots "query" and "document".
        segments: the token type of each template item; None without token types.
        max_length: tokens the model reads, special tokens included.
        pooling: how the final hidden states become one vector: one of POOLINGS.
        activation: what scores go through.
    """

    name: str
    architecture: str
    template: tuple[int | str, ...]
    segments: tuple[int, ...] | None
    max_length: int
    pooling: str
    activation: str

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Family:
        """The inverse of `to_json`."""
        segments = content["segments"]
        return cls(
            **{
                **content,
                "template": tuple(content["template"]),
                "segments": None if segments is None else tuple(segments),
            }
        )
