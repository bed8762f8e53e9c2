"""Small image files that are expensive to decode."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.serving.decoding import JPEG_SCANS, SLOW_BYTES, decode_upload
from ditf.runtime.serving.errors import TooLarge
from ditf.runtime.serving.limits import Limits
from tests.runtime.serving.pictures import noise

LIMITS = Limits()


def progressive(scans, picture=None):
    """A JPEG whose scans are repeated up to a number."""
    file = io.BytesIO()
    Image.fromarray(noise(1) if picture is None else picture).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    starts = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    last = data[starts[-1] : -2]
    return data[:-2] + last * (scans - len(starts)) + b"\xff\xd9"


@pytest.mark.parametrize("prefix", [b"", b"\xff"])
def test_scans_of_a_jpeg(prefix):
    assert decode_upload(progressive(JPEG_SCANS), LIMITS).size == (70, 50)
    data = progressive(JPEG_SCANS + 1).replace(b"\xff\xda", prefix + b"\xff\xda")
    with pytest.raises(TooLarge, match=f"more than {JPEG_SCANS} scans"):
        decode_upload(data, LIMITS)


def test_what_only_looks_like_scans():
    """The markers are in a comment, in the EXIF data, and after the end of the picture."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x9286] = b"\xff\xda" * 500
    Image.fromarray(noise(1)).save(file, "JPEG", exif=exif, comment=b"\xff\xda" * 500, progressive=True)
    assert decode_upload(file.getvalue() + b"\xff\xda" * 500, LIMITS).size == (70, 50)


def test_a_plain_ppm():
    assert decode_upload(b"P3\n2 1\n255\n1 2 3 4 5 6\n", LIMITS).getpixel((1, 0)) == (4, 5, 6)
    side = 512
    with pytest.raises(TooLarge, match="plain PPM"):
        decode_upload(b"P3\n%d %d\n255\n" % (side, side) + b"0 " * 3 * side * side, LIMITS)


def test_a_run_length_encoded_bmp():
    def bmp(width, height):
        rows = (b"\1\5" * width + b"\0\0") * height + b"\0\1"
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
        return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + head + bytes(1024) + rows

    assert decode_upload(bmp(4, 3), LIMITS).size == (4, 3)
    data = bmp(1024, 600)
    assert len(data) > SLOW_BYTES
    with pytest.raises(TooLarge, match="run-length encoded BMP"):
        decode_upload(data, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_an_animation_is_refused(kind):
    file = io.BytesIO()
    frames = [Image.fromarray(noise(seed)) for seed in range(2)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="the image holds 2 pictures"):
        decode_upload(file.getvalue(), LIMITS)


def test_the_rules_for_files_hold_for_uploads():
    """A file is turned as its EXIF data says, and values of 12 bits in 16 are refused."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(noise(1)).save(file, "PNG", exif=exif)
    assert decode_upload(file.getvalue(), LIMITS).size == (50, 70)
    file = io.BytesIO()
    Image.fromarray(noise(1)[..., 0].astype(np.uint16) * 16).save(file, "PNG")
    with pytest.raises(InputError, match="so it would come out dark"):
        decode_upload(file.getvalue(), LIMITS)


def test_a_long_side():
    file = io.BytesIO()
    Image.fromarray(np.zeros((1, 16_385, 3), np.uint8)).save(file, "PNG")
    with pytest.raises(TooLarge, match="16385x1 pixels, a side more than 16,384"):
        decode_upload(file.getvalue(), LIMITS)
