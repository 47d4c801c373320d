"""What training reads again and again, in mapped files of the run's folder instead of memory.

    cache/frames/     the clips as frames uint8, for the vae stage
    cache/latents/    the clips as latents, for the image and video stages
    cache/texts/      the captions as hidden states, for the video stage

A file holds some items, one after another, and a signature of each: a hash of the item's name,
size and time, and of the network that encodes it. A file is kept if it is whole and has the
signatures of today's items; else it is written anew. This one rule continues an encoding that was
stopped, notices clips that have changed and replaces damaged files. Several processes share the
files that have to be written.
"""

import bisect
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import zlib

import torch
from torch.utils.data import DataLoader, Dataset

import processes
import vae
from files import load_safetensors, raw_bytes, save_safetensors
from run import progress

FILE_BYTES = 8 * 2**20  # of a file, at most: what a kill loses and what encoding holds in memory
OPEN_FILES = 16  # mapped at a time
TEXTS = 16  # captions encoded at once; a file holds as many or more


class Answers(Dataset):
    """get(index), or the error that it raises: from a worker it would come with a traceback."""

    def __init__(self, get):
        self.get = get

    def __getitem__(self, index):
        try:
            return self.get(index)
        except (ValueError, OSError) as error:
            return error


def leave_signals(worker):
    """The main process answers Ctrl-C and SIGTERM at the end of a step, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a signal to the main process's group does not reach them


def read(get, indices, workers):
    """Yield get(index) for all indices, in order; so many worker processes read ahead."""
    # The loader draws a seed for its workers, not from the global generator: weights come from it.
    # Workers are forked, also where another way is the default, since `get` may be any function.
    fork = "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None
    loader = DataLoader(Answers(get), batch_size=None, sampler=indices, num_workers=workers,
                        multiprocessing_context=fork, worker_init_fn=leave_signals,
                        generator=torch.Generator())
    for answer in loader:
        if isinstance(answer, Exception):
            raise answer
        yield answer


def signature(version):
    """64 bits of a hash, as an int64."""
    digest = hashlib.sha256(repr(version).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def checksum(stored):
    """CRC-32 of a file's items, their type and where they start, which its header cannot check."""
    number = zlib.crc32(repr((stored["items"].dtype, [*stored["items"].shape])).encode())
    for name in ("items", "starts"):
        number = zlib.crc32(raw_bytes(stored[name]), number)
    return number


def digest_of(network):
    """A hash of a network's configuration and weights."""
    digest = hashlib.sha256(repr(network.config).encode())
    for tensor in network.state_dict().values():
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


