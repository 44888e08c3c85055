"""What questions show, small: RUN/completions/images/NAME.webp, for the report.

Records of answers name them, see rldatasets.shown_fields. They are of the held-out problems, and of
those whose groups are kept token by token.
"""

import base64
import re

from rldatasets import shown_fields

SIDE = 112  # pixels, at most
FOLDER = "completions/images"


def save_thumbnails(path, problems):
    """Write, for the run at `path`, what these problems show, where it is not there yet."""
    for problem in problems:
        for name, image in zip(shown_fields(problem).get("images", ()), problem.images):
            file = path / FOLDER / f"{name}.webp"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                small = image()
                small.thumbnail((SIDE, SIDE))
                small.save(file, quality=80)


def thumbnails(path, record):
    """What a record's question shows, as data URIs of those that are there."""
    names = [name for name in record.get("images", ()) if re.fullmatch("[0-9a-f]{16}", str(name))]
    files = [path / FOLDER / f"{name}.webp" for name in names]
    return [
        f"data:image/webp;base64,{base64.b64encode(file.read_bytes()).decode()}"
        for file in files
        if file.is_file()
    ]
