"""
What the tests of the scripts stand on: a tiny run, a process of its own, n CUDA devices, a server.
"""

import contextlib
import gc
import http.server
import io
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share two cores

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import data
import sample
import train
import wav
from sample import run
from wav import GPT, GPTConfig

signal.signal(SIGINT, signal.default_int_handler)  # a shell's & and nohup leave them ignored
signal.signal(SIGHUP, signal.SIG_DFL)
CPU = torch.device("cpu")
TEXT = "the quick brown fox jumps over the lazy dog\n" * 60
ANYWHERE = "--dataset a.txt --out_dir run --n_layer 4 --n_block 2 --n_embd 16 --n_head 2 --n_ctx 16"
ANYWHERE = f"{ANYWHERE} --batch_size 4 --eval_batches 2 --max_iters 4 --eval_interval 2".split()
TINY, SMALL = [*ANYWHERE, "--device", "cpu"], ["--n_layer", "2", "--n_block", "1"]
SAMPLE, RESUME = ["--out_dir", "run", "--n_chars", "5"], ["--out_dir", "run", "--resume"]
FILES = {"best.pt", "ckpt.pt", "log.csv"}
MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("Unable to allocate 9 GiB")]
MEMORY += [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]

many = settings(max_examples=100, deadline=None, derandomize=True)
odd_text = st.text("ab\r\n\ufeff\0🦊", max_size=60)
some_bytes = st.one_of(st.binary(max_size=60), (st.text(max_size=60) | odd_text).map(str.encode))
names = st.sampled_from([f"--{f.name}" for f in fields(train.Settings)])
odd = st.sampled_from(["", "wav", "pydoc", "true", "False", "-", "--", "nan", "1e9", "9" * 5000])
values = st.one_of(st.integers(-3, 300).map(str), st.floats().map(str), odd, st.text(max_size=8))
command_lines = st.lists(st.one_of(names, values), max_size=8)

# --------------------------------------------------------------------------------------------------
# Helpers: a tiny run, what it says and leaves, a process of its own


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with a text in it; what a run changes in this process is put back. The
    sample that ends a run is short, to save time."""

    def short(*args, n_chars=None, **how):
        return write_sample(*args, **how) if n_chars is None else write_sample(*args, n_chars=2)

    write_sample = sample.write_sample
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "write_sample", short)
    for name in ("mix", "merge", "offer_at_once"):
        monkeypatch.setattr(wav, name, getattr(wav, name))
    Path("a.txt").write_text(TEXT)
    before = {n: signal.getsignal(n) for n in (SIGINT, SIGTERM, SIGHUP)}
    yield monkeypatch
    torch.compiler.set_stance("default")
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        Path("a.txt").write_text(TEXT)
        assert run(train.main, TINY) == 0
        return files_in("run")


@pytest.fixture
def finished(home, trained):
    """A working directory with a text and, in run/, a finished run on it."""
    Path("run").mkdir()
    for name, content in trained.items():
        Path("run", name).write_bytes(content)
    return home


class Screen(io.StringIO):
    def isatty(self):
        return True


def said(main, *argv, code=0, tty=False):
    """What main says on stdout and on stderr; its status is `code`."""
    out, error = io.StringIO(), Screen() if tty else io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert run(main, argv) == code, error.getvalue()
    return out.getvalue(), error.getvalue()


def refused(main, argv, *words):
    """main refuses argv: status 2, nothing of a sample, and one line that names each of words."""
    out, error = said(main, *argv, code=2)
    line = error.removeprefix("run/best.pt: wav 4x16\n")
    assert line.startswith("error: ") and line.count("\n") == 1, error
    assert all(word in line for word in words) and (main is train.main or not out), line


def load(argv):
    return data.load(*argv) and 0


def files_in(folder):
    """The content of every file, by its path inside the folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def log_rows(folder="run"):
    log = Path(folder, "log.csv")
    return [row.split(",") for row in log.read_text().splitlines()[1:]] if log.exists() else []


def steps():
    return [int(row[0]) for row in log_rows()]


def read(name="run/ckpt.pt"):
    return torch.load(name, weights_only=True)


def now():
    return read()["progress"]["step"]


def stop_at(patch, step, do=lambda: signal.raise_signal(SIGTERM)):
    """As the batch after `step` steps is drawn, a signal (the checkpoint is of step + 1), or do()."""
    starts = data.random_starts
    ask = lambda *args: (args[-1] == step and do(), starts(*args))[1]
    patch.setattr(data, "random_starts", ask)


