"""OpenVINO: made of an ONNX graph exported for it, quantized, or imported from a prebuilt file."""
