"""Bundles: the folder `qrank convert` writes, and its manifest `qrank.json`.

    NAME-qrank/
      qrank.json          the manifest
      tokenizer.json      text -> token ids, for every variant
      onnx-int8/          one folder per variant
        model.onnx

The manifest lists every file with its sha256 and contains its own digest. Writing, reading and
checking it define one format, so they are all in this file, despite its length.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qrank.bundle.agreement import Agreement, Reference
from qrank.bundle.description import Description
from qrank.bundle.dimensions import Dimensions
from qrank.bundle.family import ACTIVATIONS, POOLINGS, Family
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import BundleError
from qrank.system import paths

MANIFEST = "qrank.json"
TOKENIZER = "tokenizer.json"
SCHEMA = 2

RENAMED = {"int8-full": "int8-w8a8"}
"""Precision names of earlier qrank versions -> current names; folders keep the old names."""


@dataclass(frozen=True)
class FileRecord:
    """The expected sha256 (in hex) and size of a file."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Hash a file."""
        with path.open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


@dataclass(frozen=True)
class Variant:
    """One (format, precision) of a bundle.

    Attributes:
        format: the file format, which is also the backend's name: `onnx`.
        precision: in the format's terms: `fp32`, `int8`, `q4_k_m`.
        files: path inside the bundle -> its record.
        fidelity: measured on the probes at conversion.
        tools: versions of the tools that made it.
        note: details that the precision's name does not convey; usually "".
        ranking: how far it ranks like the original; None: not compared.
    """

    format: str
    precision: str
    files: dict[str, FileRecord]
    fidelity: Fidelity
    tools: dict[str, str]
    note: str = ""
    ranking: Agreement | None = None

    @property
    def name(self) -> str:
        """`onnx-int8`."""
        return f"{self.format}-{self.precision}"

    @property
    def folder(self) -> str:
        """Its folder in the bundle, called by its name or by its former name."""
        return next(iter(self.files), self.name).partition("/")[0]

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum(record.bytes for record in self.files.values())


@dataclass(frozen=True)
class Source:
    """The checkpoint that a bundle was made from.

    Attributes:
        id: hub id, or the name of the checkpoint's folder.
        revision: commit on the hub; None for a folder.
        fingerprint: sha256 over the checkpoint's weights, configuration and tokenizer.
    """

    id: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class Probes:
    """Pairs as token ids, and their logits from the fp32 reference.

    Attributes:
        work: the pairs.
        logits: of the reference, shape [n].
        reference: the class and versions that computed them.
        verified: whether the reference was the original model. False: it was the prebuilt model
            itself; the probes then only show self-consistency, not how close it is to the original.
    """

    work: Sequences
    logits: Logits
    reference: str
    verified: bool = True


