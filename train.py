"""
Train a model on text.

    python train.py                                            # Python's own help texts
    python train.py --dataset stories.txt --residual standard  # your own text, another variant
    python train.py --resume                                   # go on where a run stopped
    torchrun --nproc_per_node=4 train.py --batch_size 64       # four GPUs

A run is kept in a folder, out/DATASET-RESIDUAL-LAYERSxWIDTH unless --out_dir names another:

    ckpt.pt     the last state, where --resume goes on
    best.pt     the state with the lowest validation loss, which sample.py takes
    log.csv     a row for each evaluation
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import math
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import wav
from data import TOKEN
from wav import GPT, RESIDUALS, GPTConfig, Refused, require

# What --resume cannot change: the model, and what its batches and its evaluations are made of.
MODEL = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]
FIXED = [*MODEL, "batch_size", "grad_accum", "eval_windows", "seed"]


def make_parser():
    """The settings. Their defaults train on two older CPU cores in 12 minutes."""
    parser = Parser(
        description="Train a model on text.",
        usage="python train.py [--SETTING VALUE ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # The run
    add("--dataset", default="pydoc", help="pydoc, tinystories, text8 or the path of a text file")
    add("--data_dir", default="data", help="where downloads are kept")
    add("--out_dir", help="where the run is kept; None: out/DATASET-RESIDUAL-LAYERSxWIDTH")
    add("--resume", action="store_true", help="go on with the run in out_dir")
    add("--overwrite", action="store_true", help="replace the run in out_dir")
    # The model
    add("--residual", default="wav", choices=RESIDUALS, help="what a sublayer reads")
    add(
        "--n_layer", type=count, default=12, help="layers; each is two sublayers, attention and MLP"
    )
    add("--n_head", type=count, default=4, help="attention heads")
    add("--n_embd", type=count, default=128, help="width of the residual stream")
    add("--n_ctx", type=count, default=128, help=f"context, in {TOKEN}s")
    add("--n_block", type=int, help="blocks that the layers are cut into; None: about 8")
    add("--detail_bias", type=float, default=-2.0, help="where the bias of wav's details starts")
    add("--dropout", type=float, default=0.0, help="dropout probability")
    # The optimisation
    add("--batch_size", type=count, default=16, help=f"windows of n_ctx {TOKEN}s, in all processes")
    add("--grad_accum", type=count, default=1, help="batches in a step")
    add("--max_iters", type=count, default=800, help="steps")
    add("--learning_rate", type=amount, default=3e-3, help="peak learning rate")
    add("--min_lr", type=amount, help="where the cosine ends; None: a tenth of the peak")
    add("--warmup_iters", type=natural, default=50, help="steps of linear warm-up")
    add("--weight_decay", type=amount, default=0.1, help="of matrices, not of queries or biases")
    add("--grad_clip", type=amount, default=1.0, help="largest gradient norm; 0: any")
    add("--seed", type=natural, default=1, help="of initialisation, batches and dropout")
    # Evaluation
    add("--eval_interval", type=count, default=100, help="steps between evaluations")
    add("--eval_windows", type=count, default=320, help=f"windows of n_ctx {TOKEN}s in one")
    # The machine
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of products")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; None: on CUDA")
    return parser


def count(text, least=1):
    if not least <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, {least} to 10**9")
    return int(text)


def natural(text):
    return count(text, least=0)


def amount(text):
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number, 0 or more")
    return float(text)


def main(argv=None):
    args, checkpoint = read_settings(argv)
    out_dir = Path(args.out_dir)
    code = checksum_of_code()  # as it starts: an edit meanwhile does not reach this run

    # Processes and device. Under torchrun there are several, and each takes its share of a batch.
    rank, local_rank, world = read_processes()
    share = args.batch_size // world
    require(args.batch_size == share * world, f"batch_size={args.batch_size} / {world} processes")
    require(args.eval_windows >= world, f"eval_windows={args.eval_windows} for {world} processes")
    device = pick_device(args.device, local_rank)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # The text. The first process of a machine downloads, the others wait and find the files.
    if local_rank > 0:
        dist.barrier()
    text = data.load(args.dataset, args.data_dir, checkpoint["text"] if checkpoint else None)
    if local_rank == 0 and world > 1:
        dist.barrier()
    sizes = f"{len(text.train):,} {TOKEN}s to train on, {len(text.val):,} to validate on"
    enough = min(len(text.train), len(text.val)) >= args.n_ctx + 2
    require(enough, f"{sizes}: n_ctx={args.n_ctx} needs {args.n_ctx + 2:,} of each")
    train_ids = torch.from_numpy(text.train).to(device)
    val_ids = torch.from_numpy(text.val).to(device)

    # Every evaluation reads the same windows, spread evenly over the validation text.
    val_starts = data.even_starts(len(val_ids), args.n_ctx, args.eval_windows)[rank::world]
    val_x, val_y = data.windows(val_ids, args.n_ctx, val_starts)

    # The model and its optimiser
    chosen = {name: getattr(args, name) for name in MODEL if name in args}  # others: the default
    config = GPTConfig(vocab_size=len(text.vocab), **chosen)
    check_route(config)
    args.n_block = config.n_block  # None has become a number
    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, args)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]  # each group its own: the schedule multiplies it
    taken = {p for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in model.named_parameters() if p.requires_grad and p not in taken]
    require(not left, f"the optimiser leaves out {len(left)} weights: {left[:3]}")

    # Precision
    dtype = pick_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32

    name = f"{args.residual} {args.n_layer}x{args.n_embd}"
    blocks = ""
    if model.kinds and model.block_size > 1:
        blocks = f" in {args.n_block} block" + "s" * (args.n_block > 1)
    n_params = sum(p.numel() for p in model.parameters())
    tokens_per_step = args.grad_accum * args.batch_size * args.n_ctx
    say(f"{args.dataset}: {sizes}")
    say(f"{name}{blocks}: {n_params:,} parameters, a vocabulary of {len(text.vocab):,}")
    say(f"{dtype} on {device}, {tokens_per_step:,} {TOKEN}s a step")
    say(f"into {out_dir}/")
    for note in doubts(args, device):
        say(f"note: {note}")

    # torch.compile, on CUDA by itself, if Triton is there (it is not on Windows)
    use_compile = args.compile
    if use_compile is None:
        use_compile = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if use_compile:
        compile_parts(model)

    # A first batch goes through before a folder is touched. It compiles, shows what fails and what
    # an evaluation measures, and changes nothing: no step is taken.
    shape = (args.grad_accum, world, share)
    starts = data.random_starts(len(train_ids), args.n_ctx, shape, args.seed, 0)[:1, rank]
    add_gradients(model, *data.windows(train_ids, args.n_ctx, starts), autocast)
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    require(world == 1 or not idle, f"no gradient for {idle[:3]}: torchrun cannot train it")
    if idle:
        say(f"note: the first batch gives {len(idle)} weights no gradient: {idle[:3]}")
    model.zero_grad()
    figures = evaluate(model, val_x[:share], val_y[:share], share, autocast)
    columns = ["step", "train_loss", *figures, "learning_rate", f"{TOKEN}s_per_second", "seconds"]
    network = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    # What the loop changes; all of it is in a checkpoint.
    step = 0
    seconds = 0.0  # of training steps alone
    best = math.inf  # validation loss
    losses = torch.zeros((), device=device)  # the sum since the last evaluation
    log = []  # the rows of log.csv
    if checkpoint:
        step, seconds, best = checkpoint["step"], checkpoint["seconds"], checkpoint["best"]
        losses, log = checkpoint["losses"].to(device), checkpoint["log"]
        require([*log[0]] == columns, f"log.csv has {[*log[0]]}, this code {columns}")
        model.load_state_dict(checkpoint["model"])
        load_moments(model, optimizer, checkpoint)
        say(f"going on from step {step:,}")
    elif rank == 0:
        claim(out_dir, args.overwrite)

    stop = threading.Event()
    if world == 1:  # torchrun ends its processes itself
        catch_ctrl_c(stop)
    max_norm = args.grad_clip if args.grad_clip > 0 else math.inf
    evaluated = log[-1]["step"] if log else -1
    since, since_step = seconds, step  # the time and place from which speed is measured
    bar = tqdm(total=args.max_iters, initial=step, unit="step", disable=True if rank else None)

    while True:
        stopping = stop.is_set()
        due = step % args.eval_interval == 0 or step == args.max_iters
        due = due and step != evaluated  # not again where a run goes on
        improved = False

        # An evaluation, first of the untrained model. The bar's clock does not count it.
        if due:
            bar.set_postfix_str("validating...")
            figures = evaluate(model, val_x, val_y, share, autocast)
            check_finite(figures["val_loss"], step)
            row = dict.fromkeys(columns)
            row.update({name: round(float(figure), 6) for name, figure in figures.items()})
            row.update(step=step, seconds=round(seconds, 1))
            said = [f"{name.removesuffix('_loss')} {x:.3f}" for name, x in figures.items()]
            if step > 0:
                train_loss = mean_over_processes(losses).item() / (step - evaluated)
                row["train_loss"] = round(train_loss, 6)
                said = [f"train {train_loss:.3f}", *said]
                if step > since_step:  # else it goes on right here, perhaps under other settings
                    rate = args.learning_rate * schedule(args, step - 1)
                    row["learning_rate"] = float(f"{rate:.6g}")
                    speed = (step - since_step) * tokens_per_step / (seconds - since)
                    row[f"{TOKEN}s_per_second"] = round(speed)
                    said.append(f"{speed:,.0f} {TOKEN}s/s")
                improved = figures["val_loss"] < best
                best = min(best, figures["val_loss"])
            say(f"step {step:,}: {', '.join(said)}")
            log.append(row)
            losses.zero_()
            evaluated = step
            since, since_step = seconds, step
            bar.set_postfix_str("")
            bar.unpause()

        # A checkpoint
        if rank == 0 and (due or stopping):
            check_finite(sum(p.sum() for p in model.parameters()).item(), step)
            state = {
                "settings": vars(args),
                "config": asdict(model.config),
                "vocab": text.vocab,
                "text": text.checksum,
                "code": code,
                "model": model.state_dict(),
                "optimizer": type(optimizer).__name__,
                "moments": moments(model, optimizer),
                "step": step,
                "seconds": seconds,
                "best": best,
                "losses": losses,
                "log": log,
            }
            if improved:
                save(out_dir / "best.pt", state)
            save(out_dir / "ckpt.pt", state)
            write_log(out_dir / "log.csv", columns, log)
        if stopping or step == args.max_iters:
            break

        # One step. Batches and dropout depend on seed and step alone: so a resumed run is the
        # unbroken one.
        began = time.perf_counter()
        starts = data.random_starts(len(train_ids), args.n_ctx, shape, args.seed, step)
        x, y = data.windows(train_ids, args.n_ctx, starts[:, rank])
        torch.manual_seed(hash((args.seed, step, rank)))

        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(args, step)
        loss = add_gradients(network, x, y, autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        model.zero_grad()
        losses += loss
        step += 1
        bar.update()
        # A GPU runs behind Python, which waits for it only where a loss is looked at.
        if step % 10 == 0 or step % args.eval_interval == 0 or step == args.max_iters:
            bar.set_postfix_str(f"loss {check_finite(loss.item(), step):.3f}", refresh=False)
        seconds += time.perf_counter() - began

    bar.close()
    if world > 1:
        del network  # as the last to hold the process group, it could wait for ever
        dist.destroy_process_group()
    if step < args.max_iters:
        say(f"stopped at step {step:,} and saved: the same command with --resume goes on")
        if args.overwrite and not args.resume:
            say("(--resume in place of --overwrite)")
        say(f"meanwhile: python sample.py --out_dir {shlex.quote(out_dir.as_posix())}")
        return 130
    if rank == 0:
        speed = step * tokens_per_step / seconds
        say(f"{name}: best validation loss {best:.4f} nats per {TOKEN}")
        say(f"{seconds:,.0f} s of training steps, {speed:,.0f} {TOKEN}s/s")
        if device.type == "cuda":
            say(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e6:,.0f} MB")
        say("a sample:")
        say(some_text(model, text.vocab, out_dir))
        folder = shlex.quote(out_dir.as_posix())
        say(f"next: python sample.py --out_dir {folder}")
        if model.kinds:
            say(f"      python sample.py --out_dir {folder} --routing")


def read_settings(argv):
    """The settings of a run, and the checkpoint from which it goes on, if it does."""
    parser = make_parser()
    args = parser.parse_args(argv)
    out_dir = args.out_dir
    if out_dir is None:
        out_dir = f"out/{Path(args.dataset).stem}-{args.residual}-{args.n_layer}x{args.n_embd}"
    path = Path(out_dir, "ckpt.pt")
    checkpoint = None

    if args.resume:
        require(not args.overwrite, "--resume goes on with a run, --overwrite replaces it")
        require(path.exists(), f"there is no {path} to resume")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        note_other_code(checkpoint)
        # What the command line leaves out is as it was.
        before = checkpoint["settings"]
        parser.set_defaults(**before)
        args = parser.parse_args(argv)
        for name in FIXED:
            new = getattr(args, name, None)
            old = before.get(name, new)  # a fork's own setting is missing in older runs
            hint = "leave it out, or start another run with --out_dir"
            require(new == old, f"{name}={new} contradicts {old}, of the run in {out_dir}: {hint}")
        done = checkpoint["step"]
        require(done < args.max_iters, f"{out_dir} has done {done:,} steps: give more --max_iters")
    elif not args.overwrite:
        require(not path.exists(), HELD.format(out_dir))

    args.out_dir = out_dir
    above = f"min_lr={args.min_lr} is above learning_rate={args.learning_rate}"
    require(args.min_lr is None or args.min_lr <= args.learning_rate, above)
    return args, checkpoint


HELD = "{} holds a run: --resume goes on with it, --overwrite replaces it, --out_dir starts another"


def read_processes():
    """Number of this process, its number on this machine, and how many there are: by torchrun."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = [name for name in names if os.environ.get(name)]
    if not given:
        return 0, 0, 1
    require(len(given) == 3, f"{given} without the rest of {names}: torchrun sets all or none")
    values = [os.environ[name] for name in names]
    fits = all(value.isdecimal() for value in values) and int(values[0]) < int(values[2])
    fits = fits and (values[2] == "1" or "MASTER_ADDR" in os.environ)
    require(fits, f"{names} are {values}: these are no processes of torchrun")
    return tuple(int(value) for value in values)


