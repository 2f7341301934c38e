"""
Train a model on text, character by character.

    python train.py                                            # the documentation of Python
    python train.py --dataset stories.txt --residual standard  # your own text, another variant
    python train.py --resume                                   # go on where a run stopped
    torchrun --nproc_per_node=4 train.py --batch_size 64       # four GPUs
"""

import argparse
import contextlib
import hashlib
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import sample
import wav
from wav import GPT, RESIDUALS, GPTConfig, require

FILES = ("best.pt", "ckpt.pt", "log.csv")
LOG_HEADER = "step,train_loss,val_loss,learning_rate,chars_per_second,seconds\n"
HELD = "{} holds a run: --resume goes on with it, --out_dir starts another, --overwrite replaces it"


def flag(default, help, low=None, high=math.inf, choices=None):
    return field(default=default, metadata={"help": help, "span": (low, high), "choices": choices})


@dataclass
class Settings:  # the defaults train on two CPU cores in about five minutes
    dataset: str = flag("pydoc", "pydoc, tinystories, text8 or the path of a text file")
    data_dir: str = flag("data", "where downloads are kept")
    out_dir: str = flag("", "where the run is kept (default: out/DATASET-RESIDUAL-LAYERSxWIDTH)")
    residual: str = flag("wav", "what a sublayer reads", choices=RESIDUALS)
    n_layer: int = flag(12, "layers; each is two sublayers, attention and MLP")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width of the residual stream")
    n_ctx: int = flag(128, "context, in characters")
    n_block: int = flag(None, "blocks that the layers are cut into (default: about 8)")
    detail_bias: float = flag(-2.0, "where the logit bias of wav's details starts")
    dropout: float = flag(0.0, "dropout probability")
    batch_size: int = flag(16, "windows of n_ctx characters, over all processes", 1, 10**6)
    grad_accum: int = flag(1, "batches in a step", 1, 10**6)
    max_iters: int = flag(800, "steps", 1, 10**9)
    learning_rate: float = flag(3e-3, "peak learning rate", 0, 1000)
    min_lr: float = flag(3e-4, "learning rate at the end of the cosine", 0, 1000)
    warmup_iters: int = flag(50, "steps of linear warm-up", 0, 10**9)
    weight_decay: float = flag(0.1, "of matrices; vectors, queries and biases have none", 0, 1000)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 for no clipping", 0)
    eval_interval: int = flag(100, "steps between evaluations, which also save", 1, 10**9)
    eval_batches: int = flag(20, "batches in an evaluation", 1, 10**6)
    seed: int = flag(1, "of initialisation, batches and dropout", 0, 2**63 - 1)
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")
    dtype: str = flag("auto", "auto is bf16 where native", choices=("auto", "float32", "bfloat16"))
    compile: bool = flag(None, "torch.compile (default: on CUDA)")
    resume: bool = flag(False, "go on from out_dir's last checkpoint")
    overwrite: bool = flag(False, "replace the run in out_dir")


MODEL = [f.name for f in fields(GPTConfig) if f.name != "vocab_size"]  # what GPTConfig takes
FIXED = (*MODEL, "batch_size", "grad_accum", "eval_batches", "seed")  # by --resume


@dataclass
class Progress:
    """All that the loop changes beside model and optimiser. A checkpoint holds it as it is."""

    step: int = 0
    seconds: float = 0.0  # of training steps alone
    best: float = math.inf  # validation loss, in nats per character
    evaluated: tuple = (-1, 0.0)  # step and seconds of the last evaluation; -1: none yet
    lr: float = 0.0  # of the last step
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # their sum since then
    log: list = field(default_factory=lambda: [LOG_HEADER])  # log.csv, row by row


