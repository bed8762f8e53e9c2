"""The cache's file. TensorRT-RTX has the names and ignores the timings: what is kept, only a GPU shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditf.engines.timing_cache import TimingCache
from ditf.runtime.backends.flavour import Log, load_flavour
from ditf.runtime.files.user_cache import cache_file, write_cache

pytestmark = pytest.mark.filterwarnings("ignore:.*TensorRT-RTX:DeprecationWarning")


@pytest.fixture
def config():
    trt = load_flavour("tensorrt-rtx")
    log = Log(trt)
    builder = trt.Builder(log.logger)
    yield builder.create_builder_config()
    del builder, log


@pytest.fixture
def path(tmp_path):
    """A cache's file, in a cache that is not there yet."""
    return tmp_path / "ditf" / "timing" / "one.cache"


def test_it_is_written_whole(config, path):
    for _ in range(2):  # the second time it is read
        cache = TimingCache(path)
        cache.attach(config)
        cache.keep(config)
        assert not cache.warning
    assert [one.name for one in path.parent.iterdir()] == ["one.cache"]


class Refusing:
    """A builder config that takes no cache but an empty one, as TensorRT does with one of another GPU."""

    def __init__(self, config):
        self._config = config

    def create_timing_cache(self, content):
        return None if content else self._config.create_timing_cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        return self._config.set_timing_cache(cache, ignore_mismatch)

    def get_timing_cache(self):
        return self._config.get_timing_cache()


def test_a_damaged_one_is_written_anew_with_a_warning(config, path):
    write_cache(path, b"rubbish" * 20)
    cache = TimingCache(path)
    cache.attach(Refusing(config))
    assert "damaged: timings start anew" in cache.warning
    cache.keep(Refusing(config))
    assert b"rubbish" not in path.read_bytes()


def test_what_others_can_write_is_neither_read_nor_written(config, path):
    write_cache(path, b"rubbish" * 20)
    path.chmod(0o666)
    cache = TimingCache(path)
    cache.attach(config)
    assert cache.warning == f"{path} cannot be used (others can write it): timings start anew"
    cache.keep(config)
    assert path.read_bytes() == b"rubbish" * 20


def test_a_file_that_cannot_be_written(config, path):
    cache = TimingCache(path)
    cache.attach(config)
    path.parent.parent.write_text("a file")
    cache.keep(config)
    assert "cannot be written" in cache.warning


@pytest.mark.parametrize("home", ["relative", None])
def test_without_a_home_folder_nothing_is_kept(monkeypatch, caplog, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is None:

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", home)
    assert cache_file("timing", "tensorrt") is None
    assert "no home folder" in caplog.text


def test_each_gpu_and_version_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = cache_file("timing", "tensorrt", "10.13.3", "NVIDIA Orin sm_87")
    assert one == tmp_path / "ditf" / "timing" / "tensorrt-10.13.3-NVIDIA_Orin_sm_87.cache"
