"""MovingShapes: the truth of a clip has to be what its caption says."""

from collections import Counter

import numpy as np
import pytest
import torch

import shapes
from shapes import (
    COLOURS,
    COMBINATIONS,
    DIRECTIONS,
    HELD_OUT,
    SEEN,
    SHAPES,
    MovingShapes,
    caption_of,
    coverage,
    render,
)

BLANK = np.zeros((1, 3, 16, 16), np.uint8)


def how_different(frames):
    """How much each pixel of uint8 (t, 3, h, w) differs from the background: (t, h, w)."""
    return np.abs(frames.numpy().astype(float) - 15).sum(1)  # 15: 0.06 of 255


def centres_of(frames):
    """The centre (x, y) of the shape in each frame, in pixels: (t, 2)."""
    weight = how_different(frames)
    axis = np.arange(frames.shape[-1]) + 0.5
    total = weight.sum((1, 2))
    return np.stack([(weight.sum(1) @ axis) / total, (weight.sum(2) @ axis) / total], axis=1)


# Which combinations there are


def test_seen_and_held_out_are_all_combinations_and_share_none():
    assert sorted(SEEN + HELD_OUT) == sorted(COMBINATIONS)
    assert len(set(COMBINATIONS)) == 72 and len(HELD_OUT) == 12


@pytest.mark.parametrize("part, names, times", [
    (0, COLOURS, 2), (1, SHAPES, 4), (2, DIRECTIONS, 3),
])
def test_every_word_is_held_out_equally_often(part, names, times):
    assert Counter(combination[part] for combination in HELD_OUT) == dict.fromkeys(names, times)


def test_the_held_out_combinations_are_those_of_older_runs():
    assert [" ".join(combination) for combination in HELD_OUT] == [
        "red square down", "red triangle up", "green circle right", "green square left",
        "blue circle up", "blue triangle left", "yellow square up", "yellow triangle right",
        "magenta circle left", "magenta square down", "cyan circle right", "cyan triangle down",
    ]


def test_training_clips_never_show_what_is_held_out():
    held_out = {caption_of(*combination) for combination in HELD_OUT}
    assert held_out.isdisjoint(MovingShapes(num_clips=500).captions)


def test_combinations_take_turns():
    counts = Counter(MovingShapes(num_clips=3 * len(SEEN)).captions)
    assert set(counts.values()) == {3} and len(counts) == len(SEEN)


def test_a_caption_says_colour_shape_and_direction():
    assert MovingShapes(1).captions == ["a red circle moving left"]


# What a clip depends on


def test_a_clip_does_not_depend_on_how_many_there_are():
    few, many = MovingShapes(num_clips=5, seed=3), MovingShapes(num_clips=900, seed=3)
    assert torch.equal(few[4][0], many[4][0]) and few[4][1] == many[4][1]


def test_a_clip_does_not_depend_on_those_read_before():
    clips = MovingShapes(num_clips=5)
    first = clips[2][0]
    assert torch.equal(clips[4][0], MovingShapes(num_clips=5)[4][0])
    assert torch.equal(clips[2][0], first)


def test_another_seed_gives_another_clip():
    assert not torch.equal(MovingShapes(seed=0)[0][0], MovingShapes(seed=1)[0][0])


def test_a_clip_of_a_seed_stays_the_same():
    """Recorded: another order of random numbers would change what every seed means."""
    clips = MovingShapes(9, num_frames=2, seed=4)
    recorded = {0: [[21.75, 11.14], [12.11, 11.14]], 8: [[10.22, 15.05], [21.19, 15.05]]}
    for i, centres in recorded.items():
        assert centres_of(clips[i][0]) == pytest.approx(np.array(centres), abs=0.02)


def test_clips_of_one_combination_differ():
    clips = MovingShapes(num_clips=2, combinations=[("red", "circle", "left")])
    assert not torch.equal(clips[0][0], clips[1][0])


def test_reading_past_the_end_ends_a_loop():
    assert len([caption for _, caption in MovingShapes(num_clips=3)]) == 3


