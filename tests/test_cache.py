"""Caches: the same data with any number of workers, after any stop, and little of it in memory."""

import os
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import fresh_pipeline, make_clip, train_small, weights_of

import cache
import files
import processes
import vae
from cache import Cache, cache_frames, cache_latents, cache_texts, read
from data import ClipFolder
from trainer import Trainer

ITEM = 40  # bytes of the longest item below


@pytest.fixture(autouse=True)
def two_items_a_file(monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 2 * ITEM + 39)


def item(i, value=0):
    """Item i: 1 to 5 rows of two numbers, row r of them 100 i + r + value."""
    return torch.arange(1.0 + i % 5)[:, None].expand(-1, 2) + 100 * i + value


def test_signals_to_a_group_of_processes_do_not_reach_workers():
    assert [*read(lambda i: os.getpgrp(), range(1), workers=1)] != [os.getpgrp()]


class Items:
    """A source of items that counts what is encoded and may fail."""

    def __init__(self, count=7, fail_at=None):
        self.count, self.fail_at, self.encoded, self.times = count, fail_at, [], {}

    def version(self, i):
        return f"clip {i}", self.times.get(i, 0)

    def encode(self, indices):
        for i in indices:
            if i == self.fail_at:
                raise KeyboardInterrupt
            self.encoded.append(i)
            yield item(i, self.times.get(i, 0))

    def cache(self, folder):
        return Cache(folder, self.count, self.version, self.encode, (8, ITEM))


def assert_right(cached, source):
    assert len(cached) == source.count
    for i, got in enumerate(cached):
        assert torch.equal(got, item(i, source.times.get(i, 0)))


# A cache as a sequence


def test_items_and_rows_are_those_that_were_encoded(tmp_path):
    source = Items()
    cached = source.cache(tmp_path / "c")
    assert_right(cached, source)
    rows = torch.cat([item(i) for i in range(7)])
    chosen = [0, len(rows) - 1, 5, 5, 2, 3]
    assert cached.num_rows == len(rows) and torch.equal(cached.rows(chosen), rows[chosen])
    assert torch.equal(cached.rows(range(len(rows))), rows)
    with pytest.raises(IndexError):
        cached[7]


def test_files_hold_as_many_items_as_fit_a_power_of_two_and_nothing_else_is_left(tmp_path,
                                                                                 monkeypatch):
    Items().cache(tmp_path / "c")
    names = [f"{k:06d}.safetensors" for k in range(4)]
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == names
    monkeypatch.setattr(cache, "FILE_BYTES", 7 * ITEM)  # seven fit: four
    Items().cache(tmp_path / "d")
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == names[:2]
    monkeypatch.setattr(cache, "FILE_BYTES", 1)  # none fits: one
    assert Items().cache(tmp_path / "e").num_files == 7


def test_a_few_files_are_open_however_many_there_are(tmp_path):
    source = Items(count=80)
    cached = source.cache(tmp_path / "c")
    assert_right(cached, source)
    assert_right(cached, source)  # also of files that were closed
    assert len(cached.opened) == cache.OPEN_FILES == 16 and cached.num_files == 40


# What is encoded, and what is not


def test_a_whole_cache_is_not_encoded_again(tmp_path, capsys):
    Items().cache(tmp_path / "c")
    again = Items()
    assert_right(again.cache(tmp_path / "c"), again)
    assert again.encoded == [] and capsys.readouterr().err == ""


