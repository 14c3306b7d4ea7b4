"""Read a checkpoint: configuration, tokenizer, head, weights, and the resulting family."""
