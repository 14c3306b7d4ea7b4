"""OpenVINO: made of the ONNX graph, quantized, or taken over from a prebuilt file."""
