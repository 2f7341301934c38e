"""
What train.py, sample.py and data.py promise: `pytest .ci/test_scripts.py`.
"""

import contextlib
import csv
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share two cores
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import data
import sample
import test_wav
import train
import wav
from wav import GPT, RESIDUALS, GPTConfig

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog.\n"]
TEXT = " ".join(random.Random(1).choices(WORDS, k=600))  # no 100 characters come twice
SHAPE = "--n_layer 4 --layers_per_block 2 --n_head 2 --n_embd 16 --n_ctx 16"
TINY = f"--dataset a.txt --out_dir run --device cpu {SHAPE} --batch_size 4 --eval_windows 8"
TINY += " --max_iters 4 --eval_interval 2"
RESUME = "--out_dir run --resume"
LONGER = "--out_dir run --resume --max_iters 6"
SAMPLE = "--out_dir run --n_tokens 5"
TRAIN_PY = f"{sys.executable} {ROOT / 'train.py'}"
SAMPLE_PY = f"{sys.executable} {ROOT / 'sample.py'}"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A working directory with a text in it. What a run changes in this process is put back."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    for name in ("mix", "merge", "details"):
        monkeypatch.setattr(wav, name, getattr(wav, name))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def go(flags):
    """Train. Returns the exit status."""
    return train.main(flags.split())


def said(script, flags, status=0, encoding="utf-8"):
    """Run a script as `python SCRIPT FLAGS` does. What it says on stdout, and on stderr."""
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding)
    screen = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with screen[0], screen[1], pytest.raises(SystemExit) as end:
        train.run(lambda: script.main(shlex.split(flags)))
    for file in (out, err):
        file.seek(0)
    out, err = out.read(), err.read()
    assert (end.value.code or 0) == status, out + err
    return out, err


def refused(script, flags, words):
    """The script refuses: status 2, one line with these words (argparse's own or ours), and no file
    is touched."""
    before = files()
    _, err = said(script, flags, status=2)
    line = err.splitlines()[-1]
    assert re.match(r"error: |\S+: error: ", line) and words in line, err
    assert files() == before


def files():
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


def read(path="run/ckpt.pt"):
    return torch.load(path, weights_only=True)


def log(folder="run"):
    """The rows of log.csv without the columns that hold a clock."""
    with open(Path(folder, "log.csv")) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for clock in ("seconds", "tokens_per_second"):
            row.pop(clock, None)
    return rows


def column(name, folder="run"):
    return [float(row[name]) for row in log(folder) if row.get(name)]


