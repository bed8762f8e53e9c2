from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.label_images import read_label_image, write_label_image

LABELS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 23


def test_indexed_labels_and_their_colours_survive(tmp_path):
    palette = bytes(range(256)) * 3
    write_label_image(tmp_path / "a.png", LABELS, palette)
    labels, colours = read_label_image(tmp_path / "a.png", (3, 4))
    np.testing.assert_array_equal(labels, LABELS)
    assert colours == palette


def test_a_palette_that_is_not_full(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(tmp_path / "a.png")
    labels, colours = read_label_image(tmp_path / "a.png", (1, 2))
    assert labels.tolist() == [[0, 1]]
    assert colours[:6] == bytes([1, 2, 3, 4, 5, 6])
    assert len(colours) == 768


def test_grey_and_black_and_white(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "grey.png")
    labels, colours = read_label_image(tmp_path / "grey.png", (3, 4))
    np.testing.assert_array_equal(labels, LABELS)
    assert len({colours[i : i + 3] for i in range(0, 768, 3)}) == 256  # every label has its own
    Image.fromarray(LABELS > 50).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_label_image(tmp_path / "mask.png", (3, 4))[0], LABELS > 50)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F", "I;16"])
def test_other_pictures_are_refused(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="not of labels"):
        read_label_image(tmp_path / "a.tiff", (3, 4))


def test_another_size_a_folder_and_a_broken_file_are_refused(tmp_path):
    write_label_image(tmp_path / "a.png", LABELS, bytes(768))
    with pytest.raises(InputError, match="has 4x3 pixels, the image 3x4"):
        read_label_image(tmp_path / "a.png", (4, 3))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for path in (tmp_path, tmp_path / "b.png"):
        with pytest.raises(InputError, match="not a readable picture of labels"):
            read_label_image(path, (3, 4))
