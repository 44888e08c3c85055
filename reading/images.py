"""Images of a data set: files that its rows name, or what a table holds as datasets' Image feature
writes it. Of an image the header alone is read at first.

PIL is imported where there is an image, so that the command line stays quick without.
"""

import hashlib
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError

COLUMNS = ("image", "images")
MOST_PIXELS = 50_000_000  # of an image; a photo of today's has 12 to 48 million
ORIENTATION, TURNED = 0x0112, range(5, 9)  # EXIF's tag, and those whose width is the file's height


@dataclass(frozen=True)
class ImageFile:
    """An image on the disk, which a call reads, or in memory. Its repr, and so the fingerprint of
    the data, is the name that the data gives it, or what it holds, and what its header says."""

    name: str
    source: str | bytes = field(repr=False, compare=False)  # a path, or what is in such a file
    size: tuple  # (width, height) as it is seen
    bytes: int

    def __call__(self):
        """The image as RGB, upright. Raises UserError where the rest of it is damaged."""
        from PIL import Image, ImageOps

        try:
            with Image.open(_file(self.source)) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            where = self.source if isinstance(self.source, str) else f"image {self.name}"
            raise UserError(f"{where}: cannot be read ({error!s:.80}); save it anew") from None


def _file(source):
    return io.BytesIO(source) if isinstance(source, bytes) else source


def images_of(row, where, folder):
    """The ImageFiles of a row, from this folder where it names files: none, one or several. Raises
    UserError, naming `where`, the row's place."""
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    values = row[column] if column else []
    values = values if isinstance(values, list) else [values]
    return tuple(_image(value, f"{where}: `{column}`", folder) for value in values)


def _image(value, where, folder):
    """The ImageFile of a path, or of the dict that a table has for an image."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        held = value["bytes"]
        return _described(hashlib.sha256(held).hexdigest()[:16], held, len(held), where)
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {str(value)[:40]}; expected a path, an image, or several as a "
                        "list")  # fmt: skip
    return image_file(value, where, folder)


def image_file(name, where, folder="."):
    """The ImageFile of this name. Raises UserError for one that is missing, damaged or enormous."""
    path = Path(folder) / name
    return _described(name, str(path), path.stat().st_size if path.is_file() else 0, where)


def _described(name, source, size, where):
    from PIL import Image

    try:
        with Image.open(_file(source)) as image:
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
    return ImageFile(name, source, (height, width) if turned else (width, height), size)
