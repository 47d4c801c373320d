"""Does every command end well, whatever its files hold, its flags say and whenever it is killed?

    python -m studies.torture --count 200 --kills 20

Small runs are trained in a temporary folder. Then each kind of file is damaged `count` times and
given to a command that reads it, numeric flags get odd values, disks are full, and a training is
killed `kills` times, resumed, and compared with one that was not.

A command held if it ends within 20 seconds of CPU time with status 0, or with one line of error and
another status, and leaves no temporary file; or if it goes on with a bar that tells how long. The
study ends with status 1 if anything did not hold.
"""

import argparse
import contextlib
import io
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import data
import evaluate
import sample
import train
import weights
from cli import check_ranges, run_main
from files import read_json
from metrics import NUM_FEATURES
from options import STAGES
from papers import key_frames, long_video, video_autoencoder, video_decoder
from studies import bench, compare, damage, page
from studies.damage import DRAW, cases, fault_of, small_files, stopped_run, trial

ROOT = Path(train.__file__).parent
NUMBERS = "0", "-1", "1" + 30 * "0", "inf", "nan", str(2**64), "", "x"
SMALL = ("--num-clips 8 --num-frames 4 --image-size 16 --vae-steps 4 --image-steps 4 --video-steps "
         "4 --vae-batch-size 4 --image-batch-size 4 --video-batch-size 2 --num-steps 2 "
         "--log-every 2 --save-every 2 --device cpu").split()
COMPARE = f"--variants none,shift --num-prompts {NUM_FEATURES + 1} --steps 2 --seeds 1".split()
COMPARE += "--checkpoints 1 --curve-prompts 2 --repetitions 1 --device cpu".split()
COMPARED = [  # damage.py, which the tests use as well, can do without what draws curves
    ("compared", "evaluation.json", page.main, ["RUN"]),
    *(("compared", f"compare/{file}", compare.main, ["RUN", *COMPARE]) for file in (
        "settings.json", "costs.json", "references.json", "shift-0/result.json",
        "feature_net.safetensors")),
]


def must(main, *words):
    """Call a command that has to work."""
    if fault := fault_of(main, words):
        raise ValueError(f"{' '.join(map(str, words))}: {fault}")


def other_runs(root, run):
    """{name: folder} of small runs of papers/, and of a comparison."""
    steps = ["--decoder-steps", 2, "--decoder-batch-size", 2, "--device", "cpu"]
    must(long_video.main, "train", root / "long", "--init", run, *steps, "--num-clips", 8,
         "--clip-frames", 64, "--long-steps", 2, "--long-batch-size", 2)
    shutil.copytree(root / "long", root / "work")  # its latents name the folder they are of

    def stop(path, parts, rate):
        next(parts)
        raise ValueError("stopped")

    with mock.patch.object(long_video, "write_parts", stop):
        fault_of(long_video.main, ["sample", root / "work", "a red circle", "--num-frames", 12,
                                   "--output", root / "work" / "x.gif"])
    (root / "work").rename(root / "latents")
    shutil.copytree(run, root / "decoder")
    must(video_decoder.main, "train", root / "decoder", *steps)
    must(video_autoencoder.main, "train", root / "3-D", *SMALL)
    shutil.copytree(run, root / "work")
    must(evaluate.main, root / "work", "--num-prompts", 2, "--device", "cpu")
    with mock.patch.object(damage, "SECONDS", 200):  # it trains a feature net
        must(compare.main, root / "work", *COMPARE)
    (root / "work").rename(root / "compared")  # its settings name the folder it is of
    return {name: root / name for name in ("long", "latents", "decoder", "3-D", "compared")}


