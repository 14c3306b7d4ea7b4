"""sentence-transformers behind a minimal FastAPI app: the peer of `serve.py`.

python plain_app.py CHECKPOINT --port PORT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder

app = FastAPI()
# fp32, its default, whatever the checkpoint's data type.
dtype = {"torch_dtype": torch.float32}
model = CrossEncoder(sys.argv[1], device="cpu", local_files_only=True, model_kwargs=dtype)


class Asked(BaseModel):
    """A query and its candidates."""

    query: str
    documents: list[str]


@app.post("/v1/rerank")
def rerank(asked: Asked) -> dict[str, Any]:
    """Rerank; as it is not async, FastAPI runs it in a thread pool: requests run concurrently."""
    found = model.rank(asked.query, asked.documents, show_progress_bar=False)
    return {
        "results": [
            {"index": int(x["corpus_id"]), "relevance_score": float(x["score"])} for x in found
        ]
    }


@app.get("/health")
def health() -> dict[str, str]:
    """Answer once the app runs."""
    return {"status": "ok"}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
