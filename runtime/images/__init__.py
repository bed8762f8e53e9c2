"""Reading images of any kind as RGB with 8 bits per channel, and fitting them to the engine's size.

These rules hold for every image that ditf is given:

- *Orientation.* A file is turned as its EXIF data says, and so is the unchanged result of `PIL.Image.open`.
  Any other PIL image is taken as its pixels are, because its owner may have turned it already: `transpose`,
  `rotate` and `convert` keep the EXIF data. A warning is logged if it still carries an orientation.
- *Several pictures.* An animation or a file of several pages is refused. Of a PIL image the current frame is
  taken. A file that holds one photograph in several versions is read as that photograph: MPO, HEIF, PSD, and
  TIFF with reduced versions or masks.
- *More than 8 bits.* Values are read on the scale of their type and are never stretched: 0..65535, or 0..4095
  in a 12-bit TIFF file, or 0..32767 in a TIFF file of signed 16 bits. An image whose values span less than a
  quarter of that scale is refused, because it would come out dark or flat; this concerns 12-bit and 14-bit
  cameras, depth and temperatures. Float images are refused. An array must be uint8.
- *Transparency* is laid over white. Colour profiles are ignored.
"""

from ditf.runtime.images.fitting import FITS, FittedImage, fit_image, fitted_image
from ditf.runtime.images.folders import find_images, image_suffixes, list_images, skipped_files
from ditf.runtime.images.opening import (
    LARGEST_FILE,
    ImageLike,
    decode_image,
    decoding,
    open_image,
    picture_count,
)
from ditf.runtime.images.pages import check_single

__all__ = [
    "FITS",
    "LARGEST_FILE",
    "FittedImage",
    "ImageLike",
    "check_single",
    "decode_image",
    "decoding",
    "find_images",
    "fit_image",
    "fitted_image",
    "image_suffixes",
    "list_images",
    "open_image",
    "picture_count",
    "skipped_files",
]
