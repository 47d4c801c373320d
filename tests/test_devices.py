"""Where networks compute, in which precision, and with how many processes; all on a CPU."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import build_unet, fresh_pipeline, unet_inputs
from torch import nn

from diffusion import Diffusion
from support import devices
from support.devices import choose_device, freeze, precision, uses_bf16, visit
from train import denoising_loss

ROUNDING = 2**-8  # of a bfloat16, relative


@pytest.fixture
def bf16(monkeypatch):
    """As on a GPU that has bfloat16."""
    monkeypatch.setattr(devices, "uses_bf16", lambda device, choice="auto": True)


def error(a, b):
    """The difference over b, both as root mean squares."""
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


# Devices


@pytest.mark.parametrize("there", [True, False])
def test_auto_chooses_cuda_if_there_is_one(monkeypatch, there):
    settings = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(
        device=torch.device(device)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", settings.append)
    assert choose_device("auto") == torch.device("cuda" if there else "cpu")
    assert settings == ["high"] * there and torch.backends.cudnn.benchmark == there


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--device {name}: not usable"):
        choose_device(name)


def test_networks_visit_a_device_and_leave_it_after_an_error():
    network = nn.Linear(2, 3)
    with pytest.raises(KeyError), visit([network], "meta"):
        assert network.weight.is_meta
        network.weight = nn.Parameter(torch.zeros(3, 2))  # a real one can leave again
        network.bias = nn.Parameter(torch.zeros(3))
        raise KeyError
    assert network.weight.device.type == "cpu"


@pytest.mark.parametrize("device, options", [
    ("cpu", {"options": {"freezing": True}, "dynamic": False}),
    ("cuda", {"mode": "reduce-overhead", "dynamic": False}),
])
def test_compiling_for_sampling_suits_the_device(device, options):
    network, seen = nn.Linear(2, 3), []
    network.compile = lambda **options: seen.append(options)
    devices.compile_for_sampling(network, device)
    assert seen == [options]


# Precision


@pytest.mark.parametrize("device, choice, ampere, expected", [
    ("cpu", "auto", True, False), ("cpu", "bf16", True, False), ("cuda", "auto", True, True),
    ("cuda", "auto", False, False), ("cuda", "bf16", False, True), ("cuda", "fp32", True, False),
])
def test_bfloat16_is_for_gpus_that_have_it_in_hardware(monkeypatch, device, choice, ampere,
                                                       expected):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",  # earlier GPUs emulate it
                        lambda including_emulation=True: ampere or including_emulation)
    assert uses_bf16(device, choice) == expected


def test_channels_lie_innermost_except_on_a_cpu():
    for device, layout in (("cpu", torch.contiguous_format), ("meta", torch.channels_last)):
        weight = freeze(nn.Conv2d(3, 4, 3), device).weight
        assert weight.is_contiguous(memory_format=layout)


def test_a_pipeline_in_bfloat16_draws_what_float32_draws(bf16):
    exact, rounded = fresh_pipeline(), fresh_pipeline()
    rounded.to("cpu")
    for network in (rounded.unet, rounded.vae, rounded.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    sampling = dataclasses.replace(exact.sampling, num_steps=3, image_size=16, num_frames=2)
    *_, a = exact.sample(["a red circle"], [1], sampling)
    *_, b = rounded.sample(["a red circle"], [1], sampling)
    assert b.dtype == torch.float32 and 0 < error(b, a) < 8 * ROUNDING
    assert 0 < error(rounded.decode(a), exact.decode(a)) < 8 * ROUNDING


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_under_autocast_has_the_gradients_of_float32(bf16, prediction_type):
    unet, diffusion = build_unet(), Diffusion(prediction_type=prediction_type)
    x0, timesteps, context = unet_inputs()
    noise, gradients = x0.flip(1), []
    for mode in (precision("cpu"), torch.autocast("cpu", enabled=False)):
        with mode:
            loss = denoising_loss(unet, diffusion, x0, noise, timesteps, context)
        unet.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert 0 < error(*gradients) < 8 * ROUNDING


# Several processes (tests/test_resume.py has two)

def test_alone_a_process_is_the_first_of_one_and_wraps_nothing():
    net = nn.Linear(2, 3)
    assert devices.rank_and_count() == (0, 1) and devices.is_main() and devices.wrap(net) is net
    devices.barrier()
    assert devices.start("cpu").type == "cpu" and devices.mean(torch.tensor(2.5)) == 2.5


def test_a_rank_without_a_local_rank_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is set without LOCAL_RANK; start with torchrun"):
        devices.start("auto")


def test_of_several_gpus_each_process_touches_its_own(monkeypatch):
    touched, joined = [], []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    monkeypatch.setattr(devices, "choose_device",
                        lambda name: touched.append(name) or torch.device(name))
    monkeypatch.setattr(devices.distributed, "init_process_group",
                        lambda backend, timeout: joined.append((backend, timeout)))
    assert devices.start("auto") == torch.device("cuda", 3)
    assert touched == ["cuda:3", "cuda:3"]
    ((backend, timeout),) = joined
    assert backend == "nccl" and timeout.total_seconds() >= 3600  # previews take minutes
