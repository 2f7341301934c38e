"""
README's figures, recomputed from .github/results.csv: `pytest .ci/test_readme.py`.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".github"))

from figures import interval, lead, losses

README = (ROOT / "README.md").read_text("utf-8").replace("−", "-")
LONGER = {"1.10x": 3300, "1.43x": 4290}  # steps of the other method, where WAV has 3,000


def cells(first_words):
    """The cells of the rows of README's tables that begin so."""
    found = re.findall(rf"^\| {re.escape(first_words)}(.*)\|$", README, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in found]


@pytest.mark.parametrize("residual", ["standard", "attnres", "block_attnres", "wav"])
def test_the_loss_of_each_variant(residual):
    ((_, _, shown, _),) = [row for row in cells(f"`{residual}`") if len(row) == 4]
    found = losses(residual, 48, seeds=range(1, 6))
    mean = sum(found.values()) / len(found)
    assert shown == f"{mean:.3f}" + "*" * (len(found) == 2)
    assert len(found) == (2 if residual == "attnres" else 5)


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
    return f"{mean:.3f} ± {half:.3f} ({len(leads)})"


def test_fixed_weights():
    pattern = r"at 48 layers, by ([\d.]+) \(three seeds\), but so does `block_attnres`, by ([\d.]+\d)"
    (shown,) = re.findall(pattern, README)
    for lead_shown, variant in zip(shown, ("fixed_wav", "fixed_block_attnres")):
        leads = lead(losses(variant, 48), losses("standard", 48))
        assert (lead_shown, len(leads)) == (f"{interval(leads)[0]:.3f}", 3)


def test_no_interval_stands_in_readme_that_is_not_recomputed_here():
    assert README.count("±") == 6
