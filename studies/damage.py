"""What torture.py and tests/test_damage.py do to files, and how they judge the command after it."""

import contextlib
import gzip
import io
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import data
import evaluate
import model
import sample
import text
import train
import vae
import weights
from checkpoints.configs import TEXT
from checkpoints.names import names_in_file
from cli import run_main
from files import save_safetensors
from media.write import write_clip
from papers import long_video, video_autoencoder, video_decoder
from shapes import MovingShapes
from tokenizer import CLIPTokenizer
from trainer import Trainer

SECONDS = 20  # of CPU time that a command may take; ten times as many if it waits
ODD = (None, True, -1, 0, 2**63, 10**30, 1e308, math.nan, math.inf, "", "x", [], [[]], [10**9], {})
DRAW = "--num-frames 1 --num-steps 1 --guidance-scale 1 --format png --device cpu".split()


class Late(BaseException):
    """A command took too long."""


def places(value):
    """The (dict or list, key) of all that a JSON value or a training state holds."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def damaged(raw, name, chance):
    """The bytes of a file of that name with one fault: in a value of its JSON, or in bytes."""
    if name.endswith(".json") and chance.random() < 0.7:
        value = json.loads(raw)
        holder, key = chance.choice(list(places(value)))
        holder[key] = chance.choice(ODD)
        return json.dumps(value).encode()
    begin, count = chance.randrange(len(raw)), chance.randrange(1, 9)
    if chance.random() < 0.5:  # a header is at the beginning, a zip's list at the end
        begin = chance.choice([begin % 200, len(raw) - 1 - begin % 200]) % len(raw)
    return chance.choice([
        raw[:begin] + chance.randbytes(count) + raw[begin + count :],  # overwritten
        raw[:begin] + chance.randbytes(count) + raw[begin:], raw[:begin] + raw[begin + count :],
        raw[:begin], raw[:begin] + raw[begin:] * 2,
    ])


def fault_of(main, words):
    """What is wrong with how main() ends, called with these words in this process, or None."""
    def stop(*_):
        raise Late

    out, errors, before = io.StringIO(), io.StringIO(), sys.argv
    handlers = {name: signal.signal(name, stop) for name in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(10 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    status = 0
    try:
        sys.argv = ["command", *map(str, words)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            run_main(main)
    except SystemExit as end:
        status = end.code or 0
    except (Exception, Late) as error:  # run_main lets it through: a traceback, or Late
        if isinstance(error, Late) and re.search(r"\d+/\d+ \[", errors.getvalue()):
            return None  # a training that goes on, with a bar that says how long
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        sys.argv = before
        torch.set_flush_denormal(False)  # the commands set it for their whole process
    if status == 130:  # Ctrl-C, or a training that stops as if by it
        raise KeyboardInterrupt
    lines = [line for line in re.split(r"[\r\n]+", errors.getvalue()) if line.strip()]
    said = [line for line in lines if ": error: " in line]
    listed = not lines and "problems" in out.getvalue()  # the answer of `data.py check`
    if status and not listed and (len(said) != 1 or said != lines[-1:]):
        return f"status {status}, {lines[-3:]}"
    return None


def cases(folders):
    """(folder, file, main, words) of each kind of file in folders {name: path}; RUN is a copy."""
    draw = ["RUN", "a red circle", *DRAW, "--output", "RUN/x.png"]
    few = ["RUN", "--num-prompts", "2", "--device", "cpu"]
    long = ["sample", "RUN", "a red circle", "--num-frames", "12", "--output", "RUN/x.gif"]
    networks = [f"{part}/{file}" for part, file in (
        ("unet", weights.UNET_WEIGHTS), ("vae", weights.UNET_WEIGHTS),
        ("text_encoder", weights.TEXT_WEIGHTS))]
    networks += [str(Path(file).with_name("config.json")) for file in networks]
    others = ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
              "scheduler/scheduler_config.json", "sampling.json"]
    kept = ["training_state.pt", "train.json", "metrics.jsonl", "cache/frames/000000.safetensors"]
    all_cases = [
        *(("run", file, sample.main, draw) for file in networks + others),
        ("run", "train.json", evaluate.main, few),
        ("texts", "prompts.txt", sample.main, [folders["run"], *DRAW, "--prompts-file",
                                               "RUN/prompts.txt", "--output", "RUN/x.png"]),
        ("texts", "merges.txt.gz", sample.main, [folders["run"], "a cat", *DRAW, "--merges",
                                                 "RUN/merges.txt.gz", "--output", "RUN/x.png"]),
        *(("stopped", file, train.main, ["RUN", "--resume", "--stage", "vae"]) for file in kept),
        *(("files", file, weights.main, [f"RUN/{file}"]) for file in ("sd.ckpt", "sd.safetensors")),
        *((kind, file, data.main, ["check", "RUN", "--image-size", "16"]) for kind, file in (
            ("gif", "1.gif"), ("gif", "1.txt"), ("webp", "1.webp"), ("npy", "1.npy"),
            ("mp4", "1.mp4"), ("png", "1.png"), ("png", "metadata.jsonl"))),
        ("long", "long_video.json", long_video.main, long),
        ("latents", "x.gif.latents", long_video.main, [*long, "--resume"]),
        ("decoder", "video_decoder/video_decoder.json", video_decoder.main, ["evaluate", *few]),
        ("decoder", "video_decoder/config.json", sample.main, draw),
        ("3-D", "video_autoencoder.json", video_autoencoder.main, ["evaluate", *few]),
        ("3-D", "vae/config.json", video_autoencoder.main,
         ["sample", "RUN", "a red circle", "--output", "RUN/x.gif"]),
    ]
    return [case for case in all_cases if case[0] in folders]


def stopped_run(path, *options):
    """A training that Ctrl-C has stopped in its first stage before the last of four steps."""
    stop = mock.patch.object(Trainer, "_stopping", lambda self, _: self.step == 3)
    with stop, contextlib.suppress(KeyboardInterrupt):
        fault_of(train.main, [path, *options, "--vae-steps", "4", "--stage", "vae"])
    return path


def trial(case, folders, work, chance):
    """Damage one file in a copy of its folder and call the command: what is wrong, or None."""
    name, file, main, words = case
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folders[name], work)
    raw = (work / file).read_bytes()
    (work / file).write_bytes(damaged(raw, file, chance))
    fault = fault_of(main, [str(word).replace("RUN", str(work)) for word in words])
    return fault or (f"left {found}" if (found := [*work.rglob("*.tmp")]) else None)


def small_files(root):
    """{name: folder} of clips, texts and single files to damage."""
    clip = next(iter(MovingShapes(1, 4, 16)))[0].float() / 127.5 - 1
    for suffix in ("gif", "webp", "png", *["mp4"] * bool(shutil.which("ffmpeg"))):
        write_clip(root / suffix / f"1.{suffix}", clip)
        (root / suffix / "1.txt").write_text("a red circle")
    (root / "npy").mkdir()
    np.save(root / "npy" / "1.npy", np.zeros((4, 16, 16, 3), np.uint8))
    (root / "npy" / "1.txt").write_text("a red circle")
    (root / "png" / "1.txt").unlink()
    (root / "png" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a red circle"}')
    tokenizer = CLIPTokenizer.train(["a red circle", "a blue square"], 20)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.ranks)]
    (root / "texts").mkdir()
    (root / "texts" / "merges.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (root / "texts" / "prompts.txt").write_text("a red circle\na blue square\n")
    networks = {
        "unet": model.UNet(model.UNetConfig(
            block_out_channels=(32, 64), layers_per_block=1, attention_levels=(True, False),
            cross_attention_dim=64, sample_size=8)),
        "vae": vae.AutoencoderKL(vae.VAEConfig(block_out_channels=(32, 64), layers_per_block=1)),
        "text_encoder": text.CLIPTextModel(text.TextConfig(600, 64, 64, 1, 1, 16)),
    }
    tensors, form = {}, {f"{TEXT}transformer.text_model.": None}
    for part, network in networks.items():
        state = network.state_dict()
        for name, place in names_in_file(part, network, form, ema=False).items():
            tensors[place] = state[name]
    (root / "files").mkdir()
    torch.save({"state_dict": tensors}, root / "files" / "sd.ckpt")
    save_safetensors(root / "files" / "sd.safetensors", tensors)
    names = "gif", "webp", "png", "mp4", "npy", "texts", "files"
    return {name: root / name for name in names if (root / name).exists()}
