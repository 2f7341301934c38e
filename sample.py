"""
Text from a trained model, or the map of what its sublayers read.

    python sample.py                                  # the latest run under out/
    python sample.py --out_dir out/pydoc-wav-12x128 --prompt "The import statement" --top_k 5
    python sample.py --routing
"""

import argparse
import sys
from pathlib import Path

import torch

import data
import wav
from train import note_changed_code, pick_device, run
from wav import GPT, GPTConfig, require


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Text from a trained model, or the map of what its sublayers read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out_dir", help="the run to sample from; None: the latest under out/")
    add("--prompt", help="text to continue; None: the first token of the vocabulary")
    add("--n_tokens", type=int, default=500, help="tokens to generate")
    add("--temperature", type=float, default=0.8, help="0: always the most likely token")
    add("--top_k", type=int, help="draw from the k most likely tokens; None: from all")
    add("--seed", type=int, default=1, help="the same seed makes the same text")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--routing", action="store_true", help="print what each sublayer reads")
    args = parser.parse_args(argv)
    require(args.temperature >= 0, f"temperature={args.temperature} must not be negative")
    require(args.top_k is None or args.top_k >= 1, f"top_k={args.top_k} must be at least 1")

    path = find_checkpoint(args.out_dir)
    model, checkpoint = load_checkpoint(path, pick_device(args.device))
    print(f"{path}: {model.config.residual}, {checkpoint['step']:,} steps", file=sys.stderr)
    if args.routing:
        print_routing(model, checkpoint)
        return

    vocab = checkpoint["vocab"]
    prompt = data.decode([0], vocab) if args.prompt is None else args.prompt
    ids = torch.from_numpy(data.encode(prompt, vocab))[None].long().to(model.head.weight.device)
    unknown = sorted({c for c in prompt if (data.encode(c, vocab) < 0).any()})
    message = f"the model never saw {unknown}: use characters of its text in --prompt"
    require((ids >= 0).all(), message)  # ids, not unknown: in a fork, a token may be a word
    torch.manual_seed(args.seed)
    new = model.stream(ids, args.n_tokens, args.temperature, args.top_k)
    print(data.decode(torch.cat([ids, *new], dim=1)[0].tolist(), vocab))


def find_checkpoint(out_dir=None):
    """The best checkpoint of a run (None: of the latest under out/)."""
    if out_dir is None:
        runs = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
        require(runs, "no run under out/: run `python train.py` first, or give --out_dir")
        out_dir = runs[-1].parent
    path = Path(out_dir, "best.pt")
    require(path.exists(), f"there is no run in {out_dir}")
    return path


def load_checkpoint(path, device="cpu"):
    """The model, in eval mode, and the whole checkpoint. Runs no code in the file."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    note_changed_code(checkpoint)
    model = GPT(GPTConfig(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


# ----------------------------------------------------------------------------------------------
# The map: mixing weights in percent, averaged over tokens. A row is a reader (a sublayer or the
# output), a column is a source.


def print_routing(model, checkpoint):
    """What is read on 32 windows of the validation text, and what each kind of source is worth."""
    x, y = validation_windows(model, checkpoint)
    weights, names = mean_routing(model, x)
    print_map(weights.tolist(), names)

    kinds = [name.split()[0] for name in names]
    loss = loss_without(None, kinds, model, x, y)
    print(f"\nkind       weight in the output   increase of the loss, {loss:.3f}, when hidden")
    for kind in dict.fromkeys(kinds):
        share = sum(w for w, k in zip(weights[-1].tolist(), kinds) if k == kind)
        print(f"{kind:10}{share:18.0f} %{loss_without(kind, kinds, model, x, y) - loss:+20.3f}")


def validation_windows(model, checkpoint):
    """32 windows (32, n_ctx), and their targets, of the text that a run was trained on."""
    settings = checkpoint["settings"]
    text = data.load(settings["dataset"], settings["data_dir"])
    require(text.checksum == checkpoint["text"], f"{settings['dataset']!r} is not this run's text")
    ids = torch.from_numpy(text.val).to(model.head.weight.device)
    return data.windows(ids, model.config.n_ctx, data.even_starts(len(ids), model.config.n_ctx, 32))


def mean_routing(model, x):
    """The mean of model.routing over all tokens, in percent (2L+1, N), and the sources' names."""
    total = 0
    for window in x.split(1):  # one by one: large models mix many sources
        weights, names = model.routing(window)
        total = total + 100 * weights.mean((2, 3)) / len(x)
    return total, names


def print_map(weights, names):
    """Shades, with numbers where 80 columns have room for them."""
    cell = 3 if 3 * len(names) <= 70 else 1
    if cell == 3:
        print(" " * 10 + "".join(f" {name[:2]}" for name in names))
        print(" " * 10 + "".join(f"{name.partition(' ')[2]:>3}" for name in names))
    else:
        print(" " * 10 + f"{names[0]}, {names[1]}, {names[2]}, ... {names[-1]}")
    for reader, row in enumerate(weights):
        line = ""
        for weight in row:
            shade = "·░▒▓█"[sum(weight >= least for least in (2, 8, 20, 45))]
            if weight == 0:  # no such source yet
                line += " " * cell
            elif cell == 1:
                line += shade
            else:
                line += "100" if weight > 99.5 else f"{shade}{weight:2.0f}"
        print(f"{name_of(reader, len(weights)):10}{line}".rstrip())


@torch.no_grad()
def loss_without(hidden, kinds, model, x, y):
    """The loss when the sources of one kind (None: of none) have their logits lowered by 10,000.
    kinds are those of all sources, in order."""
    mix = wav.mix

    def mix_without(sources, inv_rms, queries, biases=None):
        columns = kinds[: len(sources)]
        if biases is None:  # from `merge`, with running sources
            columns = kinds[1:2] * len(sources)
            biases = queries.new_zeros(1, len(sources))
        off = biases.new_tensor([-1e4 * (kind == hidden) for kind in columns])
        return mix(sources, inv_rms, queries, biases + off)

    wav.mix = mix_without
    try:
        return sum(model(*xy)[1].item() for xy in zip(x.split(1), y.split(1))) / len(x)
    finally:
        wav.mix = mix


def name_of(reader, n_reader):
    if reader == n_reader - 1:
        return "output"
    return f"{'MLP' if reader % 2 else 'att'} {reader // 2 + 1}"


if __name__ == "__main__":
    run(main)
