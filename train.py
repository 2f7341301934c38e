"""
Train a model on text.

    python train.py                                            # Python's own documentation
    python train.py --dataset stories.txt --residual standard  # your own text, another variant
    python train.py --resume                                   # continue the first, if stopped
    torchrun --nproc_per_node=4 train.py --batch_size 64       # four GPUs

A run has a folder, out/DATASET-RESIDUAL-LAYERSxWIDTH unless --out_dir names another. Its files are
written at every evaluation, and only then. Ctrl-C evaluates, saves and exits (not under torchrun).

    ckpt.pt          the last state, for --resume
    best.pt          the state with the lowest validation loss, which sample.py takes
    log.csv          one row per evaluation; train_loss is the mean since the previous row,
                     seconds counts training steps only
    settings.json    all settings

Compare runs: tail -n1 out/*/log.csv
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import wav
from wav import GPT, RESIDUALS, GPTConfig, Refused, require

# --resume may change only these; batch_size and grad_accum only if their product stays, so that a
# step reads the same windows. A new max_iters changes the learning rate from there on.
MAY_CHANGE = (
    *("dataset", "data_dir", "out_dir", "resume", "overwrite", "device", "compile"),
    *("max_iters", "eval_interval", "batch_size", "grad_accum"),
)

HELD = "{} has a run already: use --resume, --overwrite or another --out_dir"

# Read at start: the files may be edited while a run goes on.
CODE = "".join(Path(path).read_text("utf-8") for path in (wav.__file__, data.__file__, __file__))


def make_parser():
    """The flags. With their defaults, a run takes 5 to 12 minutes on two CPU cores."""
    parser = argparse.ArgumentParser(
        description="Train a model on text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # The run
    add("--dataset", default="pydoc", help="pydoc, tinystories, text8 or the path of a text file")
    add("--data_dir", default="data", help="where downloads are kept")
    add("--out_dir", help="folder of the run; None: out/DATASET-RESIDUAL-LAYERSxWIDTH")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in out_dir")
    either.add_argument("--overwrite", action="store_true", help="replace the run in out_dir")
    # The model
    add("--residual", default="wav", choices=RESIDUALS, help="residual variant")
    add("--n_layer", type=int, default=12, help="layers; each is two sublayers")
    add("--n_head", type=int, default=4, help="attention heads")
    add("--n_embd", type=int, default=128, help="width of the residual stream")
    add("--n_ctx", type=int, default=128, help="context, in tokens")
    add("--layers_per_block", type=int, help="None: about n_layer / 8, and even")
    add("--detail_bias", type=float, default=-2.0, help="initial bias of wav's details")
    add("--dropout", type=float, default=0.0, help="dropout probability")
    # The optimization
    add("--batch_size", type=int, default=16, help="windows of n_ctx tokens, over all processes")
    add("--grad_accum", type=int, default=1, help="batches per step")
    add("--max_iters", type=int, default=800, help="steps; the learning rate falls until the last")
    add("--learning_rate", type=float, default=3e-3, help="peak learning rate")
    add("--warmup_iters", type=int, default=50, help="linear warm-up steps")
    add("--weight_decay", type=float, default=0.1, help="on weight matrices only")
    add("--grad_clip", type=float, default=1.0, help="clip the gradient norm to this; 0: off")
    add("--seed", type=int, default=1, help="for initial weights, batches and dropout")
    # Evaluation
    add("--eval_interval", type=int, default=100, help="steps between evaluations")
    add("--eval_windows", type=int, default=320, help="validation windows of n_ctx tokens")
    # The machine
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on CUDA GPUs that have it")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; None: on CUDA")
    return parser


def read_settings(argv):
    """Parse and check the flags. Returns them and, with --resume, the checkpoint (else None)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    out_dir = args.out_dir
    if out_dir is None:
        out_dir = f"out/{Path(args.dataset).stem}-{args.residual}-{args.n_layer}x{args.n_embd}"
    path = Path(out_dir, "ckpt.pt")
    checkpoint = None

    if args.resume:
        require(path.exists(), f"there is no checkpoint {path}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        # Flags not given keep the run's values. Those given may differ only in MAY_CHANGE.
        before = checkpoint["settings"]
        parser.set_defaults(**before)
        args = parser.parse_args(argv)
        now = vars(args)
        changed = [k for k in now if k not in MAY_CHANGE and now[k] != before.get(k)]
        if args.batch_size * args.grad_accum != before["batch_size"] * before["grad_accum"]:
            changed.append("batch_size * grad_accum")
        require(not changed, f"--resume cannot change {changed}: start another run with --out_dir")
        done = checkpoint["step"]
        require(done < args.max_iters, f"this run has done {done:,} steps: raise --max_iters")
    else:
        require(args.overwrite or not path.exists(), HELD.format(out_dir))
    args.out_dir = out_dir

    counts = ("batch_size", "grad_accum", "max_iters", "eval_interval", "eval_windows", "n_ctx")
    for name in counts:
        require(getattr(args, name) >= 1, f"{name}={getattr(args, name)} must be at least 1")
    for name in ("learning_rate", "warmup_iters", "weight_decay", "grad_clip", "seed"):
        require(getattr(args, name) >= 0, f"{name}={getattr(args, name)} must not be negative")
    return args, checkpoint


def main(argv=None):
    args, checkpoint = read_settings(argv)
    out_dir = Path(args.out_dir)

    # Processes and device. Under torchrun there are several, and each takes its share of a batch.
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("batch_size", "eval_windows"):
        n = getattr(args, name)
        require(n % world == 0, f"{name}={n} must be a multiple of the {world} processes")
    local_batch = args.batch_size // world
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # The text. Every evaluation reads the same windows, spread evenly over the validation text.
    text = data.load(args.dataset, args.data_dir)
    sizes = f"{len(text.train):,} tokens to train on, {len(text.val):,} to validate on"
    least = min(len(text.train), len(text.val))
    require(least >= args.n_ctx + 1, f"{sizes}: n_ctx={args.n_ctx} needs {args.n_ctx + 1} of each")
    train_ids = torch.from_numpy(text.train).to(device)
    val_ids = torch.from_numpy(text.val).to(device)
    val_starts = data.even_starts(len(val_ids), args.n_ctx, args.eval_windows)[rank::world]
    val_x, val_y = data.windows(val_ids, args.n_ctx, val_starts)

    def get_batch(step):
        """This process's share of a step: inputs and targets, (grad_accum, local_batch, n_ctx)."""
        shape = (args.grad_accum, world, local_batch)
        starts = data.random_starts(len(train_ids), args.n_ctx, shape, args.seed, step)
        return data.windows(train_ids, args.n_ctx, starts[:, rank])

    # Model and optimizer. A flag with the name of a field of GPTConfig sets that field.
    model_args = {f.name: getattr(args, f.name) for f in fields(GPTConfig) if f.name in args}
    config = GPTConfig(len(text.vocab), **model_args)
    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, args)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]  # groups may have different rates

    # Precision: by default bf16 autocast on CUDA GPUs that have it in hardware; weights stay fp32
    if args.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if bf16 else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # A checkpoint holds this, which never changes ...
    about = {
        "settings": vars(args),
        "config": asdict(config),
        "code": CODE,
        "vocab": text.vocab,
        "text": text.checksum,
    }
    # ... and this, which does, beside the weights and the state of the optimizer.
    step, seconds, log = 0, 0.0, []
    if checkpoint:
        require(text.checksum == checkpoint["text"], f"{args.dataset!r} is not this run's text")
        require(asdict(config) == checkpoint["config"], "wav.py no longer makes this run's model")
        note_changed_code(checkpoint)
        about["code"] = checkpoint["code"]  # that which began the run
        step, seconds, log = (checkpoint[name] for name in ("step", "seconds", "log"))
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    name = f"{args.residual} {args.n_layer}x{args.n_embd}"
    n_params = sum(p.numel() for p in model.parameters())
    tokens_per_step = args.grad_accum * args.batch_size * args.n_ctx
    if rank == 0:
        print(f"{args.dataset}: {sizes}")
        if text.copied > 10:
            print(f"note: {text.copied} % of the validation text also occurs in the training text,")
            print("so the validation loss is too low")
        print(f"{name}: {n_params:,} parameters, a vocabulary of {len(text.vocab):,}")
        print(f"{args.dtype} on {device}, {tokens_per_step:,} tokens a step")
        print(f"writing to {out_dir}/", flush=True)

    # torch.compile, by default on CUDA with Triton (which Windows lacks)
    use_compile = args.compile
    if use_compile is None:
        use_compile = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if use_compile:
        if rank == 0:
            print("compiling, which takes a minute or more...", flush=True)
        compile_parts(model)
        # Compile on one batch before the clock starts; no step is taken.
        x, y = get_batch(0)
        add_gradients(model, x[:1], y[:1], autocast)
        model.zero_grad()
    network = DistributedDataParallel(model) if world > 1 else model

    bar = tqdm(total=args.max_iters, initial=step, unit="step", disable=True if rank else None)
    signals = []  # what has come of Ctrl-C and SIGTERM
    if world == 1:  # several processes would stop at different steps
        note_signals(signals)

    loss_sum, n_steps = torch.zeros((), device=device), 0  # since the last evaluation
    began = time.perf_counter()
    while True:
        # Evaluate and save, first the untrained model. A resumed run takes a step first.
        last = bool(signals) or step >= args.max_iters
        due = last or step % args.eval_interval == 0
        if due and (n_steps > 0 or not log):
            train_loss = mean_over_processes(loss_sum).item() / max(1, n_steps)
            elapsed = time.perf_counter() - began  # .item() has waited for the GPU
            seconds += elapsed
            val_loss = evaluate(model, val_x, val_y, local_batch, autocast)
            require(
                math.isfinite(val_loss),
                f"the loss is {val_loss} at step {step:,}: try a lower --learning_rate",
            )

            row = {"step": step, "val_loss": val_loss, "seconds": round(seconds, 1)}
            line = f"step {step:,}: val {val_loss:.3f}"
            if n_steps > 0:
                row["train_loss"] = train_loss
                row["learning_rate"] = args.learning_rate * lr_scale(args, step - 1)
                row["tokens_per_second"] = round(n_steps * tokens_per_step / elapsed)
                line += f", train {train_loss:.3f}, {row['tokens_per_second']:,} tokens/s"
            improved = all(val_loss < before["val_loss"] for before in log)
            log.append(row)
            if rank == 0:
                if step == 0 and not args.overwrite:  # another run may have saved here meanwhile
                    require(not (out_dir / "ckpt.pt").exists(), HELD.format(out_dir))
                state = {**about, "step": step, "seconds": seconds, "log": log}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_run(out_dir, state, improved)
                tqdm.write(line)  # after saving: it fails if Ctrl-C has ended `| tee`
                sys.stdout.flush()
            loss_sum, n_steps = torch.zeros((), device=device), 0
            began = time.perf_counter()
        if last:
            break

        # One step. Batches depend on the seed and the step alone, dropout also on the process. So a
        # run resumed with the same flags repeats the unbroken one. (hash of integers is not salted.)
        x, y = get_batch(step)
        torch.manual_seed(hash((args.seed, step, rank)))

        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale(args, step)
        loss = add_gradients(network, x, y, autocast)
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        model.zero_grad()
        loss_sum += loss
        n_steps += 1
        step += 1
        bar.update()
        if step % 10 == 0:  # not at each step: .item() waits for the GPU
            bar.set_postfix_str(f"loss {mean_over_processes(loss).item():.3f}", refresh=False)

    bar.close()
    if world > 1:
        del network  # it holds on to the process group
        dist.destroy_process_group()
    if rank == 0:
        best = min(row["val_loss"] for row in log)
        print(f"{name}: best validation loss {best:.4f} nats per token")
        print(f"{seconds:,.0f} s of training")
        if device.type == "cuda":
            print(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e6:,.0f} MB")
        if step < args.max_iters:
            print(f"stopped at step {step:,} and saved")
            print(f"to continue: python train.py --resume --out_dir {out_dir}")
        print(f"next: python sample.py --out_dir {out_dir}")
    return 130 if step < args.max_iters else 0