def main(argv=None):
    s, model, checkpoint, ours = read_settings(argv)
    out_dir = Path(s.out_dir)

    # Device and processes. Under torchrun each process takes its share of every batch.
    variables = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    rank, local, world = (int(os.environ.get(name) or default) for name, default in variables)
    require(s.batch_size % world == 0, f"batch_size={s.batch_size} needs {world} equal shares")
    device = data.pick_device(s.device, local, world)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # Text. The first process of each host downloads, the others then find the files.
    if local > 0:
        dist.barrier()
    try:
        train_ids, val_ids, chars = data.load(s.dataset, s.data_dir)
    finally:  # after an error too: the others then meet it by themselves, and do not wait
        if world > 1 and local == 0:
            dist.barrier()
    sizes = f"{len(train_ids):,} characters to learn from, {len(val_ids):,} to validate"
    enough = min(len(train_ids), len(val_ids)) >= s.n_ctx + 2
    require(enough, f"{sizes}: n_ctx={s.n_ctx} needs {s.n_ctx + 2:,} of each")
    text = hashlib.sha256(b"".join(("".join(chars).encode(), train_ids, val_ids))).hexdigest()
    require(not checkpoint or checkpoint["text"] == text, f"{s.dataset!r} is not this run's text")
    train_ids, val_ids = data.to_device(train_ids, device), data.to_device(val_ids, device)
    shape = (s.eval_batches, world, s.batch_size // world)
    val_starts = data.to_device(data.even_starts(val_ids, s.n_ctx, shape)[:, rank], device)

    # Model, optimiser, precision
    config = GPTConfig(len(chars), **{name: getattr(s, name) for name in MODEL})
    torch.manual_seed(s.seed)
    model = (model or GPT(config)).to(device).train()
    optimizer = make_optimizer(s, model, device)
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if native else "float32"  # emulated: slow
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU
    name, n = f"{s.residual} {s.n_layer}x{s.n_embd}", sum(p.numel() for p in model.parameters())
    chars_per_step = s.grad_accum * s.batch_size * s.n_ctx
    say(f"{s.dataset}: {sizes}, a vocabulary of {len(chars):,}; {chars_per_step:,} a step")
    say(f"{name}, {s.n_block} blocks: {n:,} parameters, {dtype} on {device}, into {out_dir}/")

    # A first batch through everything: what cannot work shows before a folder is touched.
    compiled = device.type == "cuda" if s.compile is None else s.compile
    if compiled:
        compile_parts(model)
    network = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    network.broadcast_buffers = False  # for DDP: they are constants
    try:
        rehearse(network, model, optimizer, val_ids, val_starts[:1], s, autocast)
    except Exception as error:
        if not compiled or sample.out_of_memory(error):
            raise
        say(f"torch.compile failed ({' '.join(str(error).split())[:200]}): going on without it")
        torch.compiler.set_stance("force_eager")
        rehearse(network, model, optimizer, val_ids, val_starts[:1], s, autocast)
    now = checkpoint["progress"] if checkpoint else Progress()
    if checkpoint:
        say(f"going on from step {now.step:,}")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["moments"]})

    # The loop: figures, an evaluation and a checkpoint where they are due, first at step 0; then a
    # step. A loss stays on the device until it is shown, so that no step waits for it.
    began, ckpt = time.perf_counter(), out_dir / "ckpt.pt"
    bar = tqdm(total=s.max_iters, initial=now.step, unit="step", disable=True if rank else None)
    with stop_signals(world) as stop, bar:
        if rank == 0 and not checkpoint:
            claim(out_dir, s.overwrite)
        while True:
            step, (eval_step, then) = now.step, now.evaluated
            last = step >= s.max_iters or len(stop) > 0
            due = step != eval_step and (step % s.eval_interval == 0 or step == s.max_iters)
            if due or last or time.perf_counter() - began > 0.5:
                loss = finite(now.losses.to(device) / max(1, step - eval_step), "loss", step)
                now.seconds += time.perf_counter() - began
                speed = (step - max(0, eval_step)) * chars_per_step / max(1e-9, now.seconds - then)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} chars/s" if speed else "")
                files = [ckpt] if due or last else []
                if due:
                    losses = torch.stack([loss, evaluate(model, val_ids, val_starts, s, autocast)])
                    if world > 1:
                        dist.all_reduce(losses)
                    train, val = finite(losses / world, "loss", step).tolist()
                    line, row = f"val {val:.3f}", f",{val:.6f},,,0.0"
                    if step:  # before the first step there is no more to say
                        line = f"train {train:.3f}, {line}, {speed:,.0f} chars/s"
                        row = f"{train:.6f},{val:.6f},{now.lr:g},{speed:.0f},{now.seconds:.1f}"
                    say(f"step {step:,}: {line}")
                    now.log.append(f"{step},{row}\n")
                    if step and val < now.best:
                        files, now.best = [out_dir / "best.pt", *files], val
                    now.evaluated, now.losses = (step, now.seconds), torch.zeros_like(now.losses)
                if files and rank == 0:
                    on_disk = ckpt.read_bytes()[-999:] if ckpt.exists() else ours  # its checksums
                    require(on_disk == ours, f"another run writes into {out_dir}: this one ends")
                    finite(sum(p.sum() for p in model.parameters()), "weights", step)
                    rest = {"settings": asdict(s), "text": text, "progress": vars(now)}
                    rest["optimizer"] = optimizer.state_dict()
                    sample.save_checkpoint(files, model, chars, **rest)
                    sample.write_whole(out_dir / "log.csv", "".join(now.log).encode())
                    ours = ckpt.read_bytes()[-999:]
                began = time.perf_counter()
            if last:
                break
            for group in optimizer.param_groups:
                group["lr"] = now.lr = learning_rate(s, step)
            torch.manual_seed(hash((s.seed, step, rank)))  # a resumed step has the same dropout
            shape = (s.grad_accum, world, s.batch_size // world)
            starts = data.random_starts(train_ids, s.n_ctx, shape, s.seed, step)[:, rank]
            starts = data.to_device(starts, device)
            now.losses = now.losses + gradients(network, train_ids, starts, s, autocast)
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            now.step = step + 1
            bar.update()
    if world > 1:
        del network  # it holds the group too, and as its last holder could deadlock
        dist.destroy_process_group()
    if now.step < s.max_iters:
        say(f"stopped at step {now.step:,} and saved: the same command with --resume goes on")
        return 128 + stop[0]
    if rank == 0:
        bits, rate = now.best / math.log(2), now.step * chars_per_step / max(now.seconds, 1e-9)
        say(f"{name}: best validation loss {now.best:.4f} nats ({bits:.4f} bits) per character")
        say(f"{rate:,.0f} chars/s, {now.seconds:,.0f} s, peak memory {peak_memory(device):,.0f} MB")
        torch.compiler.set_stance("force_eager")  # text comes in other shapes
        torch.manual_seed(s.seed)
        model, _ = sample.load_checkpoint(sample.find_checkpoint(out_dir), device)
        sample.write_sample(model, chars, n_chars=300)


def read_settings(argv):
    """Command line over resumed run over defaults; that run's model, checkpoint, and its end."""
    given, model, checkpoint, ours = parse(argv), None, None, None
    s = Settings(**given)
    s.out_dir = s.out_dir or f"out/{Path(s.dataset).stem}-{s.residual}-{s.n_layer}x{s.n_embd}"
    path = Path(s.out_dir, "ckpt.pt")
    if s.resume:
        require(not s.overwrite, "--resume goes on with a run, --overwrite replaces it: give one")
        require(path.exists(), f"no ckpt.pt to resume in {s.out_dir}: --overwrite starts a run")
        ours = path.read_bytes()[-999:]
        model, checkpoint = sample.load_checkpoint(path)
        before = resumable(checkpoint, model, path)
        for name in FIXED:
            was, wanted = getattr(before, name), given.get(name, getattr(before, name))
            other = f"{name}={wanted!r} contradicts the checkpoint's {was!r}: leave it out, or"
            require(wanted == was, f"{other} start another run with --out_dir")
        s = Settings(**{**asdict(before), **given, "out_dir": s.out_dir})
        done = f"{s.out_dir} has done {checkpoint['progress'].step:,} steps"
        require(checkpoint["progress"].step < s.max_iters, f"{done}: give a larger --max_iters")
    elif not s.overwrite:
        require(not any(path.with_name(x).exists() for x in FILES), HELD.format(s.out_dir))
    for f in fields(s):
        value, (low, high) = getattr(s, f.name), f.metadata["span"]
        fits = low is None or low <= value <= high and value < math.inf  # nan fails too
        require(fits, f"{f.name}={value} must be at least {low} and at most {high:,}")
    s.n_block = GPTConfig(2, **{name: getattr(s, name) for name in MODEL}).n_block  # or refused
    return s, model, checkpoint, ours


def parse(argv):
    parser = sample.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in fields(Settings):
        choices = f.metadata["choices"]
        how = {"type": f.type, "choices": choices, "metavar": None if choices else f.type.__name__}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = f.metadata["help"] + f" (default: {f.default})" * bool(f.default)
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    return vars(parser.parse_args(argv))


def resumable(checkpoint, model, path):
    """A checkpoint's settings, the default for what it lacks; fills in its progress and moments."""
    try:
        before, now = Settings(**checkpoint["settings"]), Progress(**checkpoint["progress"])
        for part, f in [(x, f) for x in (before, now) for f in fields(x)]:
            value = getattr(part, f.name)
            same = getattr(model.config, f.name, value) == value  # some are in both
            require(same and type(value) in (f.type, type(f.default)), f"bad {f.name}")
        optimizer = make_optimizer(before, model, torch.device("cpu"))
        moments = checkpoint["moments"] = checkpoint["optimizer"]["state"]  # rates are the loop's
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        require(bool(optimizer.state) == (now.step > 0), "bad moments")
        for p, state in optimizer.state.items():  # a parameter without gradient has none
            shapes = {(x.shape, x.stride()) for x in (p, state["exp_avg"], state["exp_avg_sq"])}
            require(len(shapes) == 1 and float(state["step"]) > 0, "bad moments")
        _, _ = "".join(now.log).encode(), f"{now.losses:f}"  # these raise if they cannot
        _, _ = checkpoint["text"], sum(map(float, now.evaluated))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be resumed by this train.py: {error}") from None
    checkpoint["progress"] = now
    return before


def make_optimizer(s, model, device):
    """AdamW, at rates that the loop sets. Matrices decay; vectors, queries and biases do not."""
    groups = [{"params": [], "weight_decay": decay} for decay in (s.weight_decay, 0.0)]
    for name, p in model.named_parameters():
        groups[p.ndim < 2 or name in ("query", "detail_bias")]["params"].append(p)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type != "mps")


