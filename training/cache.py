"""Data that training reads again and again, encoded once into mapped files in the run's folder.

    cache/frames.bin     the clips as frames uint8, for the vae stage
    cache/latents.bin    the clips as latents, for the image and video stages
    cache/texts.bin      the captions as hidden states, for the video stage

A .json beside each file says what it was made from and where each item starts. It is written last,
so a file without it is unfinished and is written again. A file that was made from other clips or by
another network is written again, too.
"""

import hashlib
import itertools

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import vae
from checkpoints.tokenizers import describe_cuts
from support.devices import barrier, is_main
from support.files import atomic, read_json, write_json
from training.run import progress

TEXTS = 16  # captions encoded at once


class Answers(Dataset):
    """The items of a data set, or their errors, because a worker would add a traceback."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        try:
            return self.clips[i]
        except (ValueError, OSError) as error:
            return error


def read(clips, workers):
    """Yield the items of a data set in order; worker processes read ahead."""
    # The loader draws a seed for its workers. It gets its own generator, because weights are
    # drawn from the global one.
    for answer in DataLoader(Answers(clips), batch_size=None, num_workers=workers,
                             generator=torch.Generator()):
        if isinstance(answer, Exception):
            raise answer
        yield answer


def digest(*values):
    """A hash of networks (configuration and weights) and of anything else that has a repr."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.nn.Module):
            sha.update(repr(value.config).encode())
            for tensor in value.state_dict().values():
                sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()


class Cache:
    """A sequence of tensors (t, ...) in one mapped file, which is read when an item is used.

    `made_from` is a digest of everything the items depend on; encode() yields them.
    """

    def __init__(self, path, made_from, encode):
        index = path.with_suffix(".json")
        barrier()  # all processes look before the first one writes
        stale = not index.exists() or read_json(index).get("made_from") != made_from
        barrier()
        if stale and is_main():
            index.unlink(missing_ok=True)
            lengths = []
            with atomic(path) as file:
                for item in encode():
                    file.write(item.contiguous().numpy().tobytes())
                    lengths.append(len(item))
            dtype = str(item.dtype).removeprefix("torch.")
            write_json(index, {"made_from": made_from, "dtype": dtype, "shape": item.shape[1:],
                               "starts": [0, *itertools.accumulate(lengths)]})
        barrier()
        found = read_json(index)
        self.starts, self.num_rows = found["starts"], found["starts"][-1]
        # Mode "c" never writes to the file: a page that is changed becomes a copy in memory.
        self.rows = torch.from_numpy(np.memmap(path, found["dtype"], "c", shape=(
            self.num_rows, *found["shape"])))

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        return self.rows[self.starts[i] : self.starts[i + 1]]


def cache_clips(run, name, clips, encode, network=None):
    """A Cache of encode(frames uint8 (t, 3, h, w)) for each clip."""
    def encode_all():
        answers = read(clips, run.options.workers)
        for frames, _ in progress(answers, name, len(clips)):
            yield encode(frames)

    versions = [clips.version(i) for i in range(len(clips))]
    return Cache(run.path / "cache" / f"{name}.bin", digest(versions, network), encode_all)


def cache_frames(run, clips):
    """The clips' frames, uint8 (t, 3, h, w)."""
    return cache_clips(run, "frames", clips, lambda frames: frames)


def cache_latents(run, clips, autoencoder):
    """The clips as scaled latents (t, c, h/f, w/f)."""
    return cache_clips(run, "latents", clips,
                       lambda frames: vae.encode_clip(autoencoder, frames).cpu(), autoencoder)


def cache_texts(run, captions, model):
    """A function from captions (or "") to their context (b, n, d). model is a Pipeline."""
    texts = ["", *dict.fromkeys(captions)]
    run.note(describe_cuts(model.tokenizer, captions, "captions"))

    def encode():
        for i in range(0, len(texts), TEXTS):
            yield from model.encode_text(texts[i : i + TEXTS]).float().cpu()

    cache = Cache(run.path / "cache/texts.bin", digest(
        texts, [*model.tokenizer.ranks], model.text_encoder), encode)
    numbers = {text: i for i, text in enumerate(texts)}
    return lambda chosen: torch.stack([cache[numbers[text]] for text in chosen])
