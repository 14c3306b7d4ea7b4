"""ONNX: exported from the scoring graph, quantized, or imported from a prebuilt file."""
