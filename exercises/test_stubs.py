"""The grader: `python -m pytest exercises` says in a sentence what each exercise still lacks."""

import pytest
import torch

# A case is code == value, with the sentence beside or above it that is shown if they differ.
# inputs() has X and the other tensors. ALPHA_BAR is 0.64, 0.36, 0, so signal is 0.8, 0.6, 0.
CASES = {"1 the shift": """
    type(temporal_shift(X)) == torch.Tensor  # the result should be a tensor: is there a return?
    # frame 2's first third should be frame 1's: did you shift in place, or swap past and future?
    temporal_shift(X)[:, 2, :2] == X[:, 1, :2]
    temporal_shift(X)[:, 1, 5:] == X[:, 2, 5:]  # frame 1's last third should be frame 2's
    temporal_shift(X)[:, :, 2:5] == X[:, :, 2:5]  # the middle should stay: 7 channels are 2 + 3 + 2
    # the first frame's first third and the last one's last should be zeros: did torch.roll wrap?
    temporal_shift(X)[:, 0, :2] == ZERO[:, 0, :2]
    temporal_shift(X)[:, 3, 5:] == ZERO[:, 3, 5:]
    temporal_shift(X[:, :1]) == X[:, :1]  # a clip of one frame has no neighbours and should stay
    temporal_shift(LEAF).requires_grad == True  # did you use .data, detach() or no_grad()?
    # the gradient should be the opposite shift: from frame 2's first third, to frame 1
    torch.autograd.grad(temporal_shift(LEAF)[:, 2, :2].sum(), LEAF)[0][:, 1, :2] == ONE[:, 1, :2]
    """, "2 how far a frame sees": """
    frames_seen(4, 9, 1) == 3  # it should see itself and a neighbour on each side
    frames_seen(4, 9, 2) == 5  # each block should add one frame on each side
    frames_seen(0, 9, 2) == 3  # nothing comes before frame 0
    frames_seen(7, 9, 3) == 5  # nothing comes after frame 8
    """, "3 noise and target": """
    len(noise_and_target(ONE, ZERO, ALPHA_BAR, STEPS)) == 2  # the result should be x_t and v
    # alpha_bar is 0.64 for clip 0, signal its root 0.8; view factors (b,) as (b, 1, 1, 1, 1)
    noise_and_target(ONE, ZERO, ALPHA_BAR, STEPS)[0][0] == 0.8 * ONE[0]
    noise_and_target(ZERO, ONE, ALPHA_BAR, STEPS)[0][0] == 0.6 * ONE[0]
    noise_and_target(ONE, ZERO, ALPHA_BAR, STEPS)[0][1] == 0.6 * ONE[0]
    # v should be signal eps - noise_scale x0: did you take x_t's factors, or its sign?
    noise_and_target(ZERO, ONE, ALPHA_BAR, STEPS)[1][0] == 0.8 * ONE[0]
    noise_and_target(ONE, ZERO, ALPHA_BAR, STEPS)[1][0] == -0.6 * ONE[0]
    """, "4 x0": """
    predict_x0(ZERO, ONE, ALPHA_BAR, 0, "epsilon") == 1.25 * ONE  # without noise x_t is 0.8 x0
    predict_x0(ONE, ZERO, ALPHA_BAR, 0, "epsilon") == -0.75 * ONE  # 0 = 0.8 x0 + 0.6
    # from v, x0 is signal x_t - noise_scale v: derive it, and see that nothing is divided
    predict_x0(ZERO, ONE, ALPHA_BAR, 0, "v_prediction") == 0.8 * ONE
    predict_x0(ONE, ZERO, ALPHA_BAR, 2, "v_prediction") == -1.0 * ONE
    """, "5 a DDIM step": """
    # eta = 0 should mix x0 and eps as exercise 3 does, but at t_prev, and add no noise
    ddim_step(ONE, ZERO, ALPHA_BAR[:2], 1, 0, 0.0, ZERO) == 0.8 * ONE
    ddim_step(ZERO, ONE, ALPHA_BAR[:2], 1, 0, 0.0, ZERO) == 0.6 * ONE
    ddim_step(ZERO, ZERO, ALPHA_BAR[:2], 1, 0, 0.0, ONE) == ZERO
    # t_prev = -1 should return x0, because a_prev is 1 there; alpha_bar[-1] is the noisiest
    ddim_step(ONE, ZERO, ALPHA_BAR[:2], 1, -1, 0.0, ZERO) == ONE
    # eta = 1 should be DDPM: noise of variance 0.246 (eq. 7), which replaces some of eps
    ddim_step(ZERO, ZERO, ALPHA_BAR[:2], 1, 0, 1.0, ONE) == 0.49608 * ONE
    ddim_step(ZERO, ONE, ALPHA_BAR[:2], 1, 0, 1.0, ZERO) == 0.3375 * ONE
    """, "6 guidance": """
    # scale 1 should be the text's prediction, 3; swapped texts give 1, the paper's w gives 5
    guided_prediction(model, ZERO, 7, TEXT, EMPTY, 1.0) == 3.0 * ONE
    guided_prediction(model, ZERO, 7, TEXT, EMPTY, 0.0) == ONE  # scale 0 should ignore the text
    guided_prediction(model, X, 7, TEXT, EMPTY, 3.5) == X + 8  # go 3.5 times the way from 1 to 3
    """, "7 the KL term": """
    kl_divergence(ONE[0], ZERO[0]) == torch.full((4,), 21.0)  # sum a half over 42 numbers an image
    kl_divergence(ZERO[0], 2 * ONE[0]) == torch.full((4,), 92.1702)  # logvar is log s^2 already
    """, "8 attention over time": """
    AttentionOverTime(2)(TOK) == TOK - TOK  # at first it should add 0: to_out has weight and bias
    learns(AttentionOverTime(2), TOK) == True  # all zeros can never learn: set one layer to 0
    # if q = k = v = x, frame 0 of (0, 1) weights both by a half: is the softmax over frames?
    copying(AttentionOverTime(4))(FRAMES)[0, 0] == torch.full((3, 4), 0.5)
    # frame 1 should weight itself by sigmoid(sqrt(c))
    copying(AttentionOverTime(4))(FRAMES)[0, 1] == torch.full((3, 4), 0.8808)
    # clips and positions should not see each other: the batch is (b n), the sequence t
    copying(AttentionOverTime(2))(TOK)[:1, :, :1] == copying(AttentionOverTime(2))(TOK[:1, :, :1])
    """, "9 byte pairs": """
    merge_word("low", []) == ["l", "o", "w</w>"]  # begin with letters, the last with its suffix
    merge_word("low", LOW) == ["low</w>"]  # (lo, w</w>) should join what (l, o) has made
    merge_word("slower", LOW) == ["s", "lo", "w", "er</w>"]  # w is not w</w>
    merge_word("abc", [("b", "c</w>"), ("a", "b")]) == ["a", "bc</w>"]  # join in learned order
    merge_word("banana", [("a", "n")]) == ["b", "an", "an", "a</w>"]  # join all occurrences
    merge_word("aaaa", [("a", "a")]) == ["aa", "a", "a</w>"]  # from left to right, each symbol once
    """}


