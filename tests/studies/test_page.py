"""The page of a run: balanced, complete, nothing from outside, every text escaped."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import call, change

import evaluate
import sample
from media.write import enlarge, write_clip
from shapes import HELD_OUT, MovingShapes, caption_of
from studies import page
from support.files import write_json

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;$title"
SECTIONS = ["samples", "scores", "losses", "previews", "options"]


class Reader(HTMLParser):
    """Start tags with their attributes, and texts; fails if elements are not balanced."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts, self.text = [], [], [], ""
        self.feed(page.write_page(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.texts.append((self.open[-1], data))
            self.text += data + " "

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]


def draw(path, combination):
    """Write a clip of MovingShapes."""
    frames, _ = MovingShapes(1, combinations=[combination])[0]
    write_clip(path, frames / 127.5 - 1)


@pytest.fixture
def made(tmp_path):
    """A run's folder with something of everything, made by hand."""
    path = tmp_path / "a <b> & run"
    write_json(path / "train.json", {"options": {"preset": "tiny", "video_steps": 7},
                                     "finished": ["vae", "image", "video"]})
    row = {"count": 1600, "colour": 99.0, "shape": 98.0, "direction": 97.0, "all": 96.5}
    image = {"count": 12, "colour": 89.0, "shape": 88.0, "all": 87.5, "crispness": 0.954}
    write_json(path / "evaluation.json", {
        "num_prompts": 32, "seed": 1000, "sampling": {"num_steps": 12, "guidance_scale": 3.0},
        "agreement": {"clips, seen": row, "images, all": image},
        "quality": {"real clips": {"consistency": 0.8856}, "autoencoded": {"PSNR": 31.98}}})
    lines = [json.dumps({"stage": "vae", "step": step, "loss": 1 / step, "steps_per_second": 2.0})
             for step in (50, 100, 120)]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "vae", "st']))
    draw(path / "samples" / "a-red-circle-moving-left.gif", ("red", "circle", "left"))
    draw(path / "samples" / "a-red-circle-moving-up.gif", ("red", "square", "up"))
    draw(path / "previews" / "video-001000.gif", ("red", "circle", "left"))
    return path


def test_each_section_is_there_and_filled(made):
    reader = Reader(made)
    assert [x["id"] for x in reader.all("section")] == SECTIONS
    assert {x["href"] for x in reader.all("a")} == {f"#{name}" for name in SECTIONS}
    assert "missing" not in [x.get("class") for x in reader.all("p")]


def test_nothing_is_loaded_from_outside_and_nothing_runs(made):
    reader = Reader(made)
    assert len(reader.all("img")) == 3 and not reader.all("script") and not reader.all("link")
    for name, value in (pair for _, attributes in reader.tags for pair in attributes.items()):
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith(("data:image/", "#"))
    assert not re.search(r"url\(|@import|https?:", made.joinpath("index.html").read_text())


def test_hostile_text_is_escaped(made):
    name = HOSTILE.replace("/", "")
    draw(made / "samples" / f"a-red-{name}.gif", ("red", "circle", "left"))
    change(made / "train.json", options={"preset": "tiny", "data": "shapes", "init": HOSTILE})
    entry = {"stage": HOSTILE, "step": 1, "loss": 1.0, "steps_per_second": 1.0}
    (made / "metrics.jsonl").write_text(json.dumps(entry))
    reader = Reader(made.rename(made.with_name(name)))
    assert reader.text.count(name) >= 3 and reader.text.count(HOSTILE) == 2
    assert not reader.all("script") and len(reader.all("img")) == 4


def test_clips_are_marked_with_what_the_reader_sees(made):
    draw(made / "samples" / f"{caption_of(*HELD_OUT[0]).replace(' ', '-')}-2.gif", HELD_OUT[0])
    draw(made / "samples" / "some-clip.gif", ("red", "circle", "left"))  # it names no part
    reader = Reader(made)
    assert [text.split() for text in reader.of("span") if text[0] in "✓✗"] == [
        ["✓", "red"], ["✓", "circle"], ["✓", "left"], ["✓", "red"], ["✗", "square"], ["✓", "up"],
        *(["✓", word] for word in HELD_OUT[0])]
    assert reader.of("span").count("held out") == 1
    assert "2 of 3 clips are right" in reader.text
    crisp = [float(text.split()[1]) for text in reader.of("span") if text.startswith("crispness")]
    assert crisp == pytest.approx([0.99, 0.8, 0.99], abs=0.1)  # a square is no ideal circle


def test_an_enlarged_clip_is_judged_as_drawn(tmp_path):
    frames = MovingShapes(1, combinations=[("red", "circle", "left")])[0][0] / 127.5 - 1
    for name, zoom in (("small", 1), ("large", 0)):
        write_clip(tmp_path / f"{name}.gif", enlarge(frames, zoom))
    small, large = (page.judge(tmp_path / f"{name}.gif", ("red", "circle", None), 32)
                    for name in ("small", "large"))
    assert small == large and small[1] > 0.97


def test_own_clips_have_the_real_one_beside_and_no_marks(made, tmp_path):
    for name, caption in (("1", "A red circle, moving left"), ("2", "a dog")):
        draw(tmp_path / f"clips/{name}.gif", ("red", "circle", "left"))
        (tmp_path / f"clips/{name}.txt").write_text(caption)
    change(made / "train.json", options={"data": str(tmp_path / "clips")})
    (made / "previews" / "captions.txt").write_text("a dog\nA red circle, moving left\n")
    reader = Reader(made)
    assert [x["alt"] for x in reader.all("img")] == [
        "a-red-circle-moving-left", "real: a-red-circle-moving-left", "a-red-circle-moving-up",
        "video-001000", "real clips"]
    assert "✓" not in reader.text and "✗" not in reader.text and "agree" not in reader.text
    assert "a dog; A red circle, moving left" in reader.text
    shutil.rmtree(tmp_path / "clips")  # then there are no real clips, but still a page
    assert len(Reader(made).all("img")) == 3


def test_the_scores_of_the_file_are_in_the_tables(made):
    reader = Reader(made)
    assert {"1,600", "99.0 %", "98.0 %", "97.0 %", "96.5 %", "87.5 %", "0.954", "0.886",
            "31.98 dB", "–"} <= {*reader.of("td")}
    assert reader.of("b")[:3] == ["96.5 %", "87.5 %", "1.0"]  # 120 steps at 2 steps per second


def test_a_curve_goes_through_the_losses(made):
    points = Reader(made).all("polyline")[0]["points"].split()
    x, y = np.array([tuple(map(float, point.split(","))) for point in points]).T
    steps = np.array([50, 100, 120])  # the loss is 1 / step
    assert np.allclose(np.diff(x) / np.diff(steps), (x[2] - x[0]) / 70, atol=0.01)
    slope = (y[2] - y[0]) / np.log(120 / 50)  # down the page, by the logarithm
    assert slope > 0 and np.allclose(np.diff(y) / np.diff(np.log(steps)), slope, rtol=0.02)


def test_changed_options_come_first(made):
    reader = Reader(made)
    assert [text for text in reader.of("th") if text.startswith("--")][0] == "--video-steps"
    assert [text for text in reader.of("td") if "(changed)" in text] == ["7 (changed)"]


def test_a_new_run_says_which_command_makes_what_it_lacks(tmp_path):
    path = tmp_path / "new run"
    write_json(path / "train.json", {"options": {}, "finished": ["vae"]})
    reader = Reader(path)
    assert reader.of("code")[:3] == [
        f"python train.py '{path}' --resume",
        f"python sample.py '{path}' --prompts-file prompts.txt", f"python evaluate.py '{path}'"]
    assert "Not finished: image, video; continue with" in reader.text


def test_prompts_are_drawn_as_sample_py_draws_them_and_scored(run, tmp_path, monkeypatch):
    (prompts := tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    monkeypatch.setattr(evaluate, "main", lambda arguments: write_json(
        Path(*arguments) / "evaluation.json", {
            "num_prompts": 3, "seed": 0, "agreement": {}, "quality": {},
            "sampling": {"num_steps": 1, "guidance_scale": 1}}))
    call(page.main, run, "--prompts-file", prompts)
    call(sample.main, run, "--prompts-file", prompts, "--output", tmp_path / "drawn")
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == ["a-blue-square.gif", "a-red-circle.gif"]
    for name in names:
        assert (run / "samples" / name).read_bytes() == (tmp_path / "drawn" / name).read_bytes()
    assert "3 prompts" in (run / "index.html").read_text(encoding="utf-8")
