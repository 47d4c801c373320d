"""The grader: `python -m pytest exercises` says in a sentence what each exercise still lacks."""

import pytest
import torch
from torch import nn

ALPHA_BAR = torch.tensor([0.91, 0.64, 0.36, 0.0])  # signal and noise_scale are 0.8, 0.6 at step 1
SIZES = 2, 4, 7, 3, 2  # b t c h w; w = b, so that a wrong broadcast gets a sentence
ONE, ZERO = torch.ones(SIZES), torch.zeros(SIZES)


def expect(right, sentence):
    if not right:
        pytest.fail(sentence, pytrace=False)


def same(a, b):
    return torch.allclose(a.double(), torch.as_tensor(b).double().expand_as(a), atol=1e-4)


def show(x):
    if not isinstance(x, torch.Tensor):
        return repr(x)
    return str([round(y, 2) for y in x.tolist()]) if x.ndim == 1 else f"{x.flatten()[0]:.4g}"


def call(function, *inputs, shape=SIZES):
    """The result of your function, a tensor of that shape, after a look at its inputs."""
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    y = function(*copies)
    expect(all(same(x, copy) for x, copy in zip(inputs, copies, strict=True) if hasattr(x, "ndim")),
           "your function writes into its argument: did you shift in place? Use x.clone()")
    expect(isinstance(y, torch.Tensor), f"the result is {y!r:.20}, no tensor: is there a return?")
    expect(y.shape == shape, f"the result has the shape {tuple(y.shape)} instead of {shape}")
    return y


def check(function, inputs, wanted, hint, shape=None):
    """Expect a value or, with a shape, a tensor full of one number."""
    y = call(function, *inputs, shape=shape) if shape else function(*inputs)
    given = f"{getattr(function, '__name__', '')}({', '.join(map(show, inputs))})"
    expect(same(y, wanted) if shape else y == wanted,
           f"{given} should be {wanted}, but it is {show(y)}: {hint}")


def test_1_the_shift(your):
    x, names = torch.randn(SIZES), [f"frame {i}'s" for i in range(4)] + ["zeros", "no frame's"]
    y, sources = call(your.temporal_shift, x), torch.cat([x, ZERO[:, :1]], 1)
    hints = {(2, 0): "did you shift in place?", (2, 3): "did you swap past and future?",
             (0, 3): "did torch.roll wrap around?"}
    for i, third, part, wanted in ((2, "first", slice(2), 1), (1, "last", slice(5, 7), 2),
                                   (0, "first", slice(2), 4), (3, "last", slice(5, 7), 4),
                                   (2, "middle", slice(2, 5), 2)):
        got = next((j for j in range(5) if same(y[:, i, part], sources[:, j, part])), 5)
        expect(got == wanted, f"frame {i}'s {third} third should be {names[wanted]}, but it is "
               f"{names[got]}: {hints.get((i, got), '7 channels are 2 + 3 + 2')}")
    image = call(your.temporal_shift, x[:, :1], shape=x[:, :1].shape)
    expect(same(image, x[:, :1]), "a clip of one frame has no neighbours and should stay as it is")
    y = your.temporal_shift(x.requires_grad_())
    expect(y.requires_grad, "no gradient goes back: did you use .data, detach() or no_grad()?")
    y[:, 2, :2].sum().backward()
    expect(same(x.grad[:, 1, :2], 1) and x.grad.sum() == 2 * 2 * 3 * 2,
           "the gradient should be the opposite shift: of frame 2's first third, to frame 1")


def test_2_how_far_a_frame_sees(your):
    for inputs, wanted, hint in (
        ((4, 9, 0), 1, "itself"), ((4, 9, 1), 3, "itself and a neighbour on each side"),
        ((4, 9, 2), 5, "one more on each side, because its neighbours have seen their neighbours"),
        ((0, 9, 2), 3, "nothing comes before frame 0"), ((7, 9, 3), 5, "nothing comes after 8"),
    ):
        check(your.frames_seen, inputs, wanted, hint)


def test_3_noise_and_target(your):
    for x0, eps, wanted in ((ONE, ZERO, (0.8, -0.6)), (ZERO, ONE, (0.6, 0.8))):
        y = call(lambda *inputs: torch.stack(tuple(your.noise_and_target(*inputs))), x0, eps,
                 ALPHA_BAR, torch.tensor([1, 2]), shape=(2, *SIZES))
        expect(same(y, y[:, :, :1, :1, :1, :1]), "within a clip the noise level should not change: "
               "view a factor (b,) as (b, 1, 1, 1, 1) before you multiply")
        for got, number, name in zip(y, wanted, ("x_t", "v"), strict=True):
            expect(same(got[0], number), f"x0 = {show(x0)}, eps = {show(eps)}, alpha_bar = 0.64 "
                   f"(its root is 0.8): {name} should be {number}, but it is {show(got)}")


