"""
The pictures of README. They need matplotlib (`pip install matplotlib`), which the scripts do not.

    python .github/figures.py                         # .github/results.png, from results.csv
    python .github/figures.py out/pydoc-wav-12x128    # and .github/map.png: what this run reads

results.csv has one row per run. `last_loss` is the validation loss after the last step, in nats per
character on 640 windows; `whole_loss` is the loss on the whole validation text, where it was kept.
These runs count:

    - Two variants are compared seed by seed, whichever machines the two runs are of.
    - A seed counts once. A run whose note begins with "not counted" was repeated on another machine
      (at 12 layers the runs of the Xeon, the repeats count), or differs in what no column shows.
    - Seeds 1 to 8, unless other seeds are asked for.
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
    if variant not in ("standard", "attnres"):  # which have no blocks
        wanted["blocks"] = BLOCKS.get(layers)
    wanted |= {"variant": variant, "layers": layers, **columns}
    by_seed = {}
    for row in runs():
        counts = row["seed"] in seeds and not row["note"].startswith("not counted")
        if counts and row[column] and all(row[name] == wanted[name] for name in wanted):
            if row["seed"] in by_seed:
                raise ValueError(f"two runs count as seed {row['seed']} of {wanted}")
            by_seed[row["seed"]] = row[column]
    return by_seed


def lead(of, over):
    """How much lower the first loss is, {seed: lead}, for the seeds that both have."""
    return {seed: over[seed] - of[seed] for seed in of if seed in over}


def interval(by_seed):
    """The mean over seeds, and half the width of its 95 % t-interval."""
    x = np.array(list(by_seed.values()))
    return x.mean(), T975[len(x) - 2] * x.std(ddof=1) / len(x) ** 0.5


def draw_results():
    """WAV's leads with their intervals. Texts, too, are placed in the units of the data."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 16, **STYLE})
    figure = plt.figure(figsize=(8, 6.8))
    ax = figure.add_axes((0.3, 0.12, 0.56, 0.76))
    ax.set(xlim=(-0.041, 0.035), xticks=[-0.02, 0, 0.02], ylim=(10, -0.5), yticks=[])
    ax.set_xlabel("WAV's lead, nats per character")
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.axvline(0, color="gray", lw=1.5, zorder=0)
    ax.text(0, -1.5, "no difference", ha="center")
    ax.text(0.002, -0.7, "WAV better →", weight="bold")
    ax.text(-0.002, -0.7, "← the other better", weight="bold", ha="right")

    def title(y, text):
        ax.text(-0.08, y, text, weight="bold", va="center")

    def row(y, name, layers, steps=3000):
        leads = lead(losses("wav", layers), losses(name, layers, steps=steps))
        mean, half = interval(leads)
        color = "tab:blue" if steps == 3000 else "chocolate"
        ax.errorbar(mean, y, xerr=half, fmt="o", color=color, lw=3, capsize=7, ms=11)
        if steps != 3000:
            name += f", {steps / 3000:.2f}x"
        ax.text(-0.08, y, name, va="center")
        ax.text(0.052, y, f"{len(leads)} seeds", va="center", ha="right")

    title(0, "48 layers, equal steps")
    row(1, "block_attnres", 48)
    row(2, "standard", 48)
    title(3.7, "48 layers, the other trains longer,\nfor about equal time")
    row(5, "block_attnres", 48, 3300)
    row(6, "standard", 48, 4290)
    title(7.4, "12 layers, equal steps")
    row(8.4, "block_attnres", 12)
    row(9.4, "standard", 12)
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
    image = ax.imshow(percent, cmap=blues, norm=PowerNorm(0.5, 0, 100), aspect="auto")
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(readers)), readers)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, format="{x:.0f} %", ticks=[0, 1, 5, 20, 50, 100])
    bar.outline.set_visible(False)
    figure.savefig(HERE / "map.png", dpi=200)


if __name__ == "__main__":
    draw_results()
    for out_dir in sys.argv[1:]:
        draw_map(out_dir)
