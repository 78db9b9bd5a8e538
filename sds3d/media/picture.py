"""The reader of pictures that a user gives, to begin from or to train on."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image as Images

DAMAGE = (  # errors of Pillow's readers on damaged files; DecompressionBombError, a plain Exception, is not included
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError, EOFError),
    *(struct.error, zlib.error),
)


def read(path: Path, size: int) -> Tensor:
    """Read the central square of a picture, resized to ``size`` pixels: (3, size, size) uint8.

    EXIF rotation is applied. Transparent pixels become white. Grey, palette and CMYK images become RGB; 16 bits become
    8. Of an animation, the first frame is read.

    Raises:
        ValueError: the file is no picture, is damaged or too large, or its values have no known range.
    """
    import numpy
    from PIL import Image, ImageOps

    if not os.path.isfile(path):  # also False for names that no file can have
        raise ValueError("it is no regular file" if os.path.exists(path) else "there is no such file")
    try:
        with Image.open(path) as file:
            whole = ImageOps.exif_transpose(file)
            whole.load()
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__})") from error
    square = ImageOps.fit(_eight_bits(whole).convert("RGBA"), (size, size), Image.Resampling.LANCZOS)
    on_white = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    return torch.from_numpy(numpy.array(on_white)).permute(2, 0, 1).contiguous()


def _eight_bits(image: Images.Image) -> Images.Image:
    """The image with values up to 255. Raises ValueError if the range of its values is unknown."""
    import numpy
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    numbers = numpy.asarray(image)
    if image.mode == "F" or numbers.min() < 0 or numbers.max() > 65535:
        raise ValueError(f"its numbers are neither of 8 nor of 16 bits (mode {image.mode}); save it as a PNG")
    return Image.fromarray((numbers // 257).astype(numpy.uint8))  # Pillow's convert would clip at 255