class Cache:
    """A sequence of tensors (t, ...) in the files of a folder, mapped when they are read.

    version(i) is a tuple of all that item i follows from, its name first. encode(indices) yields
    items. item_bytes are what the shortest and the longest item take at most.

    Raises ValueError if the disk has no room, or when a damaged item is read.
    """

    def __init__(self, folder, count, version, encode, item_bytes):
        self.folder, self.count, self.version = folder, count, version
        fit = max(1, FILE_BYTES // item_bytes[1])
        self.per_file = 2 ** (fit.bit_length() - 1)  # so that files hold whole batches of texts
        self.num_files = -(-count // self.per_file)
        self.opened, self.checked = {}, set()
        folder.mkdir(parents=True, exist_ok=True)
        self._write_missing(encode, item_bytes[0])
        rows = (load_safetensors(self._path(k))["starts"][-1].item() for k in range(self.num_files))
        self.starts = [0, *itertools.accumulate(rows)]  # the first row of each file
        self.num_rows = self.starts[-1]  # the sum of all items' t

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(f"item {i} of {self.count}")
        k, place = divmod(i, self.per_file)
        stored = self._open(k)
        begin, end = stored["starts"][place : place + 2].tolist()
        return stored["items"][begin:end]

    def rows(self, chosen):
        """Rows (b, ...) by their numbers among the rows of all items."""
        files = [bisect.bisect_right(self.starts, row) - 1 for row in chosen]
        return torch.stack([self._open(k)["items"][row - self.starts[k]]
                            for k, row in zip(files, chosen, strict=True)])

    def _path(self, k):
        return self.folder / f"{k:06d}.safetensors"

    def _items(self, k):
        """The numbers of the items in file k."""
        return range(k * self.per_file, min(self.count, (k + 1) * self.per_file))

    def _open(self, k):
        """The tensors of file k; a process checks their bytes once."""
        if k not in self.opened:
            stored = load_safetensors(self._path(k))
            if k not in self.checked and stored["checksum"].item() != checksum(stored):
                raise ValueError(f"{self._path(k)}: damaged; remove it and add --resume, which "
                                 "encodes its clips again")
            self.checked.add(k)
            if len(self.opened) == OPEN_FILES:
                del self.opened[next(iter(self.opened))]  # the first that was opened
            self.opened[k] = stored
        return self.opened[k]

    def _fault(self, k):
        """Why file k has to be written: "" if it does not exist, None if it need not be."""
        try:
            file = load_safetensors(self._path(k))
            starts, _, stored = file["starts"], file["checksum"], file["signatures"].tolist()
            if (starts.dtype, len(starts), len(file["items"])) != (
                torch.int64, len(stored) + 1, starts[-1]
            ):
                raise ValueError("its parts do not fit together")
        except FileNotFoundError:
            return ""
        except (LookupError, TypeError, ValueError) as error:
            return f"damaged ({error})"
        new = {signature(version): version[0] for version in map(self.version, self._items(k))}
        if list(new) == stored:
            return None
        changed = [name for number, name in new.items() if number not in stored]
        return f"{changed[0]} is new or has changed" if changed else "others were removed"

    def _write_missing(self, encode, item_bytes):
        faults = {k: self._fault(k) for k in range(self.num_files)}
        missing = [k for k, fault in faults.items() if fault is not None]
        reasons = [faults[k] for k in missing if faults[k]]
        processes.barrier()  # all have looked before one of them writes
        if reasons and processes.is_main():
            print(f"{self.folder}: {len(reasons)} of {self.num_files} files are written anew: "
                  f"{reasons[0]}", file=sys.stderr)
        rank, count = processes.rank_and_count()
        mine, written = missing[rank::count], 0  # this process's share
        # Taken before the clips are read: one that changes meanwhile is noticed by the next start.
        signatures = {k: torch.tensor([signature(self.version(i)) for i in self._items(k)])
                      for k in mine}
        encoded = encode([i for k in mine for i in self._items(k)])
        for done, k in enumerate(mine):
            file_bytes = written / done if done else item_bytes * len(self._items(k))
            needed = int(file_bytes * (len(missing) - done * count))
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise ValueError(f"{self.folder}: needs about {needed:,} bytes more of disk, got "
                                 f"{free:,}; make room and add --resume, or lower --max-frames")
            items = list(itertools.islice(encoded, len(self._items(k))))
            stored = {"items": torch.cat(items), "signatures": signatures[k],
                      "starts": torch.tensor([0, *itertools.accumulate(map(len, items))])}
            save_safetensors(self._path(k), stored | {"checksum": torch.tensor(checksum(stored))})
            written += stored["items"].nbytes
        processes.barrier()


def cache_clips(run, name, clips, row_bytes, encode, digest=""):
    """encode(frames uint8 (t, 3, h, w)) of each clip, in a folder of that name."""
    def encode_all(indices):
        answers = read(clips.__getitem__, indices, run.options.workers)
        for frames, _ in progress(answers, name, len(indices)):
            yield encode(frames)

    return Cache(run.path / "cache" / name, len(clips), lambda i: (*clips.version(i), digest),
                 encode_all, (row_bytes * clips.num_frames, row_bytes * clips.max_frames))


def cache_frames(run, clips):
    """The clips' frames, uint8 (t, 3, h, w)."""
    return cache_clips(run, "frames", clips, 3 * clips.image_size**2, lambda frames: frames)


def cache_latents(run, clips, autoencoder):
    """The clips as scaled latents (t, c, h/f, w/f), encoded once for all stages."""
    config = autoencoder.config
    row_bytes = 4 * config.latent_channels * (clips.image_size // config.downscale) ** 2
    return cache_clips(run, "latents", clips, row_bytes,
                       lambda frames: vae.encode_clip(autoencoder, frames).cpu(),
                       digest_of(autoencoder))


def cache_texts(run, captions, model):
    """A function from texts, captions or "", to their context (b, n, d). model is a Pipeline."""
    texts, config = ["", *dict.fromkeys(captions)], model.text_encoder.config
    numbers, digest = {text: i for i, text in enumerate(texts)}, digest_of(model.text_encoder)

    def encode(indices):  # the same texts together in a batch also when others are done already
        for _, batch in itertools.groupby(indices, lambda i: i // TEXTS):
            yield from model.encode_text([texts[i] for i in batch]).cpu()

    size = 4 * config.max_position_embeddings * config.hidden_size
    cache = Cache(run.path / "cache/texts", len(texts), lambda i: (texts[i], digest), encode,
                  (size, size))
    return lambda chosen: torch.stack([cache[numbers[text]] for text in chosen])
