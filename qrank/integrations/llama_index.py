"""LlamaIndex: a node postprocessor.

from qrank.integrations.llama_index import QrankRerank

index.as_query_engine(similarity_top_k=50, node_postprocessors=[QrankRerank(top_n=5)])
"""

from __future__ import annotations

from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from qrank.errors import InputError
from qrank.integrations.lazy import LazyReranker, score_of

dispatcher = get_dispatcher(__name__)


class QrankRerank(BaseNodePostprocessor):
    """Orders nodes by relevance to the query, and keeps the best.

    New `NodeWithScore`s are returned; the caller's stay as they are.
    """

    model: str = Field(default="mini", description="As for qrank.Reranker.")
    top_n: int | None = Field(default=3, ge=0, description="Nodes to keep. None: all.")
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.NONE,
        description="Which metadata is read before a node's text; EMBED: as embedding models do.",
    )
    keep_retrieval_score: bool = Field(
        default=False, description="Keep the former score as metadata['retrieval_score']."
    )
    instruction: str | None = Field(default=None, description="As for Reranker.rank.")
    long_documents: Literal["truncate", "tail", "chunk"] = Field(
        default="truncate", description="As for Reranker.rank."
    )
    budget_ms: float | None = Field(default=None, description="As for Reranker.rank.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Other arguments of Reranker, by name."
    )

    _reranker: LazyReranker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """See pydantic: keep the arguments of the model, which is opened at first use."""
        super().model_post_init(context)
        self._reranker = LazyReranker(self.model, self.options)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex stores it by."""
        return "QrankRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("there is no query to rerank by; give query_bundle or query_str")
        dispatcher.event(
            ReRankStartEvent(
                query=query_bundle,
                nodes=nodes,
                top_n=len(nodes) if self.top_n is None else self.top_n,
                model_name=self.model,
            )
        )
        self._reranker = self._reranker.of(self.model, self.options)
        found = self._reranker().rank(
            query_bundle.query_str,
            [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes],
            top_k=self.top_n,
            instruction=self.instruction,
            long_documents=self.long_documents,
            budget_ms=self.budget_ms,
        )
        ranked = [self._scored(nodes[each.index], score_of(each)) for each in found]
        dispatcher.event(ReRankEndEvent(nodes=ranked))
        return ranked

    def _scored(self, given: NodeWithScore, score: float | None) -> NodeWithScore:
        node = given.node
        if self.keep_retrieval_score:
            metadata = {**node.metadata, "retrieval_score": given.score}
            node = node.model_copy(update={"metadata": metadata})
        return NodeWithScore(node=node, score=score)
