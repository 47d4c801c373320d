"""Each position of the shift against values by hand, on a block of simple layers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_UNET, build_unet, unet_inputs
from torch import nn

from layers import ResnetBlock
from shift import temporal_shift
from studies.places import PLACES, PlacedBlock, past, place_shift, quarter


class Factor(nn.Module):
    """Multiplies frames by a number, in place of a convolution, and keeps its input."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        self.seen = x
        return self.factor * x


def placed_block(name):
    """A block without norms; its convolutions double and triple, and the time adds 0."""
    block = ResnetBlock(6, 6, 1, 1e-5, time_channels=1)
    block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    block.conv1, block.conv2 = Factor(2.0), Factor(3.0)
    nn.init.zeros_(block.time_emb_proj.weight)
    nn.init.zeros_(block.time_emb_proj.bias)
    return place_shift(block, name)


X = 1 + torch.arange(18.0).view(1, 3, 6, 1, 1)  # b t c 1 1, positive
FIRST = 2 * F.silu(X)  # after conv1, without a shift
SECOND = 3 * F.silu(FIRST)  # after conv2


@pytest.mark.parametrize("name, first, second", [
    ("front1", temporal_shift(FIRST), temporal_shift(SECOND)),
    ("front2", FIRST, temporal_shift(SECOND)),
    ("front", temporal_shift(FIRST), temporal_shift(temporal_shift(SECOND))),
    ("end", FIRST, SECOND),
    ("quarter", FIRST, quarter(SECOND)), ("past", FIRST, past(SECOND)),
])
def test_a_place_shifts_here_and_nowhere_else(name, first, second):
    """A shift moves values and keeps zeros, so it commutes with the SiLU and with Factor."""
    block = placed_block(name)
    branch = block(X, torch.zeros(1, 1)) - X
    after_conv1 = 2 * block.conv1.seen.view_as(X)
    after_conv2 = 3 * block.conv2.seen.view_as(X)
    assert torch.allclose(after_conv1, first) and torch.allclose(after_conv2, second)
    assert torch.allclose(branch, temporal_shift(SECOND) if name == "end" else second)


def test_the_past_alone_and_a_quarter_by_hand():
    x = torch.tensor([[[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]])  # b t c
    assert past(x).tolist() == [[[0, 0, 3, 4, 5, 6], [1, 2, 9, 10, 11, 12]]]
    assert quarter(x).tolist() == [[[0, 2, 3, 4, 5, 12], [1, 8, 9, 10, 11, 0]]]


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@pytest.mark.parametrize("place, shifts", [
    ({"after conv1": temporal_shift}, 1),
    ({"after conv1": temporal_shift, "after conv2": temporal_shift}, 2),
])
def test_a_placed_block_computes_what_the_core_does(monkeypatch, kind, place, shifts):
    monkeypatch.setitem(PLACES, "as the core", place)
    config = dataclasses.replace(SMALL_UNET, resnet_time_scale_shift=kind)
    expected = build_unet(config, temporal="shift", shifts=shifts)(*unet_inputs())
    placed = place_shift(build_unet(config, temporal="none"), "as the core")(*unet_inputs())
    assert torch.allclose(placed, expected, atol=1e-6)


@pytest.mark.parametrize("name", PLACES)
def test_an_image_is_not_shifted_and_no_weight_is_new(name):
    unet, inputs = build_unet(temporal="none"), unet_inputs(t=1)
    expected, names = unet(*inputs), list(unet.state_dict())
    placed = place_shift(unet, name)
    assert any(isinstance(module, PlacedBlock) for module in placed.modules())
    assert torch.allclose(placed(*inputs), expected, atol=1e-6)
    assert list(placed.state_dict()) == names
