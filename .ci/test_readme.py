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
    pattern = r"it loses ([\d.]+) at 48 layers, but gains ([\d.]+) at 12 \(three seeds each\)"
    ((lost, gained),) = re.findall(pattern, README)
    lead_48 = lead(losses("wav", 48), losses("fixed_wav", 48))
    lead_12 = lead(losses("fixed_wav", 12), losses("wav", 12))
    assert (lost, len(lead_48)) == (f"{interval(lead_48)[0]:.3f}", 3)
    assert (gained, len(lead_12)) == (f"{interval(lead_12)[0]:.3f}", 3)


def test_leads_in_percent_of_the_loss():
    percent = re.search(r"([\d.]+)% of the loss at 12 layers, ([\d.]+)% at 48", README).groups()
    for shown, layers in zip(percent, (12, 48)):
        other = losses("block_attnres", layers)
        mean, _ = interval(lead(losses("wav", layers), other))
        assert shown == f"{100 * mean / (sum(other.values()) / len(other)):.1f}"


def test_no_interval_stands_in_readme_that_is_not_recomputed_here():
    assert README.count("±") == 6
