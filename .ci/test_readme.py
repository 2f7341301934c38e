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
    assert shown == f"{mean:.3f}"
    assert len(found) == (2 if residual == "attnres" else 5)


def test_attnres_is_compared_on_its_own_seeds():
    (shown,) = re.findall(r"two, where `wav` has ([\d.]+)\)", README)
    found = losses("wav", 48, seeds=losses("attnres", 48))
    assert shown == f"{sum(found.values()) / 2:.3f}"


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
    pattern = r"is ([\d.]+) higher at 48 layers .* and ([\d.]+) lower at 12 \(three seeds each\)"
    ((higher, lower),) = re.findall(pattern, README)
    loss = lead(losses("wav", 48), losses("fixed_wav", 48))
    gain = lead(losses("fixed_wav", 12), losses("wav", 12))
    assert (higher, len(loss)) == (f"{interval(loss)[0]:.3f}", 3)
    assert (lower, len(gain)) == (f"{interval(gain)[0]:.3f}", 3)


def best_rate(variant, seed, machine=None):
    """The last loss at the rate with the lowest loss: on the whole text, where that is known."""
    found = []
    for rate in (1.5e-3, 3e-3, 6e-3, 1.2e-2):
        how = {"seeds": [seed], "learning_rate": rate}
        if machine:
            how["machine"] = machine
        last = losses(variant, 48, **how)
        whole = losses(variant, 48, column="whole_loss", **how) if machine else last
        found += [(whole[seed], last[seed]) for seed in last]
    return min(found)[1]


def test_leads_at_the_best_rates():
    (shown,) = re.findall(r"it leads by ([\d.]+ to [\d.]+) \(two seeds\)", README)
    leads = [best_rate("block_attnres", 1) - best_rate("wav", 1)]
    leads += [best_rate("standard", 11, "EPYC-Zen4") - best_rate("wav", 11, "EPYC-Zen4")]
    for variant in ("standard", "block_attnres"):
        leads.append(best_rate(variant, 11, "Xeon-AMX") - best_rate("wav", 11, "Xeon-AMX"))
    assert shown == f"{min(leads):.3f} to {max(leads):.3f}"


def test_leads_in_percent_of_the_loss():
    percent = re.search(r"([\d.]+)% of the loss at 12 layers, ([\d.]+)% at 48", README).groups()
    for shown, layers in zip(percent, (12, 48)):
        other = losses("block_attnres", layers)
        mean, _ = interval(lead(losses("wav", layers), other))
        assert shown == f"{100 * mean / (sum(other.values()) / len(other)):.1f}"


def test_no_interval_stands_in_readme_that_is_not_recomputed_here():
    assert README.count("±") == 6
