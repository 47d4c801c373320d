"""The pictures of docs/lesson.md, drawn from a trained run.

    python -m studies.figures runs/demo
    python -m studies.figures runs/demo --only shift reach --output my_pictures

One function draws one picture; inside.py measures. The same run always gives the same pixels.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor

from diffusion import randn
from evaluate import draw, psnr, recognise
from media.write import enlarge
from shapes import HELD_OUT, caption_of
from shift import temporal_shift
from studies import inside
from studies.sheets import COLOURS, new_figure, save, show
from support.cli import Parser, run_main
from vae import encode_clip

PROMPT = caption_of(*HELD_OUT[2])  # prompt of most pictures; training has never seen it
SEED = 3  # seed of the noise
TITLE = f'"{PROMPT}", always from the same noise; numbers of {inside.MEASURED} other clips'
LOSS_CLIPS, LOSS_LEVELS = 24, 11


def shift(run, figure):
    """The frame that each channel comes from, before the shift and after it."""
    t, c = 6, 9
    before = torch.arange(1, t + 1)[None, :, None].expand(1, t, c)  # b t c
    after = temporal_shift(before)  # 0 where there is no such frame
    paint = np.array([ImageColor.getrgb(colour) for colour in ("#E8E8E8", *COLOURS[:t])]) / 255
    left, right = figure.subplots(1, 2)
    for axes, x, title in ((left, before, "before the shift"), (right, after, "after the shift")):
        axes.pcolormesh(paint[x[0]], edgecolors="white", linewidth=2)
        for (frame, channel), origin in np.ndenumerate(x[0].numpy()):
            axes.text(channel + 0.5, frame + 0.5, origin, ha="center", va="center", weight="bold",
                      color="white" if origin == 1 else "black")  # legible on the frame's colour
        axes.set(xlabel="channels", xticks=[], ylabel="frame", yticks=np.arange(t) + 0.5,
                 yticklabels=range(1, t + 1), ylim=(t, 0), aspect="equal", title=title)
        axes.set_frame_on(False)
    right.vlines([3, 6], 0, t, "white", linewidth=8)
    right.set_xticks([1.5, 4.5, 7.5], ["from frame i-1", "own", "from frame i+1"])


def reach(run, figure):
    """How many frames the middle one sees after each block, measured by gradients."""
    t = 41  # eight blocks of two shifts see 33
    panels = figure.subplots(1, 3)
    for shifts, axes in enumerate(panels):
        strength = inside.reach_of(inside.with_shifts(run.video.unet, shifts), t)
        relative = (strength / strength.amax(1, keepdim=True)).log10().numpy()  # -inf: white
        image = axes.imshow(relative, vmin=-8, vmax=0, aspect="auto",
                            extent=(-t / 2, t / 2, len(strength), 0))
        labels = [f"block {n}: {seen}" for n, seen in enumerate((strength > 0).sum(1).tolist(), 1)]
        axes.set(title=f"shifts per block: {shifts}", xlabel="frames from the middle",
                 yticks=np.arange(len(strength)) + 0.5, yticklabels=labels)
    panels[0].set_ylabel("frames seen after each block")
    figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=40,
                    label="log10 of the gradient over the largest of its row; white: no path")


def latents(run, figure):
    """A clip through the autoencoder."""
    model, clip = run.video, run.clips(2)[0][1]
    z = encode_clip(model.vae, 127.5 * (clip + 1))  # t c h w
    decoded, f = model.decode(z[None])[0], model.vae.config.downscale
    gray = [enlarge((z[:, [i, i, i]] / 3).clamp(-1, 1), f) for i in range(z.shape[1])]
    rows = ["frames", *(f"latents, channel {i + 1}" for i in range(len(gray))),
            f"decoded: {psnr(decoded, clip).mean():.1f} dB"]
    show(figure.subplots(), [clip, *gray, decoded], rows,
         f"Frames of {clip[0].numel():,} numbers, their {z[0].numel():,} latents, and back")


def noise(run, figure):
    """A frame at rising noise levels, in pixels and in latents."""
    model, diffusion, frame = run.video, run.video.diffusion, run.clips(2)[0][1, :1]
    levels = torch.linspace(0, diffusion.num_train_timesteps - 1, 9).long()
    pixels, z = (diffusion.add_noise(x0.expand(len(levels), -1, -1, -1),
                                     randn(x0.shape, torch.Generator().manual_seed(SEED)), levels)
                 for x0 in (frame, encode_clip(model.vae, 127.5 * (frame + 1))))
    colours = enlarge((z[:, :3] / 3).clamp(-1, 1), model.vae.config.downscale)
    columns = [f"{t}\n{diffusion.snr(t):.3g}" for t in levels.tolist()]
    show(figure.subplots(), [pixels.clamp(-1, 1), colours, model.decode(z[None])[0]],
         ["noise on pixels", "noise on latents", "the same, decoded"],
         "A frame disappears in noise", "timestep, and its signal-to-noise ratio", columns)


def denoising(run, figure):
    """A clip after some of the steps, and the clip that the model expects there."""
    model, steps = run.video, inside.denoise(run.video, PROMPT, SEED)
    chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, 6)})
    columns = range(0, model.sampling.num_frames, max(1, model.sampling.num_frames // 4))
    rows = [f"step {i + 1}, t = {steps[i][0]}" for i in chosen]
    for axes, part, names, title in zip(
            figure.subplots(1, 2), (1, 2), (rows, []),
            ("x_t, the sampler's latents", "x0, the model's guess"), strict=True):
        clips = model.decode(torch.cat([steps[i][part] for i in chosen]))[:, columns]
        show(axes, clips, names, title, columns=[i + 1 for i in columns])
    figure.suptitle(f'"{PROMPT}", {len(chosen)} of {len(steps)} steps, decoded')


def guidance(run, figure):
    """The same noise with a rising weight of the text."""
    clips, rows = [], []
    for scale, max_snr in ((1, None), (2, None), (3, None), (4, None), (6, None), (6, 0.2)):
        model = run.variant(guidance_scale=scale, guidance_max_snr=max_snr)
        name = f"guidance {scale}" if max_snr is None else f"{scale}, SNR <= {max_snr}"
        clips.append(inside.draw_prompt(model, PROMPT, SEED))
        rows.append(f"{name}\n{inside.measure(model)}")
    show(figure.subplots(), clips, rows, TITLE)


def training(run, figure):
    """From the image model to the video model: a clip after some training steps."""
    prompt, clips = inside.previews_of(run)
    show(figure.subplots(), list(clips.values()), [f"{step:,} steps" for step in clips],
         f'"{prompt}", from the same noise after N training steps')


def without(run, figure):
    """The trained model with parts of the shift taken out, and with more frames."""
    t, model, clips, rows = run.options.num_frames, run.video, [], []
    for name, thirds in (("as trained", []), ("no shift", ["past", "future"]),
                         ("without the past", ["past"]), ("without the future", ["future"])):
        with inside.shift_without(*thirds):
            clips.append(inside.draw_prompt(model, PROMPT, SEED))
            rows.append(f"{name}\n{inside.measure(model)}")
    longer = run.variant(num_frames=2 * t)
    clips += inside.draw_prompt(longer, PROMPT, SEED).split(t)
    rows += [f"{2 * t} frames at once\n{inside.measure(longer)}", "and its second half"]
    show(figure.subplots(), clips, rows, TITLE)


def held_out(run, figure):
    """The combinations that training has never seen, and what evaluate.py sees in the clips."""
    clips, rows = draw(run.video, HELD_OUT, run.options.num_frames, SEED, len(HELD_OUT)), []
    for clip, prompt in zip(clips, HELD_OUT, strict=True):
        seen = recognise((clip.double().numpy() + 1) / 2)
        wrong = "✗\nseen as " + " ".join(word or "nothing" for word in seen)
        rows.append(f"{' '.join(prompt)} {'✓' if seen == prompt else wrong}")
    show(figure.subplots(), list(clips), rows, "Combinations that training has not seen")


def loss(run, figure):
    """The loss at each noise level: image and video model, with and without text."""
    clips, captions = run.clips(LOSS_CLIPS)
    levels = torch.linspace(0, run.video.diffusion.num_train_timesteps - 1, LOSS_LEVELS).long()
    axes = figure.subplots()
    for name, model, colour in (("image", run.image, COLOURS[0]), ("video", run.video, COLOURS[1])):
        for texts, label, style in ([""] * len(clips), "no text", "--"), (captions, "text", "-"):
            losses = inside.losses_of(model, clips, texts, levels, SEED)
            axes.plot(levels, losses, f"o{style}", color=colour, label=f"{name} model, {label}")
    axes.set(xlabel="timestep (999: pure noise)", ylabel="loss", ylim=(0, None),
             title=f"{len(clips)} clips that training has not seen")
    axes.legend()


FIGURES = {  # heights in inches
    shift: 3.1, reach: 4, latents: 5, noise: 3.1, denoising: 5.2, guidance: 5.4, training: 5,
    without: 5.4, held_out: 7.4, loss: 4.4,
}


def main():
    names = [picture.__name__ for picture in FIGURES]
    parser = Parser(description="Draw the pictures of docs/lesson.md from a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="finished run on MovingShapes")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"some of {', '.join(names)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("docs/lesson"), metavar="FOLDER",
                        help="(default: docs/lesson)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    run = inside.load(args.run)
    for picture, height in FIGURES.items():
        if picture.__name__ in args.only:
            figure = new_figure(height)
            with torch.no_grad():
                picture(run, figure)
            save(figure, args.output / f"{picture.__name__}.png")


if __name__ == "__main__":
    run_main(main)
