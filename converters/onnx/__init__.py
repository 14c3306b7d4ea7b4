"""ONNX: exported from the scoring graph, quantized, or taken over from a prebuilt file."""
