"""
Text from a trained model, or the map of what its sublayers read.

    python sample.py                                  # the latest run under out/
    python sample.py --out_dir out/pydoc-wav-12x128 --prompt "The import statement" --top_k 5
    python sample.py --routing
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch

import data
from data import TOKEN
from train import Parser, amount, count, natural, note_other_code, pick_device, run
from wav import GPT, GPTConfig, Refused, require


def main(argv=None):
    parser = Parser(
        description="Text from a trained model, or the map of what its sublayers read.",
        usage="python sample.py [--SETTING VALUE ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out_dir", help="the run to sample from; None: the latest under out/")
    add("--prompt", default="", help="text to go on from; none: a new line")
    add("--n_tokens", type=count, default=500, help=f"{TOKEN}s to make")
    add("--n_samples", type=count, default=1, help="texts to make")
    add("--temperature", type=amount, default=0.8, help=f"0: always the likeliest {TOKEN}")
    add("--top_k", type=count, help="draw from the k likeliest only; None: from all")
    add("--seed", type=natural, default=1, help="the same seed makes the same text")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add(
        "--routing",
        action="store_true",
        help="print what each sublayer reads, and what it is worth",
    )
    add("--data_dir", help="for --routing: where downloads are; None: as in training")
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    path = find_checkpoint(args.out_dir)
    model, checkpoint = load_checkpoint(path, device)
    config = model.config
    print(f"{path}: {config.residual} {config.n_layer}x{config.n_embd}", file=sys.stderr)

    if args.routing:
        print_routing(model, checkpoint, args.data_dir)
        return
    torch.manual_seed(args.seed)
    for i in range(args.n_samples):
        if i > 0:
            print("-" * 80)
        write_text(model, checkpoint["vocab"], args)


def find_checkpoint(out_dir=None):
    """The best checkpoint of a run (None: of the latest under out/), or early on its only one."""
    if not out_dir:
        runs = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
        require(runs, "no run under out/: run `python train.py` first, or give --out_dir")
        out_dir = runs[-1].parent
    best, last = Path(out_dir, "best.pt"), Path(out_dir, "ckpt.pt")
    require(last.exists(), f"{out_dir} holds no run: there is no ckpt.pt")
    return best if best.exists() else last


def load_checkpoint(path, device="cpu"):
    """A model, ready to use, and all that train.py has saved with it. Runs no code in the file."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    note_other_code(checkpoint)
    try:
        model = GPT(GPTConfig(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
    except (Refused, TypeError, RuntimeError) as error:  # a fork's run, perhaps
        raise Refused(f"{path} is not of this wav.py: {' '.join(str(error).split())}") from None
    return model.eval(), checkpoint


def write_text(model, vocab, args):
    """Print the prompt and what the model makes of it, each token as soon as it is there."""
    ids = data.encode(args.prompt or "\n", vocab)
    if not args.prompt:
        ids = ids.clip(0)  # the first token, where none is a line end
    unknown = [c for c in sorted(set(args.prompt)) if (data.encode(c, vocab) < 0).any()]
    known = data.decode(range(min(200, len(vocab))), vocab)
    require(not unknown, f"the model never saw {unknown} of the prompt: it knows {known!r}")
    ids = torch.from_numpy(ids)[None].long().to(model.head.weight.device)
    print(args.prompt, end="", flush=True)
    pending = []
    for i in model.stream(ids, args.n_tokens, args.temperature, args.top_k):
        pending.append(i.item())
        text = data.decode(pending, vocab)
        if not text.endswith("\ufffd"):  # a token may be a part of a character, such as a byte
            print(text, end="", flush=True)
            pending = []
    print(data.decode(pending, vocab))


# ----------------------------------------------------------------------------------------------
# The map of the mixing weights, in percent. A row is a reader, a sublayer or the output; a column
# is a source.


def print_routing(model, checkpoint, data_dir):
    """What is read on 32 windows of the validation text, and what each kind of source is worth."""
    config, settings = model.config, checkpoint["settings"]
    device = model.head.weight.device
    data_dir = data_dir or settings["data_dir"]
    text = data.load(settings["dataset"], data_dir, checkpoint["text"])
    starts = data.even_starts(len(text.val), config.n_ctx, 32)
    x, y = data.windows(torch.from_numpy(text.val).to(device), config.n_ctx, starts)

    weights, names = model.routing(x)  # (2L+1, N, B, T)
    weights = 100 * weights.flatten(2)  # (2L+1, N, tokens)
    fresh, _ = GPT(config).to(device).routing(x[:1])
    fresh = 100 * fresh.flatten(2)

    print(f"{config.residual} {config.n_layer}x{config.n_embd}: mixing weights in percent")
    print_map(weights.mean(2), names)
    kinds = ["running" if name.endswith("running") else name.split()[0] for name in names]
    print("\nby kind of source: mean ± deviation over tokens (mean at the start)")
    print(f"{'':10}" + "".join(f"{kind:>13}" for kind in dict.fromkeys(kinds)))
    print_means(weights, fresh, kinds, model.chunk)
    print_worth(model, x, y, dict.fromkeys(kinds))


def print_map(weights, names):
    """A row for each reader, weights (2L+1, N): shades, and numbers where there is room."""
    width = max(1, shutil.get_terminal_size().columns - 10)  # 80 - 10 when piped
    cell = min(4, width // len(names))
    if cell >= 3:
        # Two lines of heads, such as "ph" over "3". The running sum has "+" for a number.
        kinds, _, blocks = zip(*(name.partition(" ") for name in names))
        print(" " * 10 + "".join(f"{kind[: cell - 1]:>{cell}}" for kind in kinds))
        numbers = [block.replace("running", "+") for block in blocks]
        print(" " * 10 + "".join(f"{number:>{cell}}" for number in numbers).rstrip())
    else:
        # Shades alone, one column for so many neighbouring sources that all fit.
        together = math.ceil(len(names) / width)
        print(f"({names[0]}, {names[1]}, ... {names[-1]}; {together} in a column)")
        weights = torch.stack([w.sum(1) for w in weights.split(together, dim=1)], dim=1)

    for reader, row in enumerate(weights.tolist()):
        line = ""
        for weight in row:
            shade = " ░▒▓█"[sum(weight >= least for least in (2, 8, 20, 45))]
            if cell < 3:
                line += shade
            elif weight == 0:  # no such source yet
                line += " " * cell
            elif cell == 3 and weight >= 99.5:
                line += "100"
            else:
                line += f"{shade}{weight:{cell - 1}.0f}"
        print(f"{name_of(reader, len(weights)):10}{line}".rstrip())


def print_means(weights, fresh, kinds, chunk):
    """A row for the attentions and one for the MLPs of each block, and one for the output; a column
    for each kind: the sum of weights, fresh (2L+1, N, tokens) over its sources."""
    n_sublayer = len(weights) - 1
    rows = []
    for first in range(0, n_sublayer, chunk):
        last = min(first + chunk, n_sublayer)
        layers = f"{first // 2 + 1}-{last // 2}"
        rows.append((f"att {layers}", slice(first, last, 2)))
        rows.append((f"MLP {layers}", slice(first + 1, last, 2)))
    rows.append(("output", slice(n_sublayer, None)))
    for label, readers in rows:
        line = f"{label:10}"
        for kind in dict.fromkeys(kinds):
            columns = [i for i, k in enumerate(kinds) if k == kind]
            now = weights[readers][:, columns].sum(1)  # (readers, tokens)
            start = fresh[readers][:, columns].sum(1).mean()
            line += f"{now.mean():4.0f} ±{now.std(1).mean():2.0f} ({start:3.0f})"
        print(line)


def print_worth(model, x, y, kinds):
    """How much the loss rises without each kind. A weight says how much is read, not what for."""
    loss = loss_without(model, None, x, y)
    rises = [loss_without(model, kind, x, y) - loss for kind in kinds]
    print(f"{'worth':10}" + "".join(f"{rise:+13.3f}" for rise in rises))
    print(f"(worth: by so much does the loss, {loss:.3f} on these windows, rise without the kind)")


@torch.no_grad()
def loss_without(model, hidden, x, y):
    """The loss with a kind of source hidden: its c of (2) is as good as minus infinity. (What is
    all that there is to read is read nevertheless.)"""

    def bias(sources):
        kinds = ["running" if block == "running" else kind for kind, block in sources]
        off = [-1e4 if kind == hidden else 0.0 for kind in kinds]
        return GPT.bias(model, sources) + torch.tensor(off, device=x.device)

    model.bias, model.route = bias, model.route_plain
    _, loss = model(x, y)
    del model.bias, model.route
    return loss.item()


def name_of(reader, n_reader):
    if reader == n_reader - 1:
        return "output"
    kind = "att" if reader % 2 == 0 else "MLP"
    return f"{kind} {reader // 2 + 1}"


if __name__ == "__main__":
    run(main)