@dataclass(frozen=True)
class Manifest:
    """All metadata of a bundle.

    `dimensions` is None if the model's are unknown, `ranking` if the original did not rank,
    `description` if other programs cannot load the model (`Family.pair`), or an earlier qrank made
    the bundle.
    """

    name: str
    family: Family
    source: Source
    files: dict[str, FileRecord]
    probes: Probes
    variants: dict[str, Variant] = field(default_factory=dict)
    dimensions: Dimensions | None = None
    ranking: Reference | None = None
    description: Description | None = None

    def with_variant(self, variant: Variant) -> Manifest:
        """The manifest with one variant added or replaced."""
        return replace(self, variants={**self.variants, variant.name: variant})

    def identity(self, variant: Variant) -> str:
        """sha256 over everything that determines a variant's logits; ignores other variants."""
        files = {**self.files, **variant.files}
        return _digest(
            {
                "fingerprint": self.source.fingerprint,
                "family": self.family.to_json(),
                "variant": variant.folder,
                "files": {name: record.sha256 for name, record in files.items()},
            }
        )

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: keys sorted, no spaces, without the digest itself."""
        return _digest(_to_json(self))

    def save(self, folder: Path) -> None:
        """Write `qrank.json` into a bundle, atomically."""
        content = {**_to_json(self), "digest": self.digest}
        for wait in _WAITS:
            try:
                return paths.write_atomically(folder / MANIFEST, _laid_out(content) + "\n")
            except PermissionError:
                time.sleep(wait)
        paths.write_atomically(folder / MANIFEST, _laid_out(content) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a bundle's manifest. Files are checked by `Bundle.check`.

        The manifest is untrusted input: it may only name files inside the bundle, and for a variant
        inside that variant's folder, and must have enough probes to detect a wrong backend.

        Raises:
            BundleError: there is no manifest, or it is damaged, has another schema version or
                contains what no bundle may.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{folder} is no bundle: it holds no {MANIFEST}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path} cannot be read: {error}; {CONVERT_AGAIN}") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise BundleError(
                f"{path} has schema version {schema!r}; this qrank reads {SCHEMA}: "
                f"{CONVERT_AGAIN}, or install the qrank that wrote it"
            )
        # Over the content as read, not as parsed: unknown keys count too.
        if _digest(content) != content.get("digest"):
            raise BundleError(
                f"{path} does not match its own digest: it was changed; {CONVERT_AGAIN}"
            )
        try:
            manifest = _from_json(content)
            _check(manifest)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(f"{path} is damaged ({error!r}); {CONVERT_AGAIN}") from error
        return manifest


CONVERT_AGAIN = "convert the model again, with --force to replace it"
"""Advice for damaged bundles."""

_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ()
"""Seconds to wait for readers of the manifest: Windows cannot replace an open file."""

MIN_PROBES = 32
"""Fewer cannot tell a correct backend from a wrong one."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _laid_out(value: Any, indent: str = "") -> str:
    """Readable JSON, one line per list of numbers: the probes would fill thousands otherwise."""
    inner = f"{indent}  "
    if isinstance(value, dict) and value:
        rows = [
            f"{json.dumps(k, ensure_ascii=False)}: {_laid_out(v, inner)}" for k, v in value.items()
        ]
        return f"{{\n{inner}" + f",\n{inner}".join(rows) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(not isinstance(v, (int, float)) for v in value):
        rows = [_laid_out(v, inner) for v in value]
        return f"[\n{inner}" + f",\n{inner}".join(rows) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def _to_json(manifest: Manifest) -> dict[str, Any]:
    probes = manifest.probes
    segments = probes.work.segments
    # Written only if not verified, so that manifests from before this key do not change.
    verification_note = {} if probes.verified else {"verified": False}
    size = {} if manifest.dimensions is None else {"dimensions": manifest.dimensions.to_json()}
    ranking = {} if manifest.ranking is None else {"ranking": asdict(manifest.ranking)}
    about = manifest.description
    description = {} if about is None else {"description": asdict(about)}
    return {
        "schema": SCHEMA,
        "name": manifest.name,
        "family": manifest.family.to_json(),
        "source": asdict(manifest.source),
        **size,
        **description,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "variants": {name: _variant(variant) for name, variant in manifest.variants.items()},
        "probes": {
            "reference": probes.reference,
            **verification_note,
            "logits": [float(x) for x in probes.logits],
            "sequences": [s.tolist() for s in probes.work.ids],
            "segments": None if segments is None else [s.tolist() for s in segments],
        },
        **ranking,
    }


_LATER = ("note", "ranking")


def _variant(variant: Variant) -> dict[str, Any]:
    content = asdict(variant)
    # Written only if there is one, so that manifests from before these keys do not change.
    return {key: value for key, value in content.items() if value or key not in _LATER}