def test_an_interrupted_encoding_goes_on_and_leaves_no_half_file(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        Items(fail_at=5).cache(tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2  # of items 0 to 3; item 4 was in memory
    rest = Items()
    assert_right(rest.cache(tmp_path / "c"), rest)
    assert rest.encoded == [4, 5, 6] and capsys.readouterr().err == ""


def test_a_changed_item_is_encoded_again_and_named(tmp_path, capsys):
    Items().cache(tmp_path / "c")
    changed = Items()
    changed.times[3] = 9
    assert_right(changed.cache(tmp_path / "c"), changed)
    assert changed.encoded == [2, 3]  # its file
    assert capsys.readouterr().err == (f"{tmp_path}/c: 1 of 4 files are written anew: clip 3 is "
                                       "new or has changed\n")


def test_a_clip_that_changes_while_it_is_encoded_is_encoded_by_the_next_start(tmp_path):
    changing = Items()
    encode = changing.encode
    changing.encode = lambda indices: (changing.times.update({2: 5}) or x for x in encode(indices))
    changing.cache(tmp_path / "c")
    again = Items()
    again.times[2] = 5
    assert_right(again.cache(tmp_path / "c"), again)
    assert again.encoded == [2, 3]


@pytest.mark.parametrize("count, encoded, reason", [
    (8, [6, 7], "clip 7 is new or has changed"), (5, [4], "others were removed"),
])
def test_added_and_removed_items_are_noticed(tmp_path, capsys, count, encoded, reason):
    Items(count=7 if count > 7 else 6).cache(tmp_path / "c")
    now = Items(count=count)
    assert_right(now.cache(tmp_path / "c"), now)
    assert now.encoded == encoded and reason in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:100], lambda raw: raw[:-1], lambda raw: b"hello" * 50,
], ids=["empty", "a beginning", "cut", "a text"])
def test_a_damaged_file_is_written_anew(tmp_path, capsys, damage):
    Items().cache(tmp_path / "c")
    path = tmp_path / "c/000001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    again = Items()
    assert_right(again.cache(tmp_path / "c"), again)
    assert again.encoded == [2, 3] and "1 of 4 files are written anew: damaged" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("name", ["items", "starts", "checksum"])
def test_a_changed_byte_is_never_read_as_data(tmp_path, name):
    cached = Items().cache(tmp_path / "c")
    path = tmp_path / "c/000001.safetensors"
    stored = {key: value.clone() for key, value in files.load_safetensors(path).items()}
    stored[name].view(-1).view(torch.uint8)[0] ^= 1
    files.save_safetensors(path, stored)
    with pytest.raises(ValueError, match="000001.safetensors: damaged; remove it and add --resume"):
        cached[2]
    with pytest.raises(ValueError, match="damaged"):
        cached.rows([cached.starts[1]])
    path.unlink()
    again = Items()
    assert_right(again.cache(tmp_path / "c"), again)


@pytest.mark.parametrize("change", [
    lambda stored: stored.update(items=stored["items"].view(torch.int32)),
    lambda stored: stored.update(items=stored["items"].reshape(-1, 1)),
])
def test_the_type_and_shape_of_a_file_s_items_are_checked_too(tmp_path, change):
    cached = Items().cache(tmp_path / "c")
    path = tmp_path / "c/000001.safetensors"
    stored = files.load_safetensors(path)
    change(stored)
    files.save_safetensors(path, stored)
    with pytest.raises(ValueError, match="000001.safetensors: damaged"):
        cached[2]


