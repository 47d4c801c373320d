"""bfloat16 where a device has it, by autocast or by frozen weights, shown here on a CPU."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import build_unet, fresh_pipeline, unet_inputs
from torch import nn

import devices
import layers
from devices import freeze, precision, uses_bf16, visit
from diffusion import Diffusion
from train import denoising_loss

ROUNDING = 2**-8  # of a bfloat16, relative


@pytest.fixture
def bf16(monkeypatch):
    """As on a GPU that has bfloat16."""
    monkeypatch.setattr(devices, "uses_bf16", lambda device, choice="auto": True)


def error(a, b):
    """The difference over b, both as root mean squares."""
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.parametrize("device, choice, supported, expected", [
    ("cpu", "auto", True, False), ("cpu", "bf16", True, False), ("cuda", "auto", True, True),
    ("cuda", "auto", False, False), ("cuda", "bf16", False, True), ("cuda", "fp32", True, False),
])
def test_bfloat16_is_for_gpus_that_have_it(monkeypatch, device, choice, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert uses_bf16(device, choice) == expected


def test_on_a_cpu_nothing_is_cast():
    x = torch.randn(2, 3)
    with precision("cpu"):
        assert nn.Linear(3, 4)(x).dtype == torch.float32
    network = freeze(nn.Linear(3, 4).double(), "cpu")
    assert network.weight.dtype == torch.float64
    assert not network.training and not network.weight.requires_grad


def test_a_pipeline_in_bfloat16_draws_what_float32_draws(bf16):
    exact, rounded = fresh_pipeline(), fresh_pipeline()
    for network in (exact.unet, exact.vae, exact.text_encoder):
        network.eval()
    rounded.to("cpu")
    assert all(parameter.dtype == torch.bfloat16 for network in
               (rounded.unet, rounded.vae, rounded.text_encoder)
               for parameter in network.parameters())
    sampling = dataclasses.replace(exact.sampling, num_steps=3, image_size=16, num_frames=2)
    *_, a = exact.sample(["a red circle"], [1], sampling)
    *_, b = rounded.sample(["a red circle"], [1], sampling)
    assert b.dtype == torch.float32 and 0 < error(b, a) < 8 * ROUNDING
    a, b = exact.decode(a).clone(), rounded.decode(a)
    assert b.dtype == torch.float32 and 0 < error(b, a) < 8 * ROUNDING


def test_guidance_and_steps_are_float32_whatever_the_network_computes_in(bf16):
    pipeline = fresh_pipeline().to("cpu")
    seen, forward = [], pipeline.unet.forward

    def unet(x, timesteps, context):
        seen.append(x)
        return forward(x, timesteps, context)

    pipeline.unet.forward = unet
    sampling = dataclasses.replace(pipeline.sampling, num_steps=2, image_size=16, num_frames=2)
    first, last = pipeline.sample(["a red circle"], [1], sampling)
    assert [x.dtype for x in seen] == [torch.bfloat16] * 2
    assert torch.equal(seen[1][:1], first.bfloat16())  # cast for the network, and not kept so
    assert not torch.equal(first, first.bfloat16().float())
    assert last.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_under_autocast_has_the_gradients_of_float32(bf16, prediction_type):
    unet, diffusion = build_unet(), Diffusion(prediction_type=prediction_type)
    x0, timesteps, context = unet_inputs()
    noise, gradients = x0.flip(1), []
    for context_manager in (precision("cpu"), torch.autocast("cpu", enabled=False)):
        with context_manager:
            loss = denoising_loss(unet, diffusion, x0, noise, timesteps, context)
        unet.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert 0 < error(*gradients) < 8 * ROUNDING


def test_the_output_of_a_norm_is_cast_once_and_before_what_reads_it(bf16):
    dtypes = []
    with precision("cpu"):
        for norm, x in ((layers.GroupNorm(2, 4), torch.randn(2, 4, 3, 3)),
                        (layers.LayerNorm(4), torch.randn(2, 3, 4))):
            dtypes.append(norm(x).dtype)
    assert dtypes == [torch.bfloat16] * 2
    assert layers.GroupNorm(2, 4)(torch.randn(2, 4, 3, 3)).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("room, expected", [(0, 1), (1, 1), (8, 8), (11, 8), (16, 16)])
def test_a_gpu_decodes_as_many_frames_as_half_of_its_free_memory_holds(monkeypatch, room, expected):
    free = 2 * room * 100 * devices.PIXEL_BYTES
    monkeypatch.setattr(devices, "free_bytes", lambda device: free)
    x = SimpleNamespace(is_cuda=True, device="cuda")
    assert devices.frames_at_once(x, pixels=100, most=50) == expected


def test_networks_visit_a_device_and_leave_it_after_an_error():
    network = nn.Linear(2, 3)
    with pytest.raises(KeyError), visit([network], "meta"):
        assert network.weight.is_meta
        network.weight = nn.Parameter(torch.zeros(3, 2))  # a real one can leave again
        network.bias = nn.Parameter(torch.zeros(3))
        raise KeyError
    assert network.weight.device.type == "cpu"
