"""Elements of a page as trees: tables, galleries with their files inside, curves in SVG.

Whatever text comes into a tree, writing it escapes every text and every attribute.
"""

import base64
import math
import shlex
import xml.etree.ElementTree as ET

from files import open_regular

TYPES = {".gif": "image/gif", ".webp": "image/webp", ".png": "image/png", ".mp4": "video/mp4"}
MAX_BYTES = 3_000_000  # of the files in a gallery
WIDTH, HEIGHT = 360, 220  # of a chart, in pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 26, 32, 40  # its margins


def element(name, *children, **attributes):
    """An element of HTML or SVG; a string among its children is text."""
    node = ET.Element(name, {k.strip("_").replace("_", "-"): str(v) for k, v in attributes.items()})
    for child in children:
        if not isinstance(child, str):
            node.append(child)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + child
        else:
            node.text = (node.text or "") + child
    return node


def write(elements):
    """Elements as HTML."""
    return "".join(ET.tostring(x, encoding="unicode", method="html") for x in elements)


def missing(what, *command):
    """A paragraph that says what there is not, and ends with the command that makes it."""
    code = [" ", element("code", shlex.join(command))] if command else []
    return element("p", what, *code, class_="missing")


def table(columns, rows, class_="numbers"):
    """A table; a row is its cells, text or elements, the first of them its heading."""
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    body = [element("tr", element("th", first, scope="row"), *(element("td", x) for x in cells))
            for first, *cells in rows]
    parts = element("thead", head), element("tbody", *body)
    return element("div", element("table", *parts, class_=class_), class_="scroll")


def percentage(value):
    """A number from 0 to 100 behind a bar of that length."""
    bar = element("span", element("i", style=f"width: {value:.1f}%"), class_="bar")
    return element("span", bar, element("span", f"{value:.1f}"), class_="percentage")


def gallery(folder, caption, class_, most):
    """The clips and images of a folder, some of them if they are too many; [] if it has none.

    caption(path) is a text and what else stands below it.
    """
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in TYPES and p.is_file())
    count, room, figures = min(most, len(paths)), MAX_BYTES, []
    for i in range(count):
        path = paths[round(i * (len(paths) - 1) / max(1, count - 1))]  # evenly, with both ends
        if path.stat().st_size <= room:
            room -= path.stat().st_size
            text, *rest = caption(path)
            below = element("figcaption", text, *rest)
            figures.append(element("figure", embed(path, text), below))
    grid = [element("div", *figures, class_=class_)] if figures else []
    note = missing(f"{len(figures)} of {len(paths)} files are shown; all of them are in {folder}.")
    return grid if len(figures) == len(paths) else [*grid, note]


def embed(path, text):
    """A clip or an image with all its bytes."""
    with open_regular(path) as file:
        data = base64.b64encode(file.read()).decode()
    kind = TYPES[path.suffix.lower()]
    source = f"data:{kind};base64,{data}"
    if kind.startswith("image"):
        return element("img", src=source, alt=text)
    return element("video", src=source, aria_label=text, autoplay="", loop="", muted="",
                   playsinline="")


def ladder(low, high):
    """The numbers 1, 2 and 5 times powers of ten, from the last <= low to the first > high."""
    powers = range(math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 3)
    numbers = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    first, last = max(n for n in numbers if n <= low), min(n for n in numbers if n > high)
    return [number for number in numbers if first <= number <= last]


def chart(title, note, points):
    """A figure of points (step, loss), at most 200 of them, on a logarithmic axis."""
    points = points[:: -math.ceil(len(points) / 200)][::-1]  # with the last one
    end, levels = points[-1][0], ladder(min(p[1] for p in points), max(p[1] for p in points))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(step, loss):
        part = math.log(levels[-1] / loss) / math.log(levels[-1] / levels[0])
        return round(LEFT + (right - LEFT) * step / end, 1), round(TOP + (bottom - TOP) * part, 1)

    marks = [element("text", "training steps", x=right, y=HEIGHT - 6, text_anchor="end"),
             element("text", "loss", x=LEFT - 6, y=TOP - 14, text_anchor="end")]
    for level in levels[:: math.ceil(len(levels) / 8)]:
        _, y = place(0, level)
        marks += [element("line", class_="grid", x1=LEFT, x2=right, y1=y, y2=y),
                  element("text", f"{level:g}", x=LEFT - 6, y=y + 4, text_anchor="end")]
    gap = max(1, int(next(n for n in ladder(end / 9, end) if end / n <= 5)))
    for step in range(0, int(end) + 1, gap):
        x, _ = place(step, levels[0])
        marks.append(element("text", f"{step:,}", x=x, y=bottom + 16, text_anchor="middle"))
    places = [place(step, loss) for step, loss in points]
    line = element("polyline", class_="curve", points=" ".join(f"{x},{y}" for x, y in places))
    size = 2.5 if len(points) <= 60 else 1
    dots = [element("circle", element("title", f"step {step:,.0f}: loss {loss:.4g}"), class_="dot",
                    cx=x, cy=y, r=size)
            for (x, y), (step, loss) in zip(places, points, strict=True)]
    drawing = element("svg", *marks, line, *dots, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
                      aria_label=f"{title}: {note}")
    caption = element("figcaption", element("b", title), element("small", note))
    return element("figure", drawing, caption)
