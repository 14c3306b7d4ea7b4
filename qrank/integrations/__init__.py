"""qrank as a part of other libraries, in their own process. Each module imports its host.

| module | what it is there | install |
|---|---|---|
| `cross_encoder` | a class in the shape of sentence-transformers' CrossEncoder | |
| `langchain` | a document compressor, and a cross-encoder | `qrank[langchain]` |
| `llama_index` | a node postprocessor | `qrank[llama-index]` |
| `haystack` | a ranker component | `qrank[haystack]` |
| `lancedb` | a reranker of search results | `qrank[lancedb]` |

All but `cross_encoder`, which opens its model as the class it replaces does, open it at first use.
Those for frameworks return Python floats and copies of what they were given, keep the order of
ties, and put documents that a budget left unscored last, with no score.
"""
