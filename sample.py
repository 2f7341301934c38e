"""
Text from a trained model, character by character, or the map of what its sublayers read.

    python sample.py                                  # the latest run under out/
    python sample.py --out_dir out/pydoc-wav-12x128 --prompt "The import statement" --temperature 0.8
    python sample.py --routing
"""

import argparse
import math
import os
import pickle
import sys
from pathlib import Path

import torch

import data
from wav import GPT, GPTConfig


def load_checkpoint(path, device="cpu"):
    """The checkpoint at path, as (model in eval mode, checkpoint dict).

    Only tensors and plain values are read (weights_only): a file that would run code is refused.
    Raises ValueError for what is not a checkpoint of train.py, OSError for what cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values"
        ) from None
    except Exception as error:  # noqa: BLE001 (a damaged file fails in many ways)
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from None
    try:
        if type(checkpoint) is not dict:
            raise ValueError("it holds something else")
        config = GPTConfig(**checkpoint["config"])
        weights, chars = checkpoint["model"], checkpoint["chars"]
        if type(checkpoint["settings"]) is not dict:
            raise ValueError("it has no settings")
        if len(chars) != config.vocab_size or sorted(set(chars)) != list(chars):
            raise ValueError(f"{len(chars)} characters for a vocabulary of {config.vocab_size}")
        # Compare before anything is allocated: a config may claim far more than its tensors hold.
        if sum(name.endswith("proj.weight") for name in weights) != config.n_layer:
            raise ValueError(f"its tensors are not those of {config.n_layer} layers")
        with torch.device("meta"):
            claimed = {name: w.shape for name, w in GPT(config).state_dict().items()}
        if claimed != {name: w.shape for name, w in weights.items()}:
            raise ValueError("its tensors are not of the shapes that its config claims")
        if not all(w.is_contiguous() for w in weights.values()):
            raise ValueError("its tensors hold less than they claim")
        model = GPT(config).to(device)
        model.load_state_dict(weights)
    except Exception as error:  # noqa: BLE001
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a checkpoint of train.py: {reason}") from None
    return model.eval(), checkpoint


def latest_run():
    """The folder under out/ whose checkpoint was written last."""
    runs = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError("no checkpoint under out/: run `python train.py` first, or give --out_dir")
    return runs[-1].parent


def encode(prompt, chars):
    """The ids of a prompt (1, T). An empty one becomes a line end, or the text's first character."""
    prompt = prompt or ("\n" if "\n" in chars else chars[0])
    ids = {char: i for i, char in enumerate(chars)}
    unknown = sorted(set(prompt) - set(ids))
    if unknown:
        raise ValueError(
            f"the model never saw {', '.join(map(repr, unknown))} in the prompt: "
            f"its {len(chars):,} characters are {''.join(chars[:200])!r}{' ...' * (len(chars) > 200)}"
        )
    return torch.tensor([[ids[char] for char in prompt]])


def write_sample(model, chars, prompt, n_chars, temperature=1.0, top_k=None):
    """Print the prompt and n_chars characters after it, each as soon as it is made."""
    idx = encode(prompt, chars).to(model.embed.weight.device)
    print(prompt, end="", flush=True)
    for i in model.stream(idx, n_chars, temperature, top_k):
        print(chars[i.item()], end="", flush=True)
    print()


