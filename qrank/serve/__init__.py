"""A rerank server: requests of every dialect in, pairs of all of them through one engine."""
