"""
Text from a trained model, character by character, or the map of what its sublayers read.

    python sample.py                                  # the latest run under out/
    python sample.py --out_dir out/pydoc-wav-12x128 --prompt "The import statement" --top_k 5
    python sample.py --routing
"""

import argparse
import io
import math
import os
import pickle
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import data
from wav import GPT, GPTConfig, require


def save_checkpoint(paths, model, chars, **rest):
    """Write a checkpoint, as load_checkpoint reads it, to each of paths."""
    content = io.BytesIO()
    kept = {"config": asdict(model.config), "model": model.state_dict(), "chars": chars, **rest}
    torch.save(kept, content)
    for path in paths:
        write_whole(path, content.getbuffer())


def write_whole(path, content):
    """Write bytes under a temporary name, flush them to disk and move them into place."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def load_checkpoint(path, device="cpu"):
    """The checkpoint at path, as (model in eval mode, checkpoint dict).

    Only tensors and plain values are read (weights_only), and compared with what the config claims
    before a model takes memory. Raises ValueError for what train.py did not write, or OSError.
    """
    try:
        with open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        settings = checkpoint["settings"] if type(checkpoint) is dict else {}
        require(type(settings["dataset"]) is type(settings["data_dir"]) is str, "it names no text")
        config = GPTConfig(**checkpoint["config"])
        weights, chars = checkpoint["model"], checkpoint["chars"]
        vocabulary = len(chars) == config.vocab_size and sorted(set(chars)) == list(chars)
        require(vocabulary, f"{len(chars)} characters for a vocabulary of {config.vocab_size}")
        require(len(weights) >= config.n_layer, f"{len(weights)} tensors, {config.n_layer} layers")
        with torch.device("meta"):
            claimed = {name: w.shape for name, w in GPT(config).state_dict().items()}
        shapes = {name: w.shape for name, w in weights.items()}
        require(shapes == claimed, "its tensors are not those that this wav.py makes of it")
        require(all(w.is_contiguous() for w in weights.values()), "its tensors are stretched")
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it holds more than tensors and values") from None
    except Exception as error:  # a damaged file fails in many ways
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path} is not a whole checkpoint of train.py: {reason}") from None
    model = GPT(config).to(device)
    model.load_state_dict(weights)
    return model.eval(), checkpoint


def find_checkpoint(out_dir):
    """The best checkpoint of a run (None: of the latest under out/), or early on its only one."""
    if not out_dir:
        runs = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
        require(runs, "no run under out/: run `python train.py` first, or give --out_dir")
        out_dir = runs[-1].parent
    best = Path(out_dir, "best.pt")
    return best if best.exists() else Path(out_dir, "ckpt.pt")


def encode(prompt, chars):
    """The ids of a prompt (1, T). An empty one becomes a line end, or the first character."""
    prompt = prompt or ("\n" if "\n" in chars else chars[0])
    ids = {char: i for i, char in enumerate(chars)}
    unknown = ", ".join(map(repr, sorted(set(prompt) - set(ids))))
    known = repr("".join(chars[:200]))
    require(not unknown, f"the model never saw {unknown} in the prompt: it knows {known}")
    return torch.tensor([[ids[char] for char in prompt]])


def write_sample(model, chars, prompt="", n_chars=500, temperature=0.8, top_k=None):
    """Print the prompt and n_chars characters after it, each as soon as it is made."""
    idx = encode(prompt, chars).to(next(model.parameters()).device)
    print(prompt, end="", flush=True)
    for i in model.stream(idx, n_chars, temperature, top_k):
        print(chars[i.item()], end="", flush=True)
    print()


def print_routing(model, checkpoint, data_dir, device):
    """Mixing weights on validation text, in percent: a row for each reader, a column for each source;
    then by kind of source: mean, deviation from token to token, and the mean at initialisation."""
    config, settings = model.config, checkpoint["settings"]
    _, val_ids, chars = data.load(settings["dataset"], data_dir or settings["data_dir"])
    require(chars == checkpoint["chars"], f"{settings['dataset']!r} is not its training text")
    starts = data.to_device(data.even_starts(val_ids, config.n_ctx, (16,)), device)
    idx, _ = data.windows(data.to_device(val_ids, device), config.n_ctx, starts)
    weights, names = model.routing(idx)
    weights = 100 * weights.flatten(2)  # (2L+1, N, tokens)
    start = 100 * GPT(config).to(device).eval().routing(idx[:1])[0].flatten(2)

    print(f"{config.residual} {config.n_layer}x{config.n_embd}: mixing weights in percent")
    wide = len(names) > 40  # the 97 columns of a deep attnres have room for shades alone
    if not wide:  # "sum 3" stands as sum3, "sum running" as sum+
        heads = [name.replace("running", "+").split() for name in names]
        heads = [head[0][:3] + "".join(head[1:]) for head in heads]
        print(" " * 13 + "".join(f"{head:>6}" for head in heads))
    readers = [f"{kind} {i + 1}" for i in range(config.n_layer) for kind in ("attention", "MLP")]
    for reader, row in zip([*readers, "output"], weights.mean(2).tolist()):
        cells = [" ░▒▓█"[math.ceil(min(4.0, w / 15.6))] for w in row]  # a shade per sixth
        if not wide:
            cells = [f"  {shade}{w:3.0f}" if w else " " * 6 for shade, w in zip(cells, row)]
        print(f"{reader:13}" + "".join(cells).rstrip())
    print("\nby kind of source: mean ± deviation from token to token (mean at initialisation)")
    kinds = ["running" if name.endswith("running") else name.split()[0] for name in names]
    print(" " * 23 + "".join(f"{kind:>20}" for kind in dict.fromkeys(kinds)))
    last, S = 2 * config.n_layer, 2 * config.n_layer // config.n_block
    rows = [(first + j, first + S) for first in range(0, last, S) for j in (0, 1)]
    for first, end in [*rows, (last, last + 1)]:
        layers = f"layers {first // 2 + 1}-{end // 2}" if first % S == 0 and first < last else ""
        reader = "output" if first == last else ("attention", "MLP")[first % 2]
        line = f"{layers:13}{reader:10}"
        for kind in dict.fromkeys(kinds):
            columns = [i for i, k in enumerate(kinds) if k == kind]
            now, then = (w[first:end:2, columns].sum(1) for w in (weights, start))  # (rows, tokens)
            line += f"{now.mean():8.1f} ±{now.std(1).mean():4.1f} ({then.mean():4.1f})"
        print(line)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out_dir", help="the run to sample from (default: the latest under out/)")
    add("--prompt", default="", help="text to go on from (default: a new line)")
    add("--n_chars", type=int, default=500, help="characters to make (default: 500)")
    add("--n_samples", type=int, default=1, help="texts to make (default: 1)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest (default: 0.8)")
    add("--top_k", type=int, help="draw from the k likeliest only (default: all)")
    add("--seed", type=int, default=1, help="the same seed makes the same text")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--routing", action="store_true", help="print what each sublayer reads")
    add("--data_dir", help="for --routing: where downloads are (default: as trained)")
    args = parser.parse_args(argv)
    for name in ("n_chars", "n_samples"):
        require(vars(args)[name] >= 1, f"{name}={vars(args)[name]} must be 1 or more")
    require(-(2**63) <= args.seed < 2**64, f"seed={args.seed} must have 64 bits at most")
    device = data.pick_device(args.device, 0, 1)
    path = find_checkpoint(args.out_dir)
    model, checkpoint = load_checkpoint(path, device)
    config, chars = model.config, checkpoint["chars"]
    print(f"{path}: {config.residual} {config.n_layer}x{config.n_embd}", file=sys.stderr)
    if args.routing:
        return print_routing(model, checkpoint, args.data_dir, device)
    torch.manual_seed(args.seed)
    for i in range(args.n_samples):
        print("-" * 80 + "\n" if i else "", end="")
        write_sample(model, chars, args.prompt, args.n_chars, args.temperature, args.top_k)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # in place of the usage text: run() prints the message as one line
        raise ValueError(message)


def out_of_memory(error):
    """Whether an error says that memory is out: on a CPU, torch raises a plain RuntimeError."""
    said = re.search("can't allocate memory|not enough memory|out of memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said is not None)


def run(main, argv=None):
    """Run a script's main: its exit status, with what a user can mend printed as one line."""
    status, message = 0, ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a redirected file on Windows has a narrow encoding
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        require(torch.__version__ >= "2.10", f"torch {torch.__version__} is too old: 2.10 or newer")
        status = main(argv) or 0
        print(end="", flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        hint = "out of memory, make batch_size or the model smaller: " * out_of_memory(error)
        if isinstance(error, RuntimeError) and "by peer" in str(error):  # as gloo says it
            hint = "another process ended: "
        if not hint and not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        status, message = 2, f"{hint}{error}"
    if message:  # out of the except clause the frames of main are gone: a bar has ended its line
        who = f" (process {os.environ['RANK']})" if (os.environ.get("RANK") or "0") != "0" else ""
        print(f"error{who}:", " ".join(message.split())[:1000], file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run(main))