@pytest.mark.parametrize("change", [
    lambda stored: stored.pop("starts"), lambda stored: stored.pop("checksum"),
    lambda stored: stored.update(starts=stored["starts"].view(torch.float64)),
    lambda stored: stored.update(starts=stored["starts"][:-1]),
])
def test_a_file_whose_parts_do_not_fit_is_written_anew(tmp_path, capsys, change):
    Items().cache(tmp_path / "c")
    path = tmp_path / "c/000001.safetensors"
    stored = files.load_safetensors(path)
    change(stored)
    files.save_safetensors(path, stored)
    again = Items()
    assert_right(again.cache(tmp_path / "c"), again)
    assert again.encoded == [2, 3] and "written anew: damaged" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_with_the_bytes(tmp_path, monkeypatch):
    room = [100]
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=room[0]))
    least = Items(count=20)  # 10 files of two items of 8 bytes and more
    with pytest.raises(ValueError, match=r"c: needs about 160 bytes more of disk, got 100; make"):
        least.cache(tmp_path / "c")
    assert least.encoded == []
    room[0] = 170  # enough for the shortest items, but the first file's have 8 and 16 bytes
    with pytest.raises(ValueError, match=r"needs about 216 bytes more of disk, got 170"):
        least.cache(tmp_path / "c")
    assert least.encoded == [0, 1]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_what_is_missing(tmp_path, monkeypatch, count):
    """Threads in the place of processes."""
    with pytest.raises(KeyboardInterrupt):
        Items(count=14, fail_at=4).cache(tmp_path / "c")
    place, sources = threading.local(), [Items(count=14) for _ in range(count)]
    monkeypatch.setattr(processes, "rank_and_count", lambda: (place.rank, count))
    monkeypatch.setattr(processes, "barrier", threading.Barrier(count, timeout=30).wait)

    def one(rank):
        place.rank = rank
        assert_right(sources[rank].cache(tmp_path / "c"), sources[rank])

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))
    shares = [source.encoded for source in sources]
    assert sorted(sum(shares, [])) == list(range(4, 14))  # five files
    assert sorted(map(len, shares)) == {2: [4, 6], 3: [2, 4, 4]}[count]


# Reading ahead


def square(i):
    if i == 5:
        raise ValueError("clip 5: is damaged")
    return torch.tensor(i * i)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_in_order_and_an_error_stays_one_line(workers):
    got = []
    with pytest.raises(ValueError) as error:
        got.extend(read(square, iter([3, 1, 4, 1, 5, 9]), workers))
    assert torch.stack(got).tolist() == [9, 1, 16, 1]
    assert str(error.value) == "clip 5: is damaged"


