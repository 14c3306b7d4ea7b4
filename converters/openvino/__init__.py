"""OpenVINO: made from its own ONNX export, quantized, or imported from a prebuilt file."""
