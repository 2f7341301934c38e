"""
The pictures of README. They need matplotlib (`pip install matplotlib`), which the scripts do not.

    python .github/figures.py                         # .github/results.png, from results.csv
    python .github/figures.py out/pydoc-wav-12x128    # and .github/map.png: what this run reads

results.csv has one row per run. `last_loss` is the validation loss after the last step, in nats per
character on 640 windows; `whole_loss` is the loss on the whole validation text, where it was kept.
These runs count:

    - Seeds 1 to 8: all variants with the learning rate 3e-3, compared seed by seed on last_loss,
      whichever machines the two runs are of.
    - Seeds 12 and up: each variant with the best of the rates tried on seed 11 ("screen of rates"),
      compared on whole_loss; all runs of a seed are of one machine. In 24 blocks, block_attnres has
      the rate of 8. random_wav is wav, and has its rate, with other SIGNS: in place of phase and
      split two permutations of six +1 and six -1, drawn with numpy.random.default_rng(seed) until
      they are orthogonal.
    - A seed counts once. A run whose note begins with "not counted" was repeated on another machine
      (at 12 layers the runs of the Xeon, the repeats count), or differs in what no column shows.
"""

import csv
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BLOCKS = {12: 6, 48: 8}  # how many blocks, unless others are asked for

# 97.5 % of Student's t distribution lies below these, with 1 to 15 degrees of freedom.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179]
T975 += [2.160, 2.145, 2.131]

# A gray that can be read on a light and on a dark page, which show through.
STYLE = {"font.family": "sans-serif", "savefig.transparent": True}
STYLE |= dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], "#7d8590")
STYLE |= dict.fromkeys(["xtick.color", "ytick.color"], "#7d8590")


