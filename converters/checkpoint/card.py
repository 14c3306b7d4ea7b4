"""Cards: what `models/*.toml` declare about a kind of checkpoint, and which card reads one.

`concrete.py` turns a card and a checkpoint's configuration into a `qrank.bundle.family.Family`:
token ids instead of names, numbers instead of "as the config says".
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qrank.bundle.family import ACTIVATIONS, slots
from qrank.converters.checkpoint.refusals import why_not
from qrank.errors import FamilyError
from qrank.system.textfiles import read_text

ROLES = ("bos", "cls", "sep")
SLOTS = ("query", "document", "instruction")


@dataclass(frozen=True)
class Card:
    """One `models/*.toml`.

    Attributes:
        name: the family's name, as `--family` takes it.
        about: which models it reads, for people.
        architectures: supported values of `architectures` in the checkpoint's config.json.
        template: the prompt as a list of items, each tokenized separately: special tokens, as roles
            (`{cls}`, `{sep}`, `{bos}`) or spelled out, and text, with `{query}` and `{document}`
            each once, and `{instruction}`. `{document}` must end its item because it is what is
            truncated. With segments, items are only roles and slots.
        segments: the token type of each template item if the config has two or more types
            (`type_vocab_size`); empty for families without token types.
        pooling: `pooler` (first token, dense, tanh), `cls` (first token), `last` (last token of a
            causal model), `step` (first step of an encoder-decoder's decoder), or the name of the
            config key that says `cls` or `mean`.
        positions_after_pad: whether positions start at `pad_token_id + 1` (RoBERTa), which makes
            the longest input that much shorter than `max_position_embeddings`.
        activation: the activation of the published scores, unless the checkpoint names another.
        temperature: logits are divided by this before the activation.
        instruction: the text for `{instruction}` if the caller gives none.
        instructed: the template with an instruction, if it differs.
        labels: for language models: the token that means "relevant" and, if the score is the
            difference of the two, the one that means "not".
        classes: for a score head with two labels: the number of the label that means relevant, and
            of the other.
        max_length: tokens the model was made for, if its config has a larger number.
        models: hub ids. Families with labels share architectures with chat models and translators,
            and those with classes with other classifiers, so they match only these; other models
            need `--family`.
        unsupported: formats that cannot run models of this family, such as `gguf`.
    """

    name: str
    about: str
    architectures: tuple[str, ...]
    template: tuple[str, ...]
    pooling: str
    activation: str
    segments: tuple[int, ...] = ()
    positions_after_pad: bool = False
    temperature: float = 1.0
    instruction: str = ""
    instructed: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    max_length: int | None = None
    models: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str, where: str) -> Card:
        """Parse and check a card.

        Args:
            text: TOML.
            where: the file's name, for error messages.

        Raises:
            FamilyError: not TOML, an unknown or missing key, or a value out of range.
        """
        try:
            content = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise FamilyError(f"{where} is not valid TOML: {error}") from error
        known = cls.__dataclass_fields__
        required = {"name", "about", "architectures", "template", "pooling", "activation"}
        if unknown := sorted(content.keys() - known.keys()):
            raise FamilyError(
                f"{where} has unknown keys: {', '.join(unknown)}; known are: {', '.join(known)}"
            )
        if missing := sorted(required - content.keys()):
            raise FamilyError(f"{where} lacks: {', '.join(missing)}")
        for key, value in content.items():
            if (kind := _LISTS.get(key)) is not None:
                if not isinstance(value, list) or not all(type(item) is kind for item in value):
                    raise FamilyError(
                        f"{where}: {key} must be a list of {kind.__name__}, not {value}"
                    )
                content[key] = tuple(value)
            elif type(value) not in _SINGLES[key]:
                kinds = " or ".join(kind.__name__ for kind in _SINGLES[key])
                raise FamilyError(f"{where}: {key} must be {kinds}, not {value!r}")
        card = cls(**content)
        card.check(where)
        return card

    def check(self, where: str) -> None:
        """Check that the keys are consistent.

        Raises:
            FamilyError: they are not; the message begins with `where`.
        """
        for template in filter(None, (self.template, self.instructed)):
            self._check_template(template, where)
        if self.instructed and "{instruction}" not in "".join(self.instructed):
            raise FamilyError(f"{where}: instructed must hold {{instruction}}")
        if bool(self.instruction) != ("{instruction}" in "".join(self.template)):
            raise FamilyError(
                f"{where}: instruction is what {{instruction}} in template is where nobody gives "
                "one; they go together"
            )
        if self.segments and len(self.segments) != len(self.template):
            raise FamilyError(
                f"{where}: segments has {len(self.segments)} items and template "
                f"{len(self.template)}; they go together"
            )
        if self.activation not in ACTIVATIONS:
            raise FamilyError(
                f"{where}: activation is {self.activation!r}; known are: {', '.join(ACTIVATIONS)}"
            )
        if not self.temperature > 0:
            raise FamilyError(f"{where}: temperature is {self.temperature}; it must be above 0")
        if (len(self.labels) in (1, 2)) != (self.pooling in ("last", "step")):
            raise FamilyError(
                f"{where}: labels are one or two tokens where pooling is last or step, and none "
                "elsewhere"
            )
        if self.classes and (sorted(self.classes) != [0, 1] or self.labels):
            raise FamilyError(
                f"{where}: classes is {list(self.classes)}; expected [1, 0] or [0, 1], and a "
                "pooling other than last and step"
            )

    def _check_template(self, template: tuple[str, ...], where: str) -> None:
        names = [name for item in template for name in slots(item)]
        if bad := [name for name in names if name not in (*ROLES, *SLOTS)]:
            raise FamilyError(
                f"{where}: template has {bad}; known are: "
                f"{', '.join(f'{{{name}}}' for name in (*ROLES, *SLOTS))}"
            )
        for slot in ("query", "document"):
            if names.count(slot) != 1:
                raise FamilyError(f"{where}: template must hold {{{slot}}} exactly once")
        for item in template:
            if "{document}" in item and not item.endswith("{document}"):
                raise FamilyError(
                    f"{where}: {item!r} goes on behind {{document}}, which is what is cut; "
                    "make two items of it"
                )
            if {"query", "document"} <= set(slots(item)):
                raise FamilyError(f"{where}: {item!r} holds both {{query}} and {{document}}")
            alone = item in [f"{{{name}}}" for name in (*ROLES, *SLOTS)]
            if not alone and (self.segments or set(slots(item)) & set(ROLES)):
                raise FamilyError(
                    f"{where}: template has {item!r}; roles stand alone, and with segments there "
                    "is no text"
                )


_LISTS = {
    "architectures": str,
    "template": str,
    "segments": int,
    "instructed": str,
    "labels": str,
    "classes": int,
    "models": str,
    "unsupported": str,
}
_SINGLES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "about": (str,),
    "pooling": (str,),
    "activation": (str,),
    "positions_after_pad": (bool,),
    "temperature": (int, float),
    "instruction": (str,),
    "max_length": (int,),
}


def cards() -> list[Card]:
    """The cards that come with qrank, sorted by name."""
    files = [f for f in resources.files("qrank.models").iterdir() if f.name.endswith(".toml")]
    return sorted((Card.read(f.read_text("utf-8"), f.name) for f in files), key=lambda c: c.name)


def find_card(family: str | None, config: dict[str, Any], hub_id: str | None = None) -> Card:
    """The card that reads a checkpoint: the one named, or the one that matches its config.json.

    Args:
        family: a card's name, or the path of a user's own card (`*.toml`); None to match.
        config: the checkpoint's config.json.
        hub_id: the hub id it was downloaded from.

    Raises:
        FamilyError: no such card, no card reads this architecture, or the model may also be a chat
            model.
    """
    found = config.get("architectures") or []
    if family is not None and family.endswith(".toml"):
        path = Path(family)
        if not path.is_file():
            raise FamilyError(f"no card file {family}")
        return Card.read(read_text(path), path.name)
    known = cards()
    if family is not None:
        for card in known:
            if card.name == family:
                return card
        raise FamilyError(
            f"no family {family!r}; known are: {', '.join(c.name for c in known)}, "
            "or give the path of your own card (*.toml)"
        )
    readers = [card for card in known if set(card.architectures) & set(found)]
    for card in readers:
        if hub_id in card.models:
            return card
    for card in readers:
        if not card.labels and not card.classes:
            return card
    if readers:
        others = "translators" if readers[0].pooling == "step" else "chat models"
        raise FamilyError(
            f"{', '.join(found)} is what {others} are, too: nothing in this checkpoint says "
            "that it is a reranker, and how it is asked. If it is one, say which with --family: "
            f"{', '.join(card.name for card in readers)}"
        )
    if (reason := why_not(found)) is not None:
        raise FamilyError(f"{reason} (architectures in config.json)")
    supported = ", ".join(name for card in known for name in card.architectures)
    raise FamilyError(
        f"config.json names the architecture {', '.join(found) or '(none)'} (at architectures); "
        f"supported are: {supported}. If one of the families reads it, say so with --family"
    )
