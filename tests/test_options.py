"""The options of a run: which may change, which must not, and where a new run's come from."""

import dataclasses

import pytest
from helpers import flags, make_clip

from diffusion import Diffusion
from support.cli import Parser, add_flags, given_flags
from support.files import write_json
from training.options import (RECIPES, SAMPLING, STAGES, TrainOptions, merge_options,
                              read_record, stages_to_run)
from training.run import open_data

OPTIONS = dataclasses.replace(RECIPES["tiny"], image_size=16, num_clips=8)
# A value of every option that is not the tiny recipe's
OTHERS = {
    "seed": 1, "warmup_steps": 9, "ema_decay": 0.5, "accumulate": 2, "device": "cpu",
    "offload": True, "precision": "bf16", "compile": True, "workers": 2, "save_every": 7,
    "preset": "small", "init": "sd.safetensors", "merges": "bpe.txt.gz", "data": "clips",
    "num_frames": 4, "image_size": 48, "num_clips": 9, "stride": 2, "frame_rate": 7.5,
    "max_frames": 99, "vae_steps": 5, "vae_batch_size": 3, "vae_learning_rate": 0.25,
    "kl_weight": 0.5, "motion_weight": 1.5, "image_steps": 6, "image_batch_size": 2,
    "image_learning_rate": 0.125, "video_steps": 8, "video_batch_size": 4,
    "video_learning_rate": 0.75, "image_every": 0, "temporal": "conv",
    "shifts": 3 - RECIPES["tiny"].shifts, "new_layers_rate": 3.0, "prediction_type": "epsilon",
    "zero_terminal_snr": False,
    "snr_divisor": 2.0, "early_noise": 0.0, "max_tokens": 20,
}


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was stopped in its image stage."""
    record = {"options": dataclasses.asdict(OPTIONS), "finished": ["vae"]}
    write_json(tmp_path / "train.json", record)
    (tmp_path / "training_state.pt").touch()
    return tmp_path


# Flags and the record


def test_every_flag_comes_back_from_the_record(tmp_path):
    words = flags(**{name: value for name, value in OTHERS.items() if type(value) is not bool})
    words += ["--offload", "--compile", "--no-zero-terminal-snr"]
    parser = Parser()
    add_flags(parser, RECIPES["tiny"])
    given = given_flags(parser.parse_args(words), RECIPES["tiny"])
    assert given == OTHERS
    assert all(getattr(RECIPES["tiny"], name) != value for name, value in OTHERS.items())
    options = TrainOptions(**given)
    write_json(tmp_path / "train.json", {"options": dataclasses.asdict(options), "finished": []})
    assert read_record(tmp_path) == (options, [])


@pytest.mark.parametrize("preset", RECIPES)
def test_the_numbers_of_a_recipe_are_in_their_ranges(preset):
    recipe, parser = RECIPES[preset], Parser()
    add_flags(parser, recipe)
    numbers = {name: value for name, value in dataclasses.asdict(recipe).items()
               if type(value) in (int, float)}
    assert given_flags(parser.parse_args(flags(**numbers)), recipe) == numbers


@pytest.mark.parametrize("text, message", [
    ('{"options": {"seed"', "not a JSON file"), ("{}", "is not a record of a run"),
    ('{"options": {"speed": 3}, "finished": []}', "speed is unknown"),
    ('{"options": {"image_size": 20}, "finished": []}', "--image-size needs a multiple of 8"),
])
def test_a_damaged_record_is_refused_by_name(stopped, text, message):
    (stopped / "train.json").write_text(text)
    with pytest.raises(ValueError, match=f"train.json: {message}"):
        read_record(stopped)


# A run that exists


@pytest.mark.parametrize("given", [
    {"seed": 1}, {"image_size": 32}, {"preset": "small"}, {"vae_steps": 5}, {"image_steps": 5},
])
def test_an_option_that_the_run_was_not_trained_with_is_refused(stopped, given):
    ((name, value),) = given.items()
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"was trained with {flag} .*, not {value}; choose a new"):
        merge_options(stopped, given)


@pytest.mark.parametrize("given", [
    {}, {"save_every": 7, "data": "elsewhere", "device": "cuda", "precision": "fp32",
         "compile": True, "offload": True, "workers": 1},
    {"video_steps": 5, "video_batch_size": 1, "video_learning_rate": 0.5,
     "temporal": "conv", "new_layers_rate": 3.0, "image_every": 0, "early_noise": 0.0},
], ids=["nothing", "the machine", "a later stage"])
def test_options_of_the_machine_and_of_later_stages_may_change(stopped, given):
    assert merge_options(stopped, given) == (dataclasses.replace(OPTIONS, **given), ["vae"])


def test_more_steps_for_a_finished_run_are_refused_with_the_way_to_go_on(stopped):
    record = {"options": dataclasses.asdict(OPTIONS), "finished": ["vae", "image"]}
    write_json(stopped / "train.json", record)  # its video stage has begun, so it has no result yet
    with pytest.raises(ValueError, match="for other options$"):
        merge_options(stopped, {"video_steps": 9})
    with pytest.raises(ValueError, match=rf"a new folder for .* \(--init {stopped} trains it fur"):
        write_json(stopped / "train.json", record | {"finished": STAGES})
        merge_options(stopped, {"video_steps": 9})


# A new run


def test_a_new_run_needs_its_data_named(tmp_path):
    with pytest.raises(ValueError, match="needs --data shapes .* or --data FOLDER"):
        merge_options(tmp_path, {"preset": "small"})


@pytest.mark.parametrize("given", [
    *({"init": "sd", "data": "shapes", name: OTHERS[name]} for name in (
        "vae_steps", "vae_batch_size", "vae_learning_rate", "kl_weight", "motion_weight",
        "image_steps", "image_batch_size", "image_learning_rate", "max_tokens")),
    *({"data": "shapes", name: OTHERS[name]} for name in (
        "merges", "stride", "frame_rate", "max_frames", "new_layers_rate")),
    {"data": "clips", "num_clips": 9}, {"data": "shapes", "temporal": "conv", "shifts": 1},
], ids=lambda given: [*given][-1])
def test_an_option_that_the_run_would_not_use_is_refused(tmp_path, given):
    flag = "--" + [*given][-1].replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} has no effect, because .*; leave it out"):
        merge_options(tmp_path / "run", given)


def test_a_preset_brings_its_own_defaults(tmp_path):
    given = {"preset": "small", "seed": 5, "data": "shapes"}
    options, finished = merge_options(tmp_path / "run", given)
    assert options == dataclasses.replace(RECIPES["small"], seed=5) and finished == []


KEPT = {"prediction_type": None, "zero_terminal_snr": None, "snr_divisor": None}


def test_a_run_that_starts_from_another_has_its_options_and_its_schedule(stopped, tmp_path):
    given = {"init": str(stopped)}
    expected = dataclasses.replace(OPTIONS, **KEPT, **given)
    assert merge_options(tmp_path / "new", given) == (expected, [])
    given |= {"preset": "small", "data": "shapes"}  # a preset brings its defaults
    expected = dataclasses.replace(RECIPES["small"], **KEPT, **given)
    assert merge_options(tmp_path / "new", given) == (expected, [])


def test_a_run_that_starts_from_another_model_has_the_recipe_of_stable_diffusion(tmp_path):
    init = {"init": "v1-5.safetensors", "data": "clips"}
    expected = dataclasses.replace(RECIPES["sd1"], **KEPT, **init)
    assert merge_options(tmp_path / "new", init) == (expected, [])
    assert merge_options(tmp_path / "new", init | {"preset": "sd2"})[0].preset == "sd2"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / ".lock").touch()  # of a command that was stopped before it wrote anything else
    (tmp_path / "cache").mkdir()
    merge_options(tmp_path, {"data": "shapes"})
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and not a run of this command; .* a new"):
        merge_options(tmp_path, {})


@pytest.mark.parametrize("options, message", [
    ({"image_size": 20}, "--image-size needs a multiple of 8, got 20"),
    ({"preset": "small", "image_size": 40}, "--image-size needs a multiple of 16, got 40"),
    ({"prediction_type": "epsilon"}, "cannot start from zero terminal SNR"),
])
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPES[options.get("preset", "tiny")], **options)


# Configurations


@pytest.mark.parametrize("preset", RECIPES)
def test_networks_and_sampling_are_those_of_the_preset_at_the_size_of_the_run(preset):
    recipe = RECIPES[preset]
    recipe = dataclasses.replace(recipe, image_size=2 * recipe.image_size, temporal="conv",
                                 shifts=2, num_frames=5)
    unet, autoencoder, size = recipe.unet(), recipe.vae(), recipe.image_size
    assert recipe.preset == preset and autoencoder.sample_size == size
    assert (unet.temporal, unet.shifts, unet.max_frames) == ("conv", 2, recipe.latent_frames)
    assert unet.sample_size * autoencoder.downscale == size and autoencoder.scaling_factor == 1
    assert recipe.sampling(3) == dataclasses.replace(SAMPLING[preset], num_frames=3,
                                                     image_size=size)


def test_the_schedule_is_that_of_the_options():
    diffusion = TrainOptions(snr_divisor=2.0).diffusion()
    plain = TrainOptions(snr_divisor=1.0).diffusion()
    assert diffusion.prediction_type == "v_prediction" and diffusion.alpha_bar(999) == 0
    assert diffusion.snr(500) == pytest.approx(plain.snr(500) / 2)
    assert TrainOptions(zero_terminal_snr=False).diffusion().alpha_bar(999) > 0


SD = Diffusion(steps_offset=3)  # a schedule of another model
ADOPTED = TrainOptions(init="sd", **KEPT)


@pytest.mark.parametrize("given, expected", [
    ({}, {}), ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
    ({"prediction_type": "v_prediction", "zero_terminal_snr": True},
     {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": True,
      "timestep_spacing": "trailing"}),
    ({"zero_terminal_snr": False, "snr_divisor": 1.0}, {}),
])
def test_an_adopted_schedule_has_the_changes_asked_for(given, expected):
    assert dataclasses.replace(ADOPTED, **given).diffusion(SD) == dataclasses.replace(
        SD, **expected)


def test_an_adopted_schedule_is_divided_and_its_pure_noise_is_kept():
    divided = dataclasses.replace(ADOPTED, snr_divisor=4.0)
    assert divided.diffusion(SD).snr(500) == pytest.approx(SD.snr(500) / 4)
    zero = dataclasses.replace(SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert divided.diffusion(zero).snr(999) == 0 and divided.diffusion(zero).steps_offset == 3
    assert divided.diffusion(zero).snr(500) == pytest.approx(zero.snr(500) / 4)


def test_an_adopted_schedule_that_cannot_change_as_asked_is_refused():
    zero = dataclasses.replace(ADOPTED, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="use 'v_prediction'"):
        zero.diffusion(SD)
    with pytest.raises(ValueError, match="schedule of its own, which is kept; leave out"):
        zero.diffusion(TrainOptions().diffusion())


# Stages


def test_stages_that_are_missing_are_trained_in_order():
    assert stages_to_run("run", None, []) == list(STAGES)
    assert stages_to_run("run", None, ["vae"]) == ["image", "video"]
    assert stages_to_run("run", "image", ["vae"]) == ["image"]


@pytest.mark.parametrize("stage, message", [
    ("vae", "the vae stage of run is finished, or --init brings its result; choose a new folder"),
    ("video", "--stage video needs the image stage of run, which is not finished"),
])
def test_a_stage_out_of_turn_is_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        stages_to_run("run", stage, ["vae"])


# Data


def test_data_is_opened_as_the_options_say(tmp_path):
    make_clip(tmp_path / "a.gif")
    (tmp_path / "a.txt").write_text("dog")
    shapes = open_data(TrainOptions(num_clips=7, num_frames=3, image_size=24, seed=5))
    assert (len(shapes), shapes.num_frames, shapes.image_size, shapes.seed) == (7, 3, 24, 5)
    clips = open_data(TrainOptions(data=str(tmp_path), num_frames=2, image_size=24, max_frames=4,
                                   stride=3, frame_rate=5.5))
    assert clips.num_frames == 2 and clips.how == (24, 3, 5.5, 4) and clips.captions == ["dog"]
