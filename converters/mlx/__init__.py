"""Conversion to MLX's safetensors."""
