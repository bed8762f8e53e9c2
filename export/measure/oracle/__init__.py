"""The oracle: a checkpoint's own diffusers pipeline, which judges a bundle and shares no code with it.

Every part that the exporter reads in code of its own is made here by public calls of diffusers and
transformers: weights by plain `from_pretrained`, prompts, packing and timesteps by the pipeline's own call,
x_0 by its image-to-image path, noise by the scheduler. What remains shared is the definition of the feature:
which module is block k, which channels are discarded, and the seed of the noise.
"""
