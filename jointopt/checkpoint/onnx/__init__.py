"""A sub-network as an ONNX model that stock ONNX Runtime runs, and its reload."""
