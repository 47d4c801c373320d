"""Gradient checkpointing: the same gradients, and only what is cheap is computed a second time."""

from collections import Counter

import pytest
import torch
from helpers import UNETS, build_unet, unet_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import layers


def gradients(unet, checkpointing):
    unet.gradient_checkpointing = checkpointing
    unet.zero_grad()
    unet(*unet_inputs()).square().mean().backward()
    return [parameter.grad for parameter in unet.parameters()]


@pytest.mark.parametrize("name", UNETS)
def test_gradient_checkpointing_changes_no_gradient(name):
    unet = build_unet(UNETS[name])
    for a, b in zip(gradients(unet, False), gradients(unet, True), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_computes_every_block_twice():
    unet, calls = build_unet(), []
    for module in unet.modules():
        if isinstance(module, layers.ResnetBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(unet, False)
    once = len(calls)
    gradients(unet, True)
    assert (once, len(calls) - once) == (11, 22)


class Count(TorchDispatchMode):
    """Counts the operations that are really computed, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name().removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def test_convolutions_and_attention_are_computed_once_the_rest_twice():
    counts = []
    for checkpointing in (False, True):
        with Count() as count:
            gradients(build_unet(), checkpointing)
        counts.append(count.calls)
    expected = {
        "convolution": (50, 50),
        "_scaled_dot_product_flash_attention_for_cpu": (14, 14),
        "addmm": (41, 2 + 2 * 39),  # linear layers with a bias; two of them embed the time
        "gelu": (7, 14),
    }
    assert {name: tuple(calls[name] for calls in counts) for name in expected} == expected
