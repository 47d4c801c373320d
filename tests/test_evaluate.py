"""The reader of clips has to be right about real ones and silent about what is not there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, change

import evaluate
from checkpoints.weights import load_vae
from evaluate import (agreement, choose_prompts, consistency, crispness, psnr,
                      rates, real_clips, recognise)
from shapes import COLOURS, COMBINATIONS, DIRECTIONS, HELD_OUT, SEEN, SHAPES, MovingShapes
from shapes import caption_of
from vae import decode_clips, encode_clip

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def clips_of(combinations, num_frames=8, image_size=32, seed=0):
    """Clips (t, 3, h, w) in [0, 1] of combinations."""
    data = MovingShapes(len(combinations), num_frames, image_size, seed, combinations)
    return [data[i][0].numpy() / 255 for i in range(len(data))]


# Reading clips


@pytest.mark.parametrize("seed", [0, 1])
def test_all_real_combinations_are_recognised(seed):
    assert [recognise(clip) for clip in clips_of(COMBINATIONS, seed=seed)] == COMBINATIONS


@pytest.mark.parametrize("image_size, num_frames", [(16, 8), (64, 8), (32, 4), (32, 16)])
def test_other_sizes_and_lengths_are_recognised(image_size, num_frames):
    clips = clips_of(COMBINATIONS[::5], num_frames, image_size)
    assert [recognise(clip) for clip in clips] == COMBINATIONS[::5]


def test_blur_and_a_little_noise_are_forgiven():
    rng = np.random.default_rng(0)
    for clip, combination in zip(clips_of(COMBINATIONS), COMBINATIONS, strict=True):
        blurred = sum(np.roll(clip, (y, x), (2, 3)) for y in (0, 1) for x in (0, 1)) / 4
        assert recognise(blurred + 0.02 * rng.standard_normal(clip.shape)) == combination


def test_a_clip_played_backwards_moves_the_other_way():
    for clip, (colour, shape, direction) in zip(clips_of(COMBINATIONS), COMBINATIONS, strict=True):
        assert recognise(clip[::-1]) == (colour, shape, OPPOSITE[direction])


def test_other_colours_are_other_or_none():
    clip = clips_of([("red", "square", "left")])[0]
    assert recognise(clip[:, [2, 1, 0]])[0] == "blue"
    assert recognise(clip.mean(axis=1, keepdims=True).repeat(3, axis=1))[0] is None  # gray


def test_a_triangle_upside_down_is_none():
    for clip in clips_of([(colour, "triangle", "left") for colour in COLOURS]):
        assert recognise(clip[:, :, ::-1])[1] is None


def test_a_clip_that_stands_still_has_no_direction():
    for clip, combination in zip(clips_of(COMBINATIONS), COMBINATIONS, strict=True):
        assert recognise(clip[:1].repeat(8, axis=0)) == (*combination[:2], None)


@pytest.mark.parametrize("steps, expected", [
    ([(2, 2)] * 4, None), ([(2, 0)] * 4, "right"), ([(3, 1)] * 4, "right"), ([(1, 0)] * 4, None),
    ([(2, 0), (2, 0), (2, 0), (-1, 0)], "right"), ([(3, 0), (3, 0), (-1, 0), (-1, 0)], None),
    ([(0, 0), (6, 0), (0, 0), (0, 0)], None), ([], None),
], ids=["diagonal", "straight", "a little askew", "too short", "one step back", "two steps back",
        "one jump", "an image"])
def test_a_direction_is_far_enough_straight_and_mostly_forwards(steps, expected):
    frame = clips_of([("green", "circle", "right")])[0][3]
    positions = np.cumsum([(0, 0), *steps], axis=0) - (3, 3)
    clip = np.stack([np.roll(frame, (y, x), (1, 2)) for x, y in positions])
    assert recognise(clip)[2] == expected


@pytest.mark.parametrize("value", [0.0, 0.06, 1.0])
def test_a_blank_clip_is_nothing(value):
    assert recognise(np.full((8, 3, 32, 32), value)) == (None, None, None)


def test_a_shape_that_vanishes_is_not_recognised():
    clip = clips_of([("red", "circle", "left")])[0].copy()
    clip[3] = 0.06
    assert recognise(clip)[1:] == (None, None)


@pytest.mark.parametrize("size, seen", [(4, False), (6, True), (17, True), (18, False)])
def test_a_shape_covers_three_to_thirty_percent_of_a_frame(size, seen):
    clip = np.full((2, 3, 32, 32), 0.06)
    clip[:, :, 2 : 2 + size, 2 : 2 + size] = np.array(COLOURS["red"])[:, None, None]
    assert recognise(clip)[:2] == ("red", "square" if seen else None)


# Numbers


def test_agreement_is_counted_for_each_word():
    clips = [torch.from_numpy(2 * clip - 1) for clip in clips_of([("red", "circle", "left")] * 3)]
    asked = [("red", "circle", "left"), ("red", "square", "left"), ("blue", "circle", "up")]
    assert agreement(clips, asked).tolist() == [
        [True, True, True], [True, False, True], [False, True, False],
    ]


def test_crispness_is_that_of_the_shape_asked_for():
    frames, _ = MovingShapes(1, 3, 32, combinations=[("red", "square", "left")])[0]
    clip = frames / 127.5 - 1
    assert crispness(clip, "square") > 0.98 > 0.9 > crispness(clip, "triangle")
    assert crispness(torch.zeros(3, 3, 32, 32), "square") == 0.0
    whole, clip[1] = crispness(clip, "square"), clip[1, :, :1, :1]
    assert abs(crispness(clip, "square") / whole - 2 / 3) < 0.01  # a frame without a shape


def test_rates_are_percentages_of_clips():
    right = np.array([[True, True, True], [True, False, True], [True, True, False]])
    assert rates(right) == {
        "count": 3, "colour": 100.0, "shape": 66.7, "direction": 66.7, "all": 33.3,
    }


def test_an_image_is_right_without_a_direction():
    right = np.array([[True, True, False], [True, False, False]])
    assert rates(right, image=True) == {"count": 2, "colour": 100.0, "shape": 50.0, "all": 50.0}


def test_half_of_the_prompts_are_held_out_and_few_have_every_word():
    prompts = choose_prompts(25)
    assert [prompt in HELD_OUT for prompt in prompts] == [True] * 12 + [False] * 13
    assert {word for prompt in prompts[12:] for word in prompt} == {*COLOURS, *SHAPES, *DIRECTIONS}
    assert len({*choose_prompts(128)[64:]}) == len(SEEN) == 60  # of the seen, all


# Quality


def images(seed, shape=(2, 3, 14, 17)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_of_a_tenth_of_the_range_is_twenty_decibel():
    a = torch.zeros(2, 3, 4, 5)
    b = torch.stack([torch.full((3, 4, 5), 0.2), torch.full((3, 4, 5), -0.02)])
    assert psnr(a, b).tolist() == pytest.approx([20, 40])


def test_consistency_by_hand():
    """Two frames of two pixels: 0, 4 and 2, 4. Change 2, variance 2.75 around 2.5."""
    clip = torch.tensor([[0.0, 4.0], [2.0, 4.0]]).reshape(1, 2, 1, 1, 2)
    assert consistency(clip).item() == pytest.approx(1 - 2 / (2 * 2.75))


def test_consistency_does_not_depend_on_contrast():
    clips = torch.rand(1, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert consistency(0.001 * clips).item() == pytest.approx(consistency(clips).item())


def test_a_frozen_clip_has_consistency_one_and_a_blank_one_too():
    assert consistency(images(0)[:, None].expand(-1, 4, -1, -1, -1)).tolist() == [1, 1]
    assert consistency(torch.full((1, 3, 3, 4, 4), 0.3)).item() == 1


def test_independent_frames_have_nothing_in_common_but_a_colour():
    clips = images(0, (2, 6, 3, 40, 40)) + torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    assert consistency(clips).tolist() == pytest.approx([0, 0], abs=0.03)


def test_real_clips_are_those_of_the_data_in_minus_one_to_one():
    clips, data = real_clips(5, 3, 16, 4, SEEN), MovingShapes(5, 3, 16, 4)
    expected = torch.stack([data[i][0] for i in range(5)]).float() / 127.5 - 1
    assert torch.equal(clips, expected) and clips.dtype == torch.float32
    assert len(real_clips(72, 1, 16, 0)) == 72  # of all combinations


# The command


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    """evaluation.json of the small run, the clips it drew by their number of frames, the output."""
    drawn, draw = {}, evaluate.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write_json", lambda path, value: drawn.update({path.name: value}))
        patch.setattr(evaluate, "draw", lambda pipeline, prompts, t, seed, size: drawn.setdefault(
            t, draw(pipeline, prompts, t, seed, size)))
        call(evaluate.main, trained, "--num-prompts", 7, "--batch-size", 3, "--device", "cpu")
    return drawn.pop("evaluation.json"), drawn


def test_the_rows_are_the_agreement_of_the_clips_drawn(report):
    rows, prompts = report[0]["agreement"], choose_prompts(7)
    for kind, t in (("clips", 3), ("images", 1)):
        clips = report[1][t]
        assert clips.shape == (7, t, 3, 16, 16)
        right = agreement(clips, prompts)
        crisp = [crispness(clip, prompt[1]) for clip, prompt in zip(clips, prompts, strict=True)]
        for part, chosen in (("held out", slice(3)), ("seen", slice(3, 7)), ("all", slice(7))):
            expected = rates(right[chosen], image=t == 1)
            expected["crispness"] = round(float(np.mean(crisp[chosen])), 3)
            assert rows[f"{kind}, {part}"] == expected


def test_clips_are_drawn_from_the_captions_and_the_seed(trained, report):
    from sample import generate
    pipeline = evaluate.load_pipeline(trained).to("cpu")
    texts = [caption_of(*prompt) for prompt in choose_prompts(7)]
    clips = torch.stack(list(generate(pipeline, texts, pipeline.sampling, 1000, 3)))
    assert torch.equal(report[1][3], clips)


def test_the_reader_is_measured_on_real_clips_and_on_noise(report):
    rows = report[0]["agreement"]
    assert rows["real clips"]["all"] == 100.0 and rows["noise"]["all"] == 0.0
    assert rows["real clips"]["crispness"] > 0.98


def test_the_autoencoder_is_measured_on_the_same_real_clips(trained, report):
    autoencoder, prompts = load_vae(trained / "vae"), choose_prompts(7)
    real = real_clips(7, 3, 16, 1000, prompts)
    coded = torch.cat([decode_clips(autoencoder, encode_clip(autoencoder, (clip + 1) * 127.5)[None])
                       for clip in real])
    rows = report[0]["quality"]
    right = psnr(real.flatten(0, 1), coded.flatten(0, 1)).mean().item()
    assert rows["real, autoencoded"]["PSNR"] == round(right, 2)
    assert [name for name, row in rows.items() if "PSNR" in row] == ["real, autoencoded"]
    for name, clips in (("real clips", real), ("clips, all", report[1][3])):
        assert rows[name]["consistency"] == round(consistency(clips).mean().item(), 4)
    assert rows["real clips"]["consistency"] > 0.3 and abs(rows["noise"]["consistency"]) < 0.05


def test_the_report_is_printed_and_written(run, capsys):
    call(evaluate.main, run, "--num-prompts", 2)
    *lines, path = capsys.readouterr().out.splitlines()
    written = json.loads(Path(path).read_text())
    for table in ("agreement", "quality"):
        head, *rows = lines[: lines.index("")] if "" in lines else lines
        lines = lines[len(rows) + 2 :]
        assert [line[:28].strip() for line in rows] == list(written[table])
        for line, row in zip(rows, written[table].values(), strict=True):
            cells = dict(zip(head[28:].split(), line[28:].split(), strict=True))
            assert {name: float(cell) for name, cell in cells.items() if cell != "-"} == row
    assert (written["num_prompts"], written["seed"]) == (2, 1000)
    assert written["sampling"]["num_frames"] == 3


@pytest.mark.parametrize("num_frames", [1, 2])
def test_a_run_without_a_video_stage_is_measured_on_images(run, num_frames):
    change(run / "sampling.json", num_frames=num_frames)
    call(evaluate.main, run, "--num-prompts", 2)
    written, video = json.loads((run / "evaluation.json").read_text()), num_frames > 1
    assert ("clips, all" in written["agreement"]) == ("clips, all" in written["quality"]) == video
    assert ("consistency" in written["quality"]["noise"]) == video
    assert "images, all" in written["agreement"] and "crispness" in written["agreement"]["noise"]


@pytest.mark.parametrize("damage", [
    lambda record: record.unlink(),
    lambda record: change(record, options={"data": "clips"}),
], ids=["no record", "other data"])
def test_a_model_whose_truth_is_unknown_is_refused(run, damage):
    damage(run / "train.json")
    with pytest.raises(ValueError, match="needs a run of train.py on MovingShapes"):
        call(evaluate.main, run)
