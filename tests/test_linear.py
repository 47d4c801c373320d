"""support/linear.py: the convolution is the matrix product, forward and backward."""

import pytest
import torch
from recorded.rule import normal

from support import linear
from support.linear import Linear


@pytest.mark.parametrize("axes", [(32,), (2, 3, 8), (2, 3, 5)])  # 16 divides two of the counts
def test_linear_multiplies_by_its_weights_forward_and_backward(axes):
    layer = Linear(7, 6)
    x = normal(*axes, 7).requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, x @ layer.weight.T + layer.bias)
    upstream = normal(*out.shape)
    torch.testing.assert_close(torch.autograd.grad(out, [x, layer.weight, layer.bias], upstream), (
        upstream @ layer.weight, upstream.flatten(0, -2).T @ x.flatten(0, -2),
        upstream.flatten(0, -2).sum(0)))


def test_only_float32_tokens_in_sixteens_are_convolved(monkeypatch):
    conv2d, convolved = torch.conv2d, []
    monkeypatch.setattr(linear, "HAS_MKL", True)
    monkeypatch.setattr(linear.F, "conv2d", lambda x, *rest: (
        convolved.append(tuple(x.shape)) or conv2d(x, *rest)))
    for dtype, tokens in (torch.float32, 32), (torch.float32, 30), (torch.float64, 32):
        Linear(7, 6).to(dtype)(torch.ones(tokens, 7, dtype=dtype))
    assert convolved == [(16, 7, 1, 2)]
