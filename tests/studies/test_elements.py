"""Trees as text, and where a chart puts its marks."""

import pytest

from studies import elements
from studies.elements import HEIGHT, WIDTH, chart, element, gallery, write


def test_text_may_follow_an_element_in_several_parts():
    node = element("p", "a", "b", element("b", "c"), "d", "e")
    assert write([node]) == "<p>ab<b>c</b>de</p>"


@pytest.fixture
def drawing():
    return chart("vae", "note", [(20, 0.5), (40, 0.2), (100, 0.1)]).find("svg")


def test_a_drawing_stays_inside_its_frame(drawing):
    for node in drawing.iter():
        for names, most in ((("x", "x1", "x2", "cx"), WIDTH), (("y", "y1", "y2", "cy"), HEIGHT)):
            assert all(0 <= float(node.get(name, 0)) <= most for name in names)


def test_axes_name_the_places_of_losses_and_steps(drawing):
    lines = [float(line.get("y1")) for line in drawing.iter("line")]
    texts = list(drawing.iter("text"))
    levels = dict(zip((text.text for text in texts[2:]), lines, strict=False))
    steps = {text.text: float(text.get("x")) for text in texts[2 + len(lines) :]}
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in drawing.iter("circle")]
    assert dots == [(steps["20"], levels["0.5"]), (steps["40"], levels["0.2"]),
                    (steps["100"], levels["0.1"])]
    # Higher is more, the axes cross below all levels, and each label stands beside its line.
    assert levels["0.5"] < levels["0.2"] < levels["0.1"]
    labels = texts[2 : 2 + len(lines)]
    assert all(abs(float(text.get("y")) - levels[text.text]) < 6 for text in labels)


def test_few_points_have_large_dots():
    few, many = (chart("", "", [(i + 1, 1.0) for i in range(n)]).find("svg") for n in (60, 61))
    assert few.find("circle").get("r") == "2.5" and many.find("circle").get("r") == "1"


def test_files_that_just_fit_are_shown(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(bytes(50))
    monkeypatch.setattr(elements, "MAX_BYTES", 100)
    assert "missing" not in write(gallery(tmp_path, lambda path: [path.stem], "clips", 9))
    monkeypatch.setattr(elements, "MAX_BYTES", 99)
    assert "1 of 2 files" in write(gallery(tmp_path, lambda path: [path.stem], "clips", 9))