def test_reading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(read(square, [1, 2], 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_worker_gets_can_be_sent_to_it(tmp_path):
    """Where processes cannot be forked: Windows."""
    make_clip(tmp_path / "dog/a.gif")
    clips = ClipFolder(tmp_path, num_frames=2, image_size=8, max_frames=5)
    cached = Cache(tmp_path / "c", 1, clips.version, lambda indices: (clips[i][0] for i in indices),
                   (8, 2000))
    sent = pickle.loads(pickle.dumps(cache.Answers(cached.rows)))
    assert torch.equal(sent[[3, 1]], clips[0][0][[3, 1]])


# In a run


@pytest.fixture
def clips(tmp_path):
    """Six clips of three to five frames."""
    for i in range(6):
        make_clip(tmp_path / f"clips/{'dog' if i % 2 else 'cat'}/{i}.gif", 3 + i % 3, gray=20 * i)
    return tmp_path / "clips"


def test_a_run_is_the_same_with_any_number_of_workers_and_after_any_stop(
        clips, tmp_path, monkeypatch):
    options = {"data": clips, "stage": "vae", "accumulate": 2}
    train_small(tmp_path / "0", **options)
    backward, calls = Trainer.backward, []

    def stop_in_step_three(self, loss):
        calls.append(1)
        if len(calls) == 6:  # nothing of steps 3 and 4 is saved
            raise KeyboardInterrupt
        backward(self, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "backward", stop_in_step_three)
        train_small(tmp_path / "2", workers=2, **options)
    assert {path.name for path in (tmp_path / "2/cache").iterdir()} == {"frames"}
    train_small(tmp_path / "2", "--resume", workers=1, **options)
    assert weights_of(tmp_path / "2") == weights_of(tmp_path / "0")


def test_frames_go_after_their_stage_and_all_else_with_the_last(clips, tmp_path):
    def caches():
        return {path.name for path in (tmp_path / "run").glob("cache/*")}

    train_small(tmp_path / "run", "--stage", "vae", data=clips)
    assert caches() == set()
    train_small(tmp_path / "run", "--stage", "image")
    assert caches() == {"latents"}
    train_small(tmp_path / "run", "--stage", "video")
    assert not (tmp_path / "run/cache").exists()


def test_a_clip_that_changes_between_stages_is_encoded_again(clips, tmp_path, capsys):
    train_small(tmp_path / "run", "--stage", "vae", data=clips)
    train_small(tmp_path / "run", "--stage", "image")
    make_clip(clips / "dog/3.gif", 4, gray=7)
    capsys.readouterr()
    train_small(tmp_path / "run", "--stage", "video")
    assert f"written anew: {clips}/dog/3.gif is new or has changed" in capsys.readouterr().err


def test_latents_of_another_autoencoder_are_encoded_again(clips, tmp_path):
    run = SimpleNamespace(path=tmp_path, options=SimpleNamespace(workers=0))
    source, autoencoder = ClipFolder(clips, 3, 16, max_frames=5), fresh_pipeline().vae
    before = [clip.clone() for clip in cache_latents(run, source, autoencoder)]
    assert torch.equal(before[1], vae.encode_clip(autoencoder, source[1][0]))
    with torch.no_grad():
        autoencoder.quant_conv.bias += 1
    after = cache_latents(run, source, autoencoder)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_texts_have_the_states_of_their_batch_also_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "TEXTS", 4)
    run, model = SimpleNamespace(path=tmp_path), fresh_pipeline()
    captions = [f"a dog number {i}" for i in range(9)]
    texts, batches, encode_text = ["", *captions], [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda b: batches.append(b) or encode_text(b))
    bytes_of_one = encode_text([""]).nbytes
    monkeypatch.setattr(cache, "FILE_BYTES", 4 * bytes_of_one)
    context_of = cache_texts(run, [*captions, *captions], model)
    assert batches == [texts[:4], texts[4:8], texts[8:]]
    right = torch.cat([encode_text(batch) for batch in batches])
    assert torch.equal(context_of([captions[6], "", captions[2]]), right[[7, 0, 3]])
    (tmp_path / "cache/texts/000001.safetensors").unlink()
    cache_texts(run, captions, model)
    assert batches[3:] == [texts[4:8]]


@pytest.mark.parametrize("count", [4, 40])
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path, monkeypatch, count):
    """Frames and latents alive at once, of all that pass through: counted, not measured."""
    for i in range(count):
        make_clip(tmp_path / f"clips/dog/{i:02d}.gif", 3, gray=i)
    alive, most, numbers = weakref.WeakSet(), [0], []

    def count_alive(tensor):
        alive.add(tensor)
        numbers.append(1)
        most[0] = max(most[0], len(alive))
        return tensor

    get, encode = ClipFolder.__getitem__, vae.encode_clip
    monkeypatch.setattr(ClipFolder, "__getitem__", lambda *a: (count_alive(get(*a)[0]), "dog"))
    monkeypatch.setattr(vae, "encode_clip", lambda *a: count_alive(encode(*a)))
    monkeypatch.setattr(cache, "OPEN_FILES", 2)
    run = SimpleNamespace(path=tmp_path, options=SimpleNamespace(workers=0))
    source, autoencoder = ClipFolder(tmp_path / "clips", 3, 16, max_frames=3), fresh_pipeline().vae
    # Two clips a file.
    monkeypatch.setattr(cache, "FILE_BYTES", 2 * 3 * 3 * 16 * 16)
    frames = cache_frames(run, source)
    monkeypatch.setattr(cache, "FILE_BYTES", 2 * 3 * 4 * 4 * 4 * 4)
    latents = cache_latents(run, source, autoencoder)
    for cached in (frames, latents):
        assert cached.num_files == count // 2
        for item in cached:
            assert len(item) == 3 and len(cached.opened) <= 2
    assert len(numbers) == 3 * count  # read twice, encoded once
    assert most[0] <= 6  # frames and latents of a file, and those that come next
