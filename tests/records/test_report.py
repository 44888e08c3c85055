"""The page of a run: what it says, escapes and weighs, and that a browser agrees."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from launch import commands
from records import report
from records.report import write_report
from utils import write_jsonl

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    "\"'\\\u2028<!--<script> <!--BODY-->"
)
STEPS = 30


def evaluation(step, correct, problems):
    share = sum(correct) / problems
    return {"step": step, "problems": problems, "accuracy": share, "accuracy_low": share - 0.1,
            "accuracy_high": share + 0.1, "mcnemar_p": None if step == 0 else 0.031,
            "lenient_accuracy": 0.625}  # fmt: skip


def answer(i, correct, text):
    return {"question": f"question {i} {HOSTILE}", "answer": "7", "completion": text, "parsed": "7",
            "correct": correct, "finished": True}  # fmt: skip


def make_run(path, problems, text, tokens, reference=True):
    """A run of STEPS steps, two evaluations: of four problems one is lost and one gained."""
    (path / "completions").mkdir(parents=True)
    flags = {"model_name": HOSTILE, "dataset_name": "gsm8k", "seed": 1}
    config = {"command": f"python main.py {HOSTILE}", "flags": flags, "commit": "0123abc",
              "packages": {"torch": "2.13.0"}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    write_jsonl(path / "metrics.jsonl", [
        {"step": step, "reward": step / 10, "rewards/correctness": step / 20, "entropy": 0.25,
         "grad_norm": 1.0, "completion_length": 30, "flat_groups": 0.5, "seconds/sampling": 1.0,
         "seconds/policy": 3.0, "tokens/sampled": 100, "tokens/trained": 60, "tokens/flat": 40,
         "tokens/truncated": 5, "tokens/padded": 7, "completions/sampled": 8,
         "completions/trained": 4, "alarms": [f"entropy: {HOSTILE}"] if step == 7 else []}
        for step in range(STEPS)
    ])  # fmt: skip
    correct = {0: [i % 4 in (1, 2) for i in range(problems)],
               STEPS: [i % 4 in (2, 3) for i in range(problems)]}  # fmt: skip
    write_jsonl(path / "eval.jsonl", [evaluation(s, c, problems) for s, c in correct.items()])
    for step, right in correct.items():
        records = [answer(i, ok, text) for i, ok in enumerate(right)]
        write_jsonl(path / "completions" / f"eval_{step:05d}.jsonl", records)
    for step in (0, 14, STEPS - 1):
        rows = [{"question": HOSTILE, "answer": "7", "reward": 1.0, "rewards": {"correctness": 1.0},
                 "advantage": a} for a in (-1.0, 0.0, 1.0)]  # fmt: skip
        write_jsonl(path / "completions" / f"step_{step:05d}.jsonl", rows)
        logprobs = [-0.51234] * len(tokens)
        write_jsonl(path / "completions" / f"tokens_{step:05d}.jsonl", [
            {"row": row, "tokens": tokens, "sampled_logprobs": logprobs,
             "logprobs_before": logprobs, "logprobs_after": [-0.25] * len(tokens),
             **({"ref_logprobs": logprobs} if reference else {})}
            for row in range(3)
        ])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs") / "toy", 8, HOSTILE, ["<b>", " 7", "</b>"])
    write_report(path)
    return path


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text()


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_says_what_the_run_came_to(page):
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    for said in ("Held-out accuracy 50.0% → 50.0%", "[40.0%, 60.0%] → [40.0%, 60.0%]",
                 "2 gained, 2 lost", "p = 0.031", "tags not needed: 62.5% → 62.5%",
                 "step 7: entropy: ", "120 seconds, 30 steps",
                 "policy 75.0%", "carried gradient 60.0%", "0123abc", "torch 2.13.0", "--seed",
                 f"python main.py {HOSTILE}"):  # fmt: skip
        assert said in text, said


def test_the_curves_hold_the_run_s_values(page):
    data = data_of(page)
    [reward] = [c for c in data["charts"] if c["series"][0]["name"] == "total"]
    assert [series["name"] for series in reward["series"]] == ["total", "correctness"]
    assert reward["series"][0]["values"] == [step / 10 for step in range(STEPS)]
    assert page.count("<svg ") == len(data["charts"])
    names = [series["name"] for chart in data["charts"] for series in chart["series"]]
    assert "accuracy" in names and not any(name.endswith(("_low", "_p")) for name in names)
    assert page.count('class="alarm"') >= len(data["charts"]) - 1


def test_answers_are_sorted_by_what_became_of_them_and_the_page_s_text_is_the_model_s(page):
    data = data_of(page)
    assert data["answers"]["counts"] == {"gained": 2, "lost": 2, "right": 2, "wrong": 2}
    assert data["answers"]["steps"] == [0, STEPS]
    assert {q["kind"] for q in data["answers"]["questions"]} == set(data["answers"]["counts"])
    assert data["answers"]["questions"][0]["answers"][0]["text"] == HOSTILE
    group = data["groups"][1]
    assert group["step"] == 14
    assert [c["advantage"] for c in group["completions"]] == [1.0, 0.0, -1.0]
    assert group["completions"][0]["tokens"] == ["<b>", " 7", "</b>"]


def test_nothing_a_model_wrote_becomes_markup_and_no_other_script_may_run(page):
    assert len(re.findall("<script", page)) == 2  # the data and the page's own
    assert "<img" not in page and "<b>" not in page
    attributes = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, found: attributes.extend(found)
    parser.feed(page)
    assert [value for name, value in attributes if name in ("src", "href")] == ["data:,"]
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert "default-src 'none'" in page and "unsafe-eval" not in page
    assert "script-src 'sha256-" in page


def test_a_page_of_many_long_answers_and_tokens_stays_below_5_mb(tmp_path, page):
    path = make_run(tmp_path / "large", 200, "x, \n<" * 1000, ["token"] * 3000)
    for step in (10, 15, 20):
        shutil.copy(path / "completions" / "eval_00000.jsonl",
                    path / "completions" / f"eval_{step:05d}.jsonl")  # fmt: skip
    file = write_report(path)
    assert file == path / "report.html"
    assert 100_000 < file.stat().st_size < 5e6
    data = data_of(file.read_text())
    assert data["answers"]["counts"]["gained"] == 50
    assert len(data["answers"]["steps"]) == report.EVALUATIONS
    assert len(data["answers"]["questions"]) == 4 * report.ANSWERS
    sizes = [len(c["tokens"]) for c in data["groups"][0]["completions"]]
    assert sizes == [3000, 0, report.TOKENS - 3000]  # the best first, then the worst
    assert data["groups"][0]["completions"][1]["left_out"] == 3000


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("records.plots.plot_runs", lambda runs, folder: folder)
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 0, "reward": 1.0}])
    assert not commands.main(["plot", str(tmp_path), "--report"])
    assert f"{tmp_path}/report.html" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    assert "Not evaluated yet" in text and 'id="tokens"' not in text


# Asked of the page in two frames, as wide as a desk's and a phone's window.
PROBE = """<!doctype html><body><pre id="said"></pre><script>
const said = {};
let waiting = 2;
for (const width of [1280, 390]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px`;
  frame.src = "PAGE";
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const count = selector => page.querySelectorAll(selector).length;
    page.querySelectorAll("details").forEach(element => { element.open = true; });
    const svg = page.querySelector("svg"), box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 4, clientY: 5 }));
    const tip = page.querySelector(".tip").textContent;
    [...page.querySelectorAll("#answers button")].find(b => b.textContent === "lost 2").click();
    const tokens = [...page.querySelectorAll("#tokens .written")].map(e => e.textContent);
    page.querySelector("#tokens .written span").dispatchEvent(new PointerEvent("pointerenter"));
    said[width] = {
      overflow: root.scrollWidth - root.clientWidth, tip, tokens, images: count("img"),
      hacked: frame.contentWindow.hacked ?? null, scripts: count("script"),
      detail: page.querySelector(".detail").textContent,
      answers: [...page.querySelectorAll("#answers .written")].map(e => e.textContent),
      verdicts: [...page.querySelectorAll("#answers h4 span")].map(e => e.textContent),
    };
    if (--waiting === 0) document.getElementById("said").textContent = JSON.stringify(said);
  };
  document.body.append(frame);
}
</script>"""


def test_a_browser_shows_it_without_an_error_or_a_page_wider_than_its_window(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium: apt-get install chromium")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("PAGE", (run / "report.html").as_uri()))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0",
         "--virtual-time-budget=10000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    said = json.loads(html.unescape(re.search(r'id="said">(.*?)</pre>', done.stdout)[1]))
    for width in ("1280", "390"):
        seen = said[width]
        assert seen["overflow"] <= 0, width
        assert seen["hacked"] is None and seen["images"] == 0 and seen["scripts"] == 2
        assert seen["tip"] == "step 29total 2.9correctness 1.45"
        assert seen["answers"] == [HOSTILE, HOSTILE]
        assert seen["verdicts"] == ["right", "wrong"]
        assert seen["tokens"] == ["<b> 7</b>"] * 3
        assert seen["detail"].startswith('"<b>": log-prob -0.5123 → -0.2500 (+0.2623)')