def note_signals(noted):
    """The first Ctrl-C or SIGTERM is only put on the list noted. The second ends the process."""

    def note(number, frame):
        noted.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # Ctrl-C also ends `2>&1 | tee`
            os.write(2, b"\nstopping after an evaluation; Ctrl-C again to quit now\n")

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, note)


def pick_device(name):
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # Assertion: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise Refused(f"device {name!r} does not work here: {reason}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def make_optimizer(model, args):
    """AdamW; only weight matrices decay, queries and biases do not."""
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


def lr_scale(args, step):
    """The learning rate as a fraction of its peak: linear warm-up, then a cosine to a tenth."""
    if step < args.warmup_iters:
        return (step + 1) / args.warmup_iters
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def add_gradients(network, x, y, autocast):
    """Backpropagate the mean loss of the batches x, y (grad_accum, n, n_ctx), and return it."""
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
    """The mean loss, in nats per token, over the windows of all processes. x, y (n, n_ctx) are
    this process's."""
    model.eval()
    total = torch.zeros((), device=x.device)
    for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
        with autocast:
            _, loss = model(xs, ys)
        total += loss * len(xs)
    model.train()
    return mean_over_processes(total / len(x)).item()


def mean_over_processes(x):
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)  # the sum
        x = x / dist.get_world_size()
    return x


