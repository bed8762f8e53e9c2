"""The tensors that a condition turns into before it meets the image, and their names.

A conditioner makes them (`ditf.export.graph.condition`), the blocks read them. With `--conditioning bank`
the names are inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

MODULATION = "modulation"
"""AdaLN rows [R, C], float32: those of blocks 0..k-1 in the order in which they run, then block k's shift and
scale, or its scale alone."""

TEXT = "text"
"""Text tokens [L, C] that enter the trunk."""

TEXT_BIAS = "text_bias"
"""Added to the attention logits of the text's keys, [L]: a large negative number masks a token."""

KEYS, VALUES = "keys", "values"
"""Keys and values of the text in the cross-attention of each block, [k, L, C]."""

PADDING_ROTARY = "padding_rotary"
"""Cosines and sines at the position of the image's padding, [2, 1, D / 2]."""

ConditionTensors = Mapping[str, torch.Tensor]
"""The tensors by name that a trunk is given at run time; empty where the trunk has them as constants."""
