"""What is counted, by hand: bytes that exist at once, operations, and weights that are shared."""

from dataclasses import replace

import pytest
import torch
from helpers import call

from model import UNet
from options import RECIPES
from studies import costs
from studies.bench import measure
from temporal import VARIANTS

OPTIONS = replace(RECIPES["tiny"], video_batch_size=1)


def build(name="shift"):
    """The tiny U-Net of a variant, without memory."""
    config = replace(OPTIONS, temporal=name).unet()
    with torch.device("meta"):
        return UNet(config)


def meta(*shape):
    return torch.empty(shape, device="meta")


def test_the_peak_has_the_tensors_that_exist_at_once():
    x = meta(1000)  # 4,000 bytes
    with costs.PeakBytes(x) as counter:
        y = x + 1
        y = y + 1  # the first y exists until the second does: 8,000
        del y
        z = x + 1  # 4,000
        z.add_(1)  # in place: nothing new
        z.view(10, 100)
    assert counter.peak == 8000 and counter.bytes == 4000


def test_a_forward_pass_needs_no_more_than_all_it_makes_and_no_less_than_what_it_keeps():
    counted = costs.activation_bytes(build(), OPTIONS)
    # 8 frames of 8 x 8 latents with 32 channels; the way down keeps more than two of these.
    assert 2 * 4 * 8 * 8 * 8 * 32 < counted < 100 * 4 * 8 * 8 * 8 * 32


def test_operations_are_those_of_the_layers():
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7, device="meta"),
                                 torch.nn.Linear(7, 3, bias=False, device="meta"))
    counts = costs.operations(layers, meta(2, 5))
    assert counts == {"aten.addmm": 2 * 2 * 5 * 7, "aten.mm": 2 * 2 * 7 * 3}


def test_pixels_cost_as_many_times_as_there_are_more_of_them_but_for_attention():
    x0, _, *conditions = costs.batch_of(OPTIONS, torch.device("meta"))
    pixels, latents = costs.on_pixels(OPTIONS), costs.operations(build(), x0, *conditions)
    assert pixels["aten.convolution"] / latents["aten.convolution"] == pytest.approx(16, rel=0.02)
    assert pixels["aten.bmm"] / latents["aten.bmm"] > 100  # places squared: up to 256


def test_variants_share_the_memory_of_what_they_have_in_common():
    unets = {name: build(name) for name in ("shift", "conv")}
    costs.share_weights(unets.values())
    shift, conv = (unet.state_dict() for unet in unets.values())
    assert all(conv[name].data_ptr() == value.data_ptr() for name, value in shift.items())
    assert len(conv) > len(shift) and not any(value.is_meta for value in conv.values())


def test_turns_alternate_and_the_first_may_warm_up():
    calls, ticks = [], iter(range(100))
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measure(functions, 2, torch.device("cpu"), lambda: next(ticks), warm_up=1)
    assert calls == ["a", "b"] * 3 and seconds == {"a": [1, 1], "b": [1, 1]}


def test_the_table_has_a_row_for_each_variant(capsys):
    call(costs.main, "--preset", "tiny", "--turns", 1)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert [row[0] for row in rows[2:]] == list(VARIANTS)
    assert rows[2 + VARIANTS.index("shift")][1:4] == ["1.1", "0.0", "0.00033"]
    assert rows[2 + VARIANTS.index("shift")][5] == "1.000 (1.000 to 1.000)"
    assert lines[-3].startswith("all: ")


def test_less_than_no_turns_are_refused():
    with pytest.raises(ValueError, match=r"--turns needs to lie in \[0, 1000\], got -1"):
        call(costs.main, "--turns", -1)
