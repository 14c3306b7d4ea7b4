"""qrank's ranker, in the package that Haystack trusts when it loads a stored pipeline."""

from haystack_integrations.components.rankers.qrank.ranker import QrankRanker

__all__ = ["QrankRanker"]
