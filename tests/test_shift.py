"""The temporal shift, the one idea of Latent-Shift: values by hand, loops, and its symmetries."""

import pytest
import torch

from shift import temporal_shift

SHAPE = (2, 5, 7, 3, 4)  # b t c h w, all different


def numbers(*shape, dtype=torch.float32):
    """1, 2, 3, ...: every number tells where it came from, and none is the 0 of the ends."""
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


def by_loops(x, fold, causal=False):
    """The definition, one channel of one frame of one clip at a time."""
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for clip in range(x.shape[0]):
        for frame in range(x.shape[1]):
            for channel in range(x.shape[2]):
                source = frame - 1 if channel < fold else frame
                source = frame + 1 if fold <= channel < 2 * fold and not causal else source
                if 0 <= source < x.shape[1]:
                    out[clip, frame, channel] = x[clip, source, channel]
    return out


# What it does


def test_three_frames_of_three_channels_by_hand():
    frames = [[11, 12, 13],
              [21, 22, 23],
              [31, 32, 33]]
    shifted = [[0, 22, 13],
               [11, 32, 23],
               [21, 0, 33]]
    assert temporal_shift(torch.tensor([frames])).tolist() == [shifted]


def test_left_over_channels_stay():
    frames = [[11, 12, 13, 14, 15],
              [21, 22, 23, 24, 25]]
    shifted = [[0, 22, 13, 14, 15],
               [11, 0, 23, 24, 25]]
    assert temporal_shift(torch.tensor([frames])).tolist() == [shifted]


def test_a_causal_shift_by_hand():
    frames = [[11, 12, 13],
              [21, 22, 23],
              [31, 32, 33]]
    shifted = [[0, 12, 13],
               [11, 22, 23],
               [21, 32, 33]]
    assert temporal_shift(torch.tensor([frames]), causal=True).tolist() == [shifted]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fold", [1, 2, 3])
def test_equals_a_triple_loop(fold, causal):
    x = numbers(*SHAPE)
    assert torch.equal(temporal_shift(x, fold, causal), by_loops(x, fold, causal))


def test_a_causal_shift_shows_a_frame_nothing_later():
    x = numbers(*SHAPE)
    later = torch.cat([x[:, :3], -x[:, 3:]], 1)
    same = temporal_shift(x, causal=True) == temporal_shift(later, causal=True)
    assert same[:, :3].all() and not same[:, 4:].any()


@pytest.mark.parametrize("channels, fold", [(3, 1), (5, 1), (6, 2), (8, 2), (320, 106)])
def test_a_third_of_the_channels_is_shifted_unless_told_otherwise(channels, fold):
    x = numbers(1, 2, channels)
    assert torch.equal(temporal_shift(x), temporal_shift(x, fold))


def test_first_third_comes_from_the_frame_before():
    x = numbers(*SHAPE)
    assert torch.equal(temporal_shift(x)[:, 1:, :2], x[:, :-1, :2])


def test_second_third_comes_from_the_frame_after():
    x = numbers(*SHAPE)
    assert torch.equal(temporal_shift(x)[:, :-1, 2:4], x[:, 1:, 2:4])


def test_last_third_stays():
    x = numbers(*SHAPE)
    assert torch.equal(temporal_shift(x)[:, :, 4:], x[:, :, 4:])


def test_zeros_come_in_at_the_ends_and_nowhere_else():
    zero = temporal_shift(numbers(*SHAPE)) == 0
    at_the_ends = torch.zeros(SHAPE, dtype=torch.bool)
    at_the_ends[:, 0, :2] = at_the_ends[:, -1, 2:4] = True
    assert torch.equal(zero, at_the_ends)


def test_a_single_frame_keeps_only_its_last_third():
    assert temporal_shift(numbers(1, 1, 3)).tolist() == [[[0, 0, 3]]]


def test_does_not_leak_between_clips():
    x = numbers(*SHAPE)
    one_by_one = torch.cat([temporal_shift(clip) for clip in x.split(1)])
    assert torch.equal(temporal_shift(x), one_by_one)


def test_a_film_played_backwards_swaps_the_two_directions():
    x = numbers(*SHAPE)
    swap = [2, 3, 0, 1, 4, 5, 6]
    backwards = temporal_shift(x.flip(1)[:, :, swap])[:, :, swap].flip(1)
    assert torch.equal(backwards, temporal_shift(x))


