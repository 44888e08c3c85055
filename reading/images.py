"""Images of a data set: files that its rows name. Of a file the header alone is read at first.

PIL is imported where there is an image, so that the command line stays quick without.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError

COLUMN = "image"
MOST_PIXELS = 50_000_000  # of an image; a photo of today's has 12 to 48 million
ORIENTATION, TURNED = 0x0112, range(5, 9)  # EXIF's tag, and those whose width is the file's height


@dataclass(frozen=True)
class ImageFile:
    """An image on the disk, which a call reads. Its repr, and so the fingerprint of the data, is
    the name that the data gives it and what its header says."""

    name: str
    path: str = field(repr=False, compare=False)
    size: tuple  # (width, height) as it is seen
    bytes: int

    def __call__(self):
        """The image as RGB, upright. Raises UserError where the rest of it is damaged."""
        from PIL import Image, ImageOps

        try:
            with Image.open(self.path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be read ({error!s:.80}); save it anew") from None


def images_of(row, where, folder):
    """The ImageFiles that a row names, from this folder: none, one or several. Raises UserError,
    naming `where`, the row's place."""
    names = row.get(COLUMN)
    names = [names] if isinstance(names, str) else names
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: `{COLUMN}` is {str(row[COLUMN])[:40]}; expected a path, or "
                        "several as a list")  # fmt: skip
    return tuple(image_file(name, f"{where}: `{COLUMN}`", folder) for name in names)


def image_file(name, where, folder="."):
    """The ImageFile of this name. Raises UserError for one that is missing, damaged or enormous."""
    from PIL import Image

    path = Path(folder) / name
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in TURNED
    except FileNotFoundError:
        raise UserError(f"{where} {name}: no such file; in data, paths are from its folder"
                        ) from None  # fmt: skip
    except Image.DecompressionBombError:
        width, height, turned = math.inf, 1, False
    except (OSError, SyntaxError, ValueError) as error:
        what = getattr(error, "strerror", None) or "no image that can be read"
        raise UserError(f"{where} {name}: {what}; save it as PNG or JPEG") from None
    if width * height > MOST_PIXELS:
        raise UserError(f"{where} {name}: larger than {MOST_PIXELS // 10**6} million pixels; make "
                        "it smaller")  # fmt: skip
    size = (height, width) if turned else (width, height)
    return ImageFile(name, str(path), size, path.stat().st_size)
