"""Caches: the same data with any number of workers, written again if its sources change."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from helpers import fresh_pipeline, make_clip, train_small, weights_of

import vae
from shapes import MovingShapes
from training import cache
from training.cache import Cache, cache_frames, cache_latents, cache_texts, digest, read
from training.data import ClipFolder


def item(i):
    """Item i: 1 to 5 rows of two numbers, row r of them 100 i + r."""
    return torch.arange(1.0 + i % 5)[:, None].expand(-1, 2) + 100 * i


class Items:
    """A source of seven items that counts what is encoded and may fail."""

    def __init__(self, fail_at=None):
        self.fail_at, self.encoded = fail_at, []

    def encode(self):
        for i in range(7):
            if i == self.fail_at:
                raise KeyboardInterrupt
            self.encoded.append(i)
            yield item(i)

    def cache(self, folder, made_from="these"):
        return Cache(folder / "items.bin", made_from, self.encode)


# A cache as a sequence


def test_items_and_rows_are_those_that_were_encoded(tmp_path):
    cached = Items().cache(tmp_path)
    assert len(cached) == 7 and all(torch.equal(x, item(i)) for i, x in enumerate(cached))
    rows = torch.cat([item(i) for i in range(7)])
    assert torch.equal(cached.rows, rows) and cached.num_rows == len(rows)
    cached.rows.zero_()
    assert torch.equal(Items().cache(tmp_path).rows, rows)  # writing leaves the file alone
    for i in (7, -1):
        with pytest.raises(IndexError, match=f"item {i} of 7"):
            cached[i]


# Encoding only once


def test_a_whole_cache_is_not_encoded_again(tmp_path):
    Items().cache(tmp_path)
    again = Items()
    assert torch.equal(again.cache(tmp_path)[6], item(6)) and again.encoded == []


def test_an_encoding_of_something_else_starts_again_also_after_an_interruption(tmp_path):
    Items().cache(tmp_path, "others")
    with pytest.raises(KeyboardInterrupt):
        Items(fail_at=5).cache(tmp_path)
    assert not (tmp_path / "items.json").exists()
    again = Items()
    assert torch.equal(again.cache(tmp_path)[6], item(6)) and again.encoded == [*range(7)]


def test_only_the_first_process_encodes(tmp_path, monkeypatch):
    Items().cache(tmp_path)
    other, waits = Items(), []
    monkeypatch.setattr(cache, "is_main", lambda: False)
    monkeypatch.setattr(cache, "barrier", lambda: waits.append(1))
    other.cache(tmp_path, "others")
    assert other.encoded == [] and len(waits) == 3


def test_a_digest_is_of_configuration_weights_and_values():
    network = fresh_pipeline().vae
    digests = {digest([1], network), digest([2], network), digest([1])}
    with torch.no_grad():
        network.quant_conv.bias += 1
    digests.add(digest([1], network))
    network.config = vae.VAEConfig()
    digests.add(digest([1], network))
    assert len(digests) == 5 and digest([1], network) in digests


# Reading


class Squares:
    def __len__(self):
        return 7

    def __getitem__(self, i):
        if i == 5:
            raise ValueError("clip 5: is damaged")
        return torch.tensor(i * i), "a square"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_in_order_and_an_error_stays_one_line(workers):
    got, state = [], torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        got.extend(read(Squares(), workers))
    assert torch.equal(torch.get_rng_state(), state)  # new weights are drawn from it
    assert [x.item() for x, _ in got] == [0, 1, 4, 9, 16] and got[0][1] == "a square"
    assert str(error.value) == "clip 5: is damaged"


def test_a_folder_is_read_by_workers_that_inherit_nothing(tmp_path, monkeypatch):
    """Windows and macOS start workers by "spawn", which pickles the data set."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context",
                        multiprocessing.get_context("spawn"))
    make_clip(tmp_path / "a.gif")
    (tmp_path / "a.txt").write_text("an ape")
    clips = ClipFolder(tmp_path, num_frames=2, image_size=6)
    ((frames, caption),) = read(clips, 1)
    assert torch.equal(frames, clips[0][0]) and caption == "an ape"


# In a run


def run_in(path):
    return SimpleNamespace(path=path, options=SimpleNamespace(workers=0), note=print)


def test_frames_follow_the_clips(tmp_path):
    for seed in (0, 1):
        clips = MovingShapes(4, 3, 16, seed)
        assert torch.equal(cache_frames(run_in(tmp_path), clips)[2], clips[2][0])
    assert {file.name for file in tmp_path.rglob("*.*")} == {"frames.bin", "frames.json"}


def test_latents_follow_the_autoencoder(tmp_path):
    clips, autoencoder = MovingShapes(4, 3, 16), fresh_pipeline().vae
    for bias in (0.0, 1.0):
        torch.nn.init.constant_(autoencoder.quant_conv.bias, bias)
        cached = cache_latents(run_in(tmp_path), clips, autoencoder)
        assert torch.equal(cached[1], vae.encode_clip(autoencoder, clips[1][0]))


def test_texts_have_the_states_of_their_batch_and_follow_the_text_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "TEXTS", 4)
    model, batches = fresh_pipeline(), []
    captions = [f"a dog number {i}" for i in range(9)]
    texts, encode_text = ["", *captions], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda b: batches.append(b) or encode_text(b))
    context_of = cache_texts(run_in(tmp_path), [*captions, *captions], model)
    assert batches == [texts[:4], texts[4:8], texts[8:]]  # each caption once
    right = torch.cat([encode_text(batch) for batch in batches])
    assert torch.equal(context_of([captions[6], "", captions[2]]), right[[7, 0, 3]])
    cache_texts(run_in(tmp_path), captions, model)
    assert len(batches) == 3
    with torch.no_grad():
        model.text_encoder.text_model.final_layer_norm.bias += 1
    cache_texts(run_in(tmp_path), captions, model)
    assert len(batches) == 6


def test_a_run_is_the_same_with_any_number_of_workers(trained, tmp_path):
    train_small(tmp_path / "run", "--stage", "vae", workers=2)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(trained)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert ours[name] == theirs[name]
