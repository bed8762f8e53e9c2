"""The parts of a graph that the manifest counts parameters by, and how a module says which part it is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from torch import nn


class Role(Enum):
    """A part of the features graph. The values are the names in the manifest."""

    VAE_ENCODER = "VAE encoder"
    CONDITIONING = "conditioning"
    NOISE = "noise"
    EMBEDDERS = "patch and position embedders"
    MODULATION = "modulation and gates"
    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    FEED_FORWARD = "feed-forward"
    ATTENTION_AND_FEED_FORWARD = "self-attention and feed-forward"
    TEXT_STREAM = "text stream"
    DISCARD_MASK = "discard mask"
    PROJECTION = "projection"


Roles = Mapping[str, Role]
"""What a module declares as its attribute `roles`: {name of a child or of a parameter: its role}."""

_UNDIVIDED = (Role.VAE_ENCODER, Role.CONDITIONING)
"""Parts that are counted as a whole, whatever the modules inside them declare."""


def role_of(graph: nn.Module, name: str) -> Role:
    """The role of a parameter: what the nearest module around it declares.

    Args:
        graph: the module that the name starts at.
        name: of the parameter, as in `named_parameters`.

    Raises:
        LookupError: no module on the way to the parameter declares a role for what it holds.
    """
    role: Role | None = None
    module: object = graph
    for part in name.split("."):
        role = getattr(module, "roles", {}).get(part, role)
        if role in _UNDIVIDED:
            break
        module = getattr(module, part)
    if role is None:
        raise LookupError(
            f"no module around the parameter {name} of {type(graph).__name__} says what it is for;"
            " name it in the `roles` of the module that holds it (ditf.export.graph.roles)"
        )
    return role
