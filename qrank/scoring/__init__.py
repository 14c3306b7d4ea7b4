"""Text to logits to scores: everything but the model itself."""
