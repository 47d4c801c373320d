"""Counts by hand: operations, and weights that variants share."""

from dataclasses import replace

import pytest
import torch
from helpers import call

from model import UNet
from studies import costs
from studies.measuring import measure, ratio
from temporal import VARIANTS
from training.options import RECIPES

OPTIONS = replace(RECIPES["tiny"], video_batch_size=1)


def build(name="shift"):
    """The tiny U-Net of a variant, without memory."""
    config = replace(OPTIONS, temporal=name).unet()
    with torch.device("meta"):
        return UNet(config)


def test_counts_of_convolutions_over_time_by_hand_and_nothing_for_the_shift():
    none, shift, conv = (costs.count(build(name), OPTIONS) for name in ("none", "shift", "conv"))
    # 3 taps x channels squared, two convolutions per block: one block of 32 channels on the way
    # down and two on the way up at 8 x 8; one, two and two blocks of 64 channels at 4 x 4.
    assert conv["new"] == 2 * (3 * (3 * 32**2 + 32) + 5 * (3 * 64**2 + 64))
    added = 2 * 3 * 2 * 8 * (3 * 32**2 * 64 + 5 * 64**2 * 16)  # 2 operations, 8 frames
    assert conv["operations"] - none["operations"] == added
    assert shift == none


def test_variants_share_the_memory_of_common_weights():
    unets = {name: build(name) for name in ("shift", "conv")}
    costs.share_weights(unets.values(), "cpu")
    shift, conv = (unet.state_dict() for unet in unets.values())
    assert all(conv[name].data_ptr() == value.data_ptr() for name, value in shift.items())
    assert len(conv) > len(shift) and not any(value.is_meta for value in conv.values())


def test_turns_alternate_and_so_do_ratios():
    calls, ticks = [], iter(range(100))
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measure(functions, 2, torch.device("cpu"), lambda: next(ticks))
    assert calls == ["a", "b"] * 3 and seconds == {"a": [1, 1], "b": [1, 1]}  # after a warm-up
    seconds = {"a": [2.0, 6.0, 20.0], "b": [1.0, 2.0, 10.0]}
    assert ratio(seconds, "a", "b") == "2.000 (2.000 to 3.000)"


@pytest.mark.parametrize("turns", [0, 1])
def test_the_command_has_a_row_for_each_variant(capsys, monkeypatch, turns):
    monkeypatch.setitem(RECIPES, "tiny", OPTIONS)
    call(costs.main, "--turns", turns, "--device", "cpu")
    tables = [part.splitlines() for part in capsys.readouterr().out.split("\n\n") if "|" in part]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[-1]]
    assert [row[0] for row in rows[2:]] == [*VARIANTS, "shift-twice"]
    assert rows[2][:4] == ["none", "1,063,812", "0", "0.33"]
    assert len(tables) == 1 and {len(row) for row in rows} == {8 if turns else 4}


def test_the_command_times_what_is_asked_over_the_first_variant(capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", OPTIONS)
    call(costs.main, "--turns", 1, "--device", "cpu", "--variants", "shift,none", "--only",
         "forward")
    *_, head, _, first, second = capsys.readouterr().out.splitlines()
    assert "forward over shift" in head and "training step" not in head
    assert first.startswith("| shift |") and second.startswith("| none |")
    with pytest.raises(ValueError, match="got shfit"):
        call(costs.main, "--variants", "none,shfit")
