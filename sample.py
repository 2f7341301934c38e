"""
Text from a trained model, character by character, or the map of what its sublayers read.

    python sample.py                                  # the latest run under out/
    python sample.py --out_dir out/pydoc-wav-12x128 --prompt "The import statement" --temperature 0.8
    python sample.py --routing
"""

import argparse
import pickle
import sys
from dataclasses import fields
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
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from None
    try:
        config = GPTConfig(**checkpoint["config"])
        weights, chars = checkpoint["model"], checkpoint["chars"]
        if len(chars) != config.vocab_size or sorted(set(chars)) != list(chars):
            raise ValueError(f"{len(chars)} characters for a vocabulary of {config.vocab_size}")
        # Compare before anything is allocated: a config may claim far more than its tensors hold.
        if sum(name.endswith("proj.weight") for name in weights) != config.n_layer:
            raise ValueError(f"its tensors are not those of {config.n_layer} layers")
        with torch.device("meta"):
            GPT(config).load_state_dict(weights)
        model = GPT(config).to(device)
        model.load_state_dict(weights)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a checkpoint of train.py: {reason}") from None
    return model.eval(), checkpoint


def latest_run(out="out"):
    """The folder under out/ whose checkpoint was written last."""
    runs = sorted(Path(out).glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError(
            f"no checkpoint under {out}/: run `python train.py` first, or give --out_dir"
        )
    return runs[-1].parent


def encode(prompt, chars):
    """The ids of a prompt (1, T). An empty one becomes a line end, or the text's first character."""
    prompt = prompt or ("\n" if "\n" in chars else chars[0])
    ids = {char: i for i, char in enumerate(chars)}
    unknown = sorted(set(prompt) - set(ids))
    if unknown:
        raise ValueError(
            f"the model never saw {', '.join(map(repr, unknown))} in the prompt: "
            f"its {len(chars)} characters are {''.join(chars)!r}"
        )
    return torch.tensor([[ids[char] for char in prompt]])


def write_sample(model, chars, prompt, n_chars, temperature=1.0, top_k=None):
    """Print the prompt and n_chars characters after it, each as soon as it is made."""
    print(prompt, end="", flush=True)
    idx = encode(prompt, chars).to(model.embed.weight.device)
    for i in model.stream(idx, n_chars, temperature, top_k):
        print(chars[i.item()], end="", flush=True)
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    args = parser.parse_args()
