"""The reader of clips has to be right about real ones and silent about what is not there."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import call, train_small

import evaluate
import metrics
from evaluate import agreement, crispness, rates, recognise
from metrics import psnr, ssim
from media.write import write_clip
from shapes import COLOURS, COMBINATIONS, DIRECTIONS, HELD_OUT, SHAPES, MovingShapes, caption_of
from vae import decode_clips, encode_clip
from weights import load_vae

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def clips_of(combinations, num_frames=8, image_size=32, seed=0):
    """Clips (t, 3, h, w) in [0, 1] of combinations."""
    data = MovingShapes(len(combinations), num_frames, image_size, seed, combinations)
    return [data[i][0].numpy() / 255 for i in range(len(data))]


# What the reader sees


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_real_combinations_are_recognised(seed):
    seen = [recognise(clip) for clip in clips_of(COMBINATIONS, seed=seed)]
    assert seen == COMBINATIONS


@pytest.mark.parametrize("image_size, num_frames", [(16, 8), (64, 8), (32, 4), (32, 16)])
def test_other_sizes_and_lengths_are_recognised(image_size, num_frames):
    combinations = COMBINATIONS[::5]
    clips = clips_of(combinations, num_frames, image_size)
    assert [recognise(clip) for clip in clips] == combinations


def test_blur_and_a_little_noise_are_forgiven():
    rng = np.random.default_rng(0)
    for clip, combination in zip(clips_of(COMBINATIONS), COMBINATIONS, strict=True):
        blurred = sum(np.roll(clip, (y, x), (2, 3)) for y in (0, 1) for x in (0, 1)) / 4
        assert recognise(blurred + 0.02 * rng.standard_normal(clip.shape)) == combination


def test_a_clip_played_backwards_moves_the_other_way():
    for clip, (colour, shape, direction) in zip(clips_of(COMBINATIONS), COMBINATIONS, strict=True):
        assert recognise(clip[::-1]) == (colour, shape, OPPOSITE[direction])


def test_a_clip_on_its_side_moves_the_other_way():
    clip = clips_of([("red", "circle", "left")])[0]
    assert recognise(clip.swapaxes(2, 3)) == ("red", "circle", "up")


def test_a_clip_in_another_order_of_channels_has_another_colour():
    clip = clips_of([("red", "square", "left")])[0]
    assert recognise(clip[:, [2, 1, 0]])[0] == "blue"


def test_a_triangle_upside_down_is_none():
    for clip in clips_of([(colour, "triangle", "left") for colour in COLOURS]):
        assert recognise(clip[:, :, ::-1])[1] is None


def test_a_colour_between_two_is_none():
    clip = clips_of([("red", "square", "left")])[0]
    gray = clip.mean(axis=1, keepdims=True).repeat(3, axis=1)
    assert recognise(gray)[0] is None


def test_a_static_clip_has_no_direction():
    for clip, combination in zip(clips_of(COMBINATIONS), COMBINATIONS, strict=True):
        assert recognise(clip[:1].repeat(8, axis=0)) == (*combination[:2], None)


def test_an_image_has_no_direction():
    clip = clips_of([("cyan", "triangle", "up")], num_frames=1)[0]
    assert recognise(clip) == ("cyan", "triangle", None)


@pytest.mark.parametrize("order", [[0, 7] * 4, [0, 7, 1, 6, 2, 5, 3, 4], [0, 2, 4, 6, 7, 5, 3, 1]])
def test_to_and_fro_is_no_direction(order):
    clip = clips_of([("green", "circle", "right")])[0]
    assert recognise(clip[order])[2] is None


def test_a_clip_that_stands_still_and_jumps_has_no_direction():
    clip = clips_of([("green", "circle", "right")])[0]
    assert recognise(clip[[0, 0, 0, 0, 7, 7, 7, 7]])[2] is None


def test_a_diagonal_is_no_direction():
    right, down = clips_of([("green", "circle", "right"), ("green", "circle", "down")])
    steps = [np.roll(right[0], (2 * i, 2 * i), (1, 2)) for i in range(-2, 3)]
    assert recognise(np.stack(steps))[2] is None


@pytest.mark.parametrize("value", [0.0, 0.06, 0.5, 1.0])
def test_a_blank_clip_is_nothing(value):
    assert recognise(np.full((8, 3, 32, 32), value)) == (None, None, None)


def test_noise_has_neither_shape_nor_direction():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert recognise(rng.random((8, 3, 32, 32)))[1:] == (None, None)


def test_a_shape_that_vanishes_is_not_recognised():
    clip = clips_of([("red", "circle", "left")])[0].copy()
    clip[3] = 0.06
    assert recognise(clip)[1:] == (None, None)


def test_two_shapes_at_once_are_none():
    clip = clips_of([("red", "circle", "left")])[0]
    assert recognise(np.maximum(clip, np.roll(clip, 16, axis=2)))[1] is None


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


# The command


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    """evaluation.json of the small run, and the prompts it was asked to draw."""
    asked, generate = [], evaluate.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write_json", lambda path, value: asked.append(value))
        patch.setattr(evaluate, "generate", lambda pipeline, texts, sampling, *rest: (
            asked.append((texts, sampling.num_frames)) or generate(pipeline, texts, sampling, *rest)
        ))
        call(evaluate.main, trained, "--num-prompts", 7, "--batch-size", 3, "--device", "cpu")
    *asked, report = asked
    return asked, report


def test_as_many_prompts_are_drawn_as_asked_for(report):
    asked, _ = report
    assert [(len(texts), num_frames) for texts, num_frames in asked] == [(7, 3), (7, 1)]


def test_half_of_the_prompts_are_held_out_ones(report):
    (texts, _), _ = report[0]
    held_out = {caption_of(*combination) for combination in HELD_OUT}
    assert [text in held_out for text in texts] == [True] * 3 + [False] * 4


def test_the_rows_of_the_table_add_up(report):
    rows = report[1]["agreement"]
    for kind in ("clips", "images"):
        seen, held_out, both = (rows[f"{kind}, {part}"] for part in ("seen", "held out", "all"))
        assert (seen["count"], held_out["count"], both["count"]) == (4, 3, 7)
        for name in set(both) - {"count"}:
            mean = (4 * seen[name] + 3 * held_out[name]) / 7
            assert both[name] == pytest.approx(mean, abs=0.15)  # they are rounded


def test_the_reader_is_measured_on_real_clips_and_on_noise(report):
    rows = report[1]["agreement"]
    assert rows["real clips"]["all"] == 100.0 and rows["noise"]["all"] == 0.0
    assert rows["real, autoencoded"]["count"] == 7


def test_the_report_is_printed_and_written(run, capsys):
    call(evaluate.main, run, "--num-prompts", 2)
    lines = capsys.readouterr().out.splitlines()
    written = json.loads((run / "evaluation.json").read_text())
    for table in ("agreement", "quality"):
        head, *rows = lines[: lines.index("")] if "" in lines else lines
        lines = lines[len(rows) + 2 :]
        assert [line[:28].strip() for line in rows] == list(written[table])
        for line, row in zip(rows, written[table].values(), strict=True):
            cells = dict(zip(head[28:].split(), line[28:].split(), strict=True))
            assert {name: float(cell) for name, cell in cells.items() if cell != "-"} == row
    assert (written["num_prompts"], written["seed"]) == (2, 1000)


def test_few_prompts_show_every_word(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "generate", lambda pipeline, texts, *rest: asked.extend(texts))
    with pytest.raises(TypeError):  # there are no clips to look at
        call(evaluate.main, trained, "--num-prompts", 24)
    words = {word for text in asked for word in text.split()}
    assert words >= {*COLOURS, *SHAPES, *DIRECTIONS}


def test_a_run_on_other_data_is_refused(tmp_path):
    write_clip(tmp_path / "clips/a_dog/1.gif", torch.zeros(3, 3, 16, 16))
    write_clip(tmp_path / "clips/a_dog/2.gif", torch.ones(3, 3, 16, 16))
    train_small(tmp_path / "run", "--stage", "vae", data=tmp_path / "clips")
    with pytest.raises(ValueError, match="trained on .*clips; only of MovingShapes"):
        call(evaluate.main, tmp_path / "run")


def test_a_model_from_elsewhere_is_refused(run):
    (run / "train.json").unlink()
    with pytest.raises(ValueError, match="only of MovingShapes"):
        call(evaluate.main, run)


def test_a_damaged_record_is_refused_by_name(run):
    (run / "train.json").write_text('{"options": {}')
    with pytest.raises(ValueError, match="train.json: not a JSON file"):
        call(evaluate.main, run)


def test_the_smallest_numbers_are_two_prompts_one_clip_at_a_time_and_seed_0():
    words = ("run", "--num-prompts", 2, "--batch-size", 1, "--seed", 0)
    args = call(evaluate.parse_arguments, *words)
    assert (args.num_prompts, args.batch_size, args.seed) == (2, 1, 0)


def test_a_distance_needs_one_prompt_more_than_there_are_features():
    args = call(evaluate.parse_arguments, "run", "--num-prompts", 33, "--fvd")
    assert args.feature_net == evaluate.Path("run/feature_net.safetensors")


@pytest.mark.parametrize("words", [
    ("--num-prompts", 1), ("--batch-size", 0), ("--seed", -1), ("--device", "abacus"),
    ("--num-prompts", 32, "--fvd"), ("--num-prompts", 32, "--feature-net", "net.safetensors"),
])
def test_a_wrong_number_is_refused(run, words):
    with pytest.raises(ValueError, match=words[0]):
        call(evaluate.main, run, *words)
    assert not (run / "evaluation.json").exists()


def test_a_run_without_a_video_stage_is_measured_on_images(tmp_path, capsys):
    train_small(tmp_path / "run", "--stage", "vae")
    train_small(tmp_path / "run", "--stage", "image")
    call(evaluate.main, tmp_path / "run", "--num-prompts", 2)
    written = json.loads((tmp_path / "run/evaluation.json").read_text())
    rows = written["agreement"]
    assert not any(name.startswith("clips") for name in rows)
    assert rows["real clips"].pop("crispness") > 0.98
    assert rows["real clips"] == {"count": 2, "colour": 100.0, "shape": 100.0, "all": 100.0}
    assert all("consistency" not in row for row in written["quality"].values())
    with pytest.raises(ValueError, match="needs a model of clips; .*run has no video stage"):
        call(evaluate.main, tmp_path / "run", "--num-prompts", 33, "--fvd")


# Quality


def test_the_autoencoder_is_measured_on_real_clips(trained, report):
    """PSNR and SSIM of the row, worked out anew from the run's own autoencoder."""
    vae = load_vae(trained / "vae").eval()
    prompts = evaluate.choose_prompts(7)
    real = [MovingShapes(7, 3, 16, 1000, prompts)[i][0] for i in range(7)]
    coded = [decode_clips(vae, encode_clip(vae, clip)[None])[0] for clip in real]
    pairs = [(clip / 127.5 - 1, back) for clip, back in zip(real, coded, strict=True)]
    row = report[1]["quality"]["real, autoencoded"]
    assert row["PSNR"] == pytest.approx(np.mean([psnr(*pair).mean() for pair in pairs]), abs=0.01)
    assert row["SSIM"] == pytest.approx(np.mean([ssim(*pair).mean() for pair in pairs]), abs=1e-4)
    assert all(
        "PSNR" not in row for name, row in report[1]["quality"].items() if "coded" not in name
    )


