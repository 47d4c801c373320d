"""A whole comparison of two variants, of two steps each; what its tables say; going on with one."""

import json
import os
import shutil

import pytest
import torch
from helpers import call

import metrics
import train
from options import TrainOptions
from studies import compare, costs, report
from temporal import VARIANTS
from weights import load_unet

TINY = ("--steps", 2, "--checkpoints", 1, "--curve-prompts", 2, "--num-prompts", 33,
        "--repetitions", 1, "--device", "cpu")


def call_compare(*arguments):
    """The command, with a feature net that has learnt nothing: a real one takes half a minute."""

    def untrained(num_frames, image_size, device, progress):
        return metrics.FeatureNet(num_frames, image_size).eval().requires_grad_(False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "in_a_process", lambda function, *inputs: function(*inputs))
        patch.setattr(metrics, "train_feature_net", untrained)
        call(compare.main, *TINY, *arguments)


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory):
    """The folder of a comparison of shift and conv, not to be written into."""
    output = tmp_path_factory.mktemp("compared") / "compare"
    loss, batches = train.denoising_loss, []

    def loss_and_keep(unet, diffusion, *batch):
        batches.append([x.clone() for x in batch])
        return loss(unet, diffusion, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "denoising_loss", loss_and_keep)
        call_compare(trained, "--variants", "shift,conv", "--seeds", 1, "--output", output)
    torch.save(batches, output / "batches.pt")
    return output


@pytest.fixture
def begun(compared, tmp_path):
    """A copy of it, to be gone on with."""
    return shutil.copytree(compared, tmp_path / "compare")


def tables_of(text):
    """[[row, ...], ...], a row its cells."""
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    return [[line.strip("| ").split(" | ") for line in table] for table in tables]


# What it leaves


def test_the_tables_have_a_row_for_each_variant(compared):
    cost, agreement, curve, quality = tables_of((compared / "report.md").read_text())
    assert [row[0] for row in cost[2:]] == ["shift", "conv"]
    assert [row[:2] for row in agreement[2:]] == [
        ["shift", "seen"], ["shift", "held out"], ["conv", "seen"], ["conv", "held out"],
    ]
    assert [row[0] for row in curve[2:]] == ["shift", "conv"]
    assert [row[0] for row in quality[2:]] == ["shift", "conv", "the image model", "real clips"]


def test_the_tables_have_these_columns(compared):
    cost, agreement, curve, quality = tables_of((compared / "report.md").read_text())
    assert cost[0] == [
        "variant", "parameters", "new", "GFLOPs a clip", "forward over shift",
        "training step over shift", "sampling over shift", "training step, s", "peak GiB",
    ]
    assert agreement[0] == ["variant", "combinations", "colour", "shape", "direction", "all"]
    assert curve[0] == ["variant", "2 steps"]
    assert quality[0] == ["variant", "images right, %", "consistency", "FVD-shapes"]
    assert {len(row) for row in cost} == {9} and {len(row) for row in quality} == {4}


def test_the_number_of_new_parameters_is_told(compared):
    rows = {row[0]: row for row in tables_of((compared / "report.md").read_text())[0]}
    # The tiny U-Net has 8 blocks, 3 of 32 and 5 of 64 channels, with two convolutions each.
    new = 2 * (3 * (3 * 32**2 + 32) + 5 * (3 * 64**2 + 64))
    assert (rows["shift"][2], rows["conv"][2]) == ("0", f"{new:,}")


def test_all_files_are_there(compared):
    files = {path.name for path in compared.iterdir()}
    assert files >= {"report.md", "report.json", "steps.png", "seconds.png", "sheet.png"}


def test_the_json_has_the_curves_and_the_scores(compared):
    results = json.loads((compared / "report.json").read_text())["results"]
    assert {name: list(runs[0]["curve"]) for name, runs in results.items()} == {
        "shift": ["2"], "conv": ["2"],
    }
    assert set(results["conv"][0]["scores"]) == {
        "clips, seen", "clips, held out", "clips, all", "images, seen", "images, held out",
        "images, all", "consistency", "FVD-shapes",
    }


def test_each_is_trained_its_own_way(compared):
    for name in ("shift", "conv"):
        assert load_unet(compared / f"{name}-0" / "unet").config.temporal == name


