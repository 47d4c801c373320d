"""Lines over round numbers: a small plot, with Pillow alone.

    plot("steps.png", {"shift": [(100, 20, 10, 30), (200, 60, 45, 75)]}, "Motion", "steps", "%")

Everything is drawn at twice the size and scaled down, which smooths edges. Colours are Okabe and
Ito's, which the colour-blind tell apart, and each series has a marker, too, for those who print.
"""

import math

from PIL import Image, ImageDraw, ImageFont

from files import atomic

SIZE = 900, 560  # pixels of the picture
SCALE = 2  # of which so many are drawn for each
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
INK, GRAY, GRID = "#222222", "#5A5A5A", "#E4E4E4"
BAND = 40  # of 255: how much an interval covers what is behind it
# Corners of markers at unit size; three of them and as many colours as above make 21 series.
CIRCLE = [(math.cos(a * math.pi / 18), math.sin(a * math.pi / 18)) for a in range(36)]
SQUARE = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
TRIANGLE = [(0, -1.25), (1.13, 0.75), (-1.13, 0.75)]
MARKERS = CIRCLE, SQUARE, TRIANGLE


def round_ticks(low, high, count=6):
    """About `count` multiples of 1, 2 or 5 times a power of ten, which cover [low, high]."""
    if low == high:  # one value: some room around it
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [round(i * step, digits) for i in range(first, last + 1)]