def learning_rate(s, step):
    """Linear warm-up, then a cosine from learning_rate to min_lr at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (s.learning_rate - s.min_lr)


def gradients(network, ids, starts, s, autocast):
    """Add up the gradients of the batches at starts (grad_accum, n). Returns their mean loss."""
    total = 0.0
    for i, batch in enumerate(starts):
        network.require_backward_grad_sync = i == len(starts) - 1  # processes exchange once a step
        with autocast:
            loss = network(*data.windows(ids, s.n_ctx, batch))[1] / len(starts)
        loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def evaluate(model, ids, starts, s, autocast):
    """Mean loss, in nats per character, over the windows at starts (eval_batches, n)."""
    model.eval()
    with autocast:
        losses = [model(*data.windows(ids, s.n_ctx, batch))[1] for batch in starts]
    model.train()
    return torch.stack(losses).mean()


def rehearse(network, model, optimizer, ids, starts, s, autocast):
    """An evaluation and a step at rate 0: memory is taken, code compiled, and nothing changed."""
    evaluate(model, ids, starts, s, autocast)
    gradients(network, ids, starts, s, autocast)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state.clear()


def compile_parts(model):
    """torch.compile what repeats: sublayers and mixing. The loop over depth stays Python: 48 layers
    are never unrolled, and a fork's own route runs as it is."""
    torch._dynamo.config.recompile_limit = 64  # attnres needs torch's own 8: leave room
    for name in ("mix", "merge", "offer_at_once"):
        setattr(wav, name, torch.compile(getattr(wav, name)))
    for sublayer in model.sublayers:
        sublayer.compile()


