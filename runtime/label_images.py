"""Label images: PNG files whose pixel values are the labels, as in DAVIS."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import open_regular
from ditf.runtime.images import LARGEST_FILE, check_single, decoding


def read_label_image(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, bytes]:
    """Read the labels of an image and the colours that they are shown in.

    Like any image file, it is turned as its EXIF data says.

    Args:
        path: an indexed or 8-bit grey picture whose pixel values are the labels, or a black and white one
            with the labels 0 and 1.
        size: (H, W) of the image that is labelled.

    Returns:
        Labels, uint8 [H, W]; and a palette of 768 bytes, the picture's own or one in which labels that follow
        each other differ clearly.

    Raises:
        InputError: the file is missing, is of another kind, has another size than the image, holds several
            pictures, or is of a kind that changes the values: JPEG, or grey that is not stored as 8 bits.
    """
    try:
        with open_regular(path, LARGEST_FILE) as file, decoding(file) as image:
            check_single(image, str(path))
            changed = _changed_values(image)
            turned = ImageOps.exif_transpose(image)
            mode, palette = turned.mode, turned.getpalette()
            labels = np.array(turned, np.uint8) if mode in ("P", "L", "1") else None
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture of labels") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise InputError(f"{path} is not a readable picture of labels", "write it as PNG") from error
    if labels is None or changed:
        raise InputError(
            f"{path} is {changed or f'a picture of mode {mode}'}, not of labels",
            "write it as an indexed or 8-bit grey PNG",
        )
    if labels.shape != size:
        raise InputError(
            f"{path} has {labels.shape[1]}x{labels.shape[0]} pixels, the image {size[1]}x{size[0]}",
            "labels need the image's own size",
        )
    return labels, bytes(palette or []).ljust(768, b"\0") if palette else _palette()


def write_label_image(path: Path, labels: np.ndarray, palette: bytes) -> None:
    """Write labels, uint8 [H, W], as an indexed PNG with a palette of 768 bytes."""
    image = Image.fromarray(labels)
    image.putpalette(palette)
    image.save(path, "PNG")


def _changed_values(image: Image.Image) -> str:
    """What changes the values of a picture that is not loaded yet, in words; empty if nothing does."""
    if image.format in ("JPEG", "MPO"):
        return "a JPEG, which does not keep values"
    arguments = getattr(image, "tile", None) and image.tile[0].args  # type: ignore[attr-defined]
    raw_mode = arguments if isinstance(arguments, str) else str(arguments[0] if arguments else "")
    if image.mode == "L" and raw_mode.startswith("L;"):  # "L;4" is scaled to 0..255, "L;I" is inverted
        return "grey whose values Pillow scales or inverts"
    return ""


def _palette() -> bytes:
    """A palette: 0 is black, and successive hues are a golden section apart."""
    colours = [(0.0, 0.0, 0.0)]
    colours += [
        colorsys.hsv_to_rgb(i * 0.618 % 1, 1 - 0.4 * (i % 3) / 2, 1 - 0.3 * (i % 2)) for i in range(255)
    ]
    return bytes(round(255 * value) for colour in colours for value in colour)
