"""The grader: `python -m pytest exercises` says in a sentence what each exercise still lacks."""

import pytest
import torch
from torch import nn

ALPHA_BAR = torch.tensor([0.91, 0.64, 0.36, 0.0], dtype=torch.float64)  # signal 0.8 and 0.6 at 1, 2
SIZES = 2, 4, 7, 3, 2  # of x, b t c h w; w = b, so that a wrong broadcast gets a sentence


def expect(right, sentence):
    if not right:
        pytest.fail(sentence, pytrace=False)


def same(a, b):
    return torch.allclose(a.double(), torch.as_tensor(b).double().expand_as(a), atol=1e-5)


def first(x):
    return f"{x.flatten()[0].item():.4g}"


def call(function, shape, *inputs):
    """The result of your function, a tensor of that shape; the inputs stay as they were."""
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    result = function(*inputs)
    for old, new in zip(before, inputs, strict=True):
        expect(not isinstance(old, torch.Tensor) or torch.equal(old, new),
               "your function writes into its argument: write into a copy (x.clone())")
    expect(isinstance(result, torch.Tensor),
           f"the result should be a tensor, got {result!r:.30}: is there a `return`?")
    expect(result.shape == shape, f"the result should have the shape {tuple(shape)}, got "
           f"{tuple(result.shape)}")
    return result


def test_1_the_shift(your):
    x = torch.randn(SIZES)
    past, own, future = slice(2), slice(2, 5), slice(5, 7)  # a third of 7 channels: 7 // 3
    y = call(your.temporal_shift, x.shape, x)

    def origin(i, part):  # whose channels are in frame i of the result
        if not y[:, i, part].any():
            return "zeros"
        return next((f"frame {j}'s" for j in range(4) if same(y[:, i, part], x[:, j, part])),
                    "no frame's")

    expect(same(y[:, :, own], x[:, :, own]), "the middle third of the channels should not change; "
           "of 7 channels, 7 // 3 = 2 come from each neighbour")
    got = origin(2, past)
    hint = {"frame 0's": ": did you shift in place?", "frame 3's": ": did you swap past and future?"}
    expect(got == "frame 1's", "frame 2's first third should be frame 1's, but it is "
           f"{got}{hint.get(got, '')}")
    got = origin(1, future)
    expect(got == "frame 2's", f"frame 1's last third should be frame 2's, but it is {got}")
    for i, part, name in ((0, past, "first"), (3, future, "last")):
        got = origin(i, part)
        expect(got == "zeros", f"frame {i}'s {name} third should be zeros, because the clip ends "
               f"there, but it is {got}; torch.roll, for one, wraps around")
    expect(same(call(your.temporal_shift, x[:, :1].shape, x[:, :1]), x[:, :1]),
           "a clip of one frame has no neighbours and should stay as it is")
    x.requires_grad_()
    y = your.temporal_shift(x)
    expect(y.requires_grad, "no gradient goes back: did you use .data, detach() or no_grad()?")
    y[:, 2, past].sum().backward()
    expect(same(x.grad[:, 1, past], 1.0) and x.grad.sum() == x.grad[:, 1, past].sum(),
           "the gradient should be the opposite shift: of frame 2's first third, to frame 1")


def test_2_how_far_a_frame_sees(your):
    for frame, num_frames, num_blocks, wanted, hint in (
        (4, 9, 0, 1, "itself"),
        (4, 9, 1, 3, "itself and a neighbour on each side"),
        (4, 9, 2, 5, "each block adds one frame on each side, because its neighbours have seen "
                     "their own neighbours"),
        (0, 9, 2, 3, "the clip begins at frame 0, so nothing comes from before"),
        (7, 9, 3, 5, "the clip ends at frame 8, so only one comes from after"),
        (1, 3, 5, 3, "there are no more in the clip"),
    ):
        got = your.frames_seen(frame, num_frames, num_blocks)
        expect(got == wanted, f"frame {frame} of {num_frames} sees {wanted} after {num_blocks} "
               f"block(s), not {got}: {hint}")


