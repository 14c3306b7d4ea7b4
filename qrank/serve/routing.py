"""Path of a request -> route: aliases, extra slashes, a proxy's prefix."""

from __future__ import annotations

import re

ALIASES = {
    # llama.cpp's.
    "/reranking": "/rerank",
    "/v1/reranking": "/v1/rerank",
    # OpenVINO Model Server's.
    "/v3/rerank": "/v1/rerank",
    "/v1/health": "/health",
    # Weaviate's.
    "/.well-known/ready": "/ready",
    "/.well-known/live": "/health",
    "/meta": "/info",
    "/models": "/v1/models",
    # SageMaker's, as TEI and vLLM have them.
    "/invocations": "/rerank",
    "/ping": "/health",
}
"""Other paths of the imitated servers -> routes."""

_HOSTED_NIM = re.compile("/v1/retrieval/.+/reranking")
"""NVIDIA's hosted NIMs have a path for each model, and litellm appends it to any base URL."""


def routed(path: str, method: str, root: str = "", *, browser: bool = False) -> str:
    """The route of a path; an unknown path is returned unchanged.

    Args:
        path: of the request. Extra slashes are ignored.
        method: of the request.
        root: the path under which a proxy serves the routes; the proxy may remove it or not.
        browser: the client asks for HTML.
    """
    path = re.sub("/{2,}", "/", path)
    path = path.rstrip("/") or "/"
    if f"{path}/".startswith(f"{root}/"):
        path = path.removeprefix(root) or "/"
    if path == "/":
        # TEI's, but people get the page.
        if method == "POST":
            return "/rerank"
        return "/" if browser else "/health"
    if _HOSTED_NIM.fullmatch(path):
        return "/v1/ranking"
    return ALIASES.get(path, path)