def test_4_x0(your):
    for output, x_t, t, kind, wanted, hint in (
        (ZERO, ONE, 1, "epsilon", 1.25, "x_t without noise is 0.8 x0"),
        (ONE, ZERO, 1, "epsilon", -0.75, "0 = 0.8 x0 + 0.6"),
        (ZERO, ONE, 1, "v_prediction", 0.8, "take signal x_t - noise_scale v, and simplify"),
        (ONE, ZERO, 3, "v_prediction", -1.0, "where alpha_bar is 0, v is -x0; do not divide"),
    ):
        check(your.predict_x0, (output, x_t, ALPHA_BAR, t, kind), wanted, hint, SIZES)


def test_5_a_ddim_step(your):
    for x0, eps, t, t_prev, eta, noise, wanted, hint in (
        (ONE, ZERO, 2, 1, 0.0, ZERO, 0.8, "sqrt(0.64) of x0"),
        (ZERO, ONE, 2, 1, 0.0, ZERO, 0.6, "sqrt(1 - 0.64) of eps"),
        (ZERO, ZERO, 2, 1, 0.0, ONE, 0.0, "eta = 0 adds no noise"),
        (ONE, ZERO, 2, -1, 0.0, ZERO, 1.0, "the end is clean, but alpha_bar[-1] is the noisiest"),
        (ZERO, ZERO, 2, 1, 1.0, ONE, 0.49608, "its square is DDPM's variance, 0.246 (eq. 7)"),
        (ZERO, ONE, 2, 1, 1.0, ZERO, 0.3375, "DDPM's, because new noise replaces some of eps"),
    ):
        check(your.ddim_step, (x0, eps, ALPHA_BAR[:3], t, t_prev, eta, noise), wanted, hint, SIZES)


def test_6_guidance(your):
    def model(x_t, t, context):  # a text adds the mean of its hidden states
        expect(len(x_t) == len(context), f"model got {len(x_t)} clips and {len(context)} texts")
        return x_t + context.mean((1, 2))[:, None, None, None, None]

    context, empty = torch.tensor([3.0, 4.0])[:, None, None].expand(2, 5, 3), torch.ones(2, 5, 3)
    for scale in (1, 0, 3.5):
        y = call(your.guided_prediction, model, ZERO, 7, context, empty, scale)
        way = (y[:, 0, 0, 0, 0] - 1) / torch.tensor([2.0, 3.0])
        hint = ("guidance_scale is the paper's w + 1" if same(way, scale + 1) else
                "are text and empty text swapped?" if same(way, 1 - scale) else "clip by clip")
        expect(same(way, scale), f"with guidance_scale {scale} two clips should go {scale} times "
               f"the way from the empty text to their texts, but they go {show(way)}: {hint}")


def test_7_the_kl_term(your):
    for mean, logvar, wanted, hint in (
        (0, 0, 0.0, "N(0, 1) itself"), (1, 0, 21.0, "0.5 for each of an image's 42 numbers"),
        (0, 2, 92.1702, "logvar is log s^2"),
    ):
        inputs = torch.full(SIZES[1:], float(mean)), torch.full(SIZES[1:], float(logvar))
        check(your.kl_divergence, inputs, wanted, hint, SIZES[1:2])


def test_8_attention_over_time(your):
    layer, x = your.AttentionOverTime(4), torch.randn(2, 2, 4, 3, 5)
    y = call(layer, x, shape=x.shape)
    expect(same(y, x), "a new layer should be the identity: to_out has a weight and a bias")
    y.square().sum().backward()
    expect(any(p.grad is not None and p.grad.any() for p in layer.parameters() if p.ndim == 2),
           "no weight has a gradient, so the layer can never learn: set one layer to 0, not all")
    for p in layer.parameters():  # now q = k = v = x, and to_out copies
        p.data = torch.eye(4) if p.ndim == 2 else torch.zeros(4)
    y = layer(torch.tensor([0.0, 1.0])[:, None, None, None].expand(x.shape))[0, :, 0, 0, 0]
    hints = {"0": "it does not see frame 1", "1.982": "divide by sqrt(c)", "0.8808": "add x"}
    for i, wanted in enumerate((0.5, 1.8808)):
        expect(same(y[i], wanted), f"with q = k = v = x and frames of 0 and 1, frame {i} should be "
               f"{wanted}, but it is {show(y[i])}: {hints.get(show(y[i]), 'rows should sum to 1')}")
    other = x.clone()
    other[0, :, :, 0, 0] += 1
    changed = (layer(other) != layer(x)).any(2).any(1)  # b h w
    expect(changed.sum() == 1, "one position of one clip changed, and others noticed: the batch of "
           "the attention should be (b h w), its sequence the t frames")


def test_9_byte_pairs(your):
    lower = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>")]
    for word, merges, wanted, hint in (
        ("low", [], "l o w</w>", "letters, of which the last has the suffix"),
        ("low", lower, "low</w>", "(lo, w</w>) joins what (l, o) has made"),
        ("slower", lower, "s lo w er</w>", "w is not w</w>"),
        ("abc", [("b", "c</w>"), ("a", "b")], "a bc</w>", "first learned, first joined"),
        ("banana", [("a", "n")], "b an an a</w>", "join all occurrences"),
        ("aaaa", [("a", "a")], "aa a a</w>", "from left to right, each symbol once"),
    ):
        check(your.merge_word, (word, merges), wanted.split(), hint)
