"""Convert any reranker once, and run it quantized on the fastest thing the machine has.

>>> from qrank import Reranker
>>> Reranker("mini").rank("capital of France?", ["Berlin is in Germany.", "Paris is."])
"""

from typing import TYPE_CHECKING, Any

from qrank.errors import QrankError
from qrank.system.version import __version__

if TYPE_CHECKING:
    from qrank.cascade import Cascade
    from qrank.measure.tuning import tune
    from qrank.pairs.score import score_files
    from qrank.reranker import Ranking, Reranker

__all__ = ["Cascade", "QrankError", "Ranking", "Reranker", "__version__", "score_files", "tune"]

_PLACES = {
    "Cascade": "qrank.cascade",
    "Ranking": "qrank.reranker",
    "Reranker": "qrank.reranker",
    "score_files": "qrank.pairs.score",
    "tune": "qrank.measure.tuning",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: `qrank.__main__` must be running before numpy is imported."""
    if name not in _PLACES:
        raise AttributeError(f"module 'qrank' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
