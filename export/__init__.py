"""Checkpoint -> bundle. The only folder that needs torch, diffusers and onnx."""
