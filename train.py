"""
Train a model on text, character by character.

    python train.py                                             # the documentation of Python, on a laptop
    python train.py --dataset stories.txt --residual standard   # your own text, another variant
    python train.py --resume                                    # go on where a run stopped
    torchrun --nproc_per_node=4 train.py --batch_size 64        # four GPUs

It reads in the order in which it runs: settings, device, data, model, loop, the closing lines.
"""

import argparse
import contextlib
import hashlib
import io
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from sample import load_checkpoint, raise_usage, run, write_sample
from wav import GPT, GPTConfig

LOG_HEADER = "step,train_loss,val_loss,learning_rate,chars_per_second,seconds\n"
# What a resumed run cannot change: the model, the data and their order.
FIXED = (
    *("dataset", "residual", "n_layer", "n_head", "n_embd", "n_ctx", "n_block", "detail_bias"),
    *("dropout", "batch_size", "grad_accum", "seed"),
)

# What a checkpoint holds beside the model, for a run to go on.
RESUMABLE = {
    "text": str,
    "optimizer": dict,
    "step": int,
    "elapsed": float,
    "best": float,
    "losses": torch.Tensor,
}


def flag(default, help, low=None, high=math.inf):
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Settings:
    """The defaults train on two CPU cores in about five minutes."""

    dataset: str = flag("pydoc", "pydoc, tinystories, text8 or the path of a text file")
    data_dir: str = flag("data", "where downloads are kept")
    out_dir: str = flag("", "where the run is kept (default: out/DATASET-RESIDUAL-LAYERSxWIDTH)")
    residual: str = flag("wav", "standard, attnres, block_attnres or wav")
    n_layer: int = flag(12, "layers; each is two sublayers, attention and MLP")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width of the residual stream")
    n_ctx: int = flag(128, "context, in characters")
    n_block: int = flag(4, "blocks that the layers are cut into")
    detail_bias: float = flag(-2.0, "where the logit bias of wav's details starts")
    dropout: float = flag(0.0, "dropout probability")
    batch_size: int = flag(
        16, "windows of n_ctx characters in a batch, over all processes", 1, 10**6
    )
    grad_accum: int = flag(1, "batches in a step", 1, 10**6)
    max_iters: int = flag(800, "steps", 1)
    learning_rate: float = flag(3e-3, "peak learning rate", 0, 1000)
    min_lr: float = flag(3e-4, "learning rate at the end of the cosine", 0, 1000)
    warmup_iters: int = flag(50, "steps of linear warm-up", 0)
    weight_decay: float = flag(0.1, "of matrices; vectors, queries and biases have none", 0, 1000)
    beta1: float = flag(0.9, "AdamW", 0, 0.9999)
    beta2: float = flag(0.95, "AdamW", 0, 0.9999)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 for no clipping", 0)
    eval_interval: int = flag(100, "steps between evaluations, which also save", 1)
    eval_batches: int = flag(20, "batches in an evaluation", 1, 10**6)
    seed: int = flag(1, "of initialisation, batches and dropout", 0, 2**63 - 1)
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")
    dtype: str = flag("auto", "float32 or bfloat16 (autocast); auto: bfloat16 where the GPU has it")
    compile: bool = flag(None, "torch.compile (default: on CUDA only)")
    resume: bool = flag(False, "go on from out_dir's last checkpoint")
    overwrite: bool = flag(False, "replace the run in out_dir")


def parse(argv=None):
    """The command line as a dict of the settings that it gives, and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = raise_usage
    for f in fields(Settings):
        default = "" if f.default in ("", None) else f" (default: {f.default})"
        how = {"type": f.type, "metavar": f.type.__name__}
        if f.type is bool:
            how = {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        text = f.metadata["help"] + default
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    return vars(parser.parse_args(argv))


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def check(s):
    """Raise ValueError for the first setting that cannot work. GPTConfig checks the model's own."""
    for f in fields(Settings):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        if low is not None and not (low <= value <= high and value < math.inf):  # nan fails too
            upper = "" if high == math.inf else f" and at most {high:,}"
            raise ValueError(f"{f.name}={value} must be at least {low}{upper}")
    if s.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype={s.dtype!r} must be auto, float32 or bfloat16")


