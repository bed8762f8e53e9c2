from __future__ import annotations

from ditf.runtime.serving.limits import Limits


def test_the_limits_of_a_server_with_default_options_are_the_defaults():
    default = Limits()
    assert default == Limits.for_server(
        default.requests, default.deadline_s, default.body_bytes, default.pixels, default.drain_s
    )


def test_dependent_limits_follow_the_options():
    limits = Limits.for_server(requests=8, deadline_s=1.0, body_bytes=1 << 30, pixels=1_000_000, drain_s=0.0)
    assert (limits.images, limits.connections_each) == (16, 16)
    assert limits.buffered_bytes == 2 << 30
    assert limits.scores == Limits().scores // 30