def round_log_ticks(low, high):
    """Powers of ten in [low, high], and 2 and 5 times those where that leaves few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [n * 10.0**k for k in decades for n in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 4:
            return ticks
    return ticks if len(ticks) > 1 else [t for t in round_ticks(low, high) if low <= t <= high]


def _checked(series, log_x):
    """Series with points (x, y, low, high), sorted. Raises ValueError if there is no plot."""
    if not series or not all(series.values()):
        raise ValueError("plot needs a series, and a point in each")
    if len(series) > len(COLOURS) * len(MARKERS):
        raise ValueError(f"plot needs <= {len(COLOURS) * len(MARKERS)} series, got {len(series)}")
    whole = {
        name: sorted((*p, p[1], p[1]) if len(p) == 2 else tuple(p) for p in points)
        for name, points in series.items()
    }
    for name, points in whole.items():
        for point in points:
            if len(point) != 4 or not all(map(math.isfinite, point)):
                raise ValueError("plot needs points (x, y) or (x, y, low, high) of finite numbers, "
                                 f"got {point} in {name!r}")
            if log_x and point[0] <= 0:
                raise ValueError(f"plot needs x > 0 on a log axis, got {point[0]} in {name!r}")
    return whole


def _font(size):
    return ImageFont.load_default(size * SCALE)


class _Frame:
    """Where data coordinates lie in the drawing, in its pixels."""

    def __init__(self, series, log_x, right):
        self.left, self.top = 70 * SCALE, 84 * SCALE
        self.right, self.bottom = right, (SIZE[1] - 66) * SCALE
        self.log_x = log_x
        points = [point for part in series.values() for point in part]
        xs = [point[0] for point in points]
        low_x, high_x = min(xs), max(xs)
        self.y_ticks = round_ticks(min(min(p[1:]) for p in points), max(max(p[1:]) for p in points))
        if log_x:
            room = (high_x / low_x) ** 0.03 if high_x > low_x else 2.0
            self.range_x = low_x / room, high_x * room
            self.x_ticks = round_log_ticks(*self.range_x)
        else:
            ticks = round_ticks(low_x, high_x)
            high_x = high_x + 0.03 * (high_x - ticks[0]) if high_x > low_x else ticks[-1]
            self.range_x = ticks[0], high_x
            self.x_ticks = [x for x in ticks if x <= high_x]

    def x(self, value):
        low, high = self.range_x
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.left + (self.right - self.left) * (value - low) / (high - low)

    def y(self, value):
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)


def _draw_axes(draw, frame, title, x_label, y_label):
    """The title, round numbers and the lines that lead from them through the plot."""
    edge = 24 * SCALE
    draw.text((edge, 34 * SCALE), title, INK, _font(20), "ls")
    draw.text((edge, 64 * SCALE), y_label, GRAY, _font(14), "ls")  # level is easier to read
    draw.text(((frame.left + frame.right) / 2, (SIZE[1] - 18) * SCALE), x_label, GRAY, _font(14),
              "ms")
    for tick in frame.y_ticks:
        y = frame.y(tick)
        draw.line([(frame.left, y), (frame.right, y)], GRID, SCALE)
        draw.text((frame.left - 10 * SCALE, y), f"{tick:,.10g}", INK, _font(13), "rm")
    for tick in frame.x_ticks:
        x = frame.x(tick)
        draw.line([(x, frame.bottom), (x, frame.bottom + 6 * SCALE)], INK, SCALE)
        draw.text((x, frame.bottom + 12 * SCALE), f"{tick:,.10g}", INK, _font(13), "ma")
    draw.line([(frame.left, frame.bottom), (frame.right, frame.bottom)], INK, SCALE)


def _draw_marker(draw, x, y, colour, marker):
    """A marker with a white rim, which keeps it apart from lines that cross it."""
    for size, paint in ((6.5, "white"), (4.8, colour)):
        draw.polygon([(x + size * SCALE * a, y + size * SCALE * b) for a, b in marker], paint)


def _draw_band(picture, frame, points, colour):
    """The picture with a band between the ends of the intervals."""
    band = Image.new("RGBA", picture.size, colour + "00")
    outline = [(frame.x(x), frame.y(high)) for x, _, _, high in points]
    outline += [(frame.x(x), frame.y(low)) for x, _, low, _ in reversed(points)]
    ImageDraw.Draw(band).polygon(outline, f"{colour}{BAND:02x}")
    return Image.alpha_composite(picture, band)


def _draw_line(draw, frame, points, colour, marker):
    """A line with markers; a single point gets a bar from end to end of its interval."""
    path = [(frame.x(x), frame.y(y)) for x, y, _, _ in points]
    if len(points) == 1 and points[0][3] > points[0][2]:
        (x, _), ends = path[0], [frame.y(y) for y in points[0][2:]]
        bars = [[(x, ends[0]), (x, ends[1])]]
        bars += [[(x - 5 * SCALE, y), (x + 5 * SCALE, y)] for y in ends]
        for bar in bars:
            draw.line(bar, colour, 2 * SCALE)
    draw.line(path, colour, 5 * SCALE // 2, "curve")
    for x, y in path:
        _draw_marker(draw, x, y, colour, marker)


def plot(path, series, title, x_label, y_label, log_x=False):
    """Write a PNG of 900 x 560 pixels: a line for each of series {name: [point, ...]}.

    A point is (x, y), or (x, y, low, high) with an interval: a shaded band along a line, a bar
    where a series has one point.

    Raises:
        ValueError: if there is nothing to draw, a number is not finite, or x is <= 0 on a log axis.
    """
    series = _checked(series, log_x)
    legend = max(_font(14).getlength(name) for name in series) + 72 * SCALE
    frame = _Frame(series, log_x, SIZE[0] * SCALE - legend)
    picture = Image.new("RGBA", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
    _draw_axes(ImageDraw.Draw(picture), frame, title, x_label, y_label)
    looks = [(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(series))]
    for points, (colour, _) in zip(series.values(), looks, strict=True):
        if len(points) > 1:
            picture = _draw_band(picture, frame, points, colour)
    draw = ImageDraw.Draw(picture)  # all lines above all bands
    for i, (name, points) in enumerate(series.items()):
        _draw_line(draw, frame, points, *looks[i])
        x, y = frame.right + 16 * SCALE, frame.top + i * 24 * SCALE
        draw.line([(x, y), (x + 28 * SCALE, y)], looks[i][0], 5 * SCALE // 2)
        _draw_marker(draw, x + 14 * SCALE, y, *looks[i])
        draw.text((x + 38 * SCALE, y), name, INK, _font(14), "lm")
    with atomic(path) as file:
        picture.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS).save(file, "PNG")
