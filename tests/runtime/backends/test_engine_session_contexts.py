"""The kernels that TensorRT-RTX compiles, and how long they are kept, on the stand-in for a GPU."""

from __future__ import annotations

import logging

import pytest

from ditf.runtime.backends import engine_contexts
from tests.runtime.backends.engine_plans import (
    double,
    features_plan,
    match_plan,
    multiply,
    open_plan,
    opened,
)
from tests.standin.fixtures import installed
from tests.standin.world import World

pytestmark = pytest.mark.usefixtures("standin_plans")


@pytest.fixture
def kernels(tmp_path):
    return tmp_path / "ditf" / "kernels" / "a.cache"


def test_a_killed_process_has_not_compiled_in_vain_standin(kernels):
    """The first session is not closed before the second one opens. Its second run has the fast kernels."""
    with installed(World()) as world:
        killed = open_plan(match_plan(), kernels=kernels)
        for size in (3, 8) * 2:
            multiply(killed, size, size)
        compiled = dict(world.compilations)
        assert len(compiled) == 3  # for any shape, and for each of both
        with opened(match_plan(), kernels=kernels) as session:
            for size in (3, 8):
                multiply(session, size, size)
        assert dict(world.compilations) == compiled
        killed.close()


def test_eager_kernels_are_there_after_the_first_run_standin(kernels):
    with installed(World()) as world:
        killed = open_plan(features_plan(((1, 8),)), kernels=kernels)
        double(killed, batch=3)
        compiled = dict(world.compilations)
        with opened(features_plan(((1, 8),)), kernels=kernels) as session:
            double(session, batch=3)
        assert dict(world.compilations) == compiled
        killed.close()


def test_kernels_are_written_when_there_are_more_standin(kernels, monkeypatch):
    written = []
    monkeypatch.setattr(engine_contexts, "write_cache", lambda path, content: written.append(content))
    with installed(World()):
        with opened(match_plan(), kernels=kernels) as session:
            for size in (3, 3, 3, 3, 3, 8, 3, 8, 8):
                multiply(session, size, size)
        assert len(written) == 3  # for any shape, and for each of both


def test_kernels_that_cannot_be_written_are_a_warning_standin(kernels, caplog):
    kernels.parent.mkdir(parents=True)
    kernels.parent.chmod(0o700)
    kernels.mkdir()  # a folder in the file's place
    with installed(World()) as world, caplog.at_level(logging.WARNING):
        with opened(match_plan(), kernels=kernels) as session:
            for size in (3, 8, 9):
                multiply(session, size, size)
        assert not world.faults
    assert [record.message for record in caplog.records if "cannot be written" in record.message][1:] == []


@pytest.mark.parametrize("content", [b"standin-kernels:damaged", b"something else"])
def test_kernels_of_another_gpu_standin(kernels, content, caplog):
    with installed(World()) as world:
        with opened(features_plan(), kernels=kernels) as session:
            double(session)
        kernels.write_bytes(content)
        with caplog.at_level(logging.WARNING), opened(features_plan(), kernels=kernels) as session:
            double(session)
        assert "kernels are compiled anew" in caplog.text
        assert kernels.read_bytes() != content
        assert not world.faults


def test_the_order_of_destruction_standin(kernels):
    """Contexts, cache and configuration before the engine, and the runtime last."""
    with installed(World()) as world:
        with opened(features_plan(), kernels=kernels) as session:
            double(session)
        assert not world.faults
        assert not world.alive()
