"""Where networks compute, in which precision, and with how many processes; all on a CPU."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers import build_unet, fresh_pipeline, unet_inputs
from torch import nn

from diffusion import Diffusion
from support import devices
from support.devices import (choose_device, compute_dtype, freeze, loss_scaler, precision,
                             precision_notes, visit)
from train import denoising_loss

ROUNDING = 2**-8  # of a bfloat16, relative


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


@pytest.mark.parametrize("device, choice, expected", [
    ("cpu", "auto", torch.float32), ("cpu", "bf16", torch.bfloat16), ("cpu", "fp16", torch.float16),
    ("cuda:0", "auto", torch.bfloat16), ("cuda:1", "auto", torch.float16),
    ("cuda:1", "bf16", torch.bfloat16), ("cuda:0", "fp16", torch.float16),
    ("cuda:0", "fp32", torch.float32), ("mps", "auto", torch.float32),
])
def test_auto_asks_the_device_that_is_named_whether_it_has_bfloat16(monkeypatch, device, choice,
                                                                    expected):
    @contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    current = [0]
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",  # the second GPU is from before Ampere
                        lambda including_emulation=True: current[-1] == 0 or including_emulation)
    assert compute_dtype(device, choice) == expected


@pytest.mark.parametrize("hardware, choice, size, count", [
    (True, "auto", 10, 1), (False, "auto", 10, 0), (True, "fp32", 10, 0), (True, "auto", 1, 0),
])
def test_a_large_model_on_a_cpu_with_bfloat16_is_told_of_the_flag(monkeypatch, hardware, choice,
                                                                  size, count):
    monkeypatch.setattr(devices, "LARGE", 50)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    notes = precision_notes(nn.Linear(size, size), torch.device("cpu"), choice)
    assert ["--precision bf16" in note for note in notes] == [True] * count


def test_in_float16_a_pipeline_keeps_its_autoencoder_in_float32():
    exact, rounded = fresh_pipeline(), fresh_pipeline().to("cpu", "fp16")
    networks = rounded.unet, rounded.vae, rounded.text_encoder
    assert [next(network.parameters()).dtype for network in networks] == [
        torch.float16, torch.float32, torch.float16]
    sampling = dataclasses.replace(exact.sampling, num_steps=3, image_size=16, num_frames=2)
    (*_, a), (*_, b) = (pipeline.sample(["a red circle"], [1], sampling)
                        for pipeline in (exact, rounded))
    assert b.dtype == torch.float32 and 0 < error(b, a) < ROUNDING
    assert torch.equal(rounded.decode(a), exact.decode(a))


def test_channels_lie_innermost_except_on_a_cpu():
    for device, layout in (("cpu", torch.contiguous_format), ("meta", torch.channels_last)):
        weight = freeze(nn.Conv2d(3, 4, 3), device).weight
        assert weight.is_contiguous(memory_format=layout)


def test_a_pipeline_in_bfloat16_draws_what_float32_draws():
    exact, rounded = fresh_pipeline(), fresh_pipeline().to("cpu", "bf16")
    for network in (rounded.unet, rounded.vae, rounded.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    sampling = dataclasses.replace(exact.sampling, num_steps=3, image_size=16, num_frames=2)
    *_, a = exact.sample(["a red circle"], [1], sampling)
    *_, b = rounded.sample(["a red circle"], [1], sampling)
    assert b.dtype == torch.float32 and 0 < error(b, a) < 8 * ROUNDING
    assert 0 < error(rounded.decode(a), exact.decode(a)) < 8 * ROUNDING


@pytest.mark.parametrize("choice, rounding", [("bf16", ROUNDING), ("fp16", ROUNDING / 8)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_under_autocast_has_the_gradients_of_float32(prediction_type, choice, rounding):
    unet, diffusion = build_unet(), Diffusion(prediction_type=prediction_type)
    x0, timesteps, context = unet_inputs()
    noise, gradients = x0.flip(1), []
    for dtype in (choice, "fp32"):
        with precision("cpu", dtype):
            loss = denoising_loss(unet, diffusion, x0, noise, timesteps, context)
        unet.zero_grad()
        scaler = loss_scaler("cpu", dtype)  # without it, float16 loses the small gradients
        scaler.scale(loss).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()])
                         / scaler.get_scale())
    assert 0 < error(*gradients) < 8 * rounding


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
