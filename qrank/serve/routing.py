"""A path as it is asked for -> the route that answers: other names, slashes, a proxy's prefix."""

from __future__ import annotations

import re

ALIASES = {
    # llama.cpp's.
    "/reranking": "/rerank",
    "/v1/reranking": "/v1/rerank",
    "/v1/health": "/health",
    "/models": "/v1/models",
    # SageMaker's, as TEI and vLLM have them.
    "/invocations": "/rerank",
    "/ping": "/health",
}
"""Other names that the imitated servers answer at."""


def routed(path: str, method: str, root: str = "") -> str:
    """The route of a path, if there is one.

    Args:
        path: as it came. A slash more, at its end or elsewhere, means nothing.
        method: as it came.
        root: the prefix under which a proxy offers the routes, whether it strips that or not.
    """
    path = re.sub("/{2,}", "/", path)
    path = path.rstrip("/") or "/"
    if f"{path}/".startswith(f"{root}/"):
        path = path.removeprefix(root) or "/"
    if path == "/":
        # TEI's.
        return "/rerank" if method == "POST" else "/health"
    return ALIASES.get(path, path)
