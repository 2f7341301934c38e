"""
The claims of train.py, sample.py and data.py, one test each: `pytest .ci/test_scripts.py`.

    python .ci/test_scripts.py --as-on 2 ARGUMENTS    # train.py, as on a host of two CUDA devices
"""

import contextlib
import hashlib
import io
import itertools
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields
from pathlib import Path
from pydoc_data.topics import topics
from signal import SIGHUP, SIGINT, SIGTERM
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies
from torch.torch_version import TorchVersion

# isort: off
from conftest import ANYWHERE, CPU, FILES, GONE, MEMORY, OK, RESUME, ROOT, SAMPLE, SMALL, STORIES
from conftest import TEXT, TINY, Evil, Killed, command_lines, cuda, decoded, files_in, held
from conftest import limited_memory, load, log_rows, many, now, pair, python, read, refused, said
from conftest import some_bytes, steps, stop_at, stretched, stretched_moments, tampered, torchrun
from conftest import wait_for, zipped
# isort: on

import data
import sample
import train
from sample import load_checkpoint, run
from wav import GPT, KINDS, RESIDUALS, GPTConfig

# --------------------------------------------------------------------------------------------------
# As on CUDA


def test_the_stand_in_for_cuda_refuses_what_cuda_refuses():
    with cuda(2):
        x = torch.arange(3, device="cuda:1")
        assert x.device == (x + 1)[:2].device == torch.device("cuda:1") and x.cpu().device == CPU
        mixed = (lambda: x + torch.ones(3), lambda: x + torch.ones(3).to("cuda:0"), x.pin_memory)
        for wrong in (torch.device("cuda"), "cuda", "cpu", "cuda:2", *mixed):
            with pytest.raises((ValueError, AssertionError)):
                wrong() if callable(wrong) else torch.cuda.set_device(wrong)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("device", ["", "cuda", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_run_starts_on_any_number_of_gpus_and_on_each(home, n, device, residual):
    flags, i = ["--device", device] * (device != ""), int(device[5:] or 0)
    argv = [*ANYWHERE, *SMALL, "--max_iters", "1", "--residual", residual, *flags]
    with cuda(n) as seen:
        if device and i >= n:
            allowed = ", ".join(["auto", "cpu", "cuda", "cuda:0"][: 2 + 2 * n])
            for main, args in ((train.main, argv), (sample.main, flags)):
                refused(main, args, f"error: device='{device}' must be one of {allowed}\n")
            return
        out, _ = said(train.main, *argv)
        assert (f"bfloat16 on cuda:{i}" if n else "float32 on cpu") in out
        assert not n or f"peak memory {1234 + i:,} MB" in out
        parts = ["mix", "merge", "offer_at_once", *["Attention", "MLP"] * 2]
        assert (seen.current, seen.compiled) == ((i, parts) if n else (None, []))
        # The texts and the starts of evaluation and step flow, the prompt of the sample waits.
        copies = [(torch.uint8, True)] * 2 + [(torch.int64, True)] * 2 + [(torch.int64, False)]
        assert [c for c in seen.copies if not c[0].is_floating_point] == copies * (n > 0)
        said(train.main, *RESUME, "--max_iters", "2", *flags)
        said(sample.main, *SAMPLE, *flags)
        said(sample.main, *SAMPLE, "--routing", *flags, code=2 * (residual == "standard"))


@pytest.mark.parametrize("given", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("n, native", [(1, True), (1, False), (0, True)])
def test_bf16_is_chosen_only_where_it_is_native(home, n, native, given):
    dtype = given if given != "auto" else "bfloat16" if n and native else "float32"
    with cuda(n, native) as seen:
        argv = [*ANYWHERE, *SMALL, "--max_iters", "1", "--no-compile", "--dtype", given]
        assert f" parameters, {dtype} on " in said(train.main, *argv)[0]
    assert (torch.bfloat16 in seen.dtypes) == (dtype == "bfloat16") and not seen.compiled
    assert seen.autocast == {"cuda" if n else "cpu"}


# --------------------------------------------------------------------------------------------------
# Stop, start, resume, crash, refuse


SIGNALS = [*(([n], [], 128 + n, 1) for n in (SIGINT, SIGTERM, SIGHUP)), ([SIGHUP], [SIGHUP], 0, 4)]
SIGNALS += [([n, m], [], -m, 0) for n in (SIGINT, SIGTERM) for m in (SIGINT, SIGTERM)]


@pytest.mark.parametrize("sent, ignored, code, step", SIGNALS)
def test_a_signal_stops_a_run_after_its_step_and_a_second_at_once(start, sent, ignored, code, step):
    process = start(TINY, "a", held, "data", "random_starts", ignored)
    wait_for(lambda: list(Path().glob("*.held")))
    line = "" if ignored else "\nstopping after this step; again to stop now\n"
    for number in sent:
        os.kill(process.pid, number)
        wait_for(lambda: Path("a.2").read_text() == line)  # while the step goes on
    Path("go").touch()
    process.join(60)
    assert (process.exitcode, now()) == (code, step) and load_checkpoint("run/ckpt.pt")
    last = "stopped at step 1 and saved: the same command with --resume goes on"
    assert (Path("a.1").read_text().splitlines()[-1] == last) == (step == 1)
    assert code == 0 or run(train.main, [*TINY, "--resume"]) == 0
    assert steps() == [0, 2, 4] and files_in("run").keys() == FILES


def test_ctrl_c_before_the_folder_is_claimed_leaves_none_and_claims_nothing(home):
    home.setattr(train, "rehearse", lambda *args: signal.raise_signal(SIGINT))
    assert "saved" not in "".join(said(train.main, *TINY, code=130)) and os.listdir() == ["a.txt"]


def test_ctrl_c_that_ends_tee_too_still_saves(home):
    flags = [*TINY, *SMALL, "--max_iters", "5000", "--eval_interval", "5000"]
    script = f"({sys.executable} {ROOT}/train.py {' '.join(flags)}; echo $? > code) 2>&1 | tee log"
    with subprocess.Popen(["setsid", "bash", "-c", script]) as shell:
        wait_for(log_rows)
        os.killpg(shell.pid, SIGINT)
    assert Path("code").read_text() == "130\n" and now() > 0 and steps()[0] == 0
    assert "step 0: val 3." in Path("log").read_text()


def test_of_four_runs_started_together_one_goes_on(start):
    processes = [start(TINY, name, held, "train", "claim") for name in "abcd"]
    wait_for(lambda: len(list(Path().glob("*.held"))) == 4)
    Path("go").touch()
    for process in processes:
        process.join(60)
    errors = [Path(f"{name}.2").read_text() for name in "abcd"]
    assert sorted(errors) == ["", *[f"error: {train.HELD.format('run')}\n"] * 3]
    assert [process.exitcode for process in processes] == [2 if error else 0 for error in errors]
    assert files_in("run").keys() == FILES and steps() == [0, 2, 4]


@pytest.mark.parametrize("error", MEMORY)
@pytest.mark.parametrize("where", [(GPT, "forward"), (torch.optim.AdamW, "step")])
def test_a_first_batch_that_no_memory_holds_touches_no_folder(finished, where, error):
    before = files_in(".")
    finished.setattr(*where, Mock(side_effect=error))
    for argv in ([*TINY, "--overwrite"], [*TINY, "--out_dir", "new"]):
        refused(train.main, argv, "out of memory, make batch_size or the model smaller: ")
    assert files_in(".") == before and not Path("new").exists()


def test_a_compiler_that_fails_is_named_and_left_out_but_for_want_of_memory(home):
    def backend(graph, inputs):
        raise RuntimeError(reason)

    compiler = torch.compile
    home.setattr(torch, "compile", lambda f: compiler(f, backend=backend))
    reason = "CUDA out of memory"
    refused(train.main, [*TINY, "--compile"], "error: out of memory, make batch_size or the model")
    assert os.listdir() == ["a.txt"]
    reason = "no\nC++ here"
    (line,) = re.findall("torch.compile failed .*", said(train.main, *TINY, "--compile")[0])
    assert "no C++ here" in line and line.endswith(": going on without it")
    said(train.main, *TINY, "--out_dir", "eager")
    assert [row[:4] for row in log_rows()] == [row[:4] for row in log_rows("eager")]


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_stopped_and_resumed_run_is_the_unbroken_run_to_the_bit(home, residual):
    flags = [*TINY, "--residual", residual, "--dropout", "0.1", "--max_iters", "12"]
    flags += ["--eval_interval", "4", "--warmup_iters", "3", "--grad_accum", "2"]
    said(train.main, *flags, "--out_dir", "whole")
    claim = train.claim  # stopped as it starts, before an evaluation, between two, at one
    for step, argv in ((0, flags), (1, RESUME), (5, RESUME), (8, RESUME), (12, RESUME)):
        with home.context() as patch:
            stop_at(patch, step - 1)
            patch.setattr(train, "claim", lambda *a: (claim(*a), signal.raise_signal(SIGTERM)))
            out, _ = said(train.main, *argv, code=143 if step < 12 else 0)
        assert step == 12 or out.splitlines()[-1].startswith(f"stopped at step {step} and saved: ")
        assert now() == step and said(sample.main, *SAMPLE)[0].count("\n") >= 2
        torch.manual_seed(99)
        if step == 0:  # it can be read, and says what it reads
            log = rf"{train.LOG_HEADER}0,,3\.\d{{6}},,,0\.0\n"
            assert re.fullmatch(log, Path("run/log.csv").read_text())
            assert read()["optimizer"]["state"] == {}, "the first batch left something"
            assert said(sample.main, *SAMPLE)[1] == f"run/ckpt.pt: {residual} 4x16\n"
    for name in ("ckpt.pt", "best.pt"):
        whole, broken = read(f"whole/{name}"), read(f"run/{name}")
        for checkpoint in (whole, broken):  # their folder, the clock and its figures may differ
            progress, _ = checkpoint["progress"], checkpoint.pop("settings")
            del progress["seconds"]
            assert progress.pop("evaluated")[0] == 12
            rows = [row.split(",")[:4] for row in progress.pop("log")]
            assert [row[0] for row in rows] == ["step", "0", "4", "8", "12"]
            checkpoint["rest"] = [rows, *(checkpoint.pop(n) for n in ("config", "chars", "text"))]
        assert whole.pop("rest") == broken.pop("rest")
        torch.testing.assert_close(whole, broken, rtol=0, atol=0)


def test_a_run_killed_at_20_random_moments_leaves_whole_checkpoints(start):
    flags = [*TINY, *SMALL, "--max_iters", "100000", "--eval_interval", "1", "--eval_batches", "1"]
    chance, ckpt, done = random.Random(1), Path("run/ckpt.pt"), []
    saved = lambda: ckpt.stat().st_mtime_ns if ckpt.exists() else 0
    for i in range(20):
        before = saved()
        process = start([*flags, "--resume" if before else "--overwrite"])
        while i % 4 and saved() == before:  # one in four dies as it starts, the rest as they save
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert all(load_checkpoint(path) for path in Path("run").glob("*.pt"))
        if ckpt.exists():
            done.append(now())
            kept = [int(row.split(",")[0]) for row in read()["progress"]["log"][1:]]
            assert kept == list(range(done[-1] + 1)) and steps() == kept[: len(steps())]
    assert done == sorted(done) and done[-1] > 20
    said(train.main, *RESUME, "--max_iters", str(done[-1] + 3))
    assert steps() == list(range(done[-1] + 4)) and {len(row) for row in log_rows()} == {6}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("call", range(1, 9))  # 2 files at step 0, 3 at step 1, 3 at step 2
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_crash_or_a_full_disk_in_any_write_leaves_whole_checkpoints(home, function, call, full):
    def fail(file, *args):
        if next(calls) < call:
            return original(file, *args)
        before.update({n: b for n, b in files_in("run").items() if not n.endswith(".part")})
        if full:
            raise OSError(28, "No space left on device")
        if function == "fsync":  # half of what was written reached the disk
            os.ftruncate(file, os.fstat(file).st_size // 2)
        raise Killed

    calls, original, before = itertools.count(1), getattr(os, function), {}
    argv = [*TINY, *SMALL, "--max_iters", "2", "--eval_interval", "1", "--warmup_iters", "0"]
    with home.context() as patch, pytest.raises(OSError if full else Killed):
        patch.setattr(os, function, fail)
        train.main(argv)
    assert before and (files_in("run") == before or not full)
    assert all(load_checkpoint(path) for path in Path("run").glob("*.pt"))
    saved, still = Path("run/ckpt.pt").exists(), ["--learning_rate", "0", "--min_lr", "0"]
    how = ["--resume", "--max_iters", "3", *still] if saved else ["--overwrite"]
    said(train.main, *argv, *how)
    best = read("run/best.pt")["progress"]["best"]  # of what is learnt above, for no more is
    assert float(f"{best:.6f}") <= min(float(row[2]) for row in log_rows()[1:])
    assert steps()[:3] == [0, 1, 2] and {n for n in files_in("run") if n[-5:] != ".part"} == FILES


@pytest.mark.parametrize("call", range(3))
def test_a_run_killed_as_it_replaces_another_leaves_no_best_without_its_run(finished, call):
    calls, unlink = iter(range(call)), Path.unlink
    finished.setattr(Path, "unlink", lambda *args, **how: (next(calls), unlink(*args, **how)))
    with pytest.raises(StopIteration):
        train.main([*TINY, "--overwrite"])
    assert Path("run/ckpt.pt").exists() or not Path("run/best.pt").exists()


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("bad_update", [6, 7, 8])
def test_a_nan_never_comes_over_a_good_checkpoint(home, bad_update, stopped):
    def overflow(parameters, norm):  # update number `bad_update` makes every weight a nan
        parameters = list(parameters)
        for p in parameters if next(updates) == bad_update else ():
            p.grad.fill_(math.inf)
        return clip(parameters, norm)

    with home.context() as patch:
        stop_at(patch, 4)
        said(train.main, *TINY, "--max_iters", "12", "--eval_interval", "4", code=143)
    before, clip, updates = files_in("run"), torch.nn.utils.clip_grad_norm_, itertools.count(6)
    home.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    stop_at(home, bad_update - 1 if stopped else -1)  # in the very step that is bad
    what = "weights" if stopped and bad_update < 8 else "loss"
    refused(train.main, RESUME, f"{what} not finite at step", "try a lower --learning_rate or")
    assert files_in("run") == before


CHARS = sorted(set(TEXT))
LIES = [
    *(("config n_layer", n) for n in (2, 6, 10**6, 10**9, -1, "4", None, 4.0)),
    *(("config n_embd", n) for n in (8, 32, 10**6, 10**12)),
    *(("config n_ctx", n) for n in (0, 10**9, True)),
    *(("config vocab_size", n) for n in (1, 29, 10**12)),
    *(("config residual", r) for r in ("standard", "nonsense", [])),
    *(("config n_head", n) for n in (3, 10**9)),
    *(("config dropout", x) for x in ("a", math.nan)),
    *(("config n_block", 3), ("config detail_bias", math.inf), ("config unknown", 1)),
    *(("chars", chars) for chars in (CHARS[::-1], [1, *CHARS[1:]], [*CHARS, "🦊"], "", None)),
    *(("model more", torch.zeros(1)), ("model head.weight", torch.zeros(16, 28))),  # transposed
    *(("model embed.weight", GONE), ("model", stretched), ("model", []), ("model", GONE)),
    *(("settings", GONE), ("settings", None), ("config", GONE), ("config", {"a\nb": 1})),
    *(("settings dataset", GONE), ("settings data_dir", 3)),
    *(("", x) for x in (torch.zeros(3), None, {}, {"model": {"w": torch.zeros(2)}, "epoch": 3})),
]
NOT_RESUMED = [
    *((f"progress {f.name}", x) for f in fields(train.Progress) for x in (None, "x", [1])),
    *((f"settings {f.name}", []) for f in fields(train.Settings)),
    *((name, x) for name in ("progress", "optimizer", "text") for x in (None, "x", [], GONE)),
    *(("progress unknown", 1), ("settings beta1", 0.9), ("settings grad_accum", True)),
    *(("progress evaluated", (0, "x")), ("progress evaluated", (0, torch.zeros(2)))),
    *(("settings n_layer", 6), ("config dropout", 0.5), ("progress log", ["\ud800"])),
    *((f"progress {name}", torch.zeros(n)) for name in ("losses", "evaluated") for n in (1, 2)),
    *((f"optimizer state 0 {name}", stretched_moments) for name in ("exp_avg", "exp_avg_sq")),
    *(("optimizer state", x) for x in (None, "x", [1], {}, GONE)),
    *(("optimizer state 0", x) for x in (None, {"step": None, "exp_avg": "x"}, {"a": 1})),
    *((f"optimizer state 0 {n}", torch.zeros(3, 3)) for n in ("step", "exp_avg", "exp_avg_sq")),
]


@pytest.mark.parametrize("place, value", [*LIES, *NOT_RESUMED], ids=lambda value: ascii(value)[:40])
def test_a_checkpoint_that_lies_is_refused_before_a_model_takes_memory(finished, place, value):
    def build(config):
        assert torch.empty(0).device.type == "meta", "a model takes memory"
        return GPT(config)

    tampered(place, value)
    before, began = files_in("run"), time.perf_counter()
    if (place, value) in LIES:
        finished.setattr(sample, "GPT", build)
        refused(sample.main, SAMPLE, "best.pt is not a whole checkpoint of train.py")
    refused(train.main, [*RESUME, "--max_iters", "6"], "")
    assert files_in("run") == before and time.perf_counter() - began < 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["", "config"])
def test_a_checkpoint_that_would_run_code_or_is_cut_is_refused_and_runs_none(
    finished, place, legacy
):
    tampered(place, Evil(), legacy)
    refused(sample.main, SAMPLE, "best.pt is refused")
    refused(train.main, RESUME, "ckpt.pt is refused")
    assert not Path("evil").exists()
    torch.load("run/best.pt", weights_only=False)
    assert Path("evil").exists(), "the file was not a danger: the test shows nothing"
    size = Path("run/best.pt").stat().st_size
    for length in (size - 1, size // 2, 100, 0):
        os.truncate("run/best.pt", length)
        refused(sample.main, SAMPLE, "best.pt is")


def test_a_run_goes_on_for_longer_at_another_rate_without_its_log_or_a_new_setting(finished):
    tampered("settings grad_clip", GONE)
    tampered("optimizer param_groups", [])  # of another device, perhaps, and another weight decay
    Path("run/log.csv").write_text("a note")
    flags = "--max_iters 6 --learning_rate 0.01 --min_lr 0.002 --warmup_iters 2 --weight_decay 0.2"
    stop_at(finished, 5, Path("run/log.csv").unlink)  # it lives in the checkpoint
    assert "going on from step 4\n" in said(train.main, *RESUME, *flags.split())[0]
    assert steps() == [0, 2, 4, 6] and now() == 6 and read()["settings"]["grad_clip"] == 1.0
    assert 0.002 < float(log_rows()[-1][3]) < 0.01
    assert [group["weight_decay"] for group in read()["optimizer"]["param_groups"]] == [0.2, 0.0]
    with finished.context() as patch:
        stop_at(patch, 6)
        said(train.main, *RESUME, "--max_iters", "9", code=143)
    flags = "--max_iters 9 --eval_interval 7 --learning_rate 0.05"
    out, _ = said(train.main, *RESUME, *flags.split())
    assert re.search(r"step 7: train \d\.\d{3}, val \d\.\d{3}, [1-9][\d,]* chars/s", out)
    assert float(log_rows()[-2][3]) <= 0.01, "step 7 had been taken at the rate of before"


@pytest.mark.parametrize("other", [RESUME, [*TINY, "--overwrite"]])
def test_a_run_that_finds_another_ones_work_in_its_folder_ends_and_leaves_it(home, other):
    once, left = iter([0]), {}
    meet = lambda: [left.update(said(train.main, *other) and files_in(".")) for _ in once]
    stop_at(home, 3, meet)
    refused(train.main, TINY, "another run writes into run: this one ends")
    assert files_in(".") == left and now() == 4


# --------------------------------------------------------------------------------------------------
# Every bad input is one line

COUNTS = ["n_ctx", "batch_size", "n_layer", "n_embd", "n_head", "n_block"]
COUNTS += ["grad_accum", "eval_batches"]
FIXED = "n_embd 32,seed 2,residual standard,n_layer 8,n_head 1,n_ctx 8,n_block 1"
FIXED = f"{FIXED},dropout 0.5,batch_size 8,grad_accum 2,detail_bias -1,eval_batches 1".split(",")
BAD = [
    *(f"--{n} {x}" for n in COUNTS for x in (0, -1, 10**9, "x", 1.5, "")),
    *(f"--{name} {x}" for name in ("max_iters", "eval_interval") for x in (0, -1, "x", 1.5, "")),
    *(f"--learning_rate {x}" for x in ("nan", "inf", "-1", "1e400", "x")),
    *("--min_lr nan", "--weight_decay -1", "--grad_clip nan", "--dropout 1", "--dropout nan"),
    *("--dropout -0.1", "--warmup_iters -1", "--seed -1", f"--seed {2**63}", f"--seed {10**30}"),
    *("--detail_bias nan", "--detail_bias 1e300", "--n_ctx 2600", "--n_ctx 263", "--n_lay 3"),
    *(f"--dataset {x}" for x in ("tinystory", "none.txt", ".", "run", "", "x" * 5000, "a\nb")),
    *(f"--device {x}" for x in ("tpu", "cuda", "cuda:7", "cuda:-1", "meta", "mps:0:0", "")),
    *("--dtype float16", "--residual wave", "--n_block 3", "--n_block 4", "--n_head 3"),
    *("--n_embd 15", "--n_embd 18 --n_head 6", "--unknown", "more", "--n_layer"),
    "--n_layer 1_000_000_000 --n_block 7",
]
TEXTS = [("empty", b"", "2 to 65,536 are allowed"), ("same", b"a" * 100, "2 to 65,536 are allowed")]
TEXTS += [("zero", b"ab\0cd" * 20, "zero byte"), ("latin", b"caf\xe9", "not UTF-8")]
TEXTS += [("utf16", "ab".encode("utf-16"), "not UTF-8")]
DRAWS = "temperature nan,temperature -1,temperature x,temperature -inf,top_k 0,top_k -1,top_k x"
DRAWS += f",top_k 1.5,seed x,seed {10**30},seed -{10**30},promt x,out_dir nowhere,out_dir a.txt"
DRAWS += ",n_chars 0,n_chars -1,n_chars x,n_samples 0,n_samples x,device tpu,device cuda:7"
NEW, HUGE = [*TINY, "--out_dir", "new"], "--batch_size 5_000 --n_ctx 2"  # 40 GB of starts
REFUSED = [
    *((train.main, NEW, flags, "") for flags in BAD),
    *((train.main, [*TINY, "--overwrite"], flags, "") for flags in BAD[::9]),
    *((train.main, RESUME, f"--max_iters 6 --{flags}", "contradicts") for flags in FIXED),
    *((train.main, RESUME, f"--max_iters {n}", "has done 4 steps: give a larger") for n in (4, 1)),
    (train.main, RESUME, "--overwrite", "--resume goes on with a run, --overwrite replac"),
    (train.main, RESUME, "--out_dir none", "no ckpt.pt to resume in none: --overwrite starts"),
    (train.main, NEW, "--dataset tinystories --n_head 3", "n_embd=16 must be a multiple of"),
    (train.main, TINY, "--seed 2", "run holds a run: --resume goes on with it, --out_dir "),
    *((train.main, TINY, f"--out_dir {x}", x[:5]) for x in ("a.txt/run", "a.txt", "x" * 3000)),
    *((train.main, NEW, f"{HUGE} --{n} 1_000_000", "out of memory") for n in COUNTS[-2:]),
    *((train.main, NEW, f"--dataset {file}.txt", words) for file, _, words in TEXTS),
    *((sample.main, SAMPLE, f"--{flags}", "") for flags in DRAWS.split(",")),
    *((sample.main, SAMPLE, f"--prompt {x}", x[-4]) for x in ("the\u20accat", "0cat")),
    (sample.main, [], "--n_chars 5", "no run under out/: run `python train.py` first, or give"),
]


@pytest.mark.parametrize("main, argv, flags, word", REFUSED, ids=lambda value: ascii(value)[:40])
def test_what_cannot_work_is_named_in_a_line_and_touches_no_file(finished, main, argv, flags, word):
    for file, content, _ in TEXTS:
        Path(f"{file}.txt").write_bytes(content)
    finished.setattr(torch.cuda, "is_available", lambda: False)
    name, _, value = flags.removeprefix("--").partition(" ")  # "--n_ctx " gives an empty value
    before, began = files_in("."), time.perf_counter()
    word = word or (value.split("\n")[0][:500] if name in ("dataset", "out_dir") else name)
    with limited_memory():
        refused(main, [*argv, *flags.split(" ")], word)
    after = {path: x for path, x in files_in(".").items() if HUGE not in flags or path[:3] != "new"}
    assert after == before and time.perf_counter() - began < 3


def test_another_text_is_refused_and_a_window_must_fit(finished):
    for length, word in ((len(TEXT) - 1, "not this run's text"), (170, "n_ctx=16 needs 18 of e")):
        Path("a.txt").write_text(TEXT[:length])
        refused(train.main, [*RESUME, "--max_iters", "6"], word)
    Path("a.txt").write_text(TEXT[:171])  # its last tenth is 18 characters, n_ctx + 2
    said(train.main, *TINY, "--overwrite", "--seed", "2", "--max_iters", "1")
    assert read()["settings"]["seed"] == 2 and steps() == [0, 1]
    for name in ("ckpt.pt", "log.csv"):  # best.pt alone is worth as much
        Path("run", name).unlink()
        refused(train.main, TINY, "run holds a run")


def test_a_torch_that_is_too_old_is_refused_in_one_line(home):
    for version, code in (("2.10.0+cpu", 0), ("2.13.0", 0), ("2.9.1", 2)):
        home.setattr(torch, "__version__", TorchVersion(version))
        said(lambda argv: None, code=code)
    for main in (train.main, sample.main):
        refused(main, TINY, "error: torch 2.9.1 is too old: 2.10 or newer\n")


# --------------------------------------------------------------------------------------------------
# Sampling


UNUSUAL = [
    *((["--prompt", text], text, len(text) + 5) for text in ("", TEXT[:300])),
    *((["--temperature", x], "", 5) for x in ("0", "1e-45", "1e-300", "1e300", "inf")),
    *(([f"--{name}", x], "", 5) for name, x in (("seed", "-1"), ("top_k", str(10**30)))),
    (["--n_chars", "40", "--device", "cpu"], "", 40),  # past n_ctx
    (["--n_samples", "2"], "", 2 * 5 + 82),  # a line between
]


@pytest.mark.parametrize("flags, start, length", UNUSUAL)
def test_unusual_sampling_arguments_work_and_a_seed_makes_one_text(finished, flags, start, length):
    seeds = ([], [], ["--seed", "7"])
    text, again, other = (said(sample.main, *SAMPLE, *flags, *seed)[0] for seed in seeds)
    assert text.startswith(start) and len(text) == length + 1 and text == again
    cold = flags[-1] in ("0", "1e-45", "1e-300")
    assert not cold or text == said(sample.main, *SAMPLE, "--top_k", "1")[0], "the likeliest"
    assert (text == other) == cold


MAPS = [("attnres", 12, 24), *((residual, 4, 2) for residual in KINDS if residual != "attnres")]


@pytest.mark.parametrize("residual, n_layer, n_block", MAPS)
def test_the_map_has_a_row_for_each_reader(home, residual, n_layer, n_block):
    said(train.main, *TINY, "--residual", residual, "--n_layer", f"{n_layer}", "--max_iters", "1")
    weights, means = said(sample.main, *SAMPLE, "--routing")[0].split("\n\n")
    title, line, *rows = weights.splitlines()
    assert title == f"{residual} {n_layer}x16: mixing weights in percent"
    heads = [f"{kind[:3]}{block + 1}" for block in range(n_block) for kind in KINDS[residual]]
    running = [head for head in line.split() if head.endswith("+")]
    assert line.split() == ["x0", *running, *heads] and rows[0] == "attention 1    █100"
    assert [row.split()[0] for row in rows] == ["attention", "MLP"] * n_layer + ["output"]
    title, line, *rows = means.splitlines()
    kinds = ["x0", *["running"] * (residual != "attnres"), *KINDS[residual]]
    assert "mean ± deviation" in title and line.split() == kinds
    figures = [re.findall(r"([\d.]+) ±[ \d]+\.\d \([ \d]+\.\d\)", row) for row in rows]
    assert all(len(row) == len(kinds) and abs(sum(map(float, row)) - 100) < 1 for row in figures)


def test_text_and_map_are_utf8_whatever_the_encoding_and_head_ends_it_quietly(home):
    Path("a.txt").write_text("naïve 🦊 " * 300, encoding="utf-8")
    said(train.main, *TINY, "--max_iters", "1")
    line = f"{sys.executable} {ROOT}/sample.py --out_dir run"
    script = f"{line} --prompt 🦊 --n_chars 3000 | head -c 20; echo $PIPESTATUS"
    script = f"export PYTHONIOENCODING=ascii; {script}; {line} --routing > map"
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    assert done.stdout.startswith("🦊".encode()) and done.stdout[20:] == b"0\n"
    assert done.stderr == b"run/best.pt: wav 4x16\n" * 2
    assert "attention 1    █100\n" in Path("map").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Downloads, from a server that may misbehave; texts


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_is_kept_whole_but_for_a_character_that_is_cut(serve, ranges):
    requests = serve(ranges=ranges)
    for first in range(1000, 1000 + 80):  # the cut falls on every byte of a story
        data.TINYSTORIES_BYTES = first  # put back by serve
        for _ in range(2):  # the second time from the disk
            train_ids, val_ids, chars = data.load("tinystories", f"data/{first}")
        text = decoded(train_ids, chars)
        assert STORIES.decode().startswith(text) and first - 8 <= len(text.encode()) <= first
        assert decoded(val_ids, chars) == STORIES.decode()
        ask = [("/TinyStories-train.txt", f"bytes=0-{first - 1}"), ("/TinyStories-valid.txt", None)]
        assert requests[-2:] == ask
    assert len(requests) == len(files_in("data")) == 2 * 80


SERVERS = [
    ("it ended after", {"head": OK + "0"}),  # it offers ten times what it sends
    ("it ended after", {"first": 5000}),
    ("timed out", {"head": OK + "0", "hang": 1}),
    ("404", {"head": "HTTP/1.0 404 Not Found"}),
    ("SSH", {"head": "SSH-2.0-OpenSSH_9.6"}),
    ("not TinyStories", {"body": b"<html>log in first</html>"}),
    ("offers 1,000,000,000,000 bytes", {"head": OK.replace("{length}", str(10**12))}),
    ("offers 0 bytes", {"head": "HTTP/1.0 200 OK"}),
    ("many", {"head": OK.replace("{length}", "many")}),
    ("not allowed", {"head": "HTTP/1.0 302 Found\r\nLocation: file:///etc/passwd"}),
    ("", {"head": "HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:0/"}),  # nobody is there
    ("it was redirected to http:", {"first": 1000}),  # from https, as below
]


@pytest.mark.parametrize("word, server", SERVERS)
def test_a_bad_download_says_so_in_one_line_and_leaves_nothing(serve, home, word, server):
    # A server may claim any size for a file of which only the beginning is wanted.
    serve(**{"first": None, **server})
    url, urlopen, began = data.TINYSTORIES_URL, urllib.request.urlopen, time.perf_counter()
    if "redirected" in word:
        home.setattr(data, "TINYSTORIES_URL", "https://127.0.0.1/")
        home.setattr(urllib.request, "urlopen", lambda *args, **_: urlopen(url))
    refused(load, ["tinystories"], "download of http", word, "(--dataset pydoc needs no network)")
    assert files_in(".").keys() == {"a.txt"} and time.perf_counter() - began < 5


def test_text8_is_checked_and_its_zip_creates_no_file_beside_itself(serve, home):
    letters = "abcdefghijklmnopqrstuvwxyz " * 3
    body = zipped({"../../evil.txt": "x", "/tmp/evil8": "x", "text8": letters})
    serve(body)
    refused(load, ["text8", "a/b/c"], "what came has md5", "--dataset pydoc")
    assert files_in(".").keys() == {"a.txt"}
    home.setattr(data, "TEXT8_MD5", hashlib.md5(body).hexdigest())
    assert decoded(*data.load("text8", "a/b/c")[::2]) == letters
    assert files_in(".").keys() == {"a.txt", "a/b/c/text8.zip"} and not os.path.exists("/tmp/evil8")
    whole = zipped({"text8": letters})
    rotten = whole[:40] + b"\xff" * 4 + whole[44:]
    for content in (whole[: len(whole) // 2], rotten, zipped({"readme": "x"})):
        Path("a/b/c/text8.zip").write_bytes(content)
        refused(load, ["text8", "a/b/c"], "text8.zip is damaged")


def test_a_download_needs_no_progress_bar(serve):
    serve()
    code = f"data.TINYSTORIES_URL = {data.TINYSTORIES_URL!r}; data.TINYSTORIES_BYTES = 999"
    python(f"import data; {code}; data.load('tinystories')", TQDM_DISABLE="1")
    assert len(files_in("data")) == 2


@many
@given(some_bytes, strategies.none() | some_bytes)
@example("".join(map(chr, range(100, 100 + 256))).encode() * 9, None)
@example("".join(map(chr, range(100, 100 + 50000))).encode() * 9, None)
@example("\ufeffnaïve 👩‍👩‍👧 e\u0301 \u2028\x85\x0c\x1c\r\n".encode() * 9, "🦊é".encode())
def test_any_bytes_are_a_text_or_refused_in_one_line(tmp_path_factory, content, beside):
    path = tmp_path_factory.mktemp("bytes") / "a.md"
    for name, part in (("a.md", content), ("a_valid.md", beside)):
        part is None or path.with_name(name).write_bytes(part)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            train_ids, val_ids, chars = data.load(str(path))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    files = (io.BytesIO(part or b"") for part in (content, beside))
    text, val = (io.TextIOWrapper(file, "utf-8-sig").read() for file in files)
    n = len(text) * 9 // 10 if beside is None else len(text)
    text, val = text[:n], text[n:] or val
    dropped = sum(c not in text for c in val)
    assert decoded(train_ids, chars) == text and chars == sorted(set(text))
    assert decoded(val_ids, chars) == "".join(c for c in val if c in text)
    assert train_ids.dtype == val_ids.dtype == (np.uint8 if len(chars) <= 256 else np.uint16)
    assert (f"dropped {dropped:,} of {len(val):,} " in said.getvalue()) == (dropped > 0)
    assert all(repr(c) in said.getvalue() for c in sorted({*val} - {*text})[:10])


@many
@given(command_lines)
def test_any_command_line_works_or_is_refused_in_one_line(argv):
    error, code = io.StringIO(), 0
    out = contextlib.redirect_stdout(io.StringIO())
    with contextlib.redirect_stderr(error), out, contextlib.suppress(SystemExit):  # of -h
        code = run(lambda argv: train.read_settings(argv) and 0, argv)
    assert (code, error.getvalue().count("\n")) in ((0, 0), (2, 1))


def test_pydoc_is_split_by_pieces_and_always_in_the_same_way():
    whole, (text, val) = "\n\n".join(topics[name] for name in sorted(topics)), data.pydoc(None)
    assert whole[:40000] == text[:36000] + val[:4000] and len(whole) == len(text + val)
    assert whole[40000:80000] == text[36000:72000] + val[4000:8000]


def test_batches_are_windows_drawn_by_seed_and_step_alone_and_targets_one_later():
    ids, seen = np.arange(1000, dtype=np.uint16), set()
    for seed, step in ((1, 5), (1, 6), (2, 5), (1, 5)):
        _ = np.random.seed(len(seen)), torch.manual_seed(len(seen))
        seen.add(data.random_starts(ids, 16, (2, 3, 4), seed, step).tobytes())
    assert len(seen) == 3
    starts = data.random_starts(ids[:18], 16, 1000, seed=1, step=1)
    assert set(starts) == {0, 1}, "every window that fits can be drawn, and no other"
    x, y = data.windows(data.to_device(ids, CPU), 16, torch.tensor(data.even_starts(ids, 16, (5,))))
    assert torch.equal(x + 1, y) and (x.shape, x[0, 0], y[-1, -1]) == ((5, 16), 0, 999)


# --------------------------------------------------------------------------------------------------
# Training, in one process and in two


@pytest.mark.parametrize("tty", [False, True])
def test_a_run_says_what_it_does_line_by_line_and_lowers_the_loss(home, tty):
    home.setenv("RANK", "")
    out, error = said(train.main, *TINY, "--max_iters", "40", "--eval_interval", "20", tty=tty)
    step = r"train \d\.\d{3}, val \d\.\d{3}, [\d,]+ chars/s"
    lines = [
        r"a\.txt: 2,376 characters to learn from, 264 to validate, a vocabulary of 28; 64 a step",
        r"wav 4x16, 2 blocks: [\d,]+ parameters, float32 on cpu, into run/",
        *(r"step 0: val 3\.\d{3}", f"step 20: {step}", f"step 40: {step}"),
        r"wav 4x16: best validation loss (\d\.\d{4}) nats \(\d\.\d{4} bits\) per character",
        r"[\d,]+ chars/s, \d+ s, peak memory [\d,]+ MB",
    ]
    best = re.fullmatch("\n".join([*lines, r".{2}\n"]), out, re.DOTALL)[1]
    assert ("40/40" in error and "chars/s" in error) if tty else error == ""
    assert f": {sum(w.numel() for w in read()['model'].values()):,} parameters" in out
    losses = [float(row[2]) for row in log_rows()]
    assert losses == sorted(losses, reverse=True) and losses[0] < math.log(28) + 0.1
    assert float(best) == pytest.approx(losses[-1], abs=1e-4) and files_in("run").keys() == FILES


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    s = train.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(s, step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[60], rates[-1]) == pytest.approx((0.55, 0.1), abs=1e-3)


def test_gradient_accumulation_is_the_larger_batch_and_dropout_is_drawn_anew(home):
    seeds, seed = [], torch.manual_seed
    home.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    said(train.main, *TINY, "--batch_size", "8")
    assert len(set(seeds)) == 1 + 4  # of initialisation, and of four steps
    said(train.main, *TINY, "--grad_accum", "2", "--out_dir", "two")
    torch.testing.assert_close(read()["model"], read("two/ckpt.pt")["model"], rtol=1e-4, atol=1e-6)


def test_matrices_decay_by_their_shape_whatever_a_fork_calls_them():
    model = GPT(GPTConfig(11, n_layer=2, n_embd=8, n_head=2))
    model.more, model.gain = (torch.nn.Parameter(torch.ones(*size)) for size in ((2, 2), (2,)))
    decays, rest = train.make_optimizer(train.Settings(), model, CPU).param_groups
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {*map(id, rest["params"])} == {*map(id, (model.query, model.detail_bias, model.gain))}
    assert len(decays["params"]) == 2 * 5 + 2 + 1  # qkv, proj, gate, up, down; embed, head; more


def test_peak_memory_is_in_megabytes_and_help_spells_the_choices(monkeypatch, capsys):
    monkeypatch.setattr(resource, "getrusage", lambda who: type("", (), {"ru_maxrss": 10**6}))
    for platform, megabytes in (("linux", 1024.0), ("darwin", 1.0)):
        monkeypatch.setattr(sys, "platform", platform)
        assert train.peak_memory(CPU) == megabytes
    with pytest.raises(SystemExit, match="0"):
        run(train.main, ["--help"])
    assert f"--residual {{{','.join(RESIDUALS)}}}" in capsys.readouterr().out


def test_a_fork_with_a_variant_and_unused_weights_trains_resumes_and_shows_its_map(home):
    code = "import sys, torch, wav; wav.KINDS['sum_split'] = 'sum', 'split'\n"
    code += "wav.RESIDUALS += ('sum_split',); old, new = wav.GPT.__init__, torch.nn.Linear(2, 2)\n"
    code += "wav.GPT.__init__ = lambda m, config: old(m, config) or m.add_module('proj', new)\n"
    code += "import sample, train; assert sample.run(train.main) == 0\n"
    code += "assert sample.run(train.main, [*sys.argv[1:-1], '2', '--resume']) == 0\n"
    code += "assert [sample.run(sample.main, argv) for argv in ([], ['--routing'])] == [0, 0]"
    out = python(code, *TINY[:2], *TINY[4:], "--residual", "sum_split", "--max_iters", "1")
    assert "  sum1  spl1  sum2  spl2\n" in out and os.listdir("out") == ["a-sum_split-4x16"]


@pytest.mark.parametrize("script", ["../train.py", "test_scripts.py --as-on 2"])
def test_two_processes_train_as_one(home, script):
    argv = [*ANYWHERE, "--grad_accum", "2", "--dtype", "float32"]
    said(train.main, *argv, "--out_dir", "one")
    done = torchrun(*script.split(), *argv)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    on = re.findall(r"process (\d on cuda:\d)\n", done.stderr)
    assert sorted(on) == (["0 on cuda:0", "1 on cuda:1"] if "2" in script else [])
    one, two = ([[float(x or 0) for x in row[:4]] for row in log_rows(f)] for f in ("one", "run"))
    assert len(one) == 3 and np.allclose(one, two, rtol=0, atol=2e-5)
    assert files_in("run").keys() == FILES and done.stdout.count("step 4: ") == 1


def test_more_processes_than_gpus_and_a_batch_of_uneven_shares_are_refused(home):
    done = torchrun("test_scripts.py", "--as-on", "1", *ANYWHERE)
    assert done.returncode and not Path("run").exists()
    assert "error (process 1): more processes than GPUs: --nproc_per_node=1 at mo" in done.stderr
    home.setenv("WORLD_SIZE", "3")
    refused(train.main, TINY, "batch_size=4 needs 3 equal shares")


def test_two_processes_resume_with_the_dropout_of_the_unbroken_run(start):
    argv = [*TINY, "--dropout", "0.5", "--learning_rate", "0.01", "--min_lr", "0.01"]
    broken = [*argv, "--out_dir", "broken"]
    for flags in (argv, [*broken, "--max_iters", "2"], [*broken, "--resume"]):
        assert pair(start, flags) == [0, 0]
    assert [row[:4] for row in log_rows()] == [row[:4] for row in log_rows("broken")]


@pytest.mark.parametrize("flag, other", [("dataset", "is neither pydoc"), ("out_dir", "by peer")])
def test_two_processes_name_what_fails_in_a_line_each(start, flag, other):
    assert pair(start, [*TINY, f"--{flag}", "a.txt/x"]) == [2, 2]
    assert re.fullmatch(r"error: .*a\.txt/x.*\n", Path("0.2").read_text())
    assert re.fullmatch(rf"error \(process 1\): .*{other}.*\n", Path("1.2").read_text())


if __name__ == "__main__":  # --as-on N
    with cuda(int(sys.argv[2])) as seen:
        code = run(train.main, sys.argv[3:])
    print(f"process {os.environ['RANK']} on cuda:{seen.current}", file=sys.stderr)
    sys.exit(code)
