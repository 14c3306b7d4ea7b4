"""Every error qrank raises on purpose, and its exit code on the command line.

A signal that ends a command has an exit code too: 128 + its number (`qrank.system.signals`).

QrankError                 base: catch this to catch them all                  (exit 1)
 ├─ InputError             the caller's data or arguments cannot be used            (2)
 ├─ MissingExtraError      an optional package is not installed                     (3)
 ├─ ModelNotFoundError     no bundle or checkpoint of that name can be found        (4)
 ├─ BundleError            a bundle is damaged, incomplete or of another schema     (5)
 ├─ FamilyError            a card or a checkpoint is not one qrank can read         (6)
 ├─ TargetError            a backend or device is absent, or computes wrongly       (7)
 └─ ConversionError        a conversion cannot be done                              (8)
     └─ FidelityError      ... because its result does not rank like the original   (9)
"""

__all__ = [
    "BundleError",
    "ConversionError",
    "FamilyError",
    "FidelityError",
    "InputError",
    "MissingExtraError",
    "ModelNotFoundError",
    "QrankError",
    "TargetError",
]


class QrankError(Exception):
    """Says what was found, what was expected and what to do, in one line if possible."""

    exit_code = 1


class InputError(QrankError, ValueError):
    """The caller's texts, files or arguments cannot be used."""

    exit_code = 2


class MissingExtraError(QrankError, ImportError):
    """An optional package is not installed; the message holds the pip line."""

    exit_code = 3


class ModelNotFoundError(QrankError, LookupError):
    """The model is not a bundled name, a folder or a hub id."""

    exit_code = 4


class BundleError(QrankError):
    """A bundle is damaged, incomplete, or written by another schema version."""

    exit_code = 5


class FamilyError(QrankError):
    """A card is malformed, or a checkpoint belongs to no supported family."""

    exit_code = 6


class TargetError(QrankError):
    """A backend or device is absent, or does not reproduce the bundle's probes."""

    exit_code = 7


class ConversionError(QrankError):
    """A variant or a whole conversion cannot be made; nothing of it was written."""

    exit_code = 8


class FidelityError(ConversionError):
    """A converted variant does not rank like the original; it was not written."""

    exit_code = 9
