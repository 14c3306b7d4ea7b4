"""OpenVINO: made of the ONNX graph, quantized, or imported from a prebuilt file."""
