"""Nine exercises in the lesson's order: replace each NotImplementedError by 3 to 15 lines.

`python -m pytest exercises` says what is still wrong. No exercise needs another one. Clips are
(b clips, t frames, c channels, h, w). Never write into an argument; return a new tensor.

alpha_bar (num_timesteps,) falls from almost 1 (clean) to 0 (pure noise). At a timestep,

    x_t = signal x0 + noise_scale eps,  signal = sqrt(alpha_bar),  noise_scale = sqrt(1 - alpha_bar)
"""

import torch
import torch.nn.functional as F
from torch import nn


def temporal_shift(x):
    """1. Replace two thirds of each frame's channels by its neighbours'. x and result: (b, t, c, h, w).

    With fold = c // 3, frame i of the result is, along its channels,

        [ frame i-1's first fold | its own middle, unchanged | frame i+1's last fold ]

    Beyond the ends of the clip there are zeros. A clip of one frame, an image, stays as it is.
    Autograd then finds the gradient by itself: the opposite shift.

    Latent-Shift 3.2; lesson "The shift"; shift.py.
    """
    raise NotImplementedError


def frames_seen(frame, num_frames, num_blocks):
    """2. Predict how many frames a frame depends on after num_blocks blocks, an int.

    Each block convolves every frame by itself, shifts once as in exercise 1, and convolves again.
    `frame` counts from 0 in a clip of num_frames; it sees itself, too, but nothing outside the clip.

    Latent-Shift 3.2, "receptive field"; lesson "How far a frame sees"; studies/inside.py.
    """
    raise NotImplementedError


def noise_and_target(x0, eps, alpha_bar, timesteps):
    """3. Training: noisy latents x_t (equation above) and the target v. Returns the pair (x_t, v).

        v = signal eps - noise_scale x0

    x0, eps and both results are (b, t, c, h, w). timesteps (b,) int64 has one timestep per clip.

    DDPM, eq. 4; v: Salimans & Ho 2022, appendix D; lesson "Noise"; diffusion.py.
    """
    raise NotImplementedError


def predict_x0(output, x_t, alpha_bar, t, prediction_type):
    """4. Sampling: the clean latents x0 that a model's output (b, t, c, h, w) implies.

    output is eps if prediction_type is "epsilon" and v if it is "v_prediction" (exercise 3); x_t
    has the same shape, t is one timestep, an int. Solve the two equations for x0, on paper. The
    result for v has no division, so it also holds where alpha_bar is 0.

    DDIM, eq. 9; Salimans & Ho 2022, appendix D; lesson "Denoising"; diffusion.py.
    """
    raise NotImplementedError


def ddim_step(x0, eps, alpha_bar, t, t_prev, eta, noise):
    """5. Sampling: the step from timestep t to the less noisy t_prev. Returns (b, t, c, h, w).

    x0 and eps are the model's guesses at t. With a = alpha_bar at t and a_prev at t_prev,

        sigma = eta sqrt((1 - a_prev) / (1 - a)) sqrt(1 - a / a_prev)
        result = sqrt(a_prev) x0 + sqrt(1 - a_prev - sigma^2) eps + sigma noise

    t_prev = -1 is the end, where nothing is noisy: a_prev = 1. With eta = 0 a step draws no noise,
    with eta = 1 it is DDPM's. alpha_bar is a tensor, t and t_prev are ints, eta is a float; x0, eps
    and noise have one shape.

    DDIM, eq. 12 and 16; DDPM, eq. 6 and 7; lesson "Denoising"; diffusion.py.
    """
    raise NotImplementedError


def guided_prediction(model, x_t, t, context, empty, guidance_scale):
    """6. Sampling: classifier-free guidance. Returns the guided prediction (b, t, c, h, w).

    model(x_t, t, context) predicts with the texts in context (b, n, d); empty (b, n, d) has the
    empty text in each row. Start from the prediction without text and go guidance_scale times the
    way to the prediction with it: 0 ignores the text, 1 is the plain model, above 1 exaggerates.
    The paper's w is guidance_scale - 1. In x_t (b, t, c, h, w) each clip is independent of others.

    Ho & Salimans 2022, eq. 6; lesson "Guidance"; diffusion.py and pipeline.py.
    """
    raise NotImplementedError


def kl_divergence(mean, logvar):
    """7. The autoencoder's penalty for latents far from N(0, 1). Returns one number per image, (n,).

    mean and logvar (n, c, h, w) are a Gaussian N(m, s^2) per latent number, logvar = log s^2. Sum

        KL(N(m, s^2) | N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2

    over the latent numbers of each image.

    LDM, Rombach et al. 2022, appendix G; lesson "Latents"; vae.py.
    """
    raise NotImplementedError


class AttentionOverTime(nn.Module):
    """8. The shift's rival: each position attends to itself in all frames. Clips to clips.

        x + to_out(softmax(q k^T / sqrt(c)) v),  q, k, v = to_q(x), to_k(x), to_v(x)

    For each clip and position, q, k and v are (t, c) and the weights (t, t), each row summing to 1.
    Move the axes of x (b, t, c, h, w) first: a linear layer works on the last one. Before training
    the whole layer must be the identity, so that the image model is not disturbed.

    LVDM, He et al. 2022, section 3; lesson "What others do"; temporal.py.
    """

    def __init__(self, channels):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)
        # Your line or two: start as the identity, and so that the layer can still learn.

    def forward(self, x):
        raise NotImplementedError


def merge_word(word, merges):
    """9. The tokens of a word by byte-pair encoding, a list of str.

    Start with one symbol per letter, the last with the suffix "</w>". `merges` are pairs of
    symbols in the order in which training learned them. Take them in this order; each one joins
    all its neighbouring occurrences, from left to right. With merges [("l", "o"), ("lo", "w</w>"),
    ("e", "r</w>")]: "low" -> ["low</w>"], and "slower" -> ["s", "lo", "w", "er</w>"].

    Sennrich et al. 2016; CLIP 2.4; README "Read it"; tokenizer.py.
    """
    raise NotImplementedError
