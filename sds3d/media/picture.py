"""The one reader of pictures that a user gives: to begin from, to learn from."""

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

DAMAGE = (  # what Pillow's readers end with on files that are no pictures; DecompressionBombError is an Exception alone
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError, EOFError),
    *(struct.error, zlib.error),
)


def read(path: Path, size: int) -> Tensor:
    """The middle square of a picture, shrunk or grown to ``size`` pixels: (3, size, size) uint8, as a viewer shows it.

    A turn that the camera noted (EXIF) is carried out. What is transparent becomes white. Grey, palettes and CMYK
    become RGB, 16 bits become 8. Of an animation the first frame is taken.

    Raises:
        ValueError: it is no picture, or is damaged, too large, or of numbers that have no known white.
    """
    import numpy
    from PIL import Image, ImageOps

    if not os.path.isfile(path):  # which is False where the name can be no file's
        raise ValueError("it is no regular file" if os.path.exists(path) else "there is no such file")
    try:
        with Image.open(path) as file:
            whole = ImageOps.exif_transpose(file)
            whole.load()
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__})") from error
    square = ImageOps.fit(_eight_bits(whole).convert("RGBA"), (size, size), Image.Resampling.LANCZOS)
    shown = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    return torch.from_numpy(numpy.array(shown)).permute(2, 0, 1).contiguous()


def _eight_bits(image: Images.Image) -> Images.Image:
    """An image whose numbers go to 255. Raises ValueError where nobody knows what its white is."""
    import numpy
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    numbers = numpy.asarray(image)
    if image.mode == "F" or numbers.min() < 0 or numbers.max() > 65535:
        raise ValueError(f"its numbers are neither of 8 nor of 16 bits (mode {image.mode}); save it as a PNG")
    return Image.fromarray((numbers // 257).astype(numpy.uint8))  # which convert would clip at 255
