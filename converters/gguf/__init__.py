"""GGUF: written from the weights, quantized, or imported from a prebuilt file."""
