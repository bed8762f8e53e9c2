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

TEXT_BIAS_ROWS = "text_bias_rows"
"""1 for each text query to whose logits the text's bias is added, 0 for the others, [L]; absent where it is
added to all. It is added to those of every image query."""

IMAGE_TEXT_BIAS, TEXT_IMAGE_BIAS = "image_text_bias", "text_image_bias"
"""The bias of an attention over image and text, in this order or the other one: [N + L] for all queries, or
[N + L, N + L]. The trunk makes it once for all its blocks."""

KEYS, VALUES = "keys", "values"
"""Keys and values of the text in the cross-attention of each block, [k, L, C]."""

PADDING_ROTARY = "padding_rotary"
"""Cosines and sines at the position of the image's padding, [2, 1, D / 2]."""

ConditionTensors = Mapping[str, torch.Tensor]
"""The tensors by name that a trunk is given at run time; empty where the trunk has them as constants."""
