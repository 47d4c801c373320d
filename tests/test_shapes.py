"""MovingShapes: a caption has to tell the truth about its clip."""

from collections import Counter

import numpy as np
import pytest
import torch

import shapes
from shapes import (COLOURS, COMBINATIONS, DIRECTIONS, HELD_OUT, SEEN, SHAPES, MovingShapes,
                    coverage, render)


def centres_of(frames):
    """The centre (x, y) of the shape in each frame of uint8 (t, 3, h, w), in pixels: (t, 2)."""
    weight = np.abs(frames.numpy().astype(float) - 15).sum(1)  # t h w; 15 is 0.06 of 255
    axis = np.arange(frames.shape[-1]) + 0.5
    total = weight.sum((1, 2))
    return np.stack([(weight.sum(1) @ axis) / total, (weight.sum(2) @ axis) / total], axis=1)


# Which combinations there are


def test_seen_and_held_out_are_all_combinations_and_share_none():
    assert sorted(SEEN + HELD_OUT) == sorted(COMBINATIONS)
    assert len(set(COMBINATIONS)) == 72


def test_the_held_out_combinations_have_every_word_of_a_kind_equally_often():
    assert [" ".join(combination) for combination in HELD_OUT] == [
        "red square down", "red triangle up", "green circle right", "green square left",
        "blue circle up", "blue triangle left", "yellow square up", "yellow triangle right",
        "magenta circle left", "magenta square down", "cyan circle right", "cyan triangle down",
    ]
    for part, (names, times) in enumerate(((COLOURS, 2), (SHAPES, 4), (DIRECTIONS, 3))):
        assert Counter(words[part] for words in HELD_OUT) == dict.fromkeys(names, times)


def test_the_combinations_seen_in_training_take_turns():
    captions = MovingShapes(num_clips=3 * len(SEEN)).captions
    assert captions == 3 * [f"a {c} {s} moving {d}" for c, s, d in SEEN]


# What a clip depends on


def test_a_clip_does_not_depend_on_how_many_there_are_or_on_those_read_before():
    few, many = MovingShapes(num_clips=5, seed=3), MovingShapes(num_clips=900, seed=3)
    many[2]
    assert torch.equal(few[4][0], many[4][0]) and few[4][1] == many[4][1]


def test_a_clip_of_a_seed_stays_the_same():
    """Recorded: another order of random numbers would change what every seed means."""
    clips = MovingShapes(9, num_frames=2, seed=4)
    recorded = {0: [[21.75, 11.14], [12.11, 11.14]], 8: [[10.22, 15.05], [21.19, 15.05]]}
    for i, centres in recorded.items():
        assert centres_of(clips[i][0]) == pytest.approx(np.array(centres), abs=0.02)


def test_clips_of_one_combination_differ_by_their_number_and_by_the_seed():
    clips, others = (MovingShapes(2, seed=seed, combinations=SEEN[:1]) for seed in (0, 1))
    assert not torch.equal(clips[0][0], clips[1][0])
    assert not torch.equal(clips[0][0], others[0][0])


def test_the_version_of_a_clip_names_everything_that_it_depends_on():
    def version(i=0, combination=SEEN[0], **options):
        return MovingShapes(2, combinations=[combination], **options).version(i)

    changed = [version(1), version(combination=SEEN[1]), version(seed=1), version(num_frames=3),
               version(image_size=16)]
    assert version() == version() and len({version(), *changed}) == 6


def test_reading_past_the_end_ends_a_loop():
    assert len([caption for _, caption in MovingShapes(num_clips=3)]) == 3


# What a frame shows


@pytest.mark.parametrize("shape, unit_area", SHAPES.items())
def test_a_shape_covers_the_area_that_stands_beside_its_name(shape, unit_area):
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
    image = render(("red", "triangle", "up"), np.array([[16.0, 16.0]]), 8.0, 32)[0, 0]
    rows = (image.astype(float) - 15).sum(1)
    assert np.flatnonzero(rows > 30).tolist() == list(range(7, 26))  # 16 +- 1.5 * 0.778 * 8
    assert rows[9] < rows[14] < rows[19] < rows[23]


# How it moves


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_centre_moves_steadily_in_the_named_direction(direction):
    combinations = [(colour, shape, direction) for colour in COLOURS for shape in SHAPES]
    for frames, _ in MovingShapes(18, num_frames=5, combinations=combinations):
        steps = np.diff(centres_of(frames), axis=0)
        steady = np.array(DIRECTIONS[direction]) * np.abs(steps).sum() / 4
        assert steps == pytest.approx(np.tile(steady, (4, 1)), abs=0.15)


@pytest.fixture
def drawn(monkeypatch):
    """What 720 clips of two frames pass to render: (combination, centres, radius, image_size)."""
    calls, blank = [], np.zeros((2, 3, 32, 32), np.uint8)
    monkeypatch.setattr(shapes, "render", lambda *arguments: calls.append(arguments) or blank)
    list(MovingShapes(720, num_frames=2, image_size=32, combinations=COMBINATIONS))
    return calls


def test_the_shape_stays_inside_the_frame(drawn):
    for (_, shape, _), centres, radius, size in drawn:
        # The triangle's inner circle has 0.778 of the radius; sqrt(3) and 1.5 times that are its
        # half width and half height.
        half = np.array({"triangle": (1.348, 1.167)}.get(shape, (1, 1))) * radius
        assert (centres - half).min() >= 0 and (centres + half).max() <= size


def test_size_speed_and_position_vary_over_their_whole_ranges(drawn):
    radii = np.array([radius for _, _, radius, _ in drawn]) / 32
    travels = np.array([np.abs(centres[1] - centres[0]).max() for _, centres, _, _ in drawn]) / 32
    assert (radii.min(), radii.max()) == pytest.approx((0.19, 0.23), abs=0.001)
    assert (travels.min(), travels.max()) == pytest.approx((0.25, 0.35), abs=0.002)
    # Across its motion a centre is 1.4 radii from a border or farther, and often near that.
    across = np.array([centres[0, 0 if direction in ("up", "down") else 1]
                       for (_, _, direction), centres, _, _ in drawn]) / 32
    reach = np.abs(across - 0.5) / (0.5 - 1.4 * radii)
    assert (reach.max(), reach.mean()) == pytest.approx((1, 0.5), abs=0.03)
    # Along it, the whole path has that distance.
    ends = np.array([np.abs(centres / 32 - 0.5).max(0)[0 if direction in ("left", "right") else 1]
                     for (_, _, direction), centres, _, _ in drawn])
    assert (ends / (0.5 - 1.4 * radii)).max() == pytest.approx(1, abs=0.02)


def test_the_default_is_1536_clips_of_8_frames_of_32_pixels():
    clips = MovingShapes()
    assert len(clips) == 1536 and clips[0][0].shape == (8, 3, 32, 32)
    assert torch.equal(clips[7][0], MovingShapes(seed=0, combinations=SEEN)[7][0])


def test_an_image_is_the_middle_of_its_clip():
    clip, image = MovingShapes(1, num_frames=3)[0][0], MovingShapes(1, num_frames=1)[0][0]
    assert torch.equal(clip[1], image[0])