def pick_device(name, local_rank=0):
    """The torch.device of this process, number local_rank of its machine."""
    n_gpu = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_gpu else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    there = ["cpu", *(["mps"] if mps else []), *(f"cuda:{i}" for i in range(n_gpu))]
    require(name in there, f"device={name!r} is not here: try auto or one of {', '.join(there)}")
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return torch.device(name)


def pick_dtype(name, device):
    """float32 or bfloat16; auto is bf16 where a GPU computes in it (older ones emulate it)."""
    if name != "auto":
        return name
    cuda = device.type == "cuda"
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def doubts(args, device):
    """What may make a run slow or a figure wrong."""
    if args.warmup_iters >= args.max_iters:
        yield f"{args.max_iters:,} steps end within warmup_iters={args.warmup_iters}, below the peak"
    if device.type == "cpu" and hasattr(os, "getloadavg") and torch.get_num_threads() > 1:
        load, cores = os.getloadavg()[0], os.cpu_count()
        if load > cores / 2:
            yield f"load {load:.1f} on {cores} cores: OMP_NUM_THREADS=1 may be much faster"


def make_optimizer(model, args):
    """AdamW. A group keeps a rate of its own: the schedule multiplies what it is given here.
    Matrices decay, by their names; queries, biases and whatever a fork calls otherwise do not."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if name.endswith(".weight") and p.ndim == 2:
            matrices.append(p)
        else:
            rest.append(p)
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(args, step):
    """The share of its peak that a rate has at a step: linear warm-up, then a cosine down to
    min_lr / learning_rate at max_iters."""
    if step < args.warmup_iters:
        return (step + 1) / args.warmup_iters
    floor = 0.1
    if args.min_lr is not None:
        floor = args.min_lr / max(args.learning_rate, 1e-30)
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def add_gradients(network, x, y, autocast):
    """Add up the gradients of the batches x, y (grad_accum, n, n_ctx). Returns their mean loss."""
    total = 0.0
    for i in range(len(x)):
        if isinstance(network, DistributedDataParallel):  # the processes exchange once a step
            network.require_backward_grad_sync = i == len(x) - 1
        with autocast:
            _, loss = network(x[i], y[i])
        loss = loss / len(x)
        loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def evaluate(model, x, y, batch_size, autocast):
    """What is measured on the validation windows x, y (n, n_ctx) of this process, as a dict; its
    names become columns of log.csv. val_loss is the mean over all windows, in nats per token."""
    model.eval()
    total = torch.zeros(2, device=x.device)
    for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
        with autocast:
            _, loss = model(xs, ys)
        total += torch.stack([loss * len(xs), torch.ones_like(loss) * len(xs)])
    model.train()
    loss, n_windows = (mean_over_processes(total)).tolist()
    return {"val_loss": loss / n_windows}


def mean_over_processes(x):
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)  # the sum
        x = x / dist.get_world_size()
    return x


def check_finite(x, step):
    """x, unless training has failed: then no good checkpoint is written over."""
    advice = "try a lower --learning_rate or a longer --warmup_iters"
    require(math.isfinite(x), f"loss or weights not finite at step {step:,}: {advice}")
    return x


def check_route(config):
    """Training runs GPT.route. Refused where that is not route_plain, which one reads and edits."""
    if config.residual in wav.KINDS:
        small = replace(config, vocab_size=65, n_ctx=16, n_embd=8 * config.n_head)
        apart = wav.fast_off_plain(GPT(small).double(), torch.arange(32).view(2, 16))
        cure = "edit route_fast too, or let GPT.route call self.route_plain"
        require(apart < 1e-9, f"GPT.route is {apart:.0e} off route_plain: {cure}")


def compile_parts(model):
    """torch.compile what repeats: sublayers and mixing. The loop over depth stays Python: 48 layers
    are never unrolled, and a fork's own route runs as it is."""
    torch._dynamo.config.recompile_limit = 64  # attnres needs torch's own 8: leave room
    for name in ("mix", "merge", "offer_at_once"):
        setattr(wav, name, torch.compile(getattr(wav, name)))
    for sublayer in model.sublayers:
        sublayer.compile()