@pytest.mark.parametrize("options", [{"num_clips": 0}, {"num_frames": 0}, {"image_size": 15}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="MovingShapes needs"):
        MovingShapes(**options)


# What a frame shows


def test_coverage_is_one_half_on_the_edge():
    edges = {"circle": (0.0, 5.0), "square": (5.0, 2.0), "triangle": (0.0, 1.5 * 0.778 * 5)}
    assert {name: coverage(name, *xy, 5.0).item() for name, xy in edges.items()} == pytest.approx(
        dict.fromkeys(SHAPES, 0.5)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_goes_through_values_between_nothing_and_all(shape):
    values = np.unique(coverage(shape, np.linspace(0, 12, 200), np.zeros(200), 6.0))
    assert values[0] == 0 and values[-1] == 1 and len(values) > 10


@pytest.mark.parametrize("shape, unit_area", SHAPES.items())
def test_a_shape_covers_the_area_that_is_written_beside_its_name(shape, unit_area):
    axis = np.arange(-15, 16)
    area = coverage(shape, axis, axis[:, None], 7.0).sum()
    assert area == pytest.approx(unit_area * 7.0**2, rel=0.02)


@pytest.mark.parametrize("colour, pixel", [
    ("red", (255, 38, 38)), ("green", (38, 230, 38)), ("blue", (64, 89, 255)),
    ("yellow", (255, 242, 26)), ("magenta", (255, 51, 255)), ("cyan", (26, 242, 255)),
])
def test_a_shape_has_its_colour_and_the_rest_is_dark(colour, pixel):
    frame = render((colour, "circle", "up"), np.array([[8.0, 12.0]]), 6.0, 32)[0]
    assert frame[:, 12, 8] == pytest.approx(np.array(pixel), abs=1)  # 1: halves round either way
    assert frame[:, 20, 20].tolist() == [15, 15, 15]


def test_pixels_are_half_covered_where_an_edge_crosses_their_middle():
    """A square of half width 3 around column 8 covers columns 5 to 10; around 8.5, half of 5."""
    rows = [render(("red", "square", "up"), np.array([[x, 8.0]]), 3.0, 16)[0, 0, 8]
            for x in (8.0, 8.5)]
    assert rows[0].tolist() == [15] * 5 + [255] * 6 + [15] * 5
    half = [15] * 5 + [135] + [255] * 5 + [135] + [15] * 4
    assert rows[1] == pytest.approx(np.array(half), abs=1)


def test_a_triangle_points_up_and_is_as_high_above_its_centre_as_below():
    rows = how_different(torch.from_numpy(
        render(("red", "triangle", "up"), np.array([[16.0, 16.0]]), 8.0, 32)
    ))[0].sum(1)
    assert np.flatnonzero(rows > 100).tolist() == list(range(7, 26))  # 16 +- 1.5 * 0.778 * 8
    assert rows[9] < rows[14] < rows[19] < rows[23]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_centre_moves_in_the_named_direction(direction):
    combinations = [(colour, shape, direction) for colour in COLOURS for shape in SHAPES]
    clips = MovingShapes(18, num_frames=5, combinations=combinations)
    for i in range(18):
        steps = np.diff(centres_of(clips[i][0]), axis=0)
        steady = np.array(DIRECTIONS[direction]) * np.abs(steps).sum() / 4
        assert steps == pytest.approx(np.tile(steady, (4, 1)), abs=0.15)


@pytest.fixture
def drawn(monkeypatch):
    """What 720 clips of two frames pass to render: (combination, centres, radius, image_size)."""
    calls = []
    monkeypatch.setattr(shapes, "render", lambda *arguments: calls.append(arguments) or BLANK)
    clips = MovingShapes(720, num_frames=2, image_size=32, combinations=COMBINATIONS)
    for i in range(720):
        clips[i]
    return calls


def test_the_shape_stays_inside_the_frame(drawn):
    for (_, shape, _), centres, radius, size in drawn:
        # The triangle's inner circle has 0.778 of the radius; sqrt(3) and 1.5 times that are its
        # half width and half height.
        half = np.array({"triangle": (1.348, 1.167)}.get(shape, (1, 1))) * radius
        assert (centres - half).min() >= 0 and (centres + half).max() <= size


def test_size_speed_and_place_vary_over_their_whole_ranges(drawn):
    radii = np.array([radius for _, _, radius, _ in drawn]) / 32
    travels = np.array([np.abs(centres[1] - centres[0]).max() for _, centres, _, _ in drawn]) / 32
    assert (radii.min(), radii.max()) == pytest.approx((0.19, 0.23), abs=0.001)
    assert (travels.min(), travels.max()) == pytest.approx((0.25, 0.35), abs=0.002)
    # Across its motion a centre is 1.4 radii from a border or farther, and often near that.
    across = np.array([centres[0, 0 if direction in ("up", "down") else 1]
                       for (_, _, direction), centres, _, _ in drawn]) / 32
    reach = np.abs(across - 0.5) / (0.5 - 1.4 * radii)
    assert reach.max() == pytest.approx(1, abs=0.01)
    assert reach.mean() == pytest.approx(0.5, abs=0.03)
    # Along it, the whole way has that distance.
    ends = np.array([np.abs(centres / 32 - 0.5).max(0)[0 if direction in ("left", "right") else 1]
                     for (_, _, direction), centres, _, _ in drawn])
    assert (ends / (0.5 - 1.4 * radii)).max() == pytest.approx(1, abs=0.02)


def test_the_default_is_1536_clips_of_8_frames_of_32_pixels():
    clips = MovingShapes()
    assert len(clips) == 1536 and clips[0][0].shape == (8, 3, 32, 32)
    assert torch.equal(clips[7][0], MovingShapes(seed=0, combinations=SEEN)[7][0])


def test_the_smallest_clips_are_of_one_image_of_16_pixels():
    assert MovingShapes(1, num_frames=1, image_size=16)[0][0].shape == (1, 3, 16, 16)


def test_an_image_is_the_middle_of_its_clip():
    clip, image = MovingShapes(1, num_frames=3)[0][0], MovingShapes(1, num_frames=1)[0][0]
    assert torch.equal(clip[1], image[0])