def test_3_noise_and_target(your):
    one, zero, timesteps = torch.ones(SIZES), torch.zeros(SIZES), torch.tensor([1, 2])
    for x0, eps, wanted, given in ((one, zero, (0.8, -0.6), "x0 = 1 and eps = 0"),
                                   (zero, one, (0.6, 0.8), "x0 = 0 and eps = 1")):
        for i, name in enumerate(("x_t", "v")):
            y = call(lambda *inputs, i=i: your.noise_and_target(*inputs)[i], x0.shape,
                     x0, eps, ALPHA_BAR, timesteps)
            expect(same(y[0], y[0, 0, 0, 0, 0]), "the numbers of one clip should have one noise "
                   "level: view a factor (b,) as (b, 1, 1, 1, 1) before you multiply")
            expect(same(y[0], wanted[i]), f"alpha_bar = 0.64 (signal 0.8, noise_scale 0.6), {given}:"
                   f" {name} should be {wanted[i]}, got {first(y[0])}")
            expect(not same(y[1], y[0]), "clip 1 has another timestep than clip 0, but got its noise")


def test_4_x0(your):
    one, zero = torch.ones(SIZES), torch.zeros(SIZES)
    for kind, output, x_t, t, wanted, hint in (
        ("epsilon", zero, one, 1, 1.25, "x_t = 1 without noise is 0.8 x0"),
        ("epsilon", one, zero, 1, -0.75, "0 = 0.8 x0 + 0.6"),
        ("v_prediction", zero, one, 1, 0.8, "multiply x_t's equation by signal, v's by "
         "noise_scale, subtract, and use signal^2 + noise_scale^2 = 1"),
        ("v_prediction", one, zero, 1, -0.6, "more v means less x0"),
        ("v_prediction", one, zero, 3, -1.0, "where alpha_bar is 0, v is -x0; do not divide"),
    ):
        y = call(your.predict_x0, x_t.shape, output, x_t, ALPHA_BAR, t, kind)
        given = f"alpha_bar = {ALPHA_BAR[t]:g}, {kind} output {first(output)}, x_t = {first(x_t)}"
        expect(same(y, wanted), f"{given}: x0 should be {wanted}, got {first(y)}: {hint}")


def test_5_a_ddim_step(your):
    one, zero = torch.ones(SIZES), torch.zeros(SIZES)
    inputs = {"x0": (one, zero, zero), "eps": (zero, one, zero), "noise": (zero, zero, one)}
    end = "at the end alpha_bar is 1; alpha_bar[-1] is the noisiest of all"
    for t, t_prev, eta, name, wanted, hint in (
        (2, 1, 0.0, "x0", 0.8, "sqrt(0.64): mix again as at t_prev"),
        (2, 1, 0.0, "eps", 0.6, "sqrt(1 - 0.64): mix again as at t_prev"),
        (2, 1, 0.0, "noise", 0.0, "eta = 0 draws no noise"),
        (0, -1, 0.0, "x0", 1.0, end), (0, -1, 1.0, "eps", 0.0, end),
        (2, 1, 1.0, "noise", 0.496078, "with eta = 1 its square is DDPM's variance, 0.246 (eq. 7)"),
        (2, 1, 1.0, "eps", 0.3375, "new noise takes the place of old: together 1 - a_prev, as in "
         "DDPM"),
    ):
        x0, eps, noise = inputs[name]
        y = call(your.ddim_step, x0.shape, x0, eps, ALPHA_BAR, t, t_prev, eta, noise)
        expect(same(y, wanted), f"t = {t}, t_prev = {t_prev}, eta = {eta:g}: {name} should count "
               f"{wanted:.4g} times, got {first(y)}: {hint}")


