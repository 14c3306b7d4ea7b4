"""Logits -> probabilities, fitted on labelled pairs and kept in the user's own folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.sequences import Logits
from qrank.errors import InputError
from qrank.scoring.activation import Scores, activate
from qrank.system import paths
from qrank.system.disk import cannot_write
from qrank.system.extras import need
from qrank.system.safejson import parse_json

Labels = NDArray[np.bool_]
"""Whether a pair is relevant, shape [n]."""

_STEPS = 100
_GRADIENT = 1e-9


@dataclass(frozen=True)
class Platt:
    """sigmoid(slope · logit + intercept)."""

    slope: float
    intercept: float

    def apply(self, logits: Logits) -> Scores:
        """Probabilities, shape [n]."""
        return activate(self.slope * logits.astype(np.float64) + self.intercept, "sigmoid")

    @classmethod
    def fit(cls, logits: Logits, labels: Labels) -> Platt:
        """Fit by Newton's method with a line search, to Platt's smoothed targets.

        After H.-T. Lin, C.-J. Lin and R. C. Weng, "A note on Platt's probabilistic outputs for
        support vector machines", Machine Learning 68 (2007).

        Raises:
            InputError: labels are all the same, or higher logits are no more often relevant.
        """
        x, center, scale = _standardized(logits, labels)
        positive = int(labels.sum())
        negative = len(labels) - positive
        # Neither 0 nor 1, so that the best slope is finite even if logits separate the labels.
        targets = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
        design = np.stack((x, np.ones_like(x)))

        def loss(weights: NDArray[np.float64]) -> float:
            z = weights @ design
            return float((np.logaddexp(0, z) - targets * z).mean())

        weights = np.array([0.0, np.log((positive + 1) / (negative + 1))])
        for _ in range(_STEPS):
            p = activate(weights @ design, "sigmoid")
            gradient = design @ (p - targets) / len(x)
            if np.abs(gradient).max() < _GRADIENT:
                break
            hessian = (design * (p * (1 - p))) @ design.T / len(x) + 1e-12 * np.eye(2)
            step = np.linalg.solve(hessian, gradient)
            share = 1.0
            while loss(weights - share * step) > loss(weights) - 1e-4 * share * gradient @ step:
                share /= 2
                if share < 1e-10:
                    break
            weights = weights - share * step
        slope = float(weights[0]) / scale
        return cls(_rising(slope), float(weights[1]) - slope * center)


@dataclass(frozen=True)
class Isotonic:
    """The best non-decreasing fit: straight lines between knots, constant beyond them."""

    logits: list[float]
    probabilities: list[float]

    def apply(self, logits: Logits) -> Scores:
        """Probabilities, shape [n]."""
        found = np.interp(logits.astype(np.float64), self.logits, self.probabilities)
        return np.asarray(found, np.float64)

    @classmethod
    def fit(cls, logits: Logits, labels: Labels) -> Isotonic:
        """Fit by scipy's isotonic regression, with equal logits merged.

        Raises:
            InputError: as for `Platt.fit`.
        """
        _standardized(logits, labels)
        optimize: Any = need("scipy.optimize")
        x, places, counts = np.unique(
            logits.astype(np.float64), return_inverse=True, return_counts=True
        )
        share = np.bincount(places, labels) / counts
        fitted = optimize.isotonic_regression(share, weights=counts).x
        _rising(float(fitted[-1] - fitted[0]))
        # The two ends of each constant section are enough.
        edge = np.flatnonzero(np.diff(fitted))
        kept = np.unique(np.concatenate(([0], edge, edge + 1, [len(x) - 1])))
        return cls(x[kept].tolist(), np.clip(fitted[kept], 0, 1).tolist())


Calibration = Platt | Isotonic
METHODS: dict[str, type[Platt] | type[Isotonic]] = {"platt": Platt, "isotonic": Isotonic}
"""Calibration methods by their names for `--method`."""


def check_folder() -> None:
    """Check, before hours of scoring, that a calibration can be saved; creates nothing yet.

    Raises:
        OSError: its folder is not writable.
    """
    import tempfile

    folder = paths.data_folder() / "calibrations"
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise cannot_write(error, folder, "QRANK_DATA names another folder") from error


def save(manifest: Manifest, variant: Variant, calibration: Calibration) -> Path:
    """Save a variant's calibration; replaces an earlier one.

    Returns:
        The file's path.

    Raises:
        OSError: it cannot be written.
    """
    path = _path(manifest, variant)
    method = next(name for name, kind in METHODS.items() if isinstance(calibration, kind))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.write_atomically(path, json.dumps({"method": method, **asdict(calibration)}) + "\n")
    except OSError as error:
        raise cannot_write(error, path, "QRANK_DATA names another folder") from error
    return path


def load(manifest: Manifest, variant: Variant) -> Calibration:
    """A variant's calibration.

    Raises:
        InputError: there is none, or it is damaged; the message says how to make one, and if there
            is none, which variants have one.
    """
    path = _path(manifest, variant)
    again = f"make one: qrank calibrate BUNDLE --backend {variant.name} --data FOLDER"
    try:
        content = parse_json(path.read_text("utf-8"))
        calibration: Calibration = METHODS[content.pop("method")](**content)
    except FileNotFoundError:
        others = {v.name for v in manifest.variants.values() if _path(manifest, v).is_file()}
        raise InputError(
            f"{manifest.name}, {variant.name}, has no calibration here (calibrated: "
            f"{', '.join(sorted(others)) or 'none of its variants'}); {again}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); {again}") from error
    return calibration


def _path(manifest: Manifest, variant: Variant) -> Path:
    name = re.sub(r"[^\w.-]", "_", manifest.name)
    identity = manifest.identity(variant)[:16]
    return paths.data_folder() / "calibrations" / f"{name}-{variant.folder}-{identity}.json"


def _standardized(logits: Logits, labels: Labels) -> tuple[NDArray[np.float64], float, float]:
    """Logits scaled to mean 0 and standard deviation 1, and their former mean and deviation."""
    if labels.all() or not labels.any():
        kind = "relevant" if labels.any() else "not relevant"
        raise InputError(f"all {len(labels)} pairs to fit on are {kind}; both kinds are needed")
    x = logits.astype(np.float64)
    center, scale = float(x.mean()), float(x.std())
    if not scale:
        raise InputError(f"all {len(x)} pairs to fit on have the same logit; nothing can be fitted")
    return (x - center) / scale, center, scale


def _rising(slope: float) -> float:
    if slope <= 0:
        raise InputError(
            "pairs of higher logits are no more often relevant: these labels are not what the "
            "model was made to tell"
        )
    return slope
