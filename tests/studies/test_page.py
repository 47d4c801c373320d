"""The page of a run: balanced, complete, nothing from outside, every text escaped."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import call, change

from files import write_json
from media.write import write_clip
from shapes import HELD_OUT, caption_of, render
from studies import page
from studies.elements import ladder

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;$title"
VOID = {"meta", "img", "br", "link", "input", "hr"}
SECTIONS = ["samples", "scores", "losses", "previews", "options"]


class Reader(HTMLParser):
    """Start tags with their attributes, texts below each open element; fails if not balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(text for path, text in self.texts if "style" not in path)


def draw(path, combination, num_frames=6, size=32):
    """Write a clip of MovingShapes that moves from the middle by 2 pixels a frame."""
    x, y = {"left": (-2, 0), "right": (2, 0), "up": (0, -2), "down": (0, 2)}[combination[2]]
    centres = 16 + np.arange(num_frames)[:, None] * np.array([[x, y]])
    frames = render(combination, centres, 6, size)
    write_clip(path, torch.from_numpy(frames) / 127.5 - 1)


def scores():
    """An evaluation.json with a value of its own in every place."""
    row = {"count": 16, "colour": 99.0, "shape": 98.0, "direction": 97.0, "all": 96.5}
    image = {"count": 12, "colour": 89.0, "shape": 88.0, "all": 87.5}
    return {
        "num_prompts": 32, "seed": 1000, "decoder": ["decoder: another"],
        "sampling": {"num_steps": 12, "guidance_scale": 2.5},
        "agreement": {"clips, seen": row, "clips, held out": row | {"all": 76.5},
                      "images, all": image},
        "quality": {"real clips": {"consistency": 0.8856}, "real, autoencoded": {"PSNR": 31.98}},
    }


@pytest.fixture
def made(tmp_path):
    """A run's folder with something of everything, made by hand."""
    path = tmp_path / "a <b> & run"
    write_json(path / "train.json", {"options": {"preset": "tiny", "video_steps": 7},
                                     "finished": ["vae", "image", "video"]})
    write_json(path / "evaluation.json", scores())
    entries = [{"stage": "vae", "step": step, "loss": 1 / step, "steps_per_second": 2.0}
               for step in (50, 100, 120)]
    lines = [json.dumps(entry) for entry in entries]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "vae", "st']))
    draw(path / "samples" / "a-red-circle-moving-left.gif", ("red", "circle", "left"))
    draw(path / "samples" / "a-red-circle-moving-up.gif", ("red", "square", "up"))
    draw(path / "previews" / "image-000500.png", ("red", "circle", "left"), num_frames=1)
    draw(path / "previews" / "video-001000.gif", ("red", "circle", "left"))
    return path


def read(path):
    """The page of a run, parsed."""
    return Reader(page.write_page(path).read_text(encoding="utf-8"))


def figures_of(html):
    """[(alternative text, texts of the caption)] of the images of a page."""
    found = []
    for part in html.split("<figure><img")[1:]:
        reader = Reader("<figure><img" + part.split("</figure>")[0] + "</figure>")
        found.append((reader.all("img")[0]["alt"], [text for _, text in reader.texts]))
    return found


def test_each_section_is_there_and_filled(made):
    reader = read(made)
    assert [x["id"] for x in reader.all("section")] == SECTIONS
    assert {x["href"] for x in reader.all("a")} == {f"#{name}" for name in SECTIONS}
    assert not [x for x in reader.all("p") if x.get("class") == "missing"]


def test_nothing_is_loaded_from_outside_and_nothing_runs(made):
    reader = read(made)
    assert reader.all("img") and not reader.all("script") and not reader.all("link")
    for _, attributes in reader.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("data:image/", "#"))
    assert not re.search(r"url\(|@import|https?:", made.joinpath("index.html").read_text())


@pytest.mark.parametrize("where", ["prompt", "preview", "data", "stage", "scores", "folder"])
def test_hostile_text_is_escaped(made, where):
    name = HOSTILE.replace("/", "")
    if where == "prompt":
        draw(made / "samples" / f"a-red-{name}.gif", ("red", "circle", "left"))
    elif where == "preview":
        draw(made / "previews" / f"{name}.gif", ("red", "circle", "left"))
    elif where == "data":
        change(made / "train.json", options={"preset": "tiny", "data": HOSTILE})
    elif where == "stage":
        entry = {"stage": HOSTILE, "step": 1, "loss": 1.0, "steps_per_second": 1.0}
        (made / "metrics.jsonl").write_text(json.dumps(entry))
    elif where == "scores":
        change(made / "evaluation.json", decoder=[HOSTILE], quality={HOSTILE: {HOSTILE: 1.0}})
    else:
        made = made.rename(made.with_name(name))
    reader = read(made)
    shown = HOSTILE if where in ("data", "stage", "scores") else name
    assert shown in reader.text
    assert not reader.all("script") and len(reader.all("img")) in (4, 5)
    assert not [a for _, attributes in reader.tags for a in attributes if a.startswith("on")]


