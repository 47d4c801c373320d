"""The options of a run: which may change, and which never could be."""

import dataclasses
import math

import pytest
import torch
from helpers import make_clip

from files import write_json
from options import RECIPES, STAGES, TrainOptions
from run import merge_options, open_data, read_record, stages_to_run

OPTIONS = dataclasses.replace(RECIPES["tiny"], image_size=16, num_clips=8)


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was stopped in its image stage."""
    record = {"options": dataclasses.asdict(OPTIONS), "finished": ["vae"]}
    write_json(tmp_path / "train.json", record)
    (tmp_path / "training_state.pt").touch()
    return tmp_path


@pytest.mark.parametrize("given", [
    {"seed": 1}, {"image_size": 32}, {"num_clips": 9}, {"temporal": "none"}, {"preset": "small"},
    {"vae_steps": 5}, {"image_steps": 5}, {"data": "clips"},
])
def test_an_option_that_differs_from_the_runs_is_refused_by_name(stopped, given):
    ((name, value),) = given.items()
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"was trained with {flag} .*, not {value}; choose a new"):
        merge_options(stopped, given)


@pytest.mark.parametrize("given", [
    {"log_every": 7}, {"save_every": 7}, {"preview_every": 7}, {"device": "cuda"},
    {"precision": "fp32"}, {"compile": True}, {"video_steps": 5}, {"video_batch_size": 1},
    {"video_learning_rate": 0.5}, {"seed": 0}, {"offload": True}, {"gradient_checkpointing": True},
])
def test_what_does_not_touch_the_past_may_differ(stopped, given):
    ((name, value),) = given.items()
    options, finished = merge_options(stopped, given)
    assert getattr(options, name) == value and finished == ["vae"]


def test_options_that_are_not_given_are_the_runs_own(stopped):
    options, _ = merge_options(stopped, {})
    assert options == OPTIONS


def test_options_that_only_older_runs_have_are_passed_over(tmp_path):
    older = {"weight_decay": 0.01, "gradient_clip": 1.0, "shared_noise": 0.0}
    write_json(tmp_path / "train.json", {"options": {"seed": 5} | older, "finished": ["vae"]})
    assert read_record(tmp_path) == (TrainOptions(seed=5), ["vae"])


def test_a_preset_brings_its_own_defaults(tmp_path):
    options, finished = merge_options(tmp_path / "run", {"preset": "small", "seed": 5})
    assert options == dataclasses.replace(RECIPES["small"], seed=5) and finished == []


def test_all_that_is_missing_is_trained_in_order():
    assert stages_to_run("run", None, []) == list(STAGES)
    assert stages_to_run("run", None, ["vae"]) == ["image", "video"]


def test_a_stage_can_be_trained_alone():
    assert stages_to_run("run", "image", ["vae"]) == ["image"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and no run; choose a new folder"):
        merge_options(tmp_path, {})


@pytest.mark.parametrize("stage, message", [
    ("vae", "the vae stage of .* is finished; choose a new folder"),
    ("video", "--stage video needs the image stage of .*, which is not finished"),
])
def test_a_stage_out_of_turn_is_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        stages_to_run("run", stage, ["vae"])


@pytest.mark.parametrize("text, message", [
    ("", "not a JSON file"), ('{"options": {"seed"', "not a JSON file"),
    ("[]", "needs a JSON object"), ("{}", "damaged, or of another version"),
    ('{"options": {"speed": 3}, "finished": []}', "speed is unknown; is the file damaged"),
    ('{"options": {"seed": "x"}, "finished": []}', "seed needs int, .* got 'x'"),
    ('{"options": [], "finished": []}', "damaged, or of another version"),
    ('{"options": {}, "finished": 3}', "damaged, or of another version"),
    ('{"options": {}, "finished": ["gan"]}', "damaged, or of another version"),
    ('{"options": {"preset": "big"}, "finished": []}', "preset needs one of .* got 'big'"),
])
def test_a_damaged_record_is_refused_by_name(stopped, text, message):
    (stopped / "train.json").write_text(text)
    with pytest.raises(ValueError, match=f"train.json: {message}"):
        read_record(stopped)


@pytest.mark.parametrize("options, message", [
    ({"image_size": 20}, "--image-size needs a multiple of 8, got 20"),
    ({"preset": "small", "image_size": 40}, "--image-size needs a multiple of 16, got 40"),
    ({"video_steps": 0}, r"--video-steps needs to lie in \[1, 1000000000\], got 0"),
    ({"seed": -1}, "--seed needs to lie in .*, got -1"),
    ({"max_tokens": 2}, r"--max-tokens needs to lie in \[3, 65536\], got 2"),
    ({"vae_learning_rate": -0.1}, "--vae-learning-rate needs to lie in .0, "),
    ({"kl_weight": math.nan}, "--kl-weight needs to lie in .*, got nan"),
    ({"caption_dropout": 1.5}, r"--caption-dropout needs to lie in \[0, 1\], got 1.5"),
    ({"frames_per_second": 0}, "frames_per_second needs"),
    ({"num_steps": 2000}, "num_steps needs"),
    ({"prediction_type": "epsilon"}, "cannot start from zero terminal SNR"),
])
def test_what_a_later_stage_could_not_do_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPES[options.get("preset", "tiny")], **options)


@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_the_schedule_divides_the_signal_to_noise_ratio(divisor):
    def ratio(diffusion):
        return diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)

    plain = TrainOptions(snr_divisor=1.0, zero_terminal_snr=False).diffusion()
    divided = TrainOptions(snr_divisor=divisor, zero_terminal_snr=False).diffusion()
    assert torch.allclose(ratio(divided), ratio(plain) / divisor, rtol=1e-9)


def test_a_divisor_of_zero_is_refused_by_its_flag():
    with pytest.raises(ValueError, match="--snr-divisor needs to lie in"):
        TrainOptions(snr_divisor=0.0)


def test_the_last_timestep_is_pure_noise_if_asked_for():
    assert TrainOptions().diffusion().alphas_cumprod[-1] == 0
    assert TrainOptions(zero_terminal_snr=False).diffusion().alphas_cumprod[-1] > 0


# Its data


def test_shapes_are_opened_as_the_options_say():
    shapes = open_data(TrainOptions(num_clips=7, num_frames=3, image_size=24, seed=5))
    seen = len(shapes), shapes.num_frames, shapes.max_frames, shapes.image_size, shapes.seed
    assert seen == (7, 3, 3, 24, 5)


@pytest.mark.parametrize("pace", [{"stride": 3}, {"frame_rate": 5.5}])
def test_a_folder_is_opened_as_the_options_say(tmp_path, pace):
    make_clip(tmp_path / "dog/a.gif")
    given = {"num_frames": 2, "image_size": 24, "max_frames": 4, "stride": 1, "frame_rate": None}
    clips = open_data(TrainOptions(data=str(tmp_path), **given | pace))
    assert {name: getattr(clips, name) for name in given} == given | pace
    assert clips.captions == ["dog"]
