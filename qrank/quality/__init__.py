"""How good a ranking is: collections, metrics, evaluation, reliability."""
