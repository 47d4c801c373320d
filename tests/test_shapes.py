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


@pytest.mark.parametrize("combination", COMBINATIONS[::7])
def test_the_middle_of_a_shape_has_its_colour(combination):
    middle = render(combination, np.array([[16.0, 16.0]]), 6.0, 32)[0, :, 16, 16]
    assert (middle / 255).tolist() == pytest.approx(COLOURS[combination[0]], abs=0.003)


def test_half_a_pixel_of_movement_changes_the_image():
    left, right = (render(("red", "square", "up"), np.array([[x, 16]]), 6, 32) for x in (16, 16.5))
    assert not np.array_equal(left, right)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_centre_moves_in_the_named_direction(direction):
    combinations = [(colour, shape, direction) for colour in COLOURS for shape in SHAPES]
    clips = MovingShapes(18, num_frames=5, combinations=combinations)
    for i in range(18):
        steps = np.diff(centres_of(clips[i][0]), axis=0)
        steady = np.array(DIRECTIONS[direction]) * np.abs(steps).sum() / 4
        assert steps == pytest.approx(np.tile(steady, (4, 1)), abs=0.15)


def test_the_shape_stays_inside_the_frame(monkeypatch):
    drawn = []
    monkeypatch.setattr(shapes, "render", lambda *arguments: drawn.append(arguments) or BLANK)
    clips = MovingShapes(720, num_frames=2, image_size=32, combinations=COMBINATIONS)
    for i in range(720):
        clips[i]
    for (_, shape, _), centres, radius, size in drawn:
        # The triangle's inner circle has 0.778 of the radius; sqrt(3) and 1.5 times that are its
        # half width and half height.
        half = np.array({"triangle": (1.348, 1.167)}.get(shape, (1, 1))) * radius
        assert (centres - half).min() >= 0 and (centres + half).max() <= size


def test_an_image_is_the_middle_of_its_clip():
    clip, image = MovingShapes(1, num_frames=3)[0][0], MovingShapes(1, num_frames=1)[0][0]
    assert torch.equal(clip[1], image[0])
