from __future__ import annotations

import pytest
from PIL import Image

from ditf.export.measure.images import CalibrationImages
from ditf.runtime.errors import InputError


def test_files_that_are_no_calibration_images_are_named(tmp_path, caplog):
    Image.linear_gradient("L").save(tmp_path / "a.jp2")
    (tmp_path / "b.heic").touch()
    images = CalibrationImages(tmp_path, (8, 16))
    assert [array.shape for array in images.arrays] == [(8, 16, 3)]
    assert caplog.text.count("skipped, because they are no image files: b.heic") == 1


def test_an_image_that_cannot_be_read_is_told_before_any_work(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"moving\.gif holds 2 pictures"):
        CalibrationImages(tmp_path, (8, 16))