def test_real_clips_are_steadier_than_noise(report):
    rows = report[1]["quality"]
    assert rows["real clips"]["consistency"] > 0.3 and abs(rows["noise"]["consistency"]) < 0.05
    assert rows["clips, all"]["consistency"] <= 1


@pytest.fixture(scope="module")
def with_net(trained, tmp_path_factory):
    """evaluation.json and the folder of a run measured with a feature net of a few steps."""
    path = shutil.copytree(trained, tmp_path_factory.mktemp("fvd") / "run")
    train = functools.partial(metrics.train_feature_net, num_steps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "train_feature_net", train)
        call(evaluate.main, path, "--num-prompts", 33, "--device", "cpu", "--fvd")
    return json.loads((path / "evaluation.json").read_text()), path


def test_distance_and_similarity_carry_the_name_of_their_net(with_net):
    for row in with_net[0]["quality"].values():
        assert {"FVD-shapes", "CLIPSIM-shapes"} < set(row)


def test_real_clips_are_nearer_to_real_clips_than_noise_is(with_net):
    rows = with_net[0]["quality"]
    assert 0 < rows["real clips"]["FVD-shapes"] < rows["noise"]["FVD-shapes"]


def test_the_floor_is_of_other_real_clips_of_the_same_prompts(with_net):
    report, path = with_net
    net = metrics.load_feature_net(path / "feature_net.safetensors", 3, 16)
    prompts = evaluate.choose_prompts(33)
    a, b = (
        metrics.features_of(net, metrics.real_clips(33, 3, 16, seed, prompts))
        for seed in (1000, 1001)
    )
    assert report["quality"]["real clips"]["FVD-shapes"] == pytest.approx(
        metrics.frechet_distance(a, b), rel=1e-3, abs=1e-3
    )


def test_the_net_is_kept_and_its_accuracy_is_told(with_net):
    report, path = with_net
    assert report["feature_net"]["file"] == str(path / "feature_net.safetensors")
    net = metrics.load_feature_net(path / "feature_net.safetensors", 3, 16)
    assert report["feature_net"]["accuracy"] == metrics.accuracy(net)


def test_without_being_asked_no_net_is_trained(report, trained):
    assert "feature_net" not in report[1]
    assert not (trained / "feature_net.safetensors").exists()
