"""
What train.py, sample.py and data.py promise: `pytest .ci/test_scripts.py`.
"""

import contextlib
import copy
import csv
import dataclasses
import http.server
import importlib
import importlib.util
import io
import itertools
import math
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share two cores
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & leaves it ignored

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import data
import sample
import train
import wav
from wav import GPT, KINDS, RESIDUALS, GPTConfig, Refused

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog.\n"]
TEXT = " ".join(random.Random(1).choices(WORDS, k=600))  # no 100 characters come twice
SHAPE = "--n_layer 4 --n_block 2 --n_embd 16 --n_head 2 --n_ctx 16 --batch_size 4 --eval_windows 7"
TINY = "--dataset a.txt --out_dir run --device cpu --max_iters 4 --eval_interval 2"
TINY = f"{TINY} {SHAPE}".split()
RESUME = ["--out_dir", "run", "--resume"]
SAMPLE = ["--out_dir", "run", "--n_tokens", "5"]
LONGER = [*RESUME, "--max_iters", "6"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A working directory with a text in it; what a run changes in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)  # no note of it
    Path("a.txt").write_text(TEXT)
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    precision = torch.get_float32_matmul_precision()
    for name in ("mix", "merge", "offer_at_once"):
        monkeypatch.setattr(wav, name, getattr(wav, name))
    some_text = train.some_text  # to save time, the sample that ends a run is made by one test
    monkeypatch.setattr(train, "some_text", lambda *args: "...")
    monkeypatch.setattr(train, "real_some_text", some_text, raising=False)
    yield monkeypatch
    torch.compiler.set_stance("default")
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers:
        signal.signal(number, handler)


def said(main, argv, status=0):
    """Run a script as `python SCRIPT ARGV` does. What it says on stdout, and on stderr."""
    out, error = io.StringIO(), io.StringIO()
    screen = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
    with screen[0], screen[1], pytest.raises(SystemExit) as end:
        train.run(lambda: main(argv))
    assert (end.value.code or 0) == status, out.getvalue() + error.getvalue()
    return out.getvalue(), error.getvalue()


def refused(main, argv, words):
    """The script refuses argv: status 2, one line that holds these words (after notes, and the name
    of the checkpoint), nothing on stdout that looks like a result, and no file touched."""
    before = files()
    out, error = said(main, argv, status=2)
    *notes, line = error.splitlines()
    assert line.startswith("error: ") and words in line, (argv, error)
    assert all(re.fullmatch(r"note: .*|.*: (wav|standard) 4x16", note) for note in notes), error
    assert files() == before and (main is not sample.main or not out), argv


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def read(path="run/ckpt.pt"):
    return torch.load(path, weights_only=True)


def log(folder="run"):
    with open(Path(folder, "log.csv")) as file:
        return list(csv.DictReader(file))


def figures(folder="run"):
    """The rows of log.csv without the columns that hold a clock."""
    names = ("step", "train_loss", "val_loss", "learning_rate")
    return [[row[name] for name in names] for row in log(folder)]


def assert_same_run(one, two):
    """Two folders hold the same run, to the bit."""
    assert figures(one) == figures(two)
    for name in ("ckpt.pt", "best.pt"):
        for part in ("model", "moments", "best", "losses"):
            a, b = read(f"{one}/{name}")[part], read(f"{two}/{name}")[part]
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def stop_after(patch, step, number=signal.SIGINT):
    """Send this signal while step number `step` is taken. (The first batch is drawn once before,
    when there is no folder.)"""
    starts = data.random_starts

    def stopping(*args):
        if args[-1] == step - 1 and Path("run/log.csv").exists():
            signal.raise_signal(number)
        return starts(*args)

    patch.setattr(data, "random_starts", stopping)


def wait_for(condition):
    patience = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------
# Stop and go on


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_stopped_and_resumed_run_is_the_unbroken_run_to_the_bit(home, residual):
    argv = [*TINY, "--residual", residual, "--dropout", "0.1", "--grad_accum", "2"]
    argv += ["--max_iters", "12", "--eval_interval", "4", "--warmup_iters", "3"]
    train.main([*argv, "--out_dir", "whole"])
    for step in (1, 5, 8):  # before an evaluation, between two, at one
        with home.context() as patch:
            stop_after(patch, step)
            out, _ = said(train.main, argv if step == 1 else RESUME, status=130)
        last = [f"stopped at step {step} and saved: the same command with --resume goes on"]
        last.append("meanwhile: python sample.py --out_dir run")
        assert out.splitlines()[-2:] == last and read()["step"] == step
        if step == 1:  # there is no best.pt yet
            assert "run/ckpt.pt" in said(sample.main, SAMPLE)[1]
        torch.manual_seed(99)
    Path("run/log.csv").unlink()  # lost: the checkpoint knows its rows
    train.main(RESUME)
    assert_same_run("run", "whole")
    assert [row["step"] for row in log()] == ["0", "4", "8", "12"]
    refused(train.main, RESUME, "run has done 12 steps: give more --max_iters")


def test_sgd_with_momentum_resumes_to_the_bit_and_adamw_does_not_go_on_under_it(home):
    def sgd(model, args):
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    train.main([*TINY, "--out_dir", "adamw"])
    home.setattr(train, "make_optimizer", sgd)
    train.main([*TINY, "--out_dir", "whole"])
    with home.context() as patch:
        stop_after(patch, 3)
        said(train.main, TINY, status=130)
    assert all(x["momentum_buffer"].any() for x in read()["moments"].values())
    train.main(RESUME)
    assert_same_run("run", "whole")
    argv = ["--out_dir", "adamw", "--resume", "--max_iters", "6"]
    refused(train.main, argv, "trained by AdamW: SGD cannot go on with its moments")