def compile_parts(model):
    """torch.compile the sublayers and the mixing. The loop over depth stays Python, so 48 layers are
    never unrolled, and a changed `route` runs as it is."""
    torch._dynamo.config.recompile_limit = 64  # attnres exceeds the default of 8
    for name in ("mix", "merge", "details"):
        setattr(wav, name, torch.compile(getattr(wav, name)))
    for sublayer in model.sublayers:
        sublayer.compile()


def save_run(out_dir, state, improved):
    """Write the files of a run. Checkpoints go to .part files, which are then renamed, so a crash
    leaves the previous ones."""
    out_dir.mkdir(parents=True, exist_ok=True)
    names = ("best.pt", "ckpt.pt") if improved else ("ckpt.pt",)
    for name in names:
        with open(out_dir / f"{name}.part", "wb") as file:
            torch.save(state, file)
    for name in names:
        os.replace(out_dir / f"{name}.part", out_dir / name)
    (out_dir / "settings.json").write_text(json.dumps(state["settings"], indent=1))
    try:
        with open(out_dir / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, state["log"][-1], lineterminator="\n")
            writer.writeheader()
            writer.writerows(state["log"])
    except PermissionError as error:  # on Windows, another program holds it open
        print(f"note: {error}: the next save writes all of it", file=sys.stderr)


def note_changed_code(checkpoint):
    if checkpoint["code"] != CODE:
        print("note: the code has changed since this run began", file=sys.stderr)


def run(main):
    """Run a script's main. Errors the user can fix are one line; the rest keep their traceback."""
    with contextlib.suppress(AttributeError):  # as in IDLE
        sys.stdout.reconfigure(errors="replace")  # a narrow encoding, as in a pipe on Windows
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, | head: exit() would flush again
        os._exit(130)
    except (Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
