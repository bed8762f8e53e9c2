"""Writing ONNX files, and checking what their precision does to the values."""