def test_an_evaluation_where_a_run_goes_on_logs_no_speed_and_no_rate_of_no_steps(home):
    with home.context() as patch:
        stop_after(patch, 3)
        said(train.main, TINY, status=130)
    said(train.main, [*RESUME, "--eval_interval", "3", "--learning_rate", "1e-4"])
    assert [row["learning_rate"] for row in log() if row["step"] == "3"] == [""]
    speeds = {row["step"]: row["characters_per_second"] for row in log()}
    assert [*speeds] == ["0", "2", "3", "4"] and speeds["3"] == "" != speeds["4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_a_second_of_either_kind_leaves_at_once(home, capfd, number):
    handlers, starts = [], data.random_starts

    def stopping(*args):
        if args[-1] == 1:
            signal.raise_signal(number)
            handlers.extend(signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM))
        return starts(*args)

    home.setattr(data, "random_starts", stopping)
    said(train.main, TINY, status=130)
    assert handlers == [signal.SIG_DFL] * 2 and read()["step"] == 2
    assert "stopping after this step; again to stop now" in capfd.readouterr().err


def test_ctrl_c_before_the_run_has_a_folder_leaves_none(home):
    home.setattr(train, "evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
    said(train.main, TINY, status=130)
    assert not Path("run").exists()


def test_ctrl_c_saves_even_if_it_ends_tee_too():
    argv = " ".join([*TINY, "--max_iters", "50000"])
    script = f"({sys.executable} {ROOT}/train.py {argv}; echo $? > status) 2>&1 | tee screen"
    with subprocess.Popen(["setsid", "bash", "-c", script]) as shell:
        wait_for(lambda: Path("screen").exists() and "step 2:" in Path("screen").read_text())
        os.killpg(shell.pid, signal.SIGINT)
    assert Path("status").read_text() == "130\n"
    step = read()["step"]
    assert 2 <= step < 50000
    said(train.main, [*RESUME, "--max_iters", str(step + 1)])
    assert log()[-1]["step"] == str(step + 1)


# ----------------------------------------------------------------------------------------------
# Refused, crashed, broken


def test_a_run_is_replaced_only_on_demand(home):
    train.main(TINY)
    refused(train.main, TINY, "run holds a run: --resume goes on with it, --overwrite replaces it")
    for name in ("log.csv", "ckpt.pt"):  # best.pt alone is worth as much
        Path("run", name).unlink()
        refused(train.main, TINY, "run holds a run: --resume")
    train.main([*TINY, "--overwrite", "--seed", "2"])
    assert read()["settings"]["seed"] == 2


def test_of_runs_that_start_at_once_one_goes_on(home):
    def late(*args):
        claim(*args)  # another run, which passed the first look into the folder as this one did
        claim(*args)

    def start():
        together.wait()
        with contextlib.suppress(Refused):
            train.claim(Path("many"), False)
            won.append(True)

    won, together = [], threading.Barrier(8)
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    claim = train.claim
    home.setattr(train, "claim", late)
    assert said(train.main, TINY, status=2)[1].startswith("error: run holds a run: --resume")
    assert not Path("run/ckpt.pt").exists()


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # both come from a full disk
def test_a_crash_while_a_checkpoint_is_written_leaves_the_last_one(home, kind):
    def crash(state, path):
        if state["step"] == 4:
            Path(path).write_bytes(b"half")
            raise kind("No space left on device")
        write(state, path)

    write = torch.save
    with home.context() as patch:
        patch.setattr(torch, "save", crash)
        words = "error: cannot write run/best.pt: No space left on device\n"
        assert said(train.main, TINY, status=2)[1] == words
    assert not [*Path("run").glob("*.part")]
    assert read()["step"] == read("run/best.pt")["step"] == 2
    train.main(RESUME)
    assert [row["step"] for row in log()] == ["0", "2", "4"]


@pytest.mark.parametrize("what", ["loss", "evaluation", "weights"])
def test_a_nan_never_comes_over_a_good_checkpoint(home, what):
    train.main(TINY)
    if what == "evaluation":
        home.setattr(train, "evaluate", lambda *args: {"val_loss": math.nan})
    else:
        home.setattr(train, "schedule", lambda args, step: math.nan)  # the loss is so a step later
    if what == "weights":
        stop_after(home, 5)
    argv = [*RESUME, "--max_iters", "20", "--eval_interval", "5" if what == "evaluation" else "20"]
    refused(train.main, argv, "not finite at step ")


SIMILAR = {
    "other letters": (TEXT.upper(), None),
    "another order": (TEXT[5:] + TEXT[:5], None),
    "longer": (TEXT + TEXT[:80], None),
    "shorter": (TEXT[:-80], None),
    "cut otherwise": (TEXT[: len(TEXT) * 8 // 10], TEXT[len(TEXT) * 8 // 10 :]),
    "other text to validate on": (TEXT[: len(TEXT) * 9 // 10], TEXT[:300]),
}


@pytest.mark.parametrize("change", SIMILAR)
def test_a_run_goes_with_its_text_alone(change):
    train.main(TINY)
    text, beside = SIMILAR[change]
    Path("a.txt").write_text(text)
    if beside:
        Path("a_valid.txt").write_text(beside)
    words = "error: 'a.txt' is not the text of this run: it has changed, or is cut otherwise"
    refused(train.main, LONGER, words)
    refused(sample.main, [*SAMPLE, "--routing"], words)
    said(sample.main, SAMPLE)  # needs no text


@pytest.mark.parametrize("changed", [{"residual": "mine"}, {"n_query": 2}])
def test_the_run_of_a_fork_is_refused_by_name_where_wav_py_does_not_know_it(home, changed):
    train.main(TINY)
    checkpoint = read()
    checkpoint["config"].update(changed)
    torch.save(checkpoint, "run/best.pt")
    (word,) = map(str, changed)
    refused(sample.main, SAMPLE, "run/best.pt is not of this wav.py: ")
    refused(sample.main, SAMPLE, word)
    checkpoint = read()
    checkpoint["model"]["query"] = torch.zeros(9, 5)  # as fixed weights have it
    torch.save(checkpoint, "run/best.pt")
    refused(sample.main, SAMPLE, "size mismatch for query")


def copy_code(home):
    """The code of this project into the working directory, where a test may edit it."""
    for module in (wav, train, data):
        name = Path(module.__file__).name
        Path(name).write_bytes(Path(module.__file__).read_bytes())
        home.setattr(module, "__file__", name)


def test_an_edit_while_a_run_goes_on_is_not_taken_for_its_code(home):
    def edits(*args):
        Path("wav.py").write_text("# edited")
        return evaluate(*args)

    copy_code(home)
    evaluate = train.evaluate
    home.setattr(train, "evaluate", edits)
    train.main(TINY)
    assert "since this run was made, " in said(sample.main, SAMPLE)[1]


@pytest.mark.parametrize("edited", ["wav.py", "train.py", "data.py"])
def test_both_scripts_say_in_a_line_if_the_code_has_changed_since(home, edited):
    train.main(TINY)
    copy_code(home)
    for changed, steps in ((False, "6"), (True, "8")):
        if changed:
            Path(edited).write_bytes(Path(edited).read_bytes() + b"# edited\n")
        for main, argv in ((sample.main, SAMPLE), (train.main, [*RESUME, "--max_iters", steps])):
            lines = "".join(said(main, argv)).splitlines()
            assert sum("since this run was made, " in line for line in lines) == changed


SETTINGS = "max_iters batch_size grad_accum eval_interval eval_windows n_ctx n_head n_embd n_layer"
BAD = [
    *((train, f"--{name} 0", f"--{name}: 0 must be a whole number") for name in SETTINGS.split()),
    (train, "--seed -1", "--seed: -1 must be a whole number, 0 to 10**9"),
    (train, "--seed", "--seed: expected one argument"),
    (train, "--warmup_iters 1.5", "--warmup_iters: invalid"),
    (train, "--learning_rate nan", "nan must be a number, 0 or more"),
    (train, "--learning_rate inf", "inf must be a number, 0 or more"),
    (train, "--learning_rate 1e-4 --min_lr 3e-4", "min_lr=0.0003 is above learning_rate=0.0001"),
    (train, "--weight_decay=-1", "--weight_decay: -1 must be a number"),
    (train, "--grad_clip=-1", "--grad_clip: -1 must be a number"),
    (train, "--dropout 1", "dropout=1.0 must be at least 0 and below 1"),
    (train, "--detail_bias nan", "detail_bias=nan must be from"),
    (train, "--n_head 3", "n_embd=16 must be a multiple of 2 n_head=6"),
    (train, "--n_block 3", "n_block=3 does not cut n_layer=4"),
    (train, "--n_ctx 5000", "n_ctx=5000 needs 5,002 of each"),
    (train, "--residual wave", "invalid choice: 'wave'"),
    (train, "--device cuda:7", "device='cuda:7' is not here: try auto or one of cpu"),
    (train, "--dtype float16", "invalid choice: 'float16'"),
    (train, "--batch 2", "unrecognized arguments: --batch 2"),
    (train, "--dataset nothing.txt", "is neither pydoc, tinystories, text8 nor the path"),
    (train, "--dataset .", "is neither pydoc, tinystories, text8 nor the path"),
    (train, "--dataset latin.txt", "latin.txt is not UTF-8 text, at byte 2"),
    (train, "--dataset empty.txt", "has 0 different characters"),
    (train, "--dataset one.txt", "has 1 different characters"),
    (train, "--out_dir a.txt", "File exists: 'a.txt'"),
    (train, "--out_dir run", "run holds a run"),
    (train, "--out_dir none --resume", "there is no none/ckpt.pt to resume"),
    (train, "--out_dir run --resume --overwrite", "--overwrite replaces it"),
    (train, "--out_dir run --resume", "run has done 4 steps"),
    (train, "--out_dir run --resume --max_iters 6 --n_embd 32", "n_embd=32 contradicts 16"),
    (train, "--out_dir run --resume --max_iters 6 --eval_windows 8", "contradicts 7, of the run"),
    (sample, "--out_dir none", "none holds no run"),
    (sample, "", "no run under out/: run `python train.py` first"),
    (sample, "--out_dir run --prompt 0ox", "the model never saw ['0'] of the prompt: it knows"),
    (sample, "--out_dir run --temperature=-1", "-1 must be a number, 0 or more"),
    (sample, "--out_dir run --top_k 0", "--top_k: 0 must be a whole number, 1 to"),
    (sample, "--out_dir run --n_tokens 0", "--n_tokens: 0 must be a whole number, 1 to"),
    (sample, "--out_dir run --device tpu", "device='tpu' is not here"),
    (sample, "--out_dir standard --routing", "residual='standard' has no mixing weights to show"),
]


def test_what_a_person_can_mend_is_said_in_one_line_and_touches_no_file():
    assert len(BAD) >= 28
    train.main(TINY)
    train.main([*TINY, "--out_dir", "standard", "--residual", "standard"])
    Path("latin.txt").write_bytes(b"na\xefve " * 99)
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("a" * 999)
    for script, flags, words in BAD:
        new = [*TINY, "--out_dir", "new"] * (script is train and "--resume" not in flags)
        refused(script.main, [*new, *flags.split()], words)


names = st.sampled_from([f"--{name}" for name in vars(train.make_parser().parse_args([]))])
odd = st.sampled_from(["", "wav", "pydoc", "-", "--", "nan", "1e9", "9" * 5000, "0.5", "\n0"])
values = st.one_of(st.integers(-3, 300).map(str), st.floats().map(str), odd, st.text(max_size=8))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(names, values), max_size=6))
def test_any_command_line_is_read_or_refused_in_one_line(argv):
    with contextlib.redirect_stderr(io.StringIO()) as error, pytest.raises(SystemExit) as end:
        train.run(lambda: train.read_settings(argv) and None)
    assert (end.value.code or 0, error.getvalue().count("\n")) in ((0, 0), (2, 1)), argv


VARIABLES = ["RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=0 WORLD_SIZE=2"]
VARIABLES += ["LOCAL_RANK=0 RANK=0 WORLD_SIZE=2"]  # and no MASTER_ADDR
ADDRESS = "MASTER_ADDR=127.0.0.1 MASTER_PORT=1 LOCAL_RANK=0"
VARIABLES += [f"{ADDRESS} RANK={x}" for x in ("0 WORLD_SIZE=0", "2 WORLD_SIZE=2")]
VARIABLES += [f"{ADDRESS} RANK={x}" for x in ("a WORLD_SIZE=2", "0 WORLD_SIZE=3")]


@pytest.mark.parametrize("variables", VARIABLES)
def test_the_variables_of_a_cluster_that_make_no_sense_are_refused_in_one_line(home, variables):
    for variable in variables.split():
        home.setenv(*variable.split("="))
    _, error = said(train.main, TINY, status=2)
    assert re.fullmatch(r"error.*(torchrun|batch_size=4 / 3 processes).*\n", error)


@pytest.mark.parametrize("version, status", [("2.10.0a0+vendor", 0), ("2.9.1", 2), ("3.0.0", 0)])
def test_a_torch_that_is_too_old_is_refused_with_the_reason(home, version, status):
    home.setattr(torch, "__version__", version)
    _, error = said(lambda argv: None, [], status)
    assert ("torch 2.9.1 is too old: before 2.10 a checkpoint may hide code" in error) == status / 2


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_a_forks_own_error_keeps_its_traceback(home, flags):
    def forked(mlp, h, cache=None):
        raise ValueError("too many values to unpack")

    compiler = torch.compile
    home.setattr(torch, "compile", lambda f: compiler(f, backend="eager"))
    home.setattr(wav.MLP, "forward", forked)
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        train.run(lambda: train.main([*TINY, *flags]))
    assert not isinstance(error.value, Refused) and "torch.compile" not in str(error.value)
    assert error.traceback[-1].name == "forked" or "forked" in str(error.getrepr())


# ----------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("peak, floor", [(1e-4, None), (3e-3, None), (0, None), (1, 0), (1, 1)])
def test_the_rate_warms_up_and_falls_to_a_tenth_and_never_exceeds_its_peak(peak, floor):
    for warmup, n in itertools.product((0, 1, 10, 200), (1, 110)):
        argv = f"--learning_rate {peak} --warmup_iters {warmup} --max_iters {n}".split()
        argv += ["--min_lr", str(floor)] if floor is not None else []
        args = train.make_parser().parse_args(argv)
        rates = [train.schedule(args, step) * peak for step in range(n)]
        assert max(rates) <= peak * (1 + 1e-9)
        assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)][:n])
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
        if warmup < n > 1:
            least = peak / 10 if floor is None else floor
            middle = warmup + (n - warmup) // 2
            assert train.schedule(args, n) * peak == pytest.approx(least)
            assert rates[middle] == pytest.approx((peak + least) / 2, rel=0.02)


