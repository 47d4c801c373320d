"""Packed convolutions: they compute and save what the plain ones do."""

import dataclasses

import pytest
import torch
from recorded.rule import fill, normal
from test_weights import fresh_pipeline
from torch import nn

import packing
from model import PRESETS, UNet
from packing import PackedConv2d, pack
from pipeline import Sampling
from vae import PRESETS as VAE_PRESETS
from vae import AutoencoderKL
from weights import load_pipeline, save_pipeline


def convolution(kernel_size=3, **options):
    return fill(nn.Conv2d(7, 10, kernel_size, **options)).requires_grad_(False)


def networks():
    """A U-Net and an autoencoder, tiny but with every layer that the large ones have."""
    unet = dataclasses.replace(PRESETS["tiny"], attention_levels=(True, True))
    vae = dataclasses.replace(VAE_PRESETS["tiny"], mid_block_add_attention=True)
    networks = {"unet": UNet(unet), "vae": AutoencoderKL(vae)}
    return {name: fill(network).requires_grad_(False) for name, network in networks.items()}


def assert_close(out, expected):
    """To 1e-5 of the largest value: a sum in another order rounds otherwise."""
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(out, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# One convolution


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("max_channels, num_parts", [(7, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("padding", [0, 1, (0, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_packed_convolution_equals_the_plain_one(
    monkeypatch, stride, padding, max_channels, num_parts, layout
):
    monkeypatch.setattr(packing, "MAX_CHANNELS", max_channels)
    plain = convolution(stride=stride, padding=padding)
    packed = PackedConv2d(plain)
    x = normal(3, 7, 9, 6).contiguous(memory_format=layout)
    assert len(packed.packed) == num_parts
    assert_close(packed(x), plain(x))


@pytest.mark.parametrize("options", [{"bias": False}, {"dilation": 2}, {"kernel_size": (1, 3)}])
def test_convolutions_of_other_kinds_are_packed_as_well(options):
    plain, x = convolution(**options), normal(3, 7, 9, 6)
    assert_close(PackedConv2d(plain)(x), plain(x))


@pytest.mark.parametrize("max_channels", [7, 3])
def test_the_result_has_channels_innermost(monkeypatch, max_channels):
    monkeypatch.setattr(packing, "MAX_CHANNELS", max_channels)
    out = PackedConv2d(convolution())(normal(3, 7, 9, 6))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("max_channels", [7, 3])
def test_a_packed_convolution_has_the_weights_of_the_plain_one(monkeypatch, max_channels):
    monkeypatch.setattr(packing, "MAX_CHANNELS", max_channels)
    assert_same_state(PackedConv2d(convolution()), convolution())


# Networks


def test_all_convolutions_but_those_of_one_place_are_packed():
    for network in networks().values():
        plain = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
        single = {name for name in plain if network.get_submodule(name).kernel_size == (1, 1)}
        assert pack(network) is network
        modules = dict(network.named_modules())
        assert {name for name in plain if isinstance(modules[name], nn.Conv2d)} == single
        assert {n for n in plain if isinstance(modules[n], PackedConv2d)} == plain - single
        assert 0 < len(single) < len(plain)


@pytest.mark.parametrize("max_channels", [640, 24])
def test_a_packed_unet_predicts_what_the_plain_one_does(monkeypatch, max_channels):
    monkeypatch.setattr(packing, "MAX_CHANNELS", max_channels)
    inputs = normal(2, 3, 4, 8, 12), torch.tensor([37, 2]), normal(2, 5, 64, seed=2)
    unet = networks()["unet"]
    expected = unet(*inputs)
    assert_close(pack(unet)(*inputs), expected)


@pytest.mark.parametrize("max_channels", [640, 24])
def test_a_packed_autoencoder_makes_what_the_plain_one_does(monkeypatch, max_channels):
    monkeypatch.setattr(packing, "MAX_CHANNELS", max_channels)
    frames, latents = normal(2, 3, 8, 12), normal(2, 4, 3, 2, seed=2)
    vae = networks()["vae"]
    mean, decoded = vae.encode(frames).mean, vae.decode(latents)
    pack(vae)
    assert_close(vae.encode(frames).mean, mean)
    assert_close(vae.decode(latents), decoded)


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_packing_changes_no_name_no_order_and_no_bit_of_the_weights(name):
    assert_same_state(pack(networks()[name]), networks()[name])


# Pipelines


def draw(pipeline):
    sampling = Sampling(num_frames=2, image_size=16, num_steps=2, guidance_scale=1)
    *_, latents = pipeline.sample(["a red square"], [3], sampling)
    return pipeline.decode(latents)


def test_a_pipeline_on_the_cpu_draws_with_packed_networks():
    pipeline = fresh_pipeline().to("cpu")
    assert isinstance(pipeline.unet.conv_in, PackedConv2d)
    assert isinstance(pipeline.vae.decoder.conv_in, PackedConv2d)
    torch.testing.assert_close(draw(pipeline), draw(fresh_pipeline()), atol=1e-4, rtol=0)


def test_to_the_cpu_twice_is_as_good_as_once():
    once, twice = fresh_pipeline().to("cpu"), fresh_pipeline().to("cpu").to("cpu")
    assert torch.equal(draw(twice), draw(once))
    assert_same_state(twice.unet, once.unet)


def test_a_packed_pipeline_is_saved_like_a_plain_one(tmp_path):
    save_pipeline(fresh_pipeline().to("cpu"), tmp_path / "packed")
    save_pipeline(fresh_pipeline(), tmp_path / "plain")
    loaded, plain = (load_pipeline(tmp_path / name) for name in ("packed", "plain"))
    for part in ("unet", "vae", "text_encoder"):
        assert_same_state(getattr(loaded, part), getattr(plain, part))
    for file in (tmp_path / "plain").rglob("*.*"):
        written = tmp_path / "packed" / file.relative_to(tmp_path / "plain")
        same = written.read_bytes() == file.read_bytes()
        assert same, file.name  # without pytest's comparison of megabytes