def catch_ctrl_c(stop):
    """From now on Ctrl-C (or SIGTERM) only sets the event stop; a second one ends the process."""

    def handler(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # Ctrl-C has ended `| tee`, too
            os.write(2, b"\nstopping after this step; again to stop now\n")

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


# ----------------------------------------------------------------------------------------------
# The files of a run


def claim(out_dir, overwrite):
    """Make the folder of a new run. Of two that start at once, one gets it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in ("best.pt", "ckpt.pt", "log.csv"):
            (out_dir / name).unlink(missing_ok=True)
    held = any((out_dir / name).exists() for name in ("best.pt", "ckpt.pt"))
    require(not held, HELD.format(out_dir))
    try:
        open(out_dir / "log.csv", "x").close()
    except FileExistsError:
        raise Refused(HELD.format(out_dir)) from None


def save(path, state):
    """Write a checkpoint. It takes its place when it is whole: a crash leaves the last one."""
    part = path.with_name(path.name + ".part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where a disk is full
        part.unlink(missing_ok=True)
        raise Refused(f"cannot write {path}: {error}") from None


def write_log(path, columns, log):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


def moments(model, optimizer):
    """The state of any optimiser, by the names of the weights."""
    return {
        name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state
    }


def load_moments(model, optimizer, checkpoint):
    was, now = checkpoint["optimizer"], type(optimizer).__name__
    require(was == now, f"this run was trained by {was}: {now} cannot go on with its moments")
    in_order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {p: name for name, p in model.named_parameters()}
    kept = checkpoint["moments"]
    state = {i: kept[names[p]] for i, p in enumerate(in_order) if names[p] in kept}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def checksum_of_code():
    code = [Path(path).read_bytes() for path in (wav.__file__, __file__, data.__file__)]
    return hashlib.sha256(b"".join(code)).hexdigest()


def note_other_code(checkpoint):
    require("code" in checkpoint, "this run was made by an older train.py: start another")
    if checkpoint["code"] != checksum_of_code():
        note = "note: since this run was made, wav.py, train.py or data.py has changed"
        print(note, file=sys.stderr)  # not into a text that sample.py writes


# ----------------------------------------------------------------------------------------------
# What a person sees


def some_text(model, vocab, out_dir):
    """300 tokens by the best weights of a run."""
    torch.compiler.set_stance("force_eager")  # text comes in other shapes
    path = out_dir / "best.pt"
    if not path.exists():
        path = out_dir / "ckpt.pt"
    weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    model.load_state_dict(weights)
    line_end = data.encode("\n", vocab).clip(0)  # the first token, where none is a line end
    start = torch.from_numpy(line_end)[None].long().to(model.head.weight.device)
    ids = model.eval().stream(start, 300, temperature=0.8)
    return data.decode([i.item() for i in ids], vocab)


def say(line):
    """Print a line above the progress bar; under torchrun, in the first process alone."""
    if os.environ.get("RANK", "0") in ("", "0"):
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C has ended `| tee`, too
            tqdm.write(line)
            sys.stdout.flush()


class Parser(argparse.ArgumentParser):
    def error(self, message):  # in place of the usage text: a line
        raise Refused(message)


def run(main):
    """Run a script's main, and exit. What a person can mend is one line and status 2; everything
    else keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a redirected file on Windows has a narrow encoding
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    status = 0
    try:
        version = torch.__version__.split(".")[:2]
        why = "is too old: before 2.10 a checkpoint may hide code that loading runs"
        require([int(n) for n in version] >= [2, 10], f"torch {torch.__version__} {why}")
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        status = 130
    except (Refused, OSError) as error:
        process = f" (process {os.environ['RANK']})" if os.environ.get("RANK") else ""
        print(f"error{process}: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    run(main)
