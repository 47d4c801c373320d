"""The temporal shift, the one idea of Latent-Shift: values by hand, loops, and its gradient."""

import pytest
import torch
from torch.func import jacfwd, jacrev, jvp, vmap

from shift import temporal_shift

SHAPE = (2, 3, 7, 5, 6)  # b t c h w, all different
# torch's own code for forward derivatives uses a deprecated part of torch, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def numbers(*shape, dtype=torch.float32):
    """1, 2, 3, ...: every number shows its origin and differs from the zeros at the ends."""
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


def by_loops(x, fold):
    """The definition, one channel of one frame of one clip at a time."""
    b, t, c = x.shape[:3]
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for clip in range(b):
        for frame in range(t):
            for channel in range(c):
                source = frame
                if channel < fold:
                    source = frame - 1
                if channel >= c - fold:
                    source = frame + 1
                if 0 <= source < t:
                    out[clip, frame, channel] = x[clip, source, channel]
    return out


# What it does


def test_the_thirds_come_from_the_frame_before_the_frame_itself_and_the_frame_after():
    frames = [[11, 12, 13],
              [21, 22, 23],
              [31, 32, 33]]
    shifted = [[0, 12, 23],
               [11, 22, 33],
               [21, 32, 0]]
    assert temporal_shift(torch.tensor([frames])).tolist() == [shifted]


def test_channels_left_over_by_the_thirds_stay_in_their_frame():
    frames = [[11, 12, 13, 14, 15],
              [21, 22, 23, 24, 25]]
    shifted = [[0, 12, 13, 14, 25],
               [11, 22, 23, 24, 0]]
    assert temporal_shift(torch.tensor([frames])).tolist() == [shifted]


def test_an_image_is_unchanged():
    image = numbers(2, 1, 7, 5, 6)
    assert torch.equal(temporal_shift(image), image)


@pytest.mark.parametrize("channels, fold, expected", [
    (6, None, 2), (7, None, 2), (8, None, 2), (320, None, 106),  # c // 3 unless told otherwise
    (7, 1, 1), (7, 3, 3), (6, 3, 3),
])
def test_equals_a_triple_loop(channels, fold, expected):
    x = numbers(2, 3, channels, 5, 6)
    assert torch.equal(temporal_shift(x, fold), by_loops(x, expected))


def test_zeros_enter_at_the_ends_and_nowhere_else():
    at_the_ends = torch.zeros(SHAPE, dtype=torch.bool)
    at_the_ends[:, 0, :2] = at_the_ends[:, -1, -2:] = True
    assert torch.equal(temporal_shift(numbers(*SHAPE)) == 0, at_the_ends)


def test_does_not_leak_between_clips():
    x = numbers(*SHAPE)
    one_by_one = torch.cat([temporal_shift(clip) for clip in x.split(1)])
    assert torch.equal(temporal_shift(x), one_by_one)


def test_a_clip_played_backwards_swaps_the_first_third_and_the_last():
    x = numbers(*SHAPE)
    assert torch.equal(temporal_shift(x.flip(1, 2)).flip(1, 2), temporal_shift(x))


@pytest.mark.parametrize("num_shifts", [1, 2, 3])
def test_each_shift_followed_by_a_mix_of_channels_reaches_one_frame_further(num_shifts):
    x = torch.ones(1, 9, 3, requires_grad=True)
    out = x
    for _ in range(num_shifts):
        out = temporal_shift(out).mean(2, keepdim=True).expand(-1, -1, 3)  # as a convolution does
    (grad,) = torch.autograd.grad(out[0, 4].sum(), x)
    seen = [abs(frame - 4) <= num_shifts for frame in range(9)]
    assert (grad[0].sum(1) > 0).tolist() == seen


# Its gradient


def test_the_gradient_is_the_opposite_shift():
    x = torch.zeros(1, 3, 3, requires_grad=True)
    grad_out = torch.tensor([[[11.0, 12, 13],
                              [21, 22, 23],
                              [31, 32, 33]]])
    (grad,) = torch.autograd.grad(temporal_shift(x), x, grad_out)
    assert grad.tolist() == [[[21, 12, 0],
                              [31, 22, 13],
                              [0, 32, 23]]]


def test_first_derivatives_equal_finite_differences():
    x = torch.randn(2, 3, 7, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(temporal_shift, (x, 3), check_forward_ad=True)


def test_second_derivatives_equal_finite_differences():
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: temporal_shift(x) ** 3, (x,))


