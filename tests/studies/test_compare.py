"""A whole comparison of three variants, of two steps each; its tables; and how it continues."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import call

import train
from studies import compare, places
from temporal import VARIANTS
from training.options import TrainOptions

NAMES = ["shift-twice", "conv", "shift-end"]
TINY = ("--steps", 2, "--checkpoints", 1, "--curve-prompts", 2, "--num-prompts", 4, "--seeds", 1,
        "--device", "cpu")


def call_compare(*arguments):
    call(compare.main, *TINY, *arguments)


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory):
    """The folder of a comparison of NAMES, not to be written into; steps.pt has its batches."""
    output = tmp_path_factory.mktemp("compared") / "compare"
    loss, steps = train.denoising_loss, []

    def loss_and_keep(unet, diffusion, *batch):
        placed = any(isinstance(module, places.PlacedBlock) for module in unet.modules())
        steps.append((unet.config.temporal, unet.config.shifts, placed, [x.clone() for x in batch]))
        return loss(unet, diffusion, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "denoising_loss", loss_and_keep)
        call_compare(trained, "--variants", ",".join(NAMES), "--output", output)
    torch.save(steps, output / "steps.pt")
    return output


@pytest.fixture
def begun(compared, tmp_path):
    """A copy of it, to continue."""
    return shutil.copytree(compared, tmp_path / "compare")


@pytest.fixture
def trained_now(monkeypatch):
    """The (name, seed) of each training from now on."""
    jobs, train_one = [], compare.Comparison.train
    monkeypatch.setattr(compare.Comparison, "train", lambda self, *job: jobs.append(job)
                        or train_one(self, *job))
    return jobs


def test_the_report_has_two_tables_with_a_row_for_each_variant(compared):
    parts = (compared / "report.md").read_text().split("\n\n")
    curve, quality = ([line.strip("| ").split(" | ") for line in part.splitlines()]
                      for part in parts if part.startswith("|"))
    assert curve[0] == ["variant", "2 steps"] and [row[0] for row in curve[2:]] == NAMES
    assert quality[0] == [
        "variant", "seen, %", "held out, %", "images right, %", "crispness", "consistency"]
    assert [row[0] for row in quality[2:]] == [*NAMES, "the image model", "real clips"]
    assert (compared / "sheet.png").exists()


def test_each_is_trained_its_own_way_on_the_same_batches(compared):
    steps = torch.load(compared / "steps.pt")  # two for each variant
    assert [step[:3] for step in steps[::2]] == [
        ("shift", 2, False), ("conv", 1, False), ("none", 1, True)]
    for step in range(2):
        first, *others = (steps[2 * variant + step][3] for variant in range(3))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", compare.VARIANTS)
def test_nothing_of_the_run_decides_how_a_variant_sees_time(name):
    def how(**options):
        run = SimpleNamespace(choices=compare.FULL, options=TrainOptions(**options))
        row = compare.Comparison.options_of(run, name, seed=1)
        return row.temporal_fields() | {"rate": row.new_layers_rate}

    variant = compare.VARIANTS[name]
    assert how() == {"temporal": variant.temporal, "shifts": variant.shifts, "max_frames": 8,
                     "rate": variant.new_layers_rate}
    others = {field.name for field in dataclasses.fields(TrainOptions)} - {"seed", "num_frames"}
    assert how(**dict.fromkeys(others, "other")) == how()


def test_every_temporal_variant_has_a_row():
    assert {variant.temporal for variant in compare.VARIANTS.values()} == set(VARIANTS)


def test_only_missing_trainings_are_done(trained, begun, trained_now):
    (begun / "conv-0" / "result.json").unlink()
    call_compare(trained, "--variants", "shift-twice,conv", "--output", begun, "--seeds", 2)
    # conv-0 has its weights, and is only scored again
    assert trained_now == [("conv", 0), ("shift-twice", 1), ("conv", 1)]


def test_a_new_variant_leaves_a_finished_comparison_valid(trained, begun, trained_now, monkeypatch):
    monkeypatch.setitem(compare.VARIANTS, "new", compare.Variant("none"))
    call_compare(trained, "--variants", "conv,new", "--output", begun)
    assert trained_now == [("new", 0)]
    assert json.loads((begun / "settings.json").read_text()).keys() >= {*NAMES, "new"}


def test_a_stopped_training_continues_where_it_was(trained, tmp_path, monkeypatch):
    loss, calls = train.denoising_loss, []

    def stop_at_the_second(*batch):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("stopped")
        return loss(*batch)

    monkeypatch.setattr(train, "denoising_loss", stop_at_the_second)
    again = trained, "--variants", "shift", "--output", tmp_path, "--checkpoints", 2
    with pytest.raises(ValueError, match="stopped"):
        call_compare(*again)
    call_compare(*again)
    assert len(calls) == 3  # the second step once more, and not the first
    assert list(json.loads((tmp_path / "shift-0" / "curve.json").read_text())) == ["1", "2"]


def test_other_steps_and_a_changed_variant_are_refused(trained, begun, monkeypatch):
    with pytest.raises(ValueError, match="was made with steps 2, not 3; choose another --output"):
        call_compare(trained, "--variants", "conv", "--output", begun, "--steps", 3)
    faster = dataclasses.replace(compare.VARIANTS["conv"], new_layers_rate=2.0)
    monkeypatch.setitem(compare.VARIANTS, "conv", faster)
    with pytest.raises(ValueError, match="was made with conv .* choose another --output"):
        call_compare(trained, "--variants", "conv", "--output", begun)


def test_an_unknown_variant_and_an_unfinished_run_are_named(trained, tmp_path):
    with pytest.raises(ValueError, match="--variants needs some of none, shift, .* got telepathy"):
        call_compare(trained, "--variants", "shift,telepathy")
    (tmp_path / "train.json").write_text(json.dumps({"options": {}, "finished": ["vae"]}))
    with pytest.raises(ValueError, match="needs a finished image stage"):
        call_compare(tmp_path)
