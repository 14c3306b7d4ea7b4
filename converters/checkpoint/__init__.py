"""A checkpoint read: configuration, tokenizer, head, weights, and the family they make."""