def print_routing(model, checkpoint, data_dir):
    """The mixing weights on validation text, in percent: a row for each sublayer and the output, a
    column for each source. Then their sums by kind of source, now and at initialisation."""
    config, settings = model.config, checkpoint["settings"]
    _, val_ids, chars = data.load(settings["dataset"], data_dir or settings["data_dir"])
    if chars != checkpoint["chars"]:
        raise ValueError(f"dataset={settings['dataset']!r} is not the text of this checkpoint")
    starts = data.even_starts(val_ids, config.n_ctx, 16)
    idx, _ = data.windows(data.to_device(val_ids, model.embed.weight.device), config.n_ctx, starts)
    weights, names = model.routing(idx)
    before, _ = GPT(config).to(idx.device).eval().routing(idx[:1, :1])  # the same for every text

    n_sublayer, S = 2 * config.n_layer, model.basis.size(1)
    figures = len(names) <= 40  # the 97 columns of a deep attnres have room for the shades alone
    print(f"{config.residual}, {config.n_layer} layers: mixing weights in percent")
    if figures:
        short = [name[:3] + name.partition(" ")[2] for name in names]
        print(" " * 13 + "".join(f"{name:>5}" for name in short))
    for row in range(n_sublayer + 1):
        kind = "output" if row == n_sublayer else ("attention", "MLP")[row % 2] + f" {row // 2 + 1}"
        print(f"{kind:13}" + "".join(cell(w, figures) for w in weights[row].tolist()).rstrip())

    kinds = list(dict.fromkeys(name.split()[0] for name in names))
    print("\nthe same by kind of source (and at initialisation)")
    print(" " * 20 + "".join(f"{kind:>14}" for kind in kinds))
    for row in range(0, n_sublayer + 1, S):
        last = row == n_sublayer
        for j, reader in enumerate(["output"] if last else ["attention", "MLP"]):
            text = f"{'' if last else f'block {row // S + 1}':9}{reader:11}"
            for kind in kinds:
                columns = [i for i, name in enumerate(names) if name.split()[0] == kind]
                now, then = (
                    100 * w[row + j : row + S : 2, columns].sum(1).mean() for w in (weights, before)
                )
                text += f"{now:7.1f} ({then:4.1f})"
            print(text)


def cell(weight, figure):
    """A weight from 0 to 1 as a shade and, with room for it, a figure in percent."""
    # Four shades: up to 16, 31 and 47 percent, and more.
    shade = " ░▒▓█"[math.ceil(4 * min(1.0, 1.6 * weight))]
    if not figure:
        return shade
    return f" {shade}{100 * weight:3.0f}" if weight else " " * 5


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = raise_usage
    parser.add_argument("--out_dir", help="the run to sample from (default: the latest under out/)")
    parser.add_argument("--prompt", default="", help="text to go on from (default: a new line)")
    parser.add_argument(
        "--n_chars", type=int, default=500, help="characters to make (default: 500)"
    )
    parser.add_argument("--n_samples", type=int, default=1, help="texts to make (default: 1)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="1 as trained (default: 0.8)"
    )
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest only (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same text")
    parser.add_argument("--routing", action="store_true", help="print what each sublayer reads")
    parser.add_argument(
        "--data_dir", help="for --routing: where downloads are (default: as trained)"
    )
    args = parser.parse_args(argv)
    for name in ("n_chars", "n_samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be 1 or more")
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"seed={args.seed} must have 64 bits at most")
    out_dir = Path(args.out_dir) if args.out_dir else latest_run()
    model, checkpoint = load_checkpoint(out_dir / "best.pt")
    if args.routing:
        print_routing(model, checkpoint, args.data_dir)
        return
    torch.manual_seed(args.seed)
    for i in range(args.n_samples):
        if i:
            print("-" * 80)
        write_sample(
            model, checkpoint["chars"], args.prompt, args.n_chars, args.temperature, args.top_k
        )


def raise_usage(message):
    """In place of argparse's usage text: run() prints the message as one line."""
    raise ValueError(message)


def run(main, argv=None):
    """Run a script's main: its exit status, with what a user can mend printed as one line."""
    try:
        main(argv)
        return 0
    except (ValueError, OSError, MemoryError, FloatingPointError, torch.OutOfMemoryError) as error:
        message = str(error).split()
    except KeyboardInterrupt:
        return 130
    # Out of the except clause the frames of main are gone: a progress bar has ended its line.
    rank = os.environ.get("RANK", "0")  # under torchrun, an error may be that of one process alone
    print("error:" if rank == "0" else f"error (process {rank}):", *message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run(main))