def decoded(ids, chars):
    return "".join(chars[i] for i in ids)


class Killed(BaseException):
    """As kill -9: no handler for errors runs."""


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


def tampered(place, value, legacy=False):
    """Both checkpoints with another value, or none (GONE), at a place such as "config n_layer"."""
    whole = {"": read()}
    (*path, last), inner = ["", *(int(x) if x.isdigit() else x for x in place.split())], whole
    for key in path:
        inner = inner[key]
    inner[last] = value(whole[""]) if callable(value) else value
    if value is GONE:
        del inner[last]
    for name in ("best.pt", "ckpt.pt"):
        torch.save(whole[""], f"run/{name}", _use_new_zipfile_serialization=not legacy)


def stretched(content):
    """The shapes that the config claims, but every element the same four bytes."""
    content["config"]["n_embd"] = 2**14
    with torch.device("meta"):
        wide = GPT(GPTConfig(**content["config"])).state_dict()
    return {name: torch.zeros(1).expand(w.shape) for name, w in wide.items()}


def stretched_moments(content):
    """Of the right shape, but every element the same four bytes."""
    return torch.zeros(1).expand(content["optimizer"]["state"][0]["exp_avg"].shape)


def GONE(content):
    pass


def wait_for(condition):
    patience = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.005)


def held(module, name, ignored=()):
    """Calls of this function wait for a file "go". Signals are ignored, as by nohup."""

    def wait(*args):
        Path(f"{os.getpid()}.held").touch()
        wait_for(lambda: os.path.exists("go"))
        return original(*args)

    original = getattr(sys.modules[module], name)
    setattr(sys.modules[module], name, wait)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def as_process(rank, port):
    """This process becomes number `rank` of two, as torchrun would start them."""
    host = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": "2"}
    os.environ.update(host, RANK=rank, LOCAL_RANK=rank)

    def destroy():  # a wrapper that outlives its process group may wait for itself
        assert not [x for x in gc.get_objects() if type(x) is DistributedDataParallel]
        original()

    original, dist.destroy_process_group = dist.destroy_process_group, destroy


