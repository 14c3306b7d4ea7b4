"""A rerank server: requests of all dialects share one queue and one engine per model."""