def inputs():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 3, 2)  # b t c h w; w = b, so that no wrong broadcast is an error
    return {"X": x, "ONE": torch.ones_like(x), "ZERO": torch.zeros_like(x),
            "LEAF": x.clone().requires_grad_(), "TOK": x.flatten(2, 3),
            "ALPHA_BAR": torch.tensor([0.64, 0.36, 0.0]), "STEPS": torch.tensor([0, 1]),
            "TEXT": torch.full((2, 5, 3), 3.0), "EMPTY": torch.ones(2, 5, 3),
            "FRAMES": torch.tensor([0.0, 1.0])[:, None, None].expand(1, 2, 3, 4),
            "LOW": [("l", "o"), ("lo", "w</w>"), ("e", "r</w>")]}


def model(x_t, t, context):
    return x_t + context.mean((1, 2))[:, None, None, None, None]  # a text adds its mean


def learns(layer, x):
    layer(x).sum().backward()
    return any(p.grad is not None and p.grad.any().item() for p in layer.parameters() if p.ndim > 1)


def copying(layer):
    for p in layer.parameters():
        p.data = torch.eye(len(p)) if p.ndim == 2 else torch.zeros(len(p))
    return layer


def same(a, b):
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and a == b
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-4)


def show(x):
    if not isinstance(x, torch.Tensor):
        return repr(x)
    ends = dict.fromkeys(f"{end:.4g}" for end in (x.min(), x.max()))
    return f"{' to '.join(ends)} in a tensor {tuple(x.shape)}"


def grade(answers, exercise):
    """Fail with a sentence unless all cases of an exercise hold for the functions in answers."""
    sentence = ""
    for line in CASES[exercise].splitlines():
        case, _, words = line.strip().partition("# ")
        sentence, given = words or sentence, inputs()
        left, right = case.split(" == ") if case else ("0", "0")
        got = eval(left, globals() | vars(answers) | given)
        wanted = eval(right, globals() | vars(answers) | inputs())
        if not all(map(same, given.values(), inputs().values())):
            pytest.fail(f"{left} changes its argument: did you work in place? Use x.clone()")
        if not same(got, wanted):
            pytest.fail(f"{sentence} [{left} should be {show(wanted)}, got {show(got)}]")


@pytest.mark.parametrize("exercise", CASES)
def test(exercise):
    from exercises import stubs  # here, so that a syntax error becomes a sentence, too
    grade(stubs, exercise)