def pair(start, argv):
    """The exit statuses of two processes that train together. What each says is in RANK.1, .2."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [start(argv, rank, as_process, rank, port) for rank in "01"]
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def in_child(name, argv, prepare, *args):
    for fd in (1, 2):
        os.dup2(os.open(f"{name}.{fd}", os.O_WRONLY | os.O_CREAT), fd)
    prepare(*args)
    sys.exit(run(train.main, argv))


@pytest.fixture
def start(home):
    """start(argv, name, prepare, ...) starts train.py in a process of its own, forked where torch
    is loaded, after prepare(...). What it says is in the files NAME.1 and NAME.2."""

    def start(argv, name="a", prepare=int, *args):
        processes.append(forks.Process(target=in_child, args=(name, argv, prepare, *args)))
        processes[-1].start()
        return processes[-1]

    processes, forks = [], multiprocessing.get_context("forkserver")
    home.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")
    forks.set_forkserver_preload(["conftest", "torch._dynamo"])
    yield start
    for process in processes:
        process.kill()


def python(code, *argv, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def torchrun(script, *argv):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launcher, HERE / script, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def limited_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = 2**34 if before[1] == resource.RLIM_INFINITY else min(2**34, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --------------------------------------------------------------------------------------------------
# As on CUDA


class Cuda(TorchFunctionMode):
    """As on n CUDA devices. Tensors stay in the memory of the CPU, but each knows where it would be:
    it answers .device so, and meets no tensor of another device."""

    def __init__(self, n):
        super().__init__()
        self.n, self.current = n, None
        self.compiled, self.copies, self.dtypes, self.autocast = [], [], set(), set()
        self.on, self.pinned = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def index(self, device):
        """The number of a device, as torch.cuda's own functions find it. Raises ValueError."""
        i = torch.cuda._utils._get_device_index(device)
        assert 0 <= i < self.n, "CUDA error: invalid device ordinal"
        return i

    def device(self, x):
        """The torch.device that x names; None where it names none."""
        if isinstance(x, torch.device) or isinstance(x, str) and x.startswith("cuda"):
            x = torch.device(f"cuda:{self.current or 0}" if str(x) == "cuda" else x)
            return torch.device("cuda", self.index(x)) if x.type == "cuda" else x

    def real(self, x):
        return CPU if (device := self.device(x)) and device.type == "cuda" else x

    def where(self, tensor):
        return self.on.get(tensor, tensor.device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return self.where(args[0])
        if func.__name__ in ("device", "_parse_to", "_has_compatible_shallow_copy_type"):
            return func(*args, **kwargs)
        if func == torch.Tensor.data.__set__:  # so a module moves its parameters
            self.on[args[0]] = self.where(args[1])
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            args, func = (args[0], torch.device(func.__name__)), torch.Tensor.to
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        strict = func is torch.stack  # elsewhere, a CPU scalar goes with all
        places = {self.where(x) for x in given if x.dim() or strict or self.where(x) != CPU}
        if func is torch.Tensor.pin_memory:
            assert places == {CPU}, "only dense CPU tensors can be pinned"
            self.pinned[copy := args[0].clone()] = True
            return copy
        copies = func in (torch.Tensor.to, torch.Tensor.copy_)
        assert copies or len(places) < 2, f"{func.__name__}: expected all tensors on one device"
        place = [*filter(None, map(self.device, (*args, *kwargs.values()))), *places, CPU][0]
        result = func(*map(self.real, args), **{k: self.real(x) for k, x in kwargs.items()})
        if func is torch.Tensor.to and place != self.where(args[0]):
            self.copies.append(
                (result.dtype, args[0] in self.pinned and kwargs.get("non_blocking"))
            )
            result = result.clone()
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not any(x is y for y in given):
                self.dtypes |= {x.dtype} if func is F.linear else set()
                self.on.update([(x, place)] if place.type == "cuda" else [])
        return result


@contextlib.contextmanager
def cuda(n, native=True):
    """Inside, torch.cuda answers as with n devices; `native`: they compute in bf16 themselves."""
    seen, autocast, init = Cuda(n), torch.autocast, dist.init_process_group
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def bf16(including_emulation=True):
        return including_emulation or native

    def cast(kind, dtype, enabled):
        seen.autocast.add(kind)
        return autocast("cpu", dtype, enabled=enabled)

    with pytest.MonkeyPatch.context() as patch, seen:
        patch.setattr(torch.cuda, "is_available", lambda: n > 0)
        patch.setattr(torch.cuda, "device_count", lambda: n)
        patch.setattr(torch.cuda, "set_device", lambda i: setattr(seen, "current", seen.index(i)))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda i: 1e6 * (1234 + seen.index(i)))
        patch.setattr(torch.cuda, "is_bf16_supported", bf16)
        patch.setattr(torch, "autocast", cast)
        patch.setattr(torch, "is_autocast_enabled", lambda kind: enabled("cpu"))
        patch.setattr(torch, "get_autocast_dtype", lambda kind: dtype("cpu"))
        patch.setattr(torch, "compile", lambda f: seen.compiled.append(f.__name__) or f)
        patch.setattr(torch.nn.Module, "compile", lambda m: seen.compiled.append(type(m).__name__))
        patch.setattr(dist, "init_process_group", lambda b: init({"nccl": "gloo"}[b] if n else b))
        yield seen


# --------------------------------------------------------------------------------------------------
# A server that may misbehave

STORIES = ("Once upon a time… “hello”, said the fox. 🦊\n<|endoftext|>\n" * 40).encode()
OK = "HTTP/1.0 {status} OK\r\nContent-Length: {length}"


@pytest.fixture
def serve(home):
    """serve() points data at a server on 127.0.0.1, which answers each request with `head` and what
    it asks for of `body`, and hangs up after `hang` seconds. Returns the list of the requests."""

    def start(body=STORIES, head=OK, first=1000, ranges=True, hang=0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted, status, content = self.headers["Range"], 200, body
                requests.append((self.path, wanted))
                if wanted and ranges:
                    status, content = 206, body[: int(wanted.removeprefix("bytes=0-")) + 1]
                lines = head.format(status=status, length=len(content)) + "\r\n\r\n"
                with contextlib.suppress(OSError):
                    self.wfile.write(lines.encode() + content)
                time.sleep(hang)

        requests, server = [], http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url, _ = f"http://127.0.0.1:{server.server_port}/", servers.append(server)
        for name in ("TINYSTORIES_URL", "TEXT8_URL"):
            home.setattr(data, name, url)
        home.setattr(data, "TINYSTORIES_BYTES", first)
        home.setattr(data, "TIMEOUT", 0.3)
        return requests

    servers = []
    home.setenv("no_proxy", "*")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def zipped(members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in members.items():
            z.writestr(name, text)
    return content.getvalue()