def runs():
    """The rows of results.csv, with numbers as numbers, and None for a number that is missing."""
    with open(HERE / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("layers", "blocks", "steps", "seed"):
            row[name] = int(row[name]) if row[name] else None
        for name in ("learning_rate", "last_loss", "whole_loss"):
            row[name] = float(row[name]) if row[name] else None
    return rows


def losses(variant, layers, column="last_loss", seeds=range(1, 9), **columns):
    """The loss of each run that counts, {seed: loss}. columns: what else a row must have, as in
    steps=3300."""
    wanted = {"dataset": "TinyStories", "steps": 3000, "learning_rate": 3e-3}
    wanted |= {"variant": variant, "layers": layers, "blocks": BLOCKS.get(layers), **columns}
    if variant in ("standard", "attnres"):  # which have no blocks
        wanted["blocks"] = None
    by_seed = {}
    for row in runs():
        counts = row["seed"] in seeds and not row["note"].startswith("not counted")
        if counts and row[column] and all(row[name] == wanted[name] for name in wanted):
            if row["seed"] in by_seed:
                raise ValueError(f"two runs count as seed {row['seed']} of {wanted}")
            by_seed[row["seed"]] = row[column]
    return by_seed


def best_rate(variant):
    """The learning rate with the lowest loss, of those tried on seed 11."""
    screen = [row for row in runs() if row["note"] == "screen of rates"]
    loss = {row["learning_rate"]: row["whole_loss"] for row in screen if row["variant"] == variant}
    return min(loss, key=loss.get)


def tuned(variant, blocks=8):
    """The losses of the runs at the best rate, {seed: loss}."""
    rate = best_rate(variant.removeprefix("random_"))
    seeds = range(12, 99)
    return losses(variant, 48, "whole_loss", seeds, learning_rate=rate, blocks=blocks)


def lead(of, over):
    """How much lower the first loss is, {seed: lead}, for the seeds that both have."""
    return {seed: over[seed] - of[seed] for seed in of if seed in over}


def interval(by_seed):
    """The mean over seeds, and half the width of its 95 % t-interval."""
    x = np.array(list(by_seed.values()))
    return x.mean(), T975[len(x) - 2] * x.std(ddof=1) / len(x) ** 0.5


def draw_results():
    """WAV's leads, seed by seed, and their intervals. Texts are placed in the units of the data."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 16, **STYLE})
    figure = plt.figure(figsize=(8, 9))
    ax = figure.add_axes((0.3, 0.1, 0.56, 0.8))
    ax.set(xlim=(-0.041, 0.035), xticks=[-0.02, 0, 0.02], ylim=(13.6, -0.5), yticks=[])
    ax.set_xlabel("WAV's lead, nats per character")
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.axvline(0, color="gray", lw=1.5, zorder=0)
    ax.text(0, -1.5, "no difference", ha="center")
    ax.text(0.002, -0.7, "WAV better →", weight="bold")
    ax.text(-0.002, -0.7, "← the other better", weight="bold", ha="right")

    def title(y, text):
        ax.text(-0.08, y, text, weight="bold", va="center")

    def row(y, name, leads, color="tab:blue"):
        ax.plot([*leads.values()], [y] * len(leads), "o", color=color, ms=8, alpha=0.5, mew=0)
        if len(leads) > 2:
            mean, half = interval(leads)
            ax.errorbar(mean, y, xerr=half, fmt="d", color=color, lw=3, capsize=7, ms=11)
        ax.text(-0.08, y, name, va="center")
        ax.text(0.052, y, f"{len(leads)} seeds", va="center", ha="right")

    title(0, "48 layers, best rates")
    wav = tuned("wav")
    row(1, "block_attnres", lead(wav, tuned("block_attnres")))
    row(2, "… in 24 blocks", lead(wav, tuned("block_attnres", blocks=24)))
    row(3, "wav, random signs", lead(wav, tuned("random_wav")))
    row(4, "standard", lead(wav, tuned("standard")))
    title(5.2, "48 layers, 3e-3; orange: more steps\nfor the other, about equal time")
    wav = losses("wav", 48)
    row(6.5, "block_attnres", lead(wav, losses("block_attnres", 48)))
    longer = lead(wav, losses("block_attnres", 48, steps=3300))
    row(7.5, "block_attnres, 1.10x", longer, "chocolate")
    row(8.5, "standard", lead(wav, losses("standard", 48)))
    longer = lead(wav, losses("standard", 48, steps=4290))
    row(9.5, "standard, 1.43x", longer, "chocolate")
    title(10.9, "12 layers, 3e-3")
    wav = losses("wav", 12)
    row(11.9, "block_attnres", lead(wav, losses("block_attnres", 12)))
    row(12.9, "standard", lead(wav, losses("standard", 12)))
    figure.savefig(HERE / "results.png", dpi=200)


def draw_map(out_dir):
    """The map of `sample.py --routing` as a picture. A source that is yet to come is left blank."""
    sys.path.insert(0, str(HERE.parent))
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    from sample import find_checkpoint, load_checkpoint, mean_routing, name_of, validation_windows

    model, checkpoint = load_checkpoint(find_checkpoint(out_dir))
    x, _ = validation_windows(model, checkpoint)
    percent, names = mean_routing(model, x)  # (2L+1, N)
    percent = percent.where(percent > 0, float("nan")).numpy()
    readers = [name_of(i, len(percent)) for i in range(len(percent))]

    plt.rcParams.update({"font.size": 14, **STYLE})
    figure, ax = plt.subplots(figsize=(8, 8.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    # From nearly transparent to opaque, so that large weights stand out on a light and on a dark
    # page. The colour goes with the square root of the weight, so that small weights differ, too.
    stops = [(0.25, 0.75, 0.5, 0.08), (0.15, 0.65, 0.75, 0.7), (0.2, 0.4, 1, 1)]
    blues = LinearSegmentedColormap.from_list("blues", stops)
    image = ax.imshow(percent, cmap=blues, norm=PowerNorm(0.5, 0, 50), aspect="auto")
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(readers)), readers)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, format="{x:.0f} %", ticks=[0, 1, 5, 20, 50], extend="max")
    bar.outline.set_visible(False)
    figure.savefig(HERE / "map.png", dpi=200)


if __name__ == "__main__":
    draw_results()
    for out_dir in sys.argv[1:]:
        draw_map(out_dir)
