"""Which connections make room for others."""

from __future__ import annotations

import pytest

from ditf.runtime.serving.http.connections import Connections, client_address
from ditf.runtime.serving.limits import Limits


class Line:
    """A connection as `Connections` sees it."""

    def __init__(self, address="", idle=True):
        self.address, self.idle, self.client, self.aborted = address, idle, (address, 1), False

    def abort(self):
        self.aborted = True


@pytest.fixture
def connections():
    return Connections(Limits(connections=4, connections_each=2, connections_spare=1))


def test_the_longest_idle_one_makes_room(connections):
    lines = [Line(idle=n != 1) for n in range(4)]
    assert all(map(connections.opened, lines))
    connections.used(lines[0])
    assert connections.opened(Line())
    assert [one.aborted for one in lines] == [False, False, True, False]
    assert len(connections) == 4


def test_an_address_makes_room_for_itself(connections):
    other, first, second = Line("198.51.100.2"), Line("203.0.113.1"), Line("203.0.113.1")
    assert all(map(connections.opened, (other, first, second)))
    assert connections.opened(Line("203.0.113.1"))
    assert (other.aborted, first.aborted, second.aborted) == (False, True, False)
    assert connections.opened(Line())  # loopback addresses are not counted


def test_beyond_the_limit_a_few_are_for_health_checks(connections):
    busy = [Line(idle=False) for _ in range(4)]
    assert all(map(connections.opened, busy))
    spare = Line(idle=False)
    assert connections.opened(spare)
    assert connections.for_health_only(spare)
    assert not connections.opened(Line())
    spare.idle = True
    following = Line()
    assert connections.opened(following)
    assert spare.aborted
    connections.closed(following)
    connections.closed(busy[0])
    assert connections.opened(later := Line())
    assert not connections.for_health_only(later)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", ""),
        ("127.9.9.9", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        (None, ""),
        ("203.0.113.1", "203.0.113.1"),
        ("::ffff:203.0.113.1", "203.0.113.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_one_client(host, address):
    assert client_address(host) == address
