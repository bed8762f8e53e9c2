"""A strict stand-in for an NVIDIA GPU, its driver, CUDA's runtime API and the runtime half of TensorRT.

It executes a plan through ONNX Runtime on the graph that the plan was built from. It proves control flow:
the order of calls, the life of memory, what happens when a call fails. It proves nothing about speed, about
capture on real drivers, or about the accuracy of real kernels.

It is stricter than a driver. What a driver leaves undefined (reading a result before waiting for it, two
contexts that share scratch memory, a plan destroyed before its contexts) is recorded in `World.faults`.
"""
