"""What questions show stands in the report, small, and nothing else of the disk does."""

import base64
import io
import json
import re

from PIL import Image

from records.report import write_report
from records.run import Run
from records.thumbnails import FOLDER, SIDE
from rldatasets import Problem, shown_fields
from utils import write_jsonl


class Plain:
    """An image of one colour."""

    size = (640, 320)

    def __init__(self, colour):
        self.colour = colour

    def __repr__(self):
        return f"Plain({self.colour})"

    def __call__(self):
        return Image.new("RGB", self.size, self.colour)


RED, BLUE = Plain((250, 0, 0)), Plain((0, 0, 250))
TWO = Problem("Which?", "red", "", images=(RED, BLUE))
TEXT = Problem("How many?", "2", "")


def record(problem, correct):
    return {"question": problem.question, "answer": problem.answer, **shown_fields(problem),
            "completion": "x", "parsed": None, "correct": correct, "finished": True}  # fmt: skip


def page_of(run):
    text = write_report(run.path).read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def colours(uris):
    """The colour of each image in the middle, to the nearest 10 of what WebP keeps."""
    found = []
    for uri in uris:
        head, _, data = uri.partition(",")
        assert head == "data:image/webp;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (SIDE, SIDE // 2)
        found.append(tuple(round(v, -1) for v in image.getpixel((SIDE // 2, SIDE // 4))))
    return found


def run_of(path, *records):
    run = Run(path)
    (path / "config.json").write_text(json.dumps({"flags": {}}))
    (path / "completions").mkdir(exist_ok=True)
    write_jsonl(path / "metrics.jsonl", [])
    for step in (0, 1):
        write_jsonl(path / "completions" / f"eval_{step:05d}.jsonl", records)
    return run


def test_answers_and_a_group_stand_beside_what_their_question_shows(tmp_path):
    run = run_of(tmp_path, record(TWO, True), record(TEXT, False))
    run.save_thumbnails([TWO, TEXT])
    rows = [{**record(problem, True), "reward": 1.0, "rewards": {}, "advantage": 0.0}
            for problem in (TEXT, TEXT, TWO, TWO)]  # fmt: skip
    write_jsonl(tmp_path / "completions" / "step_00000.jsonl", rows)
    tokens = {"tokens": ["x"], "logprobs_before": [-1.0], "logprobs_after": [-1.0]}
    run.save_tokens(0, [TEXT, TWO], [{"row": row, **tokens} for row in (2, 3)])
    page = page_of(run)
    both = [(250, 0, 0), (0, 0, 250)]
    shown = {q["question"]: colours(q["images"]) for q in page["answers"]["questions"]}
    assert shown == {"Which?": both, "How many?": []}
    assert colours(page["groups"][0]["images"]) == both
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_the_images_of_a_group_are_kept_though_no_held_out_question_shows_them(tmp_path):
    run = run_of(tmp_path)
    run.save_tokens(0, [TEXT, TWO], [{"row": 2}, {"row": 3}])
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_a_record_names_no_other_file_and_may_name_one_that_is_gone(tmp_path):
    (tmp_path / "secret.webp").write_bytes(b"secret")
    forged = record(TEXT, True) | {"images": ["../../secret", "0" * 16, 7]}
    run = run_of(tmp_path, forged)
    run.save_thumbnails([TWO])  # so that there is a folder to go up from
    page = page_of(run)
    assert [q["images"] for q in page["answers"]["questions"]] == [[]]