def test_6_guidance(your):
    def model(x_t, t, context):
        expect(len(x_t) == len(context), f"model got {len(x_t)} clips and {len(context)} texts")
        return x_t + context.mean((1, 2))[:, None, None, None, None]  # a text adds its mean

    x, empty = torch.randn(SIZES), torch.ones(2, 5, 3)
    context = torch.stack([torch.full((5, 3), 3.0), torch.full((5, 3), 4.0)])
    for scale in (1, 0, 3.5):
        y = call(your.guided_prediction, x.shape, model, x, 7, context, empty, scale)
        way = ((y - x - 1) / torch.tensor([2.0, 3.0])[:, None, None, None, None]).mean((1, 2, 3, 4))
        hint = ("guidance_scale is the paper's w + 1" if same(way, scale + 1.0) else
                "swapped?" if same(way, 1.0 - scale) else "empty + scale * (text - empty)")
        expect(same(way, scale), f"guidance_scale {scale} should go {scale} times the way from the "
               f"empty text to each clip's text, yours goes {way[0]:.4g} and {way[1]:.4g}: {hint}")


def test_7_the_kl_term(your):
    size = 2, 4, 3, 2  # 24 latent numbers an image
    for m, logvar, wanted, hint in (
        (0.0, 0.0, 0.0, "it is N(0, 1) itself"),
        (1.0, 0.0, 12.0, "0.5 per latent number, summed over the 24 of an image"),
        (0.0, 1.386294, 19.36447, "logvar is log s^2, so s^2 is 4 and s is 2"),
    ):
        y = call(your.kl_divergence, size[:1], torch.full(size, m), torch.full(size, logvar))
        expect(same(y, wanted), f"m = {m:g}, logvar = {logvar:.4g}: the KL divergence should be "
               f"{wanted:.4g}, got {first(y)}: {hint}")


def test_8_attention_over_time(your):
    layer, x = your.AttentionOverTime(4), torch.randn(2, 3, 4, 5, 6)
    y = call(layer, x.shape, x)
    expect(same(y, x), "a new layer should be the identity: what does to_out add before training? "
           "It has a weight and a bias")
    y.square().sum().backward()
    expect(any(p.grad is not None and p.grad.any() for p in layer.parameters()), "no parameter gets "
           "a gradient, so the layer stays the identity: set one linear layer to zero, not all")
    for linear in [module for module in layer.modules() if isinstance(module, nn.Linear)]:
        nn.init.eye_(linear.weight)  # now q = k = v = x, and to_out copies
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    step = torch.tensor([0.0, 1.0])[None, :, None, None, None].expand(2, 2, 4, 5, 6)
    zero, one = (first(frame) for frame in call(layer, step.shape, step).unbind(1))
    given = "q = k = v = x, frame 0 is 0 and frame 1 is 1: "
    expect(zero == "0.5", f"{given}frame 0 weights both equally, so it should become 0.5, got {zero}"
           ": do the weights run over frames, and sum to 1 in each row?")
    hint = {"1.982": "divide by sqrt(c) = 2", "0.8808": "add x"}.get(one, "0.8808 of itself, plus x")
    expect(one == "1.881", f"{given}frame 1 should become 1.881, got {one}: {hint}")
    other = x.clone()
    other[0, :, :, 0, 0] += 1
    changed = (layer(other) != layer(x)).any(2).any(1)  # b h w
    expect(changed.sum() <= 1, "one position of one clip changed, and others noticed: the batch of "
           "the attention should be (b h w), its sequence the t frames")


def test_9_byte_pairs(your):
    lower = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>")]
    for word, merges, wanted, hint in (
        ("low", [], "l o w</w>", "without merges, letters; the last ends the word"),
        ("low", lower, "low</w>", "(lo, w</w>) joins what (l, o) made"),
        ("slower", lower, "s lo w er</w>", "w here is not w</w>"),
        ("abc", [("b", "c</w>"), ("a", "b")], "a bc</w>", "the pair learned first, not leftmost"),
        ("banana", [("a", "n")], "b an an a</w>", "join all occurrences"),
        ("aaaa", [("a", "a")], "aa a a</w>", "from left to right, each symbol once"),
    ):
        got = your.merge_word(word, merges)
        expect(got == wanted.split(), f"{word!r} with merges {merges} should be {wanted.split()}, "
               f"got {got}: {hint}")