def test_all_variants_see_the_same_batches(compared):
    batches = torch.load(compared / "batches.pt")  # two steps of each
    for first, second in zip(batches[:2], batches[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Going on


def test_what_is_finished_is_not_trained_again(trained, begun, monkeypatch):
    monkeypatch.setattr(compare.Comparison, "train", lambda *job: pytest.fail("trained again"))
    before = (begun / "report.md").read_text()
    call_compare(trained, "--variants", "shift,conv", "--seeds", 1, "--output", begun)
    assert (begun / "report.md").read_text() == before


def test_only_what_is_missing_is_trained(trained, begun, monkeypatch):
    trained_now, train_one = [], compare.Comparison.train

    def spy(self, name, seed):
        trained_now.append((name, seed))
        train_one(self, name, seed)

    monkeypatch.setattr(compare.Comparison, "train", spy)
    (begun / "conv-0" / "result.json").unlink()
    call_compare(trained, "--variants", "shift,conv", "--seeds", 2, "--output", begun)
    assert trained_now == [("conv", 0), ("shift", 1), ("conv", 1)]


def test_two_trainings_at_a_time_learn_the_same(trained, compared, begun, capfd):
    for name in ("shift-0", "conv-0"):
        shutil.rmtree(begun / name)
    call_compare(trained, "--variants", "shift,conv", "--seeds", 1, "--jobs", 2, "--output", begun)
    assert capfd.readouterr().out.count("trained: ") == 2
    for name in ("shift-0", "conv-0"):
        a, b = (load_unet(path / name / "unet").state_dict() for path in (compared, begun))
        assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def test_a_training_that_was_stopped_goes_on_where_it_was(trained, begun, monkeypatch):
    (begun / "settings.json").unlink()
    shutil.rmtree(begun / "conv-0")
    loss, calls = train.denoising_loss, []

    def stop_at_the_second(*batch):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("stopped")
        return loss(*batch)

    monkeypatch.setattr(train, "denoising_loss", stop_at_the_second)
    again = trained, "--variants", "conv", "--seeds", 1, "--output", begun, "--checkpoints", 2
    with pytest.raises(ValueError, match="stopped"):
        call_compare(*again)
    call_compare(*again)
    assert len(calls) == 3  # the second step once more, and not the first
    assert list(json.loads((begun / "conv-0" / "curve.json").read_text())) == ["1", "2"]


def test_other_steps_in_the_same_folder_are_refused(trained, begun, capsys):
    with pytest.raises(ValueError, match="was made with steps 2, not 3; choose another --output"):
        call(compare.main, trained, "--variants", "shift", "--output", begun, *TINY, "--steps", 3)


@pytest.mark.parametrize("key", ["image_model", "sampling"])
def test_another_image_model_or_sampler_in_the_same_folder_is_refused(trained, begun, key):
    settings = json.loads((begun / "settings.json").read_text())
    (begun / "settings.json").write_text(json.dumps(settings | {key: "another"}))
    with pytest.raises(ValueError, match=f"was made with {key} another, not .*another --output"):
        call(compare.main, trained, "--variants", "shift", "--output", begun, *TINY)


# Mistakes


@pytest.mark.parametrize("flags, message", [
    (["--variants", "shift,telepathy"], "--variants needs some of none, shift, .*'telepathy'"),
    (["--num-prompts", "32"], "--num-prompts needs >= 33"),
    (["--seeds", "0"], r"--seeds needs to lie in \[1, 1000\], got 0"),
])
def test_a_mistake_is_named(trained, flags, message):
    with pytest.raises(ValueError, match=message):
        call(compare.main, trained, *flags)


@pytest.mark.parametrize("file, key, value", [
    ("costs.json", "shift", None), ("costs.json", "shift", {"gib": 1.0}),
    ("costs.json", "shift", dict.fromkeys(("gib", "gflops", "parameters", "new"), 1)
     | {"forward": [1], "training step": [1], "sampling": [0]}),
    ("shift-0/result.json", "scores", []), ("shift-0/result.json", "curve", {"2": {"all": "x"}}),
    ("references.json", "real clips", []),
])
def test_a_damaged_result_is_named(trained, begun, file, key, value):
    record = json.loads((begun / file).read_text())
    (begun / file).write_text(json.dumps(record | {key: value}))
    with pytest.raises(ValueError, match=f"{file}: damaged, or of another version; remove it"):
        call_compare(trained, "--variants", "shift,conv", "--seeds", 1, "--output", begun)


def test_a_run_without_an_image_stage_is_refused(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"options": {}, "finished": ["vae"]}))
    with pytest.raises(ValueError, match="needs a finished image stage on --data shapes"):
        call(compare.main, tmp_path, "--device", "cpu")


# Its parts


def test_a_cell_has_an_interval_from_three_seeds_on():
    assert report.cell([80.0, 90.0]) == "85.0"
    assert report.cell([80.0, 90.0, 100.0]) == "90.0 ± 24.8"  # 4.303 * 10 / sqrt(3)


def test_a_curve_against_seconds_is_steps_times_the_seconds_of_one():
    results = {"shift": [{"curve": {"10": {"all": 30.0}, "5": {"all": 20.0}}}]}
    assert report.curves(results, {"shift": 0.5}) == {
        "shift": [(2.5, 20.0, 20.0, 20.0), (5.0, 30.0, 30.0, 30.0)],
    }


def test_the_operations_of_convolutions_over_time_by_hand():
    plain, conv = (costs.gflops(TrainOptions(temporal=kind)) for kind in ("none", "conv"))
    # 2 operations x 3 taps x channels squared, two convolutions a block, 8 frames: one block of 32
    # channels going down and two going up at 8 x 8, one, two and two of 64 at 4 x 4.
    added = 2 * 3 * 2 * 8 * (3 * 32**2 * 64 + 5 * 64**2 * 16)
    assert conv - plain == pytest.approx(added / 1e9)


def test_the_shift_adds_no_operation():
    shift, none = (costs.gflops(TrainOptions(temporal=kind)) for kind in ("shift", "none"))
    assert shift == none


def test_memory_is_that_of_another_process():
    assert costs.in_a_process(os.getpid) != os.getpid()


def test_every_way_is_compared():
    assert {options["temporal"] for options in compare.VARIANTS.values()} == set(VARIANTS)
