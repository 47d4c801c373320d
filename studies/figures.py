"""The pictures of docs/lesson.md, drawn from a trained run.

    python -m studies.figures runs/demo
    python -m studies.figures runs/demo --only shift reach --output my_pictures

One function draws one picture; inside.py measures. The same run always gives the same pixels.
notebook.py puts the first functions into docs/lesson.ipynb.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor

from diffusion import randn
from evaluate import choose_prompts, crispness, draw, psnr, recognise
from media.write import contact_sheet, enlarge, to_uint8
from shapes import HELD_OUT, SEEN, caption_of
from shift import temporal_shift
from studies import inside
from studies.sheets import COLOURS, diagram, drawn, save, show
from support.cli import Parser, run_main
from vae import encode_clip

PROMPT = caption_of(*HELD_OUT[2])  # prompt of most pictures; training has never seen it
SEED = 3  # seed of the noise
TITLE = f'"{PROMPT}", always from the same noise; numbers of {inside.JUDGED} other clips'
LOSS_CLIPS, LOSS_LEVELS = 24, 11
GRAY, BLUE, ORANGE = "#E8E8E8", "#BBDDF3", "#F9C99B"  # of boxes: data, networks, the shift


def colours_of(z, zoom=1):
    """Latents (t, c, h, w) as images: three of their channels as red, green and blue."""
    return enlarge((z[:, :3] / 3).clamp(-1, 1), zoom)


def whole(run, figure):
    """From a text and noise to a clip: the text encoder, the U-Net in a loop, the decoder."""
    model, axes, f = run.video, figure.subplots(), run.video.vae.config.downscale
    steps = inside.denoise(model, PROMPT, SEED)  # (t, x_t, x0) of each
    noise, latents = steps[0][1], steps[-1][2]  # 1 t c h w
    clips = colours_of(noise[0], f), colours_of(latents[0], f), model.decode(latents)[0]
    for x, name, clip in zip((1.1, 4.8, 7.4), ("noise", "latents", "frames"), clips, strict=True):
        sheet = to_uint8(contact_sheet(clip[[0, len(clip) // 2, -1]].split(1)))[0]
        axes.imshow(sheet, extent=(x - 0.45, x + 0.45, 0.1, 2.86), interpolation="nearest")
        axes.text(x, 2.95, name, ha="center")
    axes.text(0.3, 1.5, f"frames 1, {len(clip) // 2 + 1} and {len(clip)}", va="center",
              rotation=90)
    boxes = [(1.1, 3.5, f'"{PROMPT}"', GRAY), (3, 3.5, "tokenizer,\ntext encoder", BLUE),
             (3, 1.5, f"U-Net,\nin each of\n{len(steps)} steps", BLUE), (6.1, 1.5, "decoder", BLUE)]
    stops = (1.6, 2.55), (3.45, 4.3), (5.3, 5.7), (6.5, 6.9)
    arrows = [(2.1, 3.5, 2.5, 3.5), (3, 3.22, 3, 1.85), *((a, 1.5, b, 1.5) for a, b in stops)]
    diagram(axes, boxes, arrows)


def block(run, figure):
    """A ResNet block with the shift in it, for three frames."""
    axes, boxes, arrows = figure.subplots(), [], []
    for frame, y in (("frame i-1", 2.8), ("frame i", 1.65), ("frame i+1", 0.5)):
        axes.plot([1.3, 1.3, 6.6, 6.6], [y, y + 0.45, y + 0.45, y], "gray", linewidth=1)
        boxes += [(0.7, y, frame, GRAY), (2.2, y, "norm, SiLU,\nconv1", BLUE), (6.6, y, "+", GRAY),
                  (3.7, y, "SHIFT", ORANGE), (5.2, y, "norm, SiLU,\nconv2", BLUE)]
        stops = (1.1, 1.75), (2.65, 3.4), (4, 4.75), (5.65, 6.45), (6.75, 7.4)
        arrows += [(start, y, end, y) for start, end in stops]
        if y < 2:  # to the lane above and from it
            arrows += [(3.55, y + 0.2, 3.55, y + 0.97), (3.85, y + 0.97, 3.85, y + 0.2)]
            axes.text(3.5, y + 0.65, "last third", ha="right")
            axes.text(3.9, y + 0.65, "first third")
    axes.text(1.4, 3.3, "skip connection", color="gray")
    diagram(axes, boxes, arrows)


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
    scale = z.std((0, 2, 3)).tolist()  # one for each channel
    gray = [enlarge((z[:, [i, i, i]] / (3 * s)).clamp(-1, 1), f) for i, s in enumerate(scale)]
    rows = ["frames", *(f"latents, channel {i}\ndeviation {s:.2f}" for i, s in enumerate(scale, 1)),
            f"decoded: {psnr(decoded, clip).mean():.1f} dB"]
    show(figure.subplots(), [clip, *gray, decoded], rows,
         f"Frames of {clip[0].numel():,} numbers, their {z[0].numel():,} latents, and back")


def noise(run, figure):
    """A frame at rising noise levels, in pixels and in latents."""
    model, diffusion, frame = run.video, run.video.diffusion, run.clips(2)[0][1, :1]
    log_snr = torch.logit(diffusion.alphas_cumprod)  # log(a / (1 - a))
    levels = [(log_snr - k * math.log(4)).abs().argmin().item() for k in range(4, -5, -1)]
    levels = torch.tensor([*levels, diffusion.num_train_timesteps - 1])
    pixels, z = (diffusion.add_noise(x0.expand(len(levels), -1, -1, -1),
                                     randn(x0.shape, torch.Generator().manual_seed(SEED)), levels)
                 for x0 in (frame, encode_clip(model.vae, 127.5 * (frame + 1))))
    columns = [f"{float(f'{diffusion.snr(t):.2g}'):g}\n{t}" for t in levels.tolist()]
    show(figure.subplots(), [pixels.clamp(-1, 1), colours_of(z, model.vae.config.downscale),
                             model.decode(z[None])[0]],
         ["noise on pixels", "noise on latents", "the same, decoded"],
         "A frame disappears in noise", "signal-to-noise ratio, and its timestep", columns)


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
    """Images and clips that are wrong without guidance, and what too much of it does."""
    models = {"no guidance": run.variant(guidance_scale=1),
              f"guidance {run.video.sampling.guidance_scale}": run.video,
              "6, in all steps": run.variant(guidance_scale=6, guidance_max_snr=None)}
    panels, prompts = figure.subplots(3, height_ratios=(1.2, 1, 1)), choose_prompts(inside.JUDGED)
    for t, part in ((1, panels[:1]), (run.options.num_frames, panels[1:])):
        clips, right = zip(*(inside.judge(model, t) for model in models.values()), strict=True)
        rows = [f"{name}\n{100 * n.mean():.0f} % right"
                for name, n in zip(models, right, strict=True)]
        mended = np.argsort(right[0] | ~right[1], kind="stable")  # right only with guidance: first
        groups = mended[:8][None] if t == 1 else mended[:2, None]
        for axes, group in zip(part, groups, strict=True):
            title = "Images" if t == 1 else f'"{caption_of(*prompts[group[0]])}"'
            columns = ["\n".join(prompts[i][:2]) for i in group] if t == 1 else None
            show(axes, [drawn[group].flatten(0, 1) for drawn in clips], rows, title,
                 "" if columns else "frame", columns)


def training(run, figure):
    """The image model, the same with the shift, and the video model that training makes of it."""
    image, shifts = run.image.unet, run.options.shifts
    unets = {"image model": inside.with_shifts(image, 0),
             "with the shift": inside.with_shifts(image, shifts),
             f"after {run.options.video_steps:,}\ntraining steps": run.video.unet}
    models = [dataclasses.replace(run.video, unet=unet) for unet in unets.values()]
    for axes, prompt in zip(figure.subplots(2), (PROMPT, caption_of(*SEEN[20])), strict=True):
        clips = [inside.draw_prompt(model, prompt, SEED) for model in models]
        show(axes, clips, list(unets), f'"{prompt}", from the same noise')


def without(run, figure):
    """The trained model with parts of the shift taken out, and with more frames."""
    t, clips, rows = run.options.num_frames, [], []
    for name, thirds in (("as trained", []), ("no shift", ["past", "future"]),
                         ("without the past", ["past"]), ("without the future", ["future"])):
        with inside.shift_without(*thirds):
            clips.append(inside.draw_prompt(run.video, PROMPT, SEED))
            rows.append(f"{name}\n{100 * inside.judge(run.video, t)[1].mean():.0f} % right")
    clips += inside.draw_prompt(run.variant(num_frames=2 * t), PROMPT, SEED).split(t)
    right = 100 * inside.judge(run.video, 2 * t)[1].mean()
    rows += [f"{2 * t} frames at once\n{right:.0f} % right", "and its second half"]
    show(figure.subplots(), clips, rows, TITLE)


def held_out(run, figure):
    """The combinations that training has never seen, and what evaluate.py sees in the clips."""
    clips, rows = draw(run.video, HELD_OUT, run.options.num_frames, SEED, len(HELD_OUT)), []
    for clip, prompt in zip(clips, HELD_OUT, strict=True):
        seen = recognise((clip.double().numpy() + 1) / 2)
        wrong = "✗\nseen as " + " ".join(word or "nothing" for word in seen)
        verdict = "✓" if seen == prompt else wrong
        rows.append(f"{' '.join(prompt)} {verdict} {crispness(clip, prompt[1]):.2f}")
    show(figure.subplots(), list(clips), rows,
         "Combinations that training has not seen: right or wrong, and crispness")


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
    whole: 3.8, block: 3.5, shift: 3.1, reach: 4, latents: 5, noise: 3, denoising: 5.2,
    guidance: 8.5, training: 6, without: 5.4, held_out: 7.4, loss: 4.4,
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
            save(drawn(picture, run, height), args.output / f"{picture.__name__}.png")


if __name__ == "__main__":
    run_main(main)
