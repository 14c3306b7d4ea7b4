"""Haystack: a ranker component. Its code is where Haystack loads stored pipelines from.

from haystack_integrations.components.rankers.qrank import QrankRanker

pipeline.add_component("ranker", QrankRanker(top_k=5))
"""

from haystack_integrations.components.rankers.qrank import QrankRanker

__all__ = ["QrankRanker"]
