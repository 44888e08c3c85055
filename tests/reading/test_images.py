"""Tables with images in them, as datasets' Image feature writes them."""

import io

import numpy as np
import pytest
from PIL import Image

from rldatasets import fingerprint, load_problems
from utils import UserError

datasets = pytest.importorskip("datasets")
COUNT = 12


def picture(number):
    """An image that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (6 + number, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def table(column, shown, feature):
    rows = {"question": [f"What is on {n}?" for n in range(COUNT)],
            "answer": [str(n) for n in range(COUNT)],
            column: [shown(n) for n in range(COUNT)]}  # fmt: skip
    return datasets.Dataset.from_dict(rows).cast_column(column, feature)


def read(path):
    """All problems, by their answers: the question's hash has no say where there are images."""
    both = [*load_problems("gsm8k", path, "train", 0), *load_problems("gsm8k", path, "test", 0)]
    return sorted(both, key=lambda problem: int(problem.answer))


def same(image, other):
    return np.array_equal(np.asarray(image), np.asarray(other))


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_an_image_column_is_what_its_rows_show(form, tmp_path):
    one = table("image", picture, datasets.Image())
    several = table("images", lambda n: [picture(n)] * (n % 3), datasets.List(datasets.Image()))
    for made in (one, several):
        path = tmp_path / made.column_names[-1]
        if form == "parquet":
            path = path.with_suffix(".parquet")
            made.to_parquet(path)
        else:
            made.save_to_disk(path)
        problems = read(path)
        assert len(problems) == COUNT
        for n, problem in enumerate(problems):
            assert len(problem.images) == (1 if made is one else n % 3)
            assert problem.extra == {}
            for image in problem.images:
                assert image.size == (9, 6 + n)
                assert same(image(), picture(n))


def test_what_an_image_holds_is_a_part_of_the_data_s_fingerprint(tmp_path):
    for name, shift in (("a", 0), ("b", 0), ("c", 1)):
        made = table("image", lambda n, shift=shift: picture(n + shift).resize((8, 8)),
                     datasets.Image())  # fmt: skip
        made.save_to_disk(tmp_path / name)
    a, b, c = (fingerprint(read(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_an_image_that_cannot_be_read_is_named_by_its_row(tmp_path):
    encoded = io.BytesIO()
    picture(0).save(encoded, "PNG")
    good = {"bytes": encoded.getvalue(), "path": None}
    for bad, said in (({"bytes": b"no image", "path": None}, "no image that can be read"),
                      ({"bytes": None, "path": "gone.png"}, "gone.png: no such file"),
                      ({"bytes": None, "path": None}, "expected a path")):  # fmt: skip
        made = datasets.Dataset.from_dict(
            {"question": list("abcdef"), "answer": list("123456"), "image": [good] * 5 + [bad]}
        )
        made.to_parquet(tmp_path / "data.parquet")
        with pytest.raises(UserError, match=rf"data.parquet, row 6: `image`.*{said}"):
            load_problems("gsm8k", tmp_path / "data.parquet", "train", 0)