def _from_json(content: dict[str, Any]) -> Manifest:
    probes = content["probes"]
    segments = probes["segments"]
    work = Sequences(
        [np.asarray(s, np.int32) for s in probes["sequences"]],
        None if segments is None else [np.asarray(s, np.int8) for s in segments],
    )
    dimensions, ranking = content.get("dimensions"), content.get("ranking")
    description = content.get("description")
    variants = {}
    for name, item in content["variants"].items():
        fields = {
            "files": _records(item["files"]),
            "fidelity": Fidelity(**item["fidelity"]),
            "ranking": Agreement(**item["ranking"]) if "ranking" in item else None,
            "precision": RENAMED.get(item["precision"], item["precision"]),
        }
        variant = Variant(**{**item, **fields})
        known_as = {variant.name, f"{item['format']}-{item['precision']}"}
        if name not in known_as or variant.name in variants:
            raise ValueError(f"variant {name!r} must be named by format and precision, once")
        variants[variant.name] = variant
    return Manifest(
        name=content["name"],
        family=Family.from_json(content["family"]),
        source=Source(**content["source"]),
        files=_records(content["files"]),
        probes=Probes(
            work,
            np.asarray(probes["logits"], np.float32),
            probes["reference"],
            probes.get("verified", True),
        ),
        variants=variants,
        dimensions=None if dimensions is None else Dimensions.from_json(dimensions),
        ranking=None if ranking is None else _reference(ranking),
        description=None if description is None else Description.from_json(description),
    )


def _reference(content: dict[str, Any]) -> Reference:
    return Reference(**{**content, "logits": tuple(map(tuple, content["logits"]))})


def _records(content: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in content.items()}


def _check(manifest: Manifest) -> None:
    """Check that a manifest's content is allowed.

    Raises:
        ValueError: it is not; with what was found and what was expected.
    """
    family, probes = manifest.family, manifest.probes
    if not isinstance(manifest.name, str) or not isinstance(manifest.source.id, str):
        raise ValueError("name and source.id must be texts")
    if family.activation not in ACTIVATIONS:
        raise ValueError(
            f"the activation is {family.activation!r}; known are: {', '.join(ACTIVATIONS)}"
        )
    if family.pooling not in POOLINGS:
        raise ValueError(f"the pooling is {family.pooling!r}; known are: {', '.join(POOLINGS)}")
    if not 0 < family.temperature < math.inf or family.max_length < 1:
        raise ValueError("temperature and max_length of the family must be above 0")
    if TOKENIZER not in manifest.files:
        raise ValueError(f"files names no {TOKENIZER}")
    _check_records(manifest.files, "files")
    for name, variant in manifest.variants.items():
        if not is_plain(name) or "/" in name:
            raise ValueError(f"variant {name!r} is not named by one word")
        if not variant.files:
            raise ValueError(f"variant {name} has no files")
        _check_records(variant.files, name)
        folders = {name, *(f"{variant.format}-{old}" for old in _former(variant.precision))}
        own = f"{variant.folder}/" if variant.folder in folders else f"{name}/"
        if outside := [file for file in variant.files if not file.startswith(own)]:
            raise ValueError(f"variant {name} has a file outside its folder: {outside[0]!r}")
    count, lengths = len(probes.work), probes.work.lengths
    if count < MIN_PROBES or len(probes.logits) != count:
        raise ValueError(
            f"there are {count} probes with {len(probes.logits)} logits; as many of both were "
            f"expected, {MIN_PROBES} or more"
        )
    if (segments := probes.work.segments) is not None and [*map(len, segments)] != [*lengths]:
        raise ValueError("the probes' segments are not as long as their sequences")
    if not np.isfinite(probes.logits).all() or not lengths.all():
        raise ValueError("a probe is empty, or its logit is not finite")


def _former(precision: str) -> list[str]:
    """The names of a precision in earlier versions of qrank."""
    return [old for old, new in RENAMED.items() if new == precision]


def _check_records(files: dict[str, FileRecord], where: str) -> None:
    for name, record in files.items():
        if not is_plain(name):
            raise ValueError(f"{where} names {name!r}, which is no path within a bundle")
        if not _SHA256.fullmatch(record.sha256) or type(record.bytes) is not int:
            raise ValueError(f"{where} has no sha256 and size of {name}")


def is_plain(name: str) -> bool:
    """Whether a relative path stays inside its base folder, on every operating system."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and not set(part) & set("\\:\0*?[]") for part in parts)
