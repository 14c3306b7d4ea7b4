"""qrank as a part of other libraries, in their own process. Each module imports its host.

| module | what it is there | install |
|---|---|---|
| `cross_encoder` | a class in the shape of sentence-transformers' CrossEncoder | |
| `langchain` | a document compressor, and a cross-encoder | `qrank[langchain]` |
| `llama_index` | a node postprocessor | `qrank[llama-index]` |
| `haystack` | a ranker component | `qrank[haystack]` |
| `lancedb` | a reranker of search results | `qrank[lancedb]` |
| `mteb` | a cross-encoder for its reranking tasks | `qrank[mteb]` |
| `ray` | scores for datasets, and for files on the nodes of a cluster | `qrank[ray]` |

`cross_encoder` and `mteb` open their models at once, as the classes they replace do; the others at
first use. docs/integrations.md has the rules that all of them keep; tests/hosts.py tests a new one.
"""