def pick_device(name, world):
    """The torch.device of this process, one of `world`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    if name == "auto":
        mps = torch.backends.mps.is_available() and world == 1
        name = "cuda" if gpus else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={name!r} must be auto, cpu, mps, cuda or cuda:N")
    if device.type == "mps" and (world > 1 or not torch.backends.mps.is_available()):
        raise ValueError(
            "device='mps' is not there, or not for several processes: try --device cpu"
        )
    if device.type != "cuda":
        return device
    if (device.index or 0) >= gpus:
        raise ValueError(f"device={name!r} is not there: {gpus} CUDA devices found")
    if world > 1 and device.index is not None:
        raise ValueError(f"device={name!r} is one GPU for {world} processes: say cuda")
    if local > gpus:
        raise ValueError(f"{local} processes for {gpus} GPUs: --nproc_per_node={gpus} at most")
    if local < gpus:
        say(f"using {local} of {gpus} GPUs: torchrun --nproc_per_node={gpus} uses them all")
    if world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def check_memory(s, config, device):
    """Raise ValueError for a run that cannot fit, by a lower bound, before anything is allocated."""
    D, n_sublayer = config.n_embd, 2 * config.n_layer
    weights = 12 * D * D * config.n_layer + 2 * D * config.vocab_size
    positions = s.batch_size * s.n_ctx
    # Weight, gradient and two moments; each sublayer's update and norm; ids and logits; fp32.
    need = 16 * weights + 4 * positions * (2 * n_sublayer * D + config.vocab_size + 4)
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if need > have:
        raise ValueError(
            f"n_layer={s.n_layer}, n_embd={s.n_embd}, n_ctx={s.n_ctx}, batch_size={s.batch_size} need "
            f"{need / 1e9:,.0f} GB or more, {device} has {have / 1e9:,.0f}: make one of them smaller"
        )


def learning_rate(s, step):
    """Linear warm-up, then a cosine from learning_rate to min_lr at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (s.learning_rate - s.min_lr)


