"""Convert any reranker once, and run it quantized on the fastest thing the machine has.

>>> from qrank import Reranker
>>> Reranker("mini").rank("capital of France?", ["Berlin is in Germany.", "Paris is."])
"""

from qrank.errors import QrankError
from qrank.reranker import Ranking, Reranker
from qrank.tuning import tune
from qrank.version import __version__

__all__ = ["QrankError", "Ranking", "Reranker", "__version__", "tune"]
