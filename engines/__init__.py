"""ONNX -> TensorRT plans. `ditf build` will live here; today it proves that NVIDIA takes our graphs."""