def write_whole(path, content):
    """Write bytes under a temporary name, flush them to disk and move them into place."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def peak_memory(device):
    """Peak memory of this process in MB: the device's on CUDA, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows has none
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def main(argv=None):
    # ----------------------------------------------------------------------------------------------
    # Settings: the command line, over those of the checkpoint to resume, over the defaults.

    given = parse(argv)
    s = Settings(**given)
    s.out_dir = s.out_dir or f"out/{Path(s.dataset).stem}-{s.residual}-{s.n_layer}x{s.n_embd}"
    out_dir, checkpoint = Path(s.out_dir), None
    if s.resume:
        if not (out_dir / "ckpt.pt").exists():
            raise ValueError(f"nothing to resume in {out_dir}: no ckpt.pt there")
        model, checkpoint = load_checkpoint(out_dir / "ckpt.pt")
        for name, kind in RESUMABLE.items():
            if type(checkpoint.get(name)) is not kind:
                raise ValueError(f"{out_dir / 'ckpt.pt'} cannot be resumed: no whole {name} in it")
        before = checkpoint["settings"]
        for name in FIXED:
            if given.get(name, before[name]) != before[name]:
                raise ValueError(
                    f"{name}={given[name]!r} contradicts the checkpoint's {before[name]!r}: "
                    "leave it out, or start another run with --out_dir"
                )
        s = Settings(**{**before, **given, "out_dir": s.out_dir})
        if checkpoint["step"] >= s.max_iters:
            raise ValueError(
                f"{out_dir} has done {checkpoint['step']:,} steps: give a larger --max_iters"
            )
    elif not s.overwrite and (out_dir / "ckpt.pt").exists():
        raise ValueError(
            f"{out_dir} holds a run: --resume goes on with it, --out_dir starts another, "
            "--overwrite replaces it"
        )
    check(s)

    # ----------------------------------------------------------------------------------------------
    # Device and processes. Under torchrun, each process takes its share of every batch.

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = rank == 0  # the process that evaluates, logs and writes
    if s.batch_size % world:
        raise ValueError(f"batch_size={s.batch_size} must be divisible by the {world} processes")
    device = pick_device(s.device, world)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")  # for words between hosts, off the GPU
    on_cuda = device.type == "cuda"
    dtype = s.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_cuda and torch.cuda.is_bf16_supported() else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU

    # ----------------------------------------------------------------------------------------------
    # Data

    if not first:
        dist.barrier(control)  # the first process downloads, the others find the files
    train_ids, val_ids, chars = data.load(s.dataset, s.data_dir)
    if first and world > 1:
        dist.barrier(control)
    for part, ids in (("training", train_ids), ("validation", val_ids)):
        if len(ids) < s.n_ctx + 2:
            raise ValueError(
                f"the {part} text has {len(ids):,} characters: n_ctx={s.n_ctx} needs {s.n_ctx + 2:,}"
            )
    digest = hashlib.sha256("".join(chars).encode())
    digest.update(train_ids)
    digest.update(val_ids)
    text = digest.hexdigest()
    if checkpoint and checkpoint["text"] != text:
        raise ValueError(
            f"dataset={s.dataset!r} is not the text that the checkpoint was trained on"
        )
    train_ids, val_ids = data.to_device(train_ids, device), data.to_device(val_ids, device)
    val_starts = data.even_starts(val_ids, s.n_ctx, s.eval_batches * s.batch_size)

    # ----------------------------------------------------------------------------------------------
    # Model and optimiser

    names = {f.name for f in fields(GPTConfig)} & {f.name for f in fields(Settings)}
    config = GPTConfig(len(chars), **{name: getattr(s, name) for name in names})
    check_memory(s, config, device)
    torch.manual_seed(s.seed)
    if not checkpoint:
        model = GPT(config)
    model.to(device).train()
    compiled = on_cuda if s.compile is None else s.compile
    if compiled:
        began = time.perf_counter()
        model.compile()
        try:  # one batch through all that is to be compiled, with and without gradients
            evaluate(model, val_ids, val_starts[None, : s.batch_size // world], s, autocast)
            x, y = data.windows(val_ids, s.n_ctx, val_starts[: s.batch_size // world])
            with autocast:
                model(x, y)[1].backward()
            say(f"compiled in {time.perf_counter() - began:.0f} s")
        except Exception as error:  # noqa: BLE001 (whatever the compiler raises)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"torch.compile failed ({reason}): going on without it")
            plain = GPT(config).to(device).train()
            plain.load_state_dict(model.state_dict())
            model = plain
        model.zero_grad()
    matrices = [p for name, p in model.named_parameters() if name.endswith("weight")]
    vectors = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=(s.beta1, s.beta2),
        weight_decay=s.weight_decay,
        fused=device.type != "mps",
    )
    step, elapsed, best, losses = 0, 0.0, math.inf, []
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, decay in zip(optimizer.param_groups, (s.weight_decay, 0.0)):
            group.update(betas=(s.beta1, s.beta2), weight_decay=decay)
        step, elapsed, best = (checkpoint[name] for name in ("step", "elapsed", "best"))
        losses = list(checkpoint["losses"].to(device))
    network = model if world == 1 else DistributedDataParallel(model, broadcast_buffers=False)

    # ----------------------------------------------------------------------------------------------
    # The run's folder

    def save(*names):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(
                f"the weights are not finite after step {step}: try a lower --learning_rate or a "
                "longer --warmup_iters; the last checkpoint is as it was"
            )
        content = io.BytesIO()
        torch.save(
            {
                "config": asdict(config),
                "settings": asdict(s),
                "chars": chars,
                "text": text,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "elapsed": elapsed,
                "best": best,
                "losses": torch.tensor(losses),
            },
            content,
        )
        for name in names:
            write_whole(out_dir / name, content.getvalue())

    log = out_dir / "log.csv"
    if first:
        out_dir.mkdir(parents=True, exist_ok=True)
        rows = log.read_text().splitlines(keepends=True)[1:] if checkpoint else []
        if not checkpoint:
            for name in ("ckpt.pt", "best.pt"):
                (out_dir / name).unlink(missing_ok=True)
        # A row past the checkpoint, or half a row, was written by a step that will run again.
        rows = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
        write_whole(log, (LOG_HEADER + "".join(rows)).encode())

    # ----------------------------------------------------------------------------------------------
    # The loop. The loss of a step stays on the device until it is shown, so that nothing waits for it.

    def stop_later(number, frame):
        nonlocal stopped_by
        stopped_by = number

    stopped_by = 0
    handlers = {n: signal.signal(n, stop_later) for n in (signal.SIGINT, signal.SIGTERM)}
    n_params = sum(p.numel() for p in model.parameters())
    say(f"{s.residual}, {n_params:,} parameters, {dtype} on {device}, into {out_dir}/")
    chars_per_step = s.grad_accum * s.batch_size * s.n_ctx
    shown_val = ""  # the validation loss, once there is one
    bar = tqdm(total=s.max_iters, initial=step, disable=not first, unit="step")
    warm = min(step + 5, s.max_iters - 1)  # the first steps are slower: their speed does not count
    timed_step, timed_from = step, elapsed
    began = shown = time.perf_counter()  # elapsed counts the seconds of steps, and only of steps
    while step < s.max_iters and not stopped_by:
        if step == warm:
            if losses:
                losses[-1].item()  # wait for the device
            timed_step, timed_from = step, elapsed + time.perf_counter() - began
        lr = learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = data.random_starts(train_ids, s.n_ctx, s.grad_accum * s.batch_size, s.seed, step)
        torch.manual_seed(hash((s.seed, step, rank)))  # dropout is that of (seed, step) as well
        loss_of_step = 0.0
        for i, mine in enumerate(starts.reshape(s.grad_accum, world, -1)[:, rank]):
            x, y = data.windows(train_ids, s.n_ctx, mine)
            with contextlib.ExitStack() as stack:
                if world > 1 and i < s.grad_accum - 1:  # exchange gradients once a step
                    stack.enter_context(network.no_sync())
                with autocast:
                    loss = network(x, y)[1] / s.grad_accum
                loss.backward()
            loss_of_step = loss_of_step + loss.detach()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
        step += 1
        bar.update()

        if world > 1:  # a signal may reach one process a step before another
            word = torch.tensor(stopped_by)
            dist.all_reduce(word, dist.ReduceOp.MAX, control)
            stopped_by = word.item()
        due = step % s.eval_interval == 0 or step == s.max_iters
        if not (due or stopped_by or time.perf_counter() - shown > 0.5):
            continue
        train_loss = finite_mean(losses, step)
        now = shown = time.perf_counter()
        seconds = elapsed + now - began
        speed = (step - timed_step) * chars_per_step / (seconds - timed_from)
        loss = losses[-1].item()
        bar.set_postfix_str(f"loss {loss:.4f}{shown_val}, {speed:,.0f} chars/s")
        if not (due or stopped_by):
            continue
        elapsed = seconds
        if due:
            if world > 1:
                word = torch.tensor(train_loss / world)
                dist.all_reduce(word, dist.ReduceOp.SUM, control)
                train_loss = word.item()
            losses = []
            if first:
                starts = val_starts.reshape(-1, s.batch_size // world)
                val = finite_mean([evaluate(model, val_ids, starts, s, autocast)], step)
                shown_val = f", val {val:.4f}"
                bar.set_postfix_str(f"loss {loss:.4f}{shown_val}, {speed:,.0f} chars/s")
                with open(log, "a") as file:
                    file.write(
                        f"{step},{train_loss:.6f},{val:.6f},{lr:.6g},{speed:.0f},{elapsed:.1f}\n"
                    )
                improved = val < best
                best = min(val, best)
                save(*(["best.pt"] if improved else []), "ckpt.pt")
        elif first:
            save("ckpt.pt")
        began = time.perf_counter()
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if world > 1:
        dist.destroy_process_group()
    if not first:
        return
    if stopped_by and step < s.max_iters:
        say(
            f"stopped at step {step:,} and saved: the same command with --resume goes on from there"
        )
        sys.exit(128 + stopped_by)

    # ----------------------------------------------------------------------------------------------
    # The closing lines

    print(
        f"best validation loss {best:.4f} nats ({best / math.log(2):.4f} bits) per character; "
        f"{speed:,.0f} characters/s; {elapsed:,.0f} s of training; "
        f"peak memory {peak_memory(device):,.0f} MB"
    )
    model, _ = load_checkpoint(out_dir / "best.pt", device)
    torch.manual_seed(s.seed)
    write_sample(model, chars, "", 300)


@torch.no_grad()
def evaluate(model, ids, starts, s, autocast):
    """Mean loss, in nats per character, over the windows at starts (n, batch)."""
    model.eval()
    with autocast:
        losses = [model(*data.windows(ids, s.n_ctx, batch))[1] for batch in starts]
    model.train()
    return torch.stack(losses).mean()


def finite_mean(losses, step):
    """The mean of the losses of the steps up to `step`; FloatingPointError if one is not finite."""
    losses = torch.stack(losses)
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        at = step - len(losses) + bad[0].item() + 1
        raise FloatingPointError(
            f"the loss is not finite at step {at}: try a lower --learning_rate or a longer "
            "--warmup_iters; the last checkpoint is as it was"
        )
    return losses.mean().item()


def say(message):
    """Print for all processes at once: the first speaks."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