@pytest.mark.parametrize("num_shifts", [1, 2, 3])
def test_each_shift_with_a_mix_of_channels_reaches_one_frame_further(num_shifts):
    x = torch.ones(1, 9, 3, requires_grad=True)
    out = x
    for _ in range(num_shifts):
        out = temporal_shift(out).mean(2, keepdim=True).expand(-1, -1, 3)  # what a convolution does
    (grad,) = torch.autograd.grad(out[0, 4].sum(), x)
    seen = [abs(frame - 4) <= num_shifts for frame in range(9)]
    assert (grad[0].sum(1) > 0).tolist() == seen


# Its gradient


def test_gradient_is_the_opposite_shift_by_hand():
    x = torch.zeros(1, 3, 3, requires_grad=True)
    grad_out = torch.tensor([[[11.0, 12, 13],
                              [21, 22, 23],
                              [31, 32, 33]]])
    (grad,) = torch.autograd.grad(temporal_shift(x), x, grad_out)
    assert grad.tolist() == [[[21, 0, 13],
                              [31, 12, 23],
                              [0, 22, 33]]]


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_is_the_transpose_of_the_shift(causal):
    x, y = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    x.requires_grad_()
    shifted = temporal_shift(x, causal=causal)
    (grad,) = torch.autograd.grad(shifted, x, y)
    transposed, applied = (grad * x).sum(), (shifted * y).sum()  # <A'y, x> = <y, Ax>
    torch.testing.assert_close(transposed, applied)


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_equals_finite_differences(causal):
    x = torch.randn(2, 3, 7, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(temporal_shift, (x, 3, causal))


def test_second_derivative_equals_finite_differences():
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: temporal_shift(x) ** 3, (x,))


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
def test_keeps_the_memory_layout(layout):
    x = layout(numbers(*SHAPE))
    assert temporal_shift(x).stride() == x.stride()


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_gradient_keeps_the_memory_layout(layout):
    x = layout(numbers(*SHAPE)).requires_grad_()
    (grad,) = torch.autograd.grad(temporal_shift(x), x, layout(numbers(*SHAPE)))
    assert grad.stride() == x.stride()


VIEWS = {
    "contiguous": lambda: numbers(*SHAPE),
    "channels last": lambda: channels_last(numbers(*SHAPE)),
    "transposed": lambda: numbers(2, 7, 5, 3, 4).transpose(1, 2),
    "every second frame": lambda: numbers(2, 10, 7, 3, 4)[:, ::2],
    "one frame repeated": lambda: numbers(2, 1, 7, 3, 4).expand(SHAPE),
    "one number repeated": lambda: numbers(1, 1, 1, 1, 1).expand(SHAPE),
    "no picture": lambda: numbers(2, 5, 7),
}


@pytest.mark.parametrize("view", VIEWS)
def test_takes_every_view(view):
    x = VIEWS[view]()
    assert torch.equal(temporal_shift(x), by_loops(x, 2))


@pytest.mark.parametrize("view", VIEWS)
def test_does_not_write_into_its_input(view):
    x = VIEWS[view]()
    before = x.clone()
    temporal_shift(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("view", VIEWS)
def test_writing_into_the_result_leaves_the_input_alone(view):
    x = VIEWS[view]()
    before = x.clone()
    temporal_shift(x).zero_()
    assert torch.equal(x, before)


def test_gradient_takes_a_gradient_that_is_one_number_repeated():
    x = numbers(*SHAPE).requires_grad_()
    temporal_shift(x).sum().backward()  # sum() hands back an expanded 1
    lost = torch.ones(SHAPE)
    lost[:, -1, :2] = lost[:, 0, 2:4] = 0  # what left the clip has no influence
    assert torch.equal(x.grad, lost)


# Mistakes


@pytest.mark.parametrize("fold", [0, -1, 4, 2.0])
def test_refuses_a_fold_that_does_not_fit(fold):
    with pytest.raises(ValueError, match=f"0 < 2\\*fold <= c, got fold={fold}, c=7"):
        temporal_shift(numbers(*SHAPE), fold)


def test_refuses_too_few_channels_for_a_third():
    with pytest.raises(ValueError, match="got fold=0, c=2"):
        temporal_shift(numbers(1, 3, 2))


def test_refuses_a_tensor_without_channels():
    with pytest.raises(ValueError, match=r"needs x of shape \(b, t, c, ...\), got \(3, 4\)"):
        temporal_shift(numbers(3, 4))