def test_a_warm_up_that_does_not_end_and_threads_that_wait_are_said(home):
    assert "note: 4 steps end within warmup_iters=50" in said(train.main, TINY)[0]
    out, _ = said(train.main, [*TINY, "--out_dir", "b", "--warmup_iters", "2"])
    assert "warmup" not in out
    home.setattr(torch, "get_num_threads", lambda: 2)
    home.setattr(os, "cpu_count", lambda: 2)
    for load, n in ((0.5, 0), (3.0, 1)):
        home.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        notes = [*train.doubts(train.make_parser().parse_args([]), torch.device("cpu"))]
        assert "".join(notes).count("OMP_NUM_THREADS=1") == n


def tiny_model():
    """The model of TINY, before a step."""
    torch.manual_seed(1)
    return GPT(GPTConfig(len(set(TEXT)), n_ctx=16, n_layer=4, n_block=2, n_head=2, n_embd=16))


def test_an_evaluation_is_the_same_for_every_batch_size():
    losses = set()
    for n in (1, 2, 5, 16):
        out_dir = f"run{n}"
        train.main([*TINY, "--out_dir", out_dir, "--max_iters", "1", "--batch_size", f"{n}"])
        losses.add(round(float(log(out_dir)[0]["val_loss"]), 5))
    text = data.load("a.txt")
    model = tiny_model()
    starts = np.linspace(0, len(text.val) - 17, 7).astype(int)
    x = torch.tensor(np.stack([text.val[i : i + 17] for i in starts])).long()
    expected = [model(row[None, :-1], row[None, 1:])[1].item() for row in x]
    assert [*losses] == pytest.approx([np.mean(expected)], abs=2e-5)