def assert_same_state(one, two):
    """Two folders hold the same weights and the same optimizer, to the bit."""
    a, b = read(f"{one}/ckpt.pt"), read(f"{two}/ckpt.pt")
    for part in ("step", "model", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def stop_during(monkeypatch, step, number=signal.SIGINT):
    """Send a signal while this step (1, 2, ...) is taken."""
    starts = data.random_starts

    def stopping(*args):
        if args[-1] == step - 1 and Path("run").exists():  # not in the batch before the loop
            signal.raise_signal(number)
        return starts(*args)

    monkeypatch.setattr(data, "random_starts", stopping)


def wait_for_step(step):
    """Until a run in another process has saved this step."""
    patience = time.monotonic() + 60
    log = Path("run/log.csv")
    while not log.exists() or f"\n{step}," not in log.read_text():
        assert time.monotonic() < patience
        time.sleep(0.02)


def tiny_model(residual="wav"):
    """The model of TINY, before its first step."""
    torch.manual_seed(1)
    shape = {"n_ctx": 16, "n_layer": 4, "layers_per_block": 2, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig(len(set(TEXT)), residual=residual, **shape))


# ----------------------------------------------------------------------------------------------
# Stop and go on


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_stopped_and_resumed_run_is_the_unbroken_run_to_the_bit(monkeypatch, residual):
    flags = f"{TINY} --residual {residual} --dropout 0.1 --grad_accum 2 --warmup_iters 3"
    flags += " --max_iters 9 --eval_interval 3"
    assert go(f"{flags} --out_dir whole") == 0
    for step in (1, 6):  # between two evaluations, and at one
        with monkeypatch.context() as patch:
            stop_during(patch, step)
            assert go(flags if step == 1 else RESUME) == 130
        torch.manual_seed(99)
    Path("run/log.csv").unlink()  # lost: the checkpoint holds its rows
    assert go(RESUME) == 0
    assert_same_state("run", "whole")
    assert column("step") == [0, 1, 3, 6, 9]
    assert log()[3:] == log("whole")[2:]


def test_half_the_batch_and_twice_the_accumulation_go_on_with_the_same_windows(monkeypatch):
    go(f"{TINY} --out_dir whole")
    stop_during(monkeypatch, 2)
    go(TINY)
    go(f"{RESUME} --batch_size 2 --grad_accum 2")
    for name in ("train_loss", "val_loss"):
        assert column(name) == pytest.approx(column(name, "whole"), abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_a_run_and_a_second_ends_it_at_once(monkeypatch, capfd, number):
    stop_during(monkeypatch, 3, number)
    out, _ = said(train, TINY, status=130)
    assert out.splitlines()[-3:] == [
        "stopped at step 3 and saved",
        "to continue: python train.py --resume --out_dir run",
        "next: python sample.py --out_dir run",
    ]
    assert read()["step"] == 3
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "again to quit now" in capfd.readouterr().err


def test_ctrl_c_saves_even_if_it_ends_tee_too():
    flags = f"{TINY} --eval_interval 50000 --max_iters 50000"
    script = f"({TRAIN_PY} {flags}; echo $? > status) 2>&1 | tee screen"
    with subprocess.Popen(["bash", "-c", script], start_new_session=True) as shell:
        try:
            wait_for_step(0)
            time.sleep(1)  # some steps
        finally:
            os.killpg(shell.pid, signal.SIGINT)
    assert Path("status").read_text() == "130\n"
    assert 0 < read()["step"] < 50000
    assert column("step") == [0, read()["step"]]


def test_a_killed_run_leaves_a_checkpoint_that_resumes():
    flags = f"{TINY} --eval_interval 1 --max_iters 50000"
    with subprocess.Popen([*TRAIN_PY.split(), *flags.split()], stdout=subprocess.DEVNULL) as run:
        try:
            wait_for_step(4)
        finally:
            run.kill()
    step = read()["step"]
    assert go(f"{RESUME} --max_iters {step + 1}") == 0
    assert column("step") == [*range(step + 2)]


class Slowing(torch.optim.SGD):
    """Keeps momentum, and in its groups, as schedule-free optimizers do, the number of steps."""

    def step(self):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] /= group["k"]
        super().step()


def slowing(model, args):
    return Slowing(model.parameters(), lr=0.5, momentum=0.9)


def test_another_optimizer_resumes_to_the_bit_with_what_it_keeps_in_its_groups(monkeypatch):
    monkeypatch.setattr(train, "make_optimizer", slowing)
    go(f"{TINY} --out_dir whole")
    stop_during(monkeypatch, 2)
    go(TINY)
    go(RESUME)
    assert_same_state("run", "whole")


# ----------------------------------------------------------------------------------------------
# What --resume may change


def test_resume_goes_on_with_other_folders_intervals_and_steps():
    go(TINY)
    Path("run").rename("moved")
    Path("a.txt").rename("b.txt")
    flags = "--out_dir moved --resume --dataset b.txt --data_dir elsewhere --device auto"
    assert go(f"{flags} --max_iters 6 --eval_interval 3 --no-compile") == 0
    assert column("step", "moved") == [0, 2, 4, 6]


FIXED = "residual=standard n_layer=2 n_head=1 n_embd=32 n_ctx=8 layers_per_block=1 detail_bias=0"
FIXED += " dropout=0.1 learning_rate=0.1 warmup_iters=2 weight_decay=0 grad_clip=0 seed=2"
FIXED += " eval_windows=4 dtype=bfloat16"


def test_resume_changes_nothing_else_in_a_run():
    go(TINY)
    names = {setting.split("=")[0] for setting in FIXED.split()}
    assert {*train.MAY_CHANGE} | names == {*vars(train.make_parser().parse_args([]))}
    for setting in [*FIXED.split(), "batch_size=8"]:
        name = setting.split("=")[0]
        refused(train, f"{LONGER} --{setting}", f"--resume cannot change ['{name}")


def test_a_setting_that_the_run_did_not_have_is_refused():
    go(TINY)
    checkpoint = read()
    del checkpoint["settings"]["dropout"]  # as if a fork had added it
    torch.save(checkpoint, "run/ckpt.pt")
    refused(train, LONGER, "--resume cannot change ['dropout']")


def test_a_run_is_resumed_or_replaced_only_on_demand():
    refused(train, RESUME, "there is no checkpoint run/ckpt.pt")
    go(TINY)
    refused(train, RESUME, "this run has done 4 steps: raise --max_iters")
    refused(train, TINY, "run has a run already: use --resume, --overwrite or another --out_dir")
    refused(train, f"{LONGER} --overwrite", "not allowed with argument --resume")
    assert go(f"{TINY} --overwrite --seed 2") == 0
    assert read()["settings"]["seed"] == 2


CUT = len(TEXT) * 8 // 10
CHANGED = {
    "another order to train on": (TEXT[5:CUT] + TEXT[:5] + TEXT[CUT:], None),
    "other letters": (TEXT.replace("z", "{"), None),
    "cut elsewhere": (TEXT[:CUT], TEXT[CUT:]),
    "other text to validate on": (TEXT[: len(TEXT) * 9 // 10], TEXT[:300]),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_and_its_map_go_with_its_text_alone(change):
    go(TINY)
    text, beside = CHANGED[change]
    Path("a.txt").write_text(text)
    if beside:
        Path("a_valid.txt").write_text(beside)
    refused(train, LONGER, "'a.txt' is not this run's text")
    refused(sample, f"{SAMPLE} --routing", "'a.txt' is not this run's text")
    said(sample, SAMPLE)  # needs no text


def test_a_model_that_wav_py_no_longer_makes_is_refused(monkeypatch):
    @dataclass
    class Forked(GPTConfig):
        n_query: int = 1  # a setting without a flag

    go(TINY)
    monkeypatch.setattr(train, "GPTConfig", Forked)
    refused(train, LONGER, "wav.py no longer makes this run's model")


def test_a_checkpoint_keeps_the_code_that_began_the_run_and_a_change_is_said(monkeypatch):
    code = "".join(Path(module.__file__).read_text() for module in (wav, data, train))
    note = "note: the code has changed since this run began\n"
    monkeypatch.setattr(wav, "__file__", "a.txt")  # an edit after the start is not what runs
    go(TINY)
    assert note not in said(sample, SAMPLE)[1] + said(train, LONGER)[1]
    monkeypatch.setattr(train, "CODE", "# edited")
    assert note in said(sample, SAMPLE)[1]
    assert note in said(train, f"{RESUME} --max_iters 8")[1]
    assert read()["code"] == code


# ----------------------------------------------------------------------------------------------
# Refused, crashed, broken


def test_a_nan_never_comes_over_a_good_checkpoint(monkeypatch):
    go(TINY)
    monkeypatch.setattr(train, "lr_scale", lambda args, step: math.nan)
    refused(train, LONGER, "the loss is nan at step 6: try a lower --learning_rate")


def test_a_run_that_is_nan_from_the_start_leaves_nothing_and_replaces_nothing():
    refused(train, f"{TINY} --detail_bias nan", "the loss is nan at step 0")
    assert go(TINY) == 0
    refused(train, f"{TINY} --detail_bias nan --overwrite", "the loss is nan at step 0")


@pytest.mark.parametrize("name", ["best.pt", "ckpt.pt"])
def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(monkeypatch, name):
    def crash(state, file):
        if state["step"] == 4 and name in file.name:
            file.write(b"half")
            raise RuntimeError("No space left on device")  # so torch.save says it
        save(state, file)

    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(RuntimeError, match="No space left"):
            go(TINY)
    assert read()["step"] == read("run/best.pt")["step"] == 2
    assert go(RESUME) == 0


def test_of_two_runs_that_begin_in_one_folder_the_second_is_refused(monkeypatch):
    def late(*args):
        if not Path("run").exists():
            Path("run").mkdir()
            Path("run/ckpt.pt").write_text("another run's")
        return evaluate(*args)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", late)
    assert "run has a run already" in said(train, TINY, status=2)[1]
    assert Path("run/ckpt.pt").read_text() == "another run's"


def test_a_log_that_another_program_holds_open_does_not_end_the_run(monkeypatch):
    def held(path, *how, **more):
        if path.name == "log.csv":
            raise PermissionError(f"{path} is held open")
        return open(path, *how, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "open", held, raising=False)
        _, err = said(train, TINY)
    assert "note: run/log.csv is held open: the next save writes all of it\n" in err
    go(LONGER)
    assert column("step") == [0, 2, 4, 6]


COUNTS = "batch_size grad_accum max_iters eval_interval eval_windows n_ctx"
BAD = [f"--{name}=-5 | {name}=-5 must be at least 1" for name in COUNTS.split()]
BAD += """
--warmup_iters=-1 | warmup_iters=-1 must not be negative
--weight_decay=-1 | weight_decay=-1.0 must not be negative
--grad_clip=-1 | grad_clip=-1.0 must not be negative
--seed=-1 | seed=-1 must not be negative
--learning_rate=-1 | learning_rate=-1.0 must not be negative
--learning_rate nan | learning_rate=nan must not be negative
--n_head 3 | n_embd=16 must be a multiple of 2 * n_head=6
--n_ctx 296 | n_ctx=296 needs 297 of each
--device cuda:99 | device 'cuda:99' does not work here
--device tpu | device 'tpu' does not work here
--dataset nothing.txt | is neither pydoc, tinystories, text8 nor a text file
--dataset . | is neither pydoc, tinystories, text8 nor a text file
--dataset latin.txt | latin.txt or latin_valid.txt is not UTF-8 text
--dataset empty.txt | 0 tokens to train on
--out_dir a.txt | File exists: 'a.txt'
--residual wave | invalid choice: 'wave'
--warmup_iters 1.5 | --warmup_iters: invalid int value: '1.5'
--batch 2 | unrecognized arguments: --batch 2
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD)
def test_what_a_person_can_mend_is_said_in_one_line(line):
    flags, words = line.split(" | ")
    Path("latin.txt").write_bytes(b"na\xefve " * 99)
    Path("empty.txt").write_text("")
    refused(train, f"{TINY} {flags}", words)


BAD_SAMPLE = """
--out_dir none | there is no run in none
--device cpu | no run under out/: run `python train.py` first, or give --out_dir
--out_dir run --prompt 0ox1 | the model never saw ['0', '1']: use characters of its text
--out_dir run --prompt '' | the prompt is empty
--out_dir run --temperature=-1 | temperature=-1.0 must not be negative
--out_dir run --top_k 0 | top_k=0 must be at least 1
--out_dir run --routing | standard has no mixing weights to show
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD_SAMPLE)
def test_what_a_person_can_mend_is_said_in_one_line_by_sample_py(line):
    flags, words = line.split(" | ")
    go(f"{TINY} --residual standard --max_iters 1")
    refused(sample, flags, words)


@pytest.mark.parametrize("name", ["batch_size", "eval_windows"])
def test_what_the_processes_cannot_share_is_refused(monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(train, f"{TINY} --{name} 9", f"{name}=9 must be a multiple of the 2 processes")


@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"])
def test_a_forks_own_error_keeps_its_traceback(monkeypatch, compiled):
    def forked(mlp, h, cache=None):
        raise ValueError("too many values to unpack")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="eager"))
    monkeypatch.setattr(wav.MLP, "forward", forked)
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        train.run(lambda: go(f"{TINY} {compiled}"))
    assert "in forked" in str(error.getrepr(style="native"))


# ----------------------------------------------------------------------------------------------
# Training


def rates(flags):
    """The scheduled rates of a run."""
    args, _ = train.read_settings(f"--out_dir none {flags}".split())
    return [args.learning_rate * train.lr_scale(args, step) for step in range(args.max_iters + 1)]


def test_the_rate_warms_up_and_falls_as_a_cosine_to_a_tenth():
    found = rates("--learning_rate 0.5 --warmup_iters 10 --max_iters 110")
    assert found[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert found[10] == pytest.approx(0.5)
    assert found[35] == pytest.approx(0.5 * (0.1 + 0.9 * math.cos(math.pi / 8) ** 2))
    assert found[110] == pytest.approx(0.05)
    assert max(rates("--learning_rate 1e-4 --warmup_iters 300")) <= 1e-4


@pytest.mark.parametrize("clip", [0.05, 0])
def test_training_is_these_lines_and_accumulation_the_larger_batch(clip):
    flags = f"{TINY} --grad_accum 2 --grad_clip {clip} --learning_rate 0.01 --warmup_iters 2"
    args, _ = train.read_settings(flags.split())
    go(flags)
    text = data.load("a.txt")
    model = tiny_model()
    optimizer = train.make_optimizer(model, args)
    losses = []
    for step in range(4):
        starts = data.random_starts(len(text.train), 16, 8, 1, step)
        x, y = data.windows(torch.from_numpy(text.train), 16, starts)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * train.lr_scale(args, step)
        loss = model(x, y)[1]
        loss.backward()
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    means = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert column("train_loss") == pytest.approx(means, abs=5e-5)
    torch.testing.assert_close(read()["model"], model.state_dict(), rtol=1e-3, atol=1e-4)
    moments = optimizer.state_dict()["state"]
    torch.testing.assert_close(read()["optimizer"]["state"], moments, rtol=1e-3, atol=1e-6)


def test_the_batch_that_compiles_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(train, "make_optimizer", slowing)
    go(f"{TINY} --dropout 0.2 --out_dir with --compile")
    go(f"{TINY} --dropout 0.2 --out_dir without")
    assert_same_state("with", "without")


def test_a_groups_own_rate_follows_the_schedule_and_the_log_holds_the_last_steps(monkeypatch):
    class Noting(torch.optim.SGD):
        def step(self):
            taken.append([group["lr"] for group in self.param_groups])
            super().step()

    def two_rates(model, args):
        queries = {"params": [model.query], "lr": args.learning_rate / 10}
        rest = [p for p in model.parameters() if p is not model.query]
        return Noting([queries, {"params": rest}], lr=args.learning_rate)

    taken = []
    monkeypatch.setattr(train, "make_optimizer", two_rates)
    flags = f"{TINY} --warmup_iters 2 --learning_rate 0.5"
    scheduled = rates(flags)[:4]
    go(flags)
    assert [rest for _, rest in taken] == pytest.approx(scheduled)
    assert [10 * queries for queries, _ in taken] == pytest.approx(scheduled)
    assert column("learning_rate") == pytest.approx([scheduled[1], scheduled[3]])


def test_what_decays_is_two_dimensional_and_called_weight():
    model = tiny_model()
    model.scales = torch.nn.Parameter(torch.ones(4, 8))  # a fork's, of every layer
    model.norm = torch.nn.LayerNorm(8)
    model.more = torch.nn.Linear(8, 8)
    args = train.make_parser().parse_args(["--weight_decay", "0.3"])
    matrices, rest = train.make_optimizer(model, args).param_groups
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    kept = {names[p] for p in rest["params"]}
    assert kept == {"query", "detail_bias", "scales", "norm.weight", "norm.bias", "more.bias"}
    assert len(matrices["params"]) == 4 * 5 + 3  # qkv, proj, gate, up, down; embed, head, more


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_an_evaluation_is_the_mean_over_even_windows_for_every_batch_size(batch_size):
    go(f"{TINY} --eval_windows 7 --max_iters 1 --batch_size {batch_size}")
    text = data.load("a.txt")
    model = tiny_model()
    losses = []
    for start in np.linspace(0, len(text.val) - 17, 7).astype(int):
        window = torch.from_numpy(text.val[start : start + 17]).long()[None]
        losses.append(model(window[:, :-1], window[:, 1:])[1].item())
    assert column("val_loss")[0] == pytest.approx(np.mean(losses), abs=1e-5)


def test_two_processes_train_as_one(monkeypatch):
    go(f"{TINY} --grad_accum 2 --out_dir one")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = f"{TRAIN_PY} {TINY} --grad_accum 2".split()
    pair = []
    for rank in "01":  # as torchrun starts them
        env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank}
        pair.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    first, second = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert "step 4: " in first and second == ""
    for name in ("train_loss", "val_loss"):
        assert column(name) == pytest.approx(column(name, "one"), abs=2e-5)


# ----------------------------------------------------------------------------------------------
# On a GPU


class OnCPU(TorchFunctionMode):
    """Whatever is asked of a device is done by the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


@pytest.fixture
def cuda(monkeypatch):
    """As on a machine with two GPUs. What was compiled, set or asked for."""
    asked, autocast, spec = [], torch.autocast, importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1.234e9)
    monkeypatch.setattr(torch, "autocast", lambda kind, *how, **more: autocast("cpu", *how, **more))
    monkeypatch.setattr(torch, "compile", lambda f: asked.append(f.__name__) or f)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or spec(name))
    with OnCPU():
        yield asked


@pytest.mark.parametrize("device, found", [("auto", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_run_takes_a_gpu_in_bf16_and_compiled(cuda, device, found):
    out, _ = said(train, f"{TINY} --device {device}")
    assert f"bfloat16 on {found}, 64 tokens a step\n" in out
    assert "compiling, which takes a minute or more...\n" in out
    assert "peak memory 1,234 MB\n" in out
    compiled = ["mix", "merge", "details", *["_call_impl"] * 8]
    assert cuda == [found, *compiled]  # and float32 is never lowered to TF32
    go(f"{TINY} --out_dir cpu")
    assert log() != log("cpu")
    said(sample, f"{SAMPLE} --device {device}")


def test_an_older_gpu_without_triton_trains_in_float32_as_it_is(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out, _ = said(train, f"{TINY} --device cuda")
    assert "float32 on cuda:0" in out
    assert "compiling" not in out
    assert cuda == ["cuda:0"]
    go(f"{TINY} --out_dir cpu")
    assert log() == log("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_gpu_trains_compiled_in_bf16_resumes_and_writes_text(residual):
    out, _ = said(train, f"{TINY} --device cuda --residual {residual}")
    assert "bfloat16 on cuda:0" in out and "compiling" in out
    assert go(LONGER) == 0
    said(sample, SAMPLE)
    if residual != "standard":
        said(sample, f"{SAMPLE} --routing")


# ----------------------------------------------------------------------------------------------
# What a person sees


def test_a_run_lowers_its_loss_and_its_folder_is_named_after_it_and_holds_its_settings():
    go(TINY.replace("--out_dir run", ""))
    folder = Path("out/a-wav-4x16")
    names = {path.name for path in folder.iterdir()}
    assert names == {"ckpt.pt", "best.pt", "log.csv", "settings.json"}
    settings = json.loads(Path(folder, "settings.json").read_text())
    assert settings == read(folder / "ckpt.pt")["settings"]
    assert (settings["n_embd"], settings["dtype"]) == (16, "float32")
    losses = column("val_loss", folder)
    assert losses == sorted(losses, reverse=True)


def test_best_pt_is_the_state_with_the_lowest_loss(monkeypatch):
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    go(TINY)
    assert (read("run/best.pt")["step"], read()["step"]) == (2, 4)


def test_the_same_seed_makes_the_same_text_from_the_prompt():
    go(TINY)
    flags = "--out_dir run --prompt 'the ' --n_tokens 40 --seed"
    first, again, other = [said(sample, f"{flags} {seed}")[0] for seed in (1, 1, 7)]
    assert first == again != other
    assert re.fullmatch("the .{40}\n", first, re.DOTALL)


def test_the_latest_run_is_taken():
    go(f"{TINY} --out_dir out/one")
    go(f"{TINY} --out_dir out/two")
    os.utime("out/one/ckpt.pt", (2e9, 2e9))
    assert said(sample, "--n_tokens 5")[1] == "out/one/best.pt: wav, 4 steps\n"


def test_a_reader_that_stops_early_ends_a_text_quietly(monkeypatch):
    go(TINY)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script = f"{SAMPLE_PY} --out_dir run --n_tokens 3 | head -c 0"
    done = subprocess.run(["bash", "-c", script], check=True, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "run/best.pt: wav, 4 steps\n"


def encode_list(tokens, vocab):
    ids = {token: i for i, token in enumerate(vocab)}
    return np.array([ids.get(token, -1) for token in tokens], np.int32)


def test_a_fork_to_bytes_is_three_functions_of_data(monkeypatch):
    Path("a.txt").write_text(TEXT + " naïve, 🦊" * 60, "utf-8")
    monkeypatch.setattr(data, "vocabulary", lambda text: set(text.encode()))
    monkeypatch.setattr(data, "encode", lambda text, vocab: encode_list(text.encode(), vocab))
    monkeypatch.setattr(data, "decode", lambda ids, vocab: bytes(vocab[i] for i in ids).decode())
    go(TINY)
    said(sample, f"{SAMPLE} --routing")
    refused(sample, f"{SAMPLE} --prompt 'naïve 0'", "the model never saw ['0']")
    spoken = torch.from_numpy(data.encode("ï, 🦊", read()["vocab"]))  # several bytes in a character
    monkeypatch.setattr(GPT, "stream", lambda *how: spoken.view(-1, 1, 1))
    assert said(sample, f"{SAMPLE} --prompt '🦊 '")[0] == "🦊 ï, 🦊\n"


def test_a_fork_to_words_is_these_functions(monkeypatch):
    Path("a.txt").write_text(f"{TEXT}end")
    Path("a_valid.txt").write_text(f"begin {TEXT}")
    monkeypatch.setattr(data, "vocabulary", lambda text: set(text.split()))
    monkeypatch.setattr(data, "encode", lambda text, vocab: encode_list(text.split(), vocab))
    monkeypatch.setattr(data, "decode", lambda ids, vocab: " ".join(vocab[i] for i in ids))
    go(TINY)
    assert {"end", "begin"} < {*read()["vocab"]}  # not as one word, where the two parts meet
    text = said(sample, f"{SAMPLE} --prompt 'quick brown'")[0]
    assert text.startswith("quick brown ") and {*text.split()} < {*read()["vocab"]}
    refused(sample, f"{SAMPLE} --prompt 'quick cat'", "the model never saw")


# ----------------------------------------------------------------------------------------------
# The map


@pytest.mark.parametrize("residual, n_layer", [("wav", 4), ("wav", 12), ("attnres", 48)])
def test_the_map_has_a_row_for_each_reader_and_at_12_layers_80_columns(capsys, residual, n_layer):
    model = GPT(GPTConfig(29, n_ctx=2, n_layer=n_layer, n_head=2, n_embd=4, residual=residual))
    weights, names = sample.mean_routing(model, torch.zeros(1, 2).long())
    sample.print_map(weights.tolist(), names)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= max(80, 10 + len(names))
    rows = lines[-2 * n_layer - 1 :]
    readers = [f"{kind} {i + 1}" for i in range(n_layer) for kind in ("att", "MLP")]
    assert [row[:10].strip() for row in rows] == [*readers, "output"]
    for row in rows if residual == "wav" else ():
        percents = [int(n) for n in re.findall(r"\d+", row[10:])]
        assert sum(percents) == pytest.approx(100, abs=len(percents) / 2)


@pytest.mark.parametrize("n", [4, 60])
def test_a_small_weight_is_seen_in_the_map_and_an_absent_source_is_blank(capsys, n):
    sample.print_map([[100] + [0] * (n - 1), [0.01] * n], ["x0", *["sum 1"] * (n - 1)])
    first, last = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch("att 1     (100|█)", first)
    assert last.startswith("output    ") and last.count("·") == n


def test_the_map_is_the_mean_over_windows_taken_one_by_one(monkeypatch):
    model = tiny_model().eval()
    x = torch.arange(96).view(6, 16) % 29
    expected = 100 * model.routing(x)[0].mean((2, 3))
    kinds = kinds_of(model, x)
    sizes, embed = [], model.embed.forward
    monkeypatch.setattr(model.embed, "forward", lambda idx: sizes.append(len(idx)) or embed(idx))
    torch.testing.assert_close(sample.mean_routing(model, x)[0], expected)
    sample.loss_without("x0", kinds, model, x, x)
    assert sizes == [1] * 12


def kinds_of(model, x):
    """The kinds of all sources, in order."""
    return [name.split()[0] for name in model.routing(x)[1]]


KINDS = [("wav", kind) for kind in ("x0", "sum", "phase", "split")]
KINDS += [("block_attnres", "x0"), ("block_attnres", "sum")]
KINDS += [("attnres", "x0"), ("attnres", "update"), ("wav", None)]


@torch.no_grad()
@pytest.mark.parametrize("residual, kind", KINDS)
def test_what_a_kind_is_worth_is_the_loss_of_a_model_without_it(residual, kind):
    model = test_wav.make(residual)
    x = torch.arange(96).view(6, 16) % 20
    loss = model(x, x)[1].item()
    found = sample.loss_without(kind, kinds_of(model, x), model, x, x)
    logits, _ = test_wav.literal(model, x, hidden=kind)
    assert found == pytest.approx(F.cross_entropy(logits.flatten(0, 1), x.flatten()).item())
    assert (abs(found - loss) > 1e-4) == (kind is not None)
    assert model(x, x)[1].item() == loss  # nothing stays hidden


def test_the_map_says_what_each_kind_is_worth():
    go(f"{TINY} --learning_rate 0.1 --warmup_iters 1")
    out, _ = said(sample, f"{SAMPLE} --routing")
    model, checkpoint = sample.load_checkpoint("run/best.pt")
    x, y = sample.validation_windows(model, checkpoint)
    loss = model(x, y)[1].item()
    assert f"increase of the loss, {loss:.3f}, when hidden" in out
    percents = []
    for kind in ("x0", "sum", "phase", "split"):
        ((percent, rise),) = re.findall(rf"^{kind} +(\d+) % +([+-].*)$", out, re.MULTILINE)
        percents.append(int(percent))
        expected = sample.loss_without(kind, kinds_of(model, x), model, x, y) - loss
        assert float(rise) == pytest.approx(expected, abs=6e-4)
    assert min(percents) > 0  # the output's, which reads all kinds
    assert sum(percents) == pytest.approx(100, abs=2)


def test_a_narrow_encoding_shows_question_marks():
    go(TINY)
    assert "?" in said(sample, f"{SAMPLE} --routing", encoding="ascii")[0]


# ----------------------------------------------------------------------------------------------
# Texts


def test_pydoc_does_not_validate_on_what_it_trains_on():
    text, val = data.pydoc()
    seen = {text[i : i + 100] for i in range(len(text) - 99)}
    starts = range(len(val) - 99)
    assert sum(val[i : i + 100] in seen for i in starts) < 0.05 * len(starts)
    assert len(text) > 200_000
    assert len(val) == pytest.approx(len(text) / 9, rel=0.05)


def test_the_share_of_copied_validation_text_is_counted_and_said():
    assert data.load("a.txt").copied == 0
    assert "note: " not in said(train, f"{TINY} --out_dir other")[0]
    Path("a_valid.txt").write_text(TEXT[:500] + TEXT[:500].upper())
    assert 35 < data.load("a.txt").copied < 50
    assert "% of the validation text also occurs in the training text" in said(train, TINY)[0]


def test_ids_are_places_in_a_vocabulary_of_both_parts_and_minus_one_if_not_there():
    Path("a.txt").write_text("naïve 🦊\n", "utf-8")
    Path("a_valid.txt").write_text("nave? 🦊", "utf-8")
    text = data.load("a.txt")
    assert text.vocab == sorted(set("naïve 🦊\n?"))
    assert data.decode(text.train, text.vocab) == "naïve 🦊\n"
    assert data.decode(text.val, text.vocab) == "nave? 🦊"
    assert data.encode("b?a🦊", ["a", "b"]).tolist() == [1, -1, 0, -1]
    Path("a.txt").write_text("".join(map(chr, range(33, 633))), "utf-8")  # more than a byte holds
    Path("a_valid.txt").write_text("z")
    assert [*data.load("a.txt").train] == [*range(600)]


def test_a_text_is_split_at_its_last_tenth_or_has_its_validation_text_beside_it():
    cut = len(TEXT) * 9 // 10
    assert data.read("a.txt", None) == (TEXT[:cut], TEXT[cut:])
    Path("a.txt").write_text(TEXT, "utf-8-sig")  # with the mark that some editors put before a text
    Path("a_valid.txt").write_text("dog", "utf-8-sig")
    assert data.read("a.txt", None) == (TEXT, "dog")


def test_targets_are_the_inputs_one_later():
    x, y = data.windows(torch.arange(1000), 16, data.even_starts(1000, 16, 5))
    assert torch.equal(x + 1, y)
    assert (x.shape, x[0, 0], y[-1, -1]) == ((5, 16), 0, 999)  # from the first to the last token


def test_batches_depend_on_the_seed_and_the_step_alone():
    one = data.random_starts(1000, 16, (2, 3), 1, 5).tolist()
    assert one == data.random_starts(1000, 16, (2, 3), 1, 5).tolist()
    assert one != data.random_starts(1000, 16, (2, 3), 1, 6).tolist()
    assert one != data.random_starts(1000, 16, (2, 3), 2, 5).tolist()
    assert {*data.random_starts(18, 16, 1000, 1, 1)} == {0, 1}  # every window that fits


STORIES = ("Once upon a time… 🦊\n<|endoftext|>\n" * 40).encode()


class Server(http.server.BaseHTTPRequestHandler):
    takes_ranges = True
    missing = 0  # bytes that it promises and does not send

    def do_GET(self):
        part = self.headers["Range"] if self.takes_ranges else None
        content = STORIES
        if part:
            content = STORIES[: int(part.removeprefix("bytes=0-")) + 1]
        self.send_response(206 if part else 200)
        self.send_header("Content-Length", len(content) + self.missing)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    """A file on a server of our own."""
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/stories.txt"
        server.shutdown()


@pytest.mark.parametrize("first", [None, 100])
def test_a_download_is_what_was_asked_for_and_is_fetched_once(monkeypatch, url, first):
    path = data.download(url, Path("new/folder"), first)
    assert path.read_bytes() == STORIES[:first]
    assert [*path.parent.iterdir()] == [path]
    monkeypatch.delattr(data.urllib.request, "urlopen")
    assert data.download(url, Path("new/folder"), first) == path


FAULTS = [("missing", 9, None, "it ended early: try again")]
FAULTS += [("takes_ranges", False, 100, "sends the whole file instead of the part asked for")]


@pytest.mark.parametrize("name, value, first, words", FAULTS)
def test_a_download_that_goes_wrong_leaves_nothing(monkeypatch, url, name, value, first, words):
    monkeypatch.setattr(Server, name, value)
    with pytest.raises(wav.Refused, match=words):
        data.download(url, Path("new"), first)
    assert not [*Path("new").iterdir()]


def test_a_character_that_the_end_of_a_download_cuts_is_ignored():
    Path("data").mkdir()
    Path("data/TinyStories-train.txt").write_bytes("the fox 🦊".encode()[:-1])
    Path("data/TinyStories-valid.txt").write_text("dog")
    assert data.read("tinystories", Path("data")) == ("the fox ", "dog")