# Inside the transforms of torch.func and torch.compile


@pytest.mark.parametrize("axis", [0, 3])
def test_vmap_shifts_each_element_of_the_mapped_axis(axis):
    x = numbers(2, 3, 7, 4)  # b t c and, along any axis, four of them
    out = vmap(temporal_shift, in_dims=axis, out_dims=axis)(x.movedim(3, axis))
    expected = [by_loops(part, 2) for part in x.unbind(3)]
    assert torch.equal(out, torch.stack(expected, axis))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians_move_one_number_at_a_time(jacobian):
    rows = jacobian(temporal_shift)(torch.zeros(1, 3, 4)).flatten(3).flatten(0, 2)  # out in
    units = torch.eye(12).view(12, 3, 4)  # a 1 at each position of x
    assert torch.equal(rows, by_loops(units, 1).flatten(1).T)


def test_jvp_shifts_the_tangent():
    x, tangent = numbers(*SHAPE), numbers(*SHAPE).flip(0)
    out, moved = jvp(temporal_shift, (x,), (tangent,))
    assert torch.equal(out, by_loops(x, 2)) and torch.equal(moved, by_loops(tangent, 2))


def test_the_hessian_of_cubes_is_six_x_where_x_stays_in_the_clip():
    x = numbers(1, 2, 3)
    hessian = jacfwd(jacrev(lambda x: (temporal_shift(x) ** 3).sum()))(x).view(6, 6)
    assert hessian.tolist() == torch.diag(torch.tensor([6.0, 12, 0, 0, 30, 36])).tolist()


def test_compiled_it_is_one_graph_with_the_same_values_and_gradients():
    compiled, results = torch.compile(temporal_shift, backend="aot_eager", fullgraph=True), []
    for shift in (temporal_shift, compiled):
        x = numbers(*SHAPE).requires_grad_()
        out = shift(x)
        results.append((out, *torch.autograd.grad(out, x, numbers(*SHAPE))))
    assert all(map(torch.equal, *results))


# Every tensor there is


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16,
                                   torch.int64, torch.uint8, torch.bool])
def test_is_exact_in_every_dtype(dtype):
    x = (numbers(*SHAPE) % 5).to(dtype)
    out = temporal_shift(x)
    assert out.dtype == dtype and torch.equal(out, by_loops(x, 2))


def channels_last(x):
    """A clip whose frames lie in memory as h w c."""
    frames = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return frames.unflatten(0, x.shape[:2])


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_the_result_and_its_gradient_keep_the_memory_layout(layout):
    x = layout(numbers(*SHAPE)).requires_grad_()
    out = temporal_shift(x)
    (grad,) = torch.autograd.grad(out, x, layout(numbers(*SHAPE)))
    assert out.stride() == grad.stride() == x.stride()


VIEWS = {
    "contiguous": lambda: numbers(*SHAPE),
    "channels last": lambda: channels_last(numbers(*SHAPE)),
    "transposed": lambda: numbers(2, 7, 3, 5, 6).transpose(1, 2),
    "every second frame": lambda: numbers(2, 6, 7, 5, 6)[:, ::2],
    "one frame repeated": lambda: numbers(2, 1, 7, 5, 6).expand(SHAPE),
    "one number repeated": lambda: numbers(1, 1, 1, 1, 1).expand(SHAPE),
    "no height or width": lambda: numbers(2, 3, 7),
}


@pytest.mark.parametrize("view", VIEWS)
def test_takes_every_view_and_never_shares_its_memory(view):
    x = VIEWS[view]()
    before = x.clone()
    out = temporal_shift(x)
    assert torch.equal(out, by_loops(before, 2))
    out.zero_()
    assert torch.equal(x, before)


# Mistakes


@pytest.mark.parametrize("channels, fold, got", [(7, 4, "fold=4"), (7, 0, "fold=0"),
                                                 (2, None, "fold=0")])
def test_a_fold_that_does_not_fit_is_refused(channels, fold, got):
    with pytest.raises(ValueError, match=rf"0 < 2\*fold <= c, got {got}, c={channels}"):
        temporal_shift(numbers(2, 3, channels), fold)


def test_a_tensor_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"needs x of shape \(b, t, c, ...\), got \(3, 4\)"):
        temporal_shift(numbers(3, 4))
