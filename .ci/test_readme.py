"""
README's figures, recomputed from .github/results.csv: `pytest .ci/test_readme.py`.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".github"))

from figures import best_rate, interval, lead, losses, tuned

README = (ROOT / "README.md").read_text("utf-8").replace("−", "-")
LONGER = {"1.10x": 3300, "1.43x": 4290}  # steps of the other method, where WAV has 3,000


def cells(first_words):
    """The cells of the rows of README's tables that begin so."""
    found = re.findall(rf"^\| {re.escape(first_words)}(.*)\|$", README, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in found]


@pytest.mark.parametrize("residual", ["standard", "block_attnres", "wav"])
def test_the_loss_of_each_variant(residual):
    ((_, _, shown, _),) = [row for row in cells(f"`{residual}`") if len(row) == 4]
    found = tuned(residual)
    assert shown == f"{sum(found.values()) / len(found):.3f}"
    assert list(found) == [12, 13]


def test_attnres():
    pattern = r"`attnres` trails `wav` by ([\d.]+) and leads `standard` by ([\d.]+)\."
    (shown,) = re.findall(pattern, README)
    attnres = losses("attnres", 48)
    leads = lead(losses("wav", 48), attnres), lead(attnres, losses("standard", 48))
    assert [*shown] == [f"{interval(found)[0]:.3f}" for found in leads]


@pytest.mark.parametrize("layers", [12, 48])
@pytest.mark.parametrize("other", ["block_attnres", "standard"])
def test_each_lead_and_its_interval(other, layers):
    ((equal_steps, longer),) = cells(f"`{other}`, {layers} layers |")
    assert equal_steps == as_shown(losses(other, layers), layers)
    if longer:
        steps = longer.split()[-1]
        assert longer == f"{as_shown(losses(other, layers, steps=LONGER[steps]), layers)}, {steps}"


def as_shown(other, layers):
    leads = lead(losses("wav", layers), other)
    mean, half = interval(leads)
    return f"{mean:.3f} ± {half:.3f} ({len(leads)})" if len(leads) > 2 else f"{mean:.3f} (2)"


def test_fixed_weights():
    pattern = r"is ([\d.]+) higher at 48 layers and ([\d.]+) lower at 12; .* by ([\d.]+) at 48 "
    pattern += r"layers and beats it by ([\d.]+) at 12 \(three seeds each; only 0.015 is clear\)"
    (shown,) = re.findall(pattern, README)
    leads = [lead(losses("wav", 48), losses("fixed_wav", 48))]
    leads += [lead(losses("fixed_wav", 12), losses("wav", 12))]
    leads += [lead(losses("wav", 48), losses("fixed_block_attnres", 48))]
    leads += [lead(losses("fixed_block_attnres", 12), losses("wav", 12))]
    assert [*shown] == [f"{interval(found)[0]:.3f}" for found in leads]
    assert {len(found) for found in leads} == {3}
    means, halves = zip(*(interval(found) for found in leads))
    assert [m > half for m, half in zip(means, halves)] == [False, True, False, False]


TUNED = [
    ("`block_attnres`", "block_attnres", 8),
    ("`block_attnres` in 24 blocks: as many sources, step time 1.63", "block_attnres", 24),
    ("WAV with random signs in place of phase and split", "random_wav", 8),
    ("`standard`", "standard", None),
]


@pytest.mark.parametrize("name, variant, blocks", TUNED)
def test_each_lead_at_the_best_rates(name, variant, blocks):
    leads = lead(tuned("wav"), tuned(variant, blocks))
    assert list(leads) == list(tuned("wav")) == [12, 13]
    assert [f"{x:.3f}" for x in leads.values()] in cells(f"{name} |")


def test_the_best_rates():
    assert "3e-3 for `block_attnres`, 6e-3 for the others" in README
    assert [best_rate(v) for v in ("standard", "block_attnres", "wav")] == [6e-3, 3e-3, 6e-3]


def test_leads_by_depth():
    pattern = r"is ([\d.]+) at 12 layers \(in 2 blocks ([-\d.]+)\) and ([\d.]+) at 48"
    (shown,) = re.findall(pattern, README)
    leads = [lead(losses("wav", 12), losses("block_attnres", 12))]
    leads += [lead(losses("wav", 12, blocks=2), losses("block_attnres", 12, blocks=2))]
    leads += [lead(losses("wav", 48), losses("block_attnres", 48))]
    assert [*shown] == [f"{interval(found)[0]:.3f}" for found in leads]


def test_how_far_another_machine_moves_a_lead():
    (shown,) = re.findall(r"which moved leads by up to ([\d.]+):", README)
    how = {"seeds": [11], "learning_rate": 6e-3}
    one, other = (
        lead(losses("wav", 48, machine=m, **how), losses("standard", 48, machine=m, **how))[11]
        for m in ("EPYC-Zen4", "Xeon-AMX")
    )
    assert shown == f"{abs(one - other):.3f}"


def test_no_interval_stands_in_readme_that_is_not_recomputed_here():
    assert README.count("±") == 5
