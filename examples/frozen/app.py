"""An application of one file: it ranks with `mini`; with arguments, it is the command `qrank`."""

import sys

from qrank import Reranker
from qrank.__main__ import main

if __name__ == "__main__":
    if sys.argv[1:]:
        main()
    else:
        documents = ["Bees make honey.", "Mars is red."]
        with Reranker("mini") as reranker:
            for found in reranker.rank("which planet is red?", documents):
                sys.stdout.write(f"{found.score:.4f}\t{found.text}\n")
