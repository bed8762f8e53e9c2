"""Modules say which part of the graph their parameters are counted in."""

from __future__ import annotations

import pytest
from torch import nn

from ditf.export.assemble.parameter_counts import parameter_parts
from ditf.export.graph.roles import Role, role_of


class Holder(nn.Module):
    """Modules by name, with roles for some of them."""

    def __init__(self, roles, **children):
        super().__init__()
        self.roles = roles
        for name, child in children.items():
            self.add_module(name, child)


def test_the_nearest_declaration_counts():
    inner = Holder({"norm": Role.MODULATION}, norm=nn.LayerNorm(2), linear=nn.Linear(2, 2))
    graph = Holder({"block": Role.SELF_ATTENTION}, block=nn.ModuleList([inner]))
    assert role_of(graph, "block.0.norm.weight") is Role.MODULATION
    assert role_of(graph, "block.0.linear.bias") is Role.SELF_ATTENTION


def test_conditioning_is_counted_as_a_whole():
    inner = Holder({"norm": Role.MODULATION}, norm=nn.LayerNorm(2))
    assert role_of(Holder({"condition": Role.CONDITIONING}, condition=inner), "condition.norm.weight") is (
        Role.CONDITIONING
    )


def test_a_module_without_a_role_is_named():
    graph = Holder({"known": Role.FEED_FORWARD}, known=nn.Linear(2, 2), new=nn.Linear(2, 2))
    with pytest.raises(LookupError, match=r"new\.weight of Holder.*name it in the `roles`"):
        parameter_parts(graph)