def finite(x, what, step):
    advice = "try a lower --learning_rate or a longer --warmup_iters; what is saved is whole"
    if not x.isfinite().all():
        raise FloatingPointError(f"{what} not finite at step {step:,}: {advice}")
    return x


def claim(out_dir, overwrite):
    """Make out_dir this run's: of two that start together, one creates the log (or saves first)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES if overwrite else ():
        (out_dir / name).unlink(missing_ok=True)
    try:
        open(out_dir / "log.csv", "x").close()
    except FileExistsError:
        raise ValueError(HELD.format(out_dir)) from None


@contextlib.contextmanager
def stop_signals(world):
    """Inside, the first signal that asks to stop goes into a list, the second ends the process."""
    asked, taken = [], []

    def ask(number, frame):
        asked.append(number)
        for n in taken:
            signal.signal(n, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; again to stop now\n")

    with contextlib.ExitStack() as undo:
        for name in ("SIGINT", "SIGTERM", "SIGHUP") if world == 1 else ():  # torchrun ends its own
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                taken.append(number)
                undo.callback(signal.signal, number, signal.signal(number, ask))
        yield asked


def say(line):
    """A line above the bar, from the first process. If its reader is gone (`| tee`), no matter."""
    if (os.environ.get("RANK") or "0") == "0":
        with contextlib.suppress(OSError), tqdm.external_write_mode():
            print(line, flush=True)


def peak_memory(device):
    """Peak memory of this process in MB: the device's on CUDA, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    sys.exit(sample.run(main))