def test_a_clip_is_marked_as_what_the_reader_sees_in_it(made):
    right, wrong = figures_of(page.write_page(made).read_text(encoding="utf-8"))[:2]
    assert right == ("a red circle moving left",
                     ["a red circle moving left", "✓ red", "✓ circle", "✓ left"])
    assert wrong[1][1:] == ["✓ red", "✗ square", "✓ up"]
    assert "1 of 2 clips are right" in read(made).text


def test_only_held_out_combinations_are_marked_so(made):
    name = caption_of(*HELD_OUT[0]).replace(" ", "-")
    draw(made / "samples" / f"{name}.gif", HELD_OUT[0])
    figures = figures_of(page.write_page(made).read_text(encoding="utf-8"))
    assert [text for text, caption in figures if "held out" in caption] == [name.replace("-", " ")]


def test_an_image_is_right_without_a_direction(made):
    draw(made / "samples" / "a-blue-square-moving-up.png", ("blue", "square", "up"), num_frames=1)
    figures = dict(figures_of(page.write_page(made).read_text(encoding="utf-8")))
    assert figures["a blue square moving up"][1:] == ["✓ blue", "✓ square"]


def test_a_clip_that_cannot_be_read_is_shown_with_the_reason(made):
    (made / "samples" / "a-red-circle-moving-left.gif").write_bytes(b"no GIF")
    caption = figures_of(page.write_page(made).read_text(encoding="utf-8"))[0][1]
    assert caption[1].startswith("not judged: cannot be read") and "0 of 1 clips" in read(made).text


def test_the_scores_of_the_file_are_in_the_tables(made):
    cells = [text for path, text in read(made).texts if "td" in path]
    assert {"16", "99.0", "98.0", "97.0", "96.5", "76.5", "87.5", "0.8856", "31.98"} <= {*cells}
    assert "96.5 %" in read(made).text and "decoder: another" in read(made).text


def test_a_curve_goes_through_the_losses(made):
    reader = read(made)
    points = [tuple(map(float, point.split(",")))
              for point in reader.all("polyline")[0]["points"].split()]
    x, y = zip(*points, strict=True)
    steps, losses = np.array([50, 100, 120]), 1 / np.array([50, 100, 120])
    assert np.allclose(np.diff(x) / np.diff(steps), (x[2] - x[0]) / 70, atol=0.01)
    assert np.allclose(np.diff(y) / np.diff(np.log(losses)), (y[2] - y[0]) / np.log(50 / 120),
                       rtol=0.02) and y[2] > y[0]  # down the page
    assert "120 steps in 1.0 minutes" in reader.text  # at 2 steps a second


def test_a_ladder_surrounds_its_numbers():
    assert ladder(0.03, 0.3) == [0.02, 0.05, 0.1, 0.2, 0.5]
    assert ladder(1, 1) == [1, 2]


def test_changed_options_come_first(made):
    rows = [text for path, text in read(made).texts if "details" in path and "td" in path]
    heads = [text for path, text in read(made).texts if "details" in path and "th" in path]
    assert heads[3] == "--video-steps" and rows[:2] == ["7 ", "changed"]
    assert rows.count("changed") == 1


def test_what_a_new_run_lacks_is_said_with_the_command_that_makes_it(tmp_path):
    path = tmp_path / "new run"
    write_json(path / "train.json", {"options": {}, "finished": ["vae"]})
    reader = read(path)
    commands = [text for path, text in reader.texts if path[-1:] == ("code",)]
    assert commands[:3] == [f"python train.py '{path}' --resume",
                            f"python sample.py '{path}' --prompts-file prompts.txt",
                            f"python evaluate.py '{path}'"]
    missing = [x for x in reader.all("p") if x.get("class") == "missing"]
    assert len(missing) == 5 and "Not finished: image, video; continue with" in reader.text


def test_clips_of_a_folder_are_shown_and_not_judged(made):
    change(made / "train.json", options={"preset": "tiny", "data": "my clips"})
    reader = read(made)
    assert len(reader.all("img")) == 4 and "✗ square" not in reader.text
    assert "trained on my clips; only of MovingShapes" in reader.text


def test_the_losses_of_a_video_decoder_are_shown_as_well(made):
    entry = {"stage": "decoder", "step": 9, "loss": 0.5, "steps_per_second": 1.0}
    (made / "video_decoder").mkdir()
    (made / "video_decoder" / "metrics.jsonl").write_text(json.dumps(entry))
    assert len(read(made).all("svg")) == 2


def test_too_many_files_are_left_out_and_so_are_too_large_ones(made):
    for step in range(20):
        draw(made / "previews" / f"video-{step:06d}.gif", ("red", "circle", "left"))
    assert "8 of 22 files" in read(made).text
    with open(made / "samples" / "z.mp4", "wb") as file:
        file.truncate(3_000_000)
    assert "2 of 3 files" in read(made).text and len(read(made).all("img")) == 10


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="is no run, it has no train.json"):
        call(page.main, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [{"agreement": [1]}, {"quality": {"clips": [5]}}])
def test_a_damaged_evaluation_is_named(made, damage):
    change(made / "evaluation.json", **damage)
    with pytest.raises(ValueError, match="evaluation.json: damaged"):
        call(page.main, made)
