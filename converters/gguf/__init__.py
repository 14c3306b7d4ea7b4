"""GGUF: written from the weights, quantized, or taken over from a prebuilt file."""