def a_tenth_for_queries(kind):
    def make_optimizer(model, args):
        queries = [p for name, p in model.named_parameters() if name == "query"]
        rest = [p for name, p in model.named_parameters() if name != "query"]
        groups = [{"params": queries, "lr": args.learning_rate / 10}, {"params": rest}]
        return kind(groups, lr=args.learning_rate)

    return make_optimizer


OPTIMIZERS = {
    "AdamW": train.make_optimizer,
    "SGD": lambda model, args: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
    "SGD, rates of groups": a_tenth_for_queries(torch.optim.SGD),
    "AdamW, rates of groups": a_tenth_for_queries(torch.optim.AdamW),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_batch_changes_nothing_whatever_the_optimizer(home, name):
    def without(function, result):
        """The function, but the first call does nothing."""
        results = itertools.chain([result], itertools.repeat(None))
        return lambda *args: next(results) or function(*args)

    argv = [*TINY, "--dropout", "0.2"]
    home.setattr(train, "make_optimizer", OPTIMIZERS[name])
    train.main(argv)
    home.setattr(train, "add_gradients", without(train.add_gradients, 1.0))
    home.setattr(train, "evaluate", without(train.evaluate, {"val_loss": 1.0}))
    train.main([*argv, "--out_dir", "without"])
    assert_same_run("run", "without")


def test_a_groups_own_rate_counts_in_every_step_and_the_log_holds_the_schedules(home):
    class Noting(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    rates = []
    home.setattr(train, "make_optimizer", a_tenth_for_queries(Noting))
    argv = [*TINY, "--eval_interval", "1", "--warmup_iters", "2", "--learning_rate", "0.5"]
    train.main(argv)
    args = train.make_parser().parse_args(argv)
    scheduled = [0.5 * train.schedule(args, step) for step in range(4)]
    assert rates == [[pytest.approx(rate / 10), pytest.approx(rate)] for rate in scheduled]
    logged = [float(row["learning_rate"]) for row in log()[1:]]
    assert logged == pytest.approx(scheduled, rel=1e-5)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_an_edit_of_the_plain_form_alone_is_refused_before_it_trains(home, residual):
    plain = GPT.route_plain
    home.setattr(GPT, "route_plain", lambda self, x, *rest: plain(self, x, *rest) + 1e-6 * x)
    argv = [*TINY, "--residual", residual, "--dropout", "0.1"]
    if residual in KINDS:
        refused(train.main, argv, "off route_plain: edit route_fast too")
        home.setattr(GPT, "route", GPT.route_plain)
    train.main(argv)


def test_a_frozen_weight_does_not_stop_the_comparison_of_forms():
    model = tiny_model().double()
    model.embed.weight.requires_grad_(False)
    assert wav.fast_off_plain(model, torch.arange(8).view(2, 4)) < 1e-9


def test_forms_that_drop_alike_train_and_a_dropout_in_the_plain_form_alone_is_refused(home):
    drop, forward, plain = torch.nn.functional.dropout, wav.MLP.forward, GPT.route_plain
    home.setattr(wav.MLP, "forward", lambda self, *rest: drop(forward(self, *rest), 0.5))
    train.main(TINY)
    home.setattr(GPT, "route_plain", lambda self, *rest: drop(plain(self, *rest), 0.5))
    refused(train.main, [*TINY, "--out_dir", "two"], "off route_plain")


def test_a_setting_of_a_fork_without_a_flag_keeps_its_default_and_older_runs_go_on(home):
    @dataclasses.dataclass
    class Config(GPTConfig):
        n_query: int = 1

    train.main(TINY)
    home.setattr(train, "GPTConfig", Config)
    home.setattr(train, "MODEL", [*train.MODEL, "n_query"])
    home.setattr(train, "FIXED", [*train.FIXED, "n_query"])
    train.main(LONGER)
    assert read()["config"]["n_query"] == 1


def test_an_optimizer_that_leaves_a_weight_out_is_refused(home):
    def all_but_queries(model, args):
        return torch.optim.SGD([p for n, p in model.named_parameters() if n != "query"], lr=0.1)

    home.setattr(train, "make_optimizer", all_but_queries)
    refused(train.main, TINY, "the optimiser leaves out 1 weights: ['query']")


def test_what_decays_is_two_dimensional_and_called_weight():
    model = GPT(GPTConfig(11, n_layer=2, n_embd=8, n_head=2))
    model.scales = torch.nn.Parameter(torch.ones(4, 8))  # a fork's, of every layer
    model.norm = torch.nn.LayerNorm(8)
    model.more = torch.nn.Linear(8, 8)
    args = train.make_parser().parse_args([])
    matrices, rest = train.make_optimizer(model, args).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    kept = {"query", "detail_bias", "scales", "norm.weight", "norm.bias", "more.bias"}
    assert {names[id(p)] for p in rest["params"]} == kept
    assert len(matrices["params"]) == 2 * 5 + 2 + 1  # qkv, proj, gate, up, down; embed, head; more


def test_another_figure_at_each_evaluation_is_one_edit(home):
    def more(*args):
        return {**evaluate(*args), "entropy": np.float64(1.25)}

    evaluate = train.evaluate
    train.main([*TINY, "--out_dir", "before"])
    resume_before = ["--out_dir", "before", *LONGER[2:]]
    with home.context() as patch:
        patch.setattr(train, "evaluate", more)
        out, _ = said(train.main, TINY)
        refused(train.main, resume_before, "log.csv has ['step', 'train_loss', 'val_loss', 'lear")
    assert [row["entropy"] for row in log()] == ["1.25"] * 3
    read()  # holds no type of NumPy's, which weights_only would refuse
    lines = re.findall(r"step \d: .*val \d\.\d{3}, entropy 1\.250", out)
    assert len(lines) == 3
    refused(train.main, LONGER, "'entropy'")


def test_training_is_these_lines_and_accumulation_the_larger_batch():
    argv = [*TINY, "--grad_accum", "2", "--learning_rate", "0.1", "--warmup_iters", "2"]
    train.main(argv)
    args = train.make_parser().parse_args(argv)
    text, model = data.load("a.txt"), tiny_model()
    optimizer = train.make_optimizer(model, args)
    for step in range(4):
        starts = data.random_starts(len(text.train), 16, (2, 1, 4), 1, step).flatten()
        x, y = data.windows(torch.from_numpy(text.train), 16, starts)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * train.schedule(args, step)
        optimizer.zero_grad()
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(read()["model"], model.state_dict(), rtol=1e-3, atol=1e-4)


def test_two_processes_train_as_one():
    argv = [*TINY, "--grad_accum", "2", "--eval_windows", "7"]  # shares of 4 and 3
    train.main([*argv, "--out_dir", "one"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = []
    for rank in "01":  # as torchrun starts them
        env = {**os.environ, **names, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, ROOT / "train.py", *argv]
        pair.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    out, silent = (process.communicate()[0] for process in pair)
    assert [process.returncode for process in pair] == [0, 0] and silent == ""
    assert out.count("step 4: ") == out.count("a sample:") == 1
    one, two = ([[float(x or 0) for x in row] for row in figures(name)] for name in ("one", "run"))
    assert len(one) == 3 and np.allclose(one, two, rtol=0, atol=2e-5)


def test_a_weight_without_gradient_is_named_and_under_torchrun_refused(home):
    class Fork(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.unused = torch.nn.Linear(2, 2)

    assert "first batch" not in "".join(said(train.main, [*TINY, "--out_dir", "as it is"]))
    home.setattr(train, "GPT", Fork)
    note = "note: the first batch gives 2 weights no gradient: ['unused.weight', 'unused.bias']\n"
    assert note in "".join(said(train.main, TINY))
    home.setattr(dist, "init_process_group", lambda backend: None)
    home.setattr(dist, "barrier", lambda: None)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        home.setenv(name, "0")
    home.setenv("WORLD_SIZE", "2")
    _, error = said(train.main, [*TINY, "--out_dir", "two"], status=2)
    words = "error (process 0): no gradient for ['unused.weight', 'unused.bias']: torchrun cannot"
    assert error.startswith(words) and error.count("\n") == 1 and not Path("two").exists()


# ----------------------------------------------------------------------------------------------
# On a GPU


class OnCPU(TorchFunctionMode):
    """Whatever is asked of a device is done by the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        if "device" in (kwargs or {}):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def cuda(n, native=True, triton=None):
    """As on a machine with n GPUs. Yields what was compiled."""
    compiled, autocast, spec = [], torch.autocast, importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch, OnCPU():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: n)
        patch.setattr(torch.cuda, "set_device", lambda device: compiled.append(device))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1.234e9)
        patch.setattr(torch, "autocast", lambda kind, *args, **how: autocast("cpu", *args, **how))
        patch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or f)
        find = lambda name: triton if name == "triton" else spec(name)
        patch.setattr(importlib.util, "find_spec", find)
        yield compiled


@pytest.mark.parametrize("flags, device", [([], "cuda:0"), (["--device", "cuda:1"], "cuda:1")])
def test_a_run_takes_a_gpu_in_bf16_compiled_where_triton_is(flags, device):
    argv = [*TINY, "--device", "auto", *flags]
    with cuda(2, triton=True) as compiled:
        out, _ = said(train.main, argv)
        assert f"bfloat16 on {device}, 64 characters a step" in out
        assert "peak memory 1,234 MB" in out
        parts = ["mix", "merge", "offer_at_once", *["_call_impl"] * 8]
        assert compiled == [device, *parts]
        assert torch.get_float32_matmul_precision() == "high"
        said(train.main, [*LONGER, *flags])
        assert "run/best.pt" in said(sample.main, [*SAMPLE, *flags])[1]
        assert "mixing weights" in said(sample.main, [*SAMPLE, "--routing", *flags])[0]
    with cuda(2, native=False) as compiled:  # an older one, on Windows
        assert f"float32 on {device}" in said(train.main, [*argv, "--overwrite"])[0]
        assert compiled == [device]
        refused(train.main, [*LONGER, "--device", "cuda:2"], "one of cpu, cuda:0, cuda:1")


def test_on_a_cpu_products_are_in_full_float32_unless_asked(home):
    asked = []
    home.setattr(torch, "set_float32_matmul_precision", asked.append)
    assert "float32 on cpu" in said(train.main, TINY)[0] and not asked
    out, _ = said(train.main, [*TINY, "--out_dir", "b", "--dtype", "bfloat16"])
    assert "bfloat16 on cpu" in out and figures() != figures("b")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_gpu_trains_compiled_in_bf16_resumes_and_writes_text(home, residual):
    home.setattr(train, "some_text", train.real_some_text)
    argv = [*TINY, "--device", "cuda", "--residual", residual]
    train.main(argv)
    train.main(LONGER)
    sample.main(SAMPLE)
    if residual != "standard":
        sample.main([*SAMPLE, "--routing"])
    assert len(log()) == 4 and read()["settings"]["device"] == "cuda"


# ----------------------------------------------------------------------------------------------
# What a person sees


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_run_says_what_it_does_lowers_the_loss_and_names_what_to_type_next(home, residual):
    home.setattr(train, "some_text", train.real_some_text)
    folder = "out/tinystories-block_attnres-48x1024"  # as long as a name gets by itself
    argv = [*TINY, "--residual", residual, "--max_iters", "20", "--eval_interval", "10"]
    out, _ = said(train.main, [*argv, "--out_dir", folder])
    assert max(map(len, out[: out.index("a sample:")].splitlines())) <= 80
    routed, blocks = residual != "standard", residual not in ("standard", "attnres")
    n = sum(w.numel() for w in read(f"{folder}/ckpt.pt")["model"].values())
    parameters = f"{n:,} parameters, a vocabulary of {len(set(TEXT))}"
    step = r"train \d\.\d{3}, val \d\.\d{3}, [\d,]+ characters/s"
    text = data.load("a.txt")
    lines = [
        f"a.txt: {len(text.train):,} characters to train on, {len(text.val):,} to validate on",
        f"{residual} 4x16{' in 2 blocks' if blocks else ''}: {parameters}",
        "float32 on cpu, 64 characters a step",
        f"into {folder}/",
        "note: 20 steps end within warmup_iters=50, below the peak",
        r"step 0: val \d\.\d{3}",
        f"step 10: {step}",
        f"step 20: {step}",
        rf"{residual} 4x16: best validation loss \d\.\d{{4}} nats per character",
        r"\d+ s of training steps, [\d,]+ characters/s",
        "a sample:",
        "(?s:.{300})",
        f"next: python sample.py --out_dir {folder}",
        *[f"      python sample.py --out_dir {folder} --routing"] * routed,
    ]
    assert re.fullmatch("\n".join([*lines, ""]), out), out
    assert max(map(len, out.splitlines()[-1 - routed :])) <= 80
    losses = [float(row["val_loss"]) for row in log(folder)]
    assert losses == sorted(losses, reverse=True)


def test_a_terminal_of_80_columns_shows_validating_first_and_wraps_no_line():
    # The defaults, but for what takes long. The session is a terminal's, as it would be a person's.
    argv = "--max_iters 2 --batch_size 2 --eval_windows 2 --n_layer 4 --n_embd 32 --n_ctx 32"
    pid, terminal = pty.fork()
    if pid == 0:
        command = f"stty cols 80 rows 24; {sys.executable} {ROOT}/train.py {argv}"
        os.execvp("bash", ["bash", "-c", command])
    screen = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 10000):
            screen += part
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, screen
    screen = re.sub(r"\x1b\[\w*", "", screen.decode())
    assert 0 < screen.index("validating...") < screen.index("step 0: val")
    assert "2/2" in screen and "step 2: train" in screen
    before_sample = screen[: screen.index("a sample:")]
    assert max(map(len, re.split(r"[\r\n]", before_sample))) <= 80


def test_text_depends_on_the_seed_alone_and_goes_on_from_the_prompt():
    train.main([*TINY, "--out_dir", "out/one"])
    train.main([*TINY, "--out_dir", "out/two"])
    os.utime("out/one/ckpt.pt", (2e9, 2e9))  # the latest
    texts = []
    for seed in ("1", "1", "7"):
        out, error = said(sample.main, ["--prompt", "the ", "--n_tokens", "40", "--seed", seed])
        texts.append(out)
        assert error == "out/one/best.pt: wav 4x16\n"
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the ") and len(texts[0]) == 4 + 40 + 1


def test_a_fork_to_bytes_is_an_edit_of_data_alone(home):
    Path("a.txt").write_text(TEXT + " naïve, 🦊" * 60)
    Path("a_valid.txt").write_text(TEXT[:200] + "0")
    home.setattr(data, "TOKEN", "byte")
    home.setattr(data, "vocabulary", lambda text: sorted(set(text.encode())))
    home.setattr(data, "encode", encode_bytes)
    home.setattr(
        data, "decode", lambda ids, vocab: bytes(vocab[i] for i in ids).decode(errors="replace")
    )
    for name in ("train", "sample"):  # as in a process that starts now
        home.delitem(sys.modules, name)
    fork, fork_sample = importlib.import_module("train"), importlib.import_module("sample")
    screen = [*said(fork.main, TINY), *said(fork.main, ["--help"])]
    for flags in (["--prompt", "the 🦊"], ["--routing"], ["--help"]):
        screen += said(fork_sample.main, [*SAMPLE, *flags])
    _, error = said(fork_sample.main, [*SAMPLE, "--prompt", "naïve 0"], status=2)
    assert "the model never saw ['0']" in error
    screen = "".join([*screen, error])
    spoken = torch.from_numpy(data.encode("ï, 🦊", read()["vocab"]))  # characters of 2 and 4 bytes
    home.setattr(GPT, "stream", lambda *how: iter(spoken))
    assert said(fork_sample.main, [*SAMPLE, "--prompt", "🦊 "])[0] == "🦊 ï, 🦊\n"
    assert "validation bytes, unseen" in screen
    assert "bytes to train on" in screen and "nats per byte" in screen and "the 🦊" in screen
    assert "character" not in screen and "bytes_per_second" in log()[0]


def encode_bytes(text, vocab):
    ids = {byte: i for i, byte in enumerate(vocab)}
    return np.array([ids.get(byte, -1) for byte in text.encode()], np.int32)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_text_and_map_are_utf_8_whatever_the_encoding(home, encoding):
    Path("a.txt").write_text("naïve 🦊 " * 300, encoding="utf-8")
    train.main(TINY)
    for flags, words in ((["--prompt", "🦊"], "🦊"), (["--routing"], "█100")):
        file = io.BytesIO()
        home.setattr(sys, "stdout", io.TextIOWrapper(file, encoding=encoding))
        with pytest.raises(SystemExit) as end:
            train.run(lambda flags=flags: sample.main([*SAMPLE, *flags]))
        assert not end.value.code and words in file.getvalue().decode("utf-8")


def test_head_ends_a_text_quietly():
    train.main(TINY)
    line = f"{sys.executable} {ROOT}/sample.py --out_dir run --prompt fox --n_tokens 3000"
    script = f"{line} | head -c 3; echo $PIPESTATUS"
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "fox0\n" and done.stderr == "run/best.pt: wav 4x16\n"


MAPS = [("wav", 4, 80), ("wav", 12, 80), ("attnres", 12, 80), ("attnres", 48, 80)]
MAPS += [("block_attnres", 12, 80), ("attnres", 12, 130), ("wav", 12, 130)]


@pytest.mark.parametrize("residual, n_layer, width", MAPS)
def test_the_map_fits_the_screen_and_has_a_row_for_each_reader(home, residual, n_layer, width):
    if width != 80:  # which is what a pipe has
        home.setenv("COLUMNS", str(width))
    argv = [*TINY[: TINY.index("--n_layer")], "--n_layer", str(n_layer), "--n_embd", "8"]
    argv += ["--n_head", "2", "--n_ctx", "8", "--max_iters", "1", "--residual", residual]
    train.main([*argv, "--eval_windows", "1", "--batch_size", "1"])
    out, _ = said(sample.main, [*SAMPLE, "--routing"])
    assert max(map(len, out.splitlines())) <= width
    weights, means = out.split("\n\n")
    title, *rows = weights.splitlines()
    assert title == f"{residual} {n_layer}x8: mixing weights in percent"
    rows = rows[-2 * n_layer - 1 :]
    labels = [f"{kind} {i + 1}" for i in range(n_layer) for kind in ("att", "MLP")]
    assert [row[:10].strip() for row in rows] == [*labels, "output"]
    heads = weights.splitlines()[1]
    if heads.startswith("("):  # shades, where cells of three columns would not fit
        assert heads.endswith("; 1 in a column)" if n_layer == 12 else "; 2 in a column)")
        assert rows[0] == "att 1     █"
    else:
        assert rows[0].endswith("100") and len(rows[0]) == heads.index("x0") + 2
    if width == 130:
        sums = [sum(map(int, re.findall(r"\d+", row[10:]))) for row in rows]
        assert sums == pytest.approx([100] * len(rows), abs=0.5 * len(rows))
        assert weights.splitlines()[1].split()[:2] == ["x0", "sum"]
    _, heads, *rows, worth, _ = means.splitlines()
    kinds = ["x0", *KINDS[residual]]
    assert {*heads.split()} == {*kinds, *["running"] * (residual != "attnres")}
    assert worth.startswith("worth ") and len(worth.split()) == 1 + len(heads.split())
    for row in rows:
        percents = [float(x) for x in re.findall(r"(\d+) ±", row)]
        assert len(percents) == len(heads.split()) and sum(percents) == pytest.approx(100, abs=3)


def loss_with_less(model, hidden, x, y):
    """The loss where no reader has the sources of a kind, unless they are all that it has."""
    completed, updates = [("x0", model.embed(x))], []
    for l, query in enumerate(model.query):
        read = completed + ([("running", sum(updates))] if updates else [])
        kept = [(kind, s) for kind, s in read if kind != hidden] or read
        sources = torch.stack([s for _, s in kept])
        c = [
            model.detail_bias[l, model.details.index(k)] if k in model.details else 0
            for k, _ in kept
        ]
        logits = wav.rms_norm(sources) @ query + torch.tensor(c)[:, None, None]
        h = (logits.softmax(0)[..., None] * sources).sum(0)
        if l < len(model.sublayers):
            updates.append(model.sublayers[l](h))
        if len(updates) == model.block_size:
            offered = wav.offer(model.kinds, updates, model.block_size, 1)
            completed += [(kind, s) for (kind, _), s in offered.items()]
            updates = []
    return torch.nn.functional.cross_entropy(model.head(wav.rms_norm(h)).flatten(0, 1), y.flatten())


def test_the_worth_of_a_kind_is_the_loss_without_it():
    argv = [*TINY, "--max_iters", "30", "--eval_interval", "30", "--learning_rate", "0.03"]
    train.main(argv)
    model = sample.load_checkpoint("run/best.pt")[0].requires_grad_(False)
    text = data.load("a.txt")
    starts = data.even_starts(len(text.val), 16, 32)
    x, y = data.windows(torch.from_numpy(text.val), 16, starts)
    loss = model(x, y)[1].item()
    assert sample.loss_without(model, None, x, y) == pytest.approx(loss, abs=1e-5)
    rises = {}
    for kind in ("x0", "running", "sum", "phase", "split"):
        rises[kind] = sample.loss_without(model, kind, x, y) - loss
        expected = loss_with_less(model, kind, x, y).item() - loss
        assert rises[kind] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-4
    for i, kind in enumerate(model.details):
        without = copy.deepcopy(model)
        without.detail_bias[:, i] = -1e4
        assert without(x, y)[1].item() - loss == pytest.approx(rises[kind], abs=1e-5)
    assert model(x, y)[1].item() == loss  # nothing is left hidden
    out, _ = said(sample.main, [*SAMPLE, "--routing"])
    (heads,) = re.findall(r"\n +(x0 .*)\n", out.split("\n\n")[1])
    (worth,) = re.findall(r"\nworth (.*)\n", out)
    printed = dict(zip(heads.split(), map(float, worth.split())))
    assert printed == {kind: pytest.approx(rise, abs=6e-4) for kind, rise in rises.items()}
    assert f"does the loss, {loss:.3f} on these windows" in out


# ----------------------------------------------------------------------------------------------
# Texts


def test_pydoc_does_not_validate_on_what_it_trains_on():
    text, val = data.pydoc()
    seen = {text[i : i + 100] for i in range(len(text) - 99)}
    starts = range(len(val) - 99)
    assert sum(val[i : i + 100] in seen for i in starts) < 0.05 * len(starts)
    assert len(text) > 200_000 and len(val) == pytest.approx(len(text) / 9, rel=0.05)


def test_a_text_that_validates_on_itself_is_said(capsys):
    Path("a.txt").write_text(TEXT[:500] * 9)
    data.load("a.txt")
    note = "note: 100% of the validation text is in the training text: its loss is too low\n"
    assert capsys.readouterr().err == note
    Path("a.txt").write_text(TEXT)
    data.load("a.txt")
    assert capsys.readouterr().err == ""


def test_ids_are_places_in_the_vocabulary_and_unknown_characters_are_dropped(capsys):
    Path("a.txt").write_text("naïve 🦊\n")
    Path("a_valid.txt").write_text("nave?🦊ü")
    train_ids, val_ids, vocab, _ = data.load("a.txt")
    assert vocab == sorted(set("naïve 🦊\n"))
    assert data.decode(train_ids, vocab) == "naïve 🦊\n" and data.decode(val_ids, vocab) == "nave🦊"
    assert "dropped 2 of 7 validation characters" in capsys.readouterr().err


def test_a_text_is_split_at_its_last_tenth_or_has_its_validation_text_beside_it():
    cut = len(TEXT) * 9 // 10
    assert data.text_file(Path("a.txt")) == (TEXT[:cut], TEXT[cut:])
    Path("a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    Path("a_valid.txt").write_text("dog")
    assert data.text_file(Path("a.txt")) == (TEXT, "dog")


def test_batches_are_windows_drawn_by_seed_and_step_and_targets_come_one_later():
    draws = [data.random_starts(1000, 16, (2, 3), *how) for how in ((1, 5), (1, 6), (2, 5))]
    assert len({draw.tobytes() for draw in draws}) == 3
    assert np.array_equal(draws[0], data.random_starts(1000, 16, (2, 3), 1, 5))
    assert set(data.random_starts(18, 16, 1000, 1, 1)) == {0, 1}, "every window that fits"
    ids = torch.arange(1000, dtype=torch.int32)
    x, y = data.windows(ids, 16, data.even_starts(1000, 16, 5))
    assert torch.equal(x + 1, y) and (x.shape, x[0, 0], y[-1, -1]) == ((5, 16), 0, 999)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_is_the_beginning_that_was_asked_for_or_nothing(home, ranges):
    stories = ("Once upon a time… 🦊\n<|endoftext|>\n" * 40).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted, content = self.headers["Range"], stories
            if wanted and ranges:
                content = stories[: int(wanted.removeprefix("bytes=0-")) + 1]
            self.send_response(200)
            self.send_header("Content-Length", len(content) + self.server.missing)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    home.setenv("no_proxy", "*")
    home.setattr(data, "TINYSTORIES_URL", f"http://127.0.0.1:{server.server_port}/")
    server.missing = 10  # the connection ends before the file does
    home.setattr(data, "TINYSTORIES_BYTES", len(stories) + 10)
    argv = [*TINY, "--dataset", "tinystories"]
    assert "failed: it ended after" in said(train.main, argv, status=2)[1].splitlines()[-1]
    assert not list(Path("data").iterdir())
    server.missing = 0
    for first in range(1000, 1040):  # the cut falls on every byte of a story
        home.setattr(data, "TINYSTORIES_BYTES", first)
        for _ in range(2):  # the second time from the disk
            text, val = data.tinystories(Path(f"data/{first}"))
            assert stories.decode().startswith(text) and first - 4 < len(text.encode()) <= first
            assert val == stories.decode()
    server.shutdown()
    server.server_close()