def flags_of(main, command):
    """The flags with a value of a command, from its help."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        with mock.patch.object(sys, "argv", ["command", *command, "--help"]):
            main()
    found = re.findall(r"^ +(--[\w-]+) [A-Z{]", out.getvalue(), re.MULTILINE)
    return [flag for flag in found if flag not in ("--output", "--sheet")]


def odd_numbers(folders, root, count, chance):
    """Yield what is wrong, or None, for so many of all flags of all commands with odd values."""
    run, long = folders["run"], folders["long"]
    clip = folders["gif"] / "1.gif"
    commands = [
        (train.main, [], ["new", *SMALL, "--stage", "vae"]), (sample.main, [], [run, "a", *DRAW]),
        (evaluate.main, [], [run, "--num-prompts", "2"]),
        (data.main, ["check"], [folders["gif"]]), (weights.main, [], [run]),
        (long_video.main, ["train"], ["new", "--init", run, "--long-steps", "1"]),
        (long_video.main, ["sample"], [long, "a", "--num-frames", "9"]),
        (long_video.main, ["evaluate"], [long, "--num-clips", "1"]),
        (key_frames.main, ["sample"], [long, "a", "--num-key-frames", "2"]),
        (key_frames.main, ["interpolate"], [long, clip]),
        (video_autoencoder.main, ["train"], ["new", *SMALL, "--stage", "vae"]),
        (video_autoencoder.main, ["compare"], [run, "--num-clips", "2"]),
        (video_autoencoder.main, ["sample"], [folders["3-D"], "a"]),
        (video_autoencoder.main, ["evaluate"], [folders["3-D"], "--num-prompts", "2"]),
        (video_decoder.main, ["train"], [run, "--decoder-steps", "1", "--decoder-batch-size", "1"]),
        (video_decoder.main, ["evaluate"], [folders["decoder"], "--num-prompts", "2"]),
        (video_decoder.main, ["costs"], ["--image-size", "64"]),
        (bench.main, [], ["--only", "shift", "--repetitions", "1"]),
    ]
    calls = [(main, [*command, *words, flag, number]) for main, command, words in commands
             for flag in flags_of(main, command) for number in NUMBERS]
    for main, words in chance.sample(calls, min(count, len(calls))):
        for folder in (root / "new", run / "video_decoder"):
            shutil.rmtree(folder, ignore_errors=True)
        fault = fault_of(main, words)
        yield fault and f"{main.__module__} {' '.join(map(str, words))}: {fault}"


def full_disks(root, count, chance):
    """Yield what is wrong, or None, with trainings whose files cannot grow beyond some size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(count):
        shutil.rmtree(root / "full", ignore_errors=True)
        size = int(10 ** chance.uniform(0, 7))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            fault = fault_of(train.main, [root / "full", *SMALL])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        litter = [*root.rglob("*.tmp")]
        resume = ["--resume"] * (root / "full" / "train.json").exists()
        fault = fault or (f"left {litter}" if litter else None)
        yield fault or fault_of(train.main, [root / "full", *SMALL, *resume])


def killed(root, kills, chance):
    """Yield what is wrong, or None, with trainings that were killed and resumed."""
    def start(path):
        resume = ["--resume"] * (path / "train.json").exists()
        return subprocess.Popen([sys.executable, ROOT / "train.py", path, *SMALL, *resume],
                                stderr=subprocess.PIPE, text=True)

    def networks(path):
        return {file.relative_to(path): file.read_bytes() for file in path.rglob("*.safetensors")}

    began, whole = time.perf_counter(), start(root / "whole")
    errors = whole.communicate()[1]
    if whole.returncode:
        raise ValueError(errors[-300:])
    seconds = time.perf_counter() - began
    for number in range(kills):
        path, finished = root / f"killed-{number}", list(STAGES)
        while len(finished) == len(STAGES):  # a kill after the last stage is none
            shutil.rmtree(path, ignore_errors=True)
            with start(path) as process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0.3, 1) * seconds)  # imports take the beginning
                process.kill()
            record = path / "train.json"
            finished = read_json(record)["finished"] if record.exists() else []
        with start(path) as process:
            errors = process.communicate()[1]
        same = networks(path) == networks(root / "whole") and not [*path.rglob("*.tmp")]
        yield None if same else f"kill {number}: {errors[-300:]}"


def main():
    parser = argparse.ArgumentParser(description="Damage files, flags, disks and processes.",
                                     allow_abbrev=False)
    parser.add_argument("--count", type=int, default=200, help="of each kind (default: 200)")
    parser.add_argument("--kills", type=int, default=20, help="of a training (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged (default: 0)")
    args = parser.parse_args()
    check_ranges(args, count=(1, 10**6), kills=(0, 10**4), seed=(0, 2**62))
    chance, rows = random.Random(args.seed), []

    def note(name, faults):
        tried = held = 0
        for fault in faults:
            tried, held = tried + 1, held + (fault is None)
            if fault:
                print(f"{name}: {fault}", file=sys.stderr, flush=True)
        rows.append((tried, held))
        print(bench.row(name, str(tried), str(held)), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.chdir(root)
        must(train.main, root / "run", *SMALL)
        folders = {"run": root / "run", "stopped": stopped_run(root / "stopped", *SMALL),
                   **small_files(root), **other_runs(root, root / "run")}
        print(bench.table(["test", "tried", "held"]))
        for case in [*cases(folders), *COMPARED]:
            note(f"{case[1]} ({case[2].__module__})", (
                trial(case, folders, root / "work", chance) for _ in range(args.count)))
        note("odd numbers for flags", odd_numbers(folders, root, 5 * args.count, chance))
        note("full disks", full_disks(root, -(-args.count // 20), chance))
        note("kills of a training", killed(root, args.kills, chance))
        os.chdir(ROOT)  # or else the folder could not be removed everywhere
    return int(any(tried != held for tried, held in rows))


if __name__ == "__main__":
    run_main(main)
