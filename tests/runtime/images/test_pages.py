"""Files of several pictures are refused, and files that hold one photograph in several versions are read."""

from __future__ import annotations

import io
import struct

import imageio.v3 as imageio
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageSequence

from ditf.runtime.errors import InputError
from ditf.runtime.images import decode_image, open_image, picture_count
from ditf.runtime.images.pages import pictures_in

PHOTOGRAPH = skimage.data.chelsea()[100:164, 120:216]
FRAMES = [Image.fromarray(np.roll(PHOTOGRAPH, 16 * shift, 1)) for shift in range(3)]


def saved(path, frames=FRAMES):
    first, *others = (frame.copy() for frame in frames)  # Pillow keeps the settings of an encoder in an image
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif", "tif"])
def test_animations_and_pages_are_refused(tmp_path, suffix):
    path = saved(tmp_path / f"moving.{suffix}")
    assert picture_count(path) == 3
    with pytest.raises(InputError, match=f"moving.{suffix} holds 3 pictures") as caught:
        open_image(path)
    assert "write each to its own file" in caught.value.fix
    with pytest.raises(InputError, match="upload holds 3 pictures"):
        decode_image(path.read_bytes(), "upload")
    single = saved(tmp_path / f"still.{suffix}", FRAMES[:1])
    assert picture_count(single) == 1
    assert np.abs(np.asarray(open_image(single)).astype(int) - PHOTOGRAPH).mean() < 20


def test_the_files_of_other_encoders(tmp_path):
    stack = np.stack([np.asarray(frame) for frame in FRAMES])
    imageio.imwrite(tmp_path / "a.gif", stack)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="rgb")
    tifffile.imwrite(tmp_path / "big.tif", stack, photometric="rgb", bigtiff=True)
    tifffile.imwrite(tmp_path / "order.tif", stack, photometric="rgb", byteorder=">")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(InputError, match="holds 3 pictures"):
            open_image(path)
    for name, options in (("big.tif", {"bigtiff": True}), ("order.tif", {"byteorder": ">"})):
        tifffile.imwrite(tmp_path / name, stack[0], photometric="rgb", **options)
        np.testing.assert_array_equal(open_image(tmp_path / name), stack[0])


def test_the_photograph_of_a_phone_is_its_first_picture(tmp_path):
    """Phones write MPO files, named .jpg: the photograph, then its depth, gain map or second view."""
    path = saved(tmp_path / "IMG_1.mpo").rename(tmp_path / "IMG_1.jpg")
    with Image.open(path) as image:
        assert image.format == "MPO"
        assert image.n_frames == 3
    assert picture_count(path) == 1
    assert np.abs(np.asarray(open_image(path)).astype(int) - PHOTOGRAPH).mean() < 5


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_a_pyramid_of_reduced_versions_is_one_picture(tmp_path, options):
    """As GDAL and scanners write them: the photograph, then smaller versions of it and a mask."""
    with tifffile.TiffWriter(tmp_path / "a.tif", **options) as file:
        file.write(PHOTOGRAPH, photometric="rgb")
        file.write(np.ascontiguousarray(PHOTOGRAPH[::2, ::2]), photometric="rgb", subfiletype=1)
        file.write(PHOTOGRAPH[..., 0] > 99, photometric="minisblack", subfiletype=4)
    assert picture_count(tmp_path / "a.tif") == 1
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif"), PHOTOGRAPH)


def test_a_pil_image_is_its_current_frame(tmp_path):
    with Image.open(saved(tmp_path / "moving.png")) as moving:
        shown = [np.asarray(open_image(frame)) for frame in ImageSequence.Iterator(moving)]
    for array, frame in zip(shown, FRAMES, strict=True):
        np.testing.assert_array_equal(array, frame)


def page(place: int, following: int, entries: int) -> bytes:
    tags = [(254, 4, 1, 1), (256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 0)]
    tags += [(60000 + index % 1000, 4, 1, 0) for index in range(entries - len(tags))]
    packed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<H", entries) + packed + struct.pack("<I", following)


class Counting(io.BytesIO):
    """A file in memory that counts the bytes that are read."""

    count = 0

    def read(self, *size):
        content = super().read(*size)
        self.count += len(content)
        return content


def test_the_work_of_counting_does_not_grow_with_the_tags(tmp_path):
    """Pillow's own count reads every tag of every page, which a small file can make take minutes."""
    size, count = len(page(0, 0, 400)), 1500
    chain = b"".join(page(0, 8 + size * (index + 1), 400) for index in range(count))
    file = Counting(struct.pack("<2sHI", b"II", 42, 8) + chain)
    with Image.open(file) as image:
        file.count = 0
        assert pictures_in(image) == 1
        assert file.count < 30 * count


def test_chains_that_return_or_end_early(tmp_path):
    (tmp_path / "circle.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 8) + page(8, 8, 6))
    assert picture_count(tmp_path / "circle.tif") == 1
    path = saved(tmp_path / "cut.tif")
    path.write_bytes(path.read_bytes()[:-300])
    assert picture_count(path) in (2, 3)
