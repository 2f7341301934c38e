"""
The claims of the method and of the scripts around it, one test each: `pytest` runs them all.

The model is held against `literal`, which writes the equations down term by term, in float64. After it
come generation and configuration, then the scripts: data, training, interruption, and bad input.
"""

import contextlib
import hashlib
import http.server
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import sample
import train
import wav
from sample import load_checkpoint, run
from wav import GPT, RESIDUALS, GPTConfig, basis

ROUTED = RESIDUALS[1:]


def make(residual, dtype=torch.float64, trained=True, **changes):
    """A small model; `trained` gives its queries, biases and weights values far from their start."""
    settings = {
        "vocab_size": 11,
        "n_ctx": 16,
        "n_layer": 6,
        "n_head": 2,
        "n_embd": 12,
        "n_block": 3,
    }
    torch.manual_seed(1)
    model = GPT(GPTConfig(residual=residual, **{**settings, **changes})).to(dtype)
    if trained:
        generator = torch.Generator().manual_seed(2)
        for name, p in model.named_parameters():
            std = 1.0 if name in ("query", "detail_bias") else 0.3
            p.data += std * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model.eval()


def some_ids(B=2, T=16, V=11):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))


def rms(x):
    return x.square().mean(-1, keepdim=True).sqrt()


def literal(model, idx):
    """The method by the letter: logits, and the mixing weights of each sublayer and the output.

    Every mixing point lists all its sources anew: nothing is shared, nothing is computed ahead.
    """
    residual, n_sublayer = model.config.residual, len(model.sublayers)
    S = n_sublayer // model.config.n_block
    x0, updates, all_weights = model.embed(idx), [], []
    for l in range(n_sublayer + 1):
        sources, bias = [x0], [0.0]
        if residual in ("standard", "attnres"):
            sources += updates  # (1), (2)
            bias += [0.0] * len(updates)
        else:
            for first in range(0, l, S):  # (3)
                block = updates[first : min(first + S, l)]
                total = sum(block)
                sources.append(total)
                bias.append(0.0)
                if residual == "wav" and len(block) == S:  # (6)
                    phase = sum(block[0::2]) - sum(block[1::2])
                    split = sum(block[: S // 2]) - sum(block[S // 2 :])
                    for kind, detail in enumerate((phase, split)):
                        gain = (rms(total) / rms(detail)).detach()
                        sources.append(gain * detail)
                        bias.append(model.detail_bias[l, kind])
        if residual == "standard":
            h = sum(sources)
        else:  # (4)
            logits = [(s / rms(s)) @ model.query[l] + c for s, c in zip(sources, bias)]
            weights = torch.stack(logits).softmax(0)
            h = sum(w[..., None] * s for w, s in zip(weights, sources))
            all_weights.append(weights.mean((1, 2)))
        if l < n_sublayer:
            updates.append(model.sublayers[l](h))
    return (h / rms(h)) @ model.head.weight.T, all_weights


# --------------------------------------------------------------------------------------------------
# The method


def test_the_basis_of_two_layers_is_that_of_the_paper():
    assert basis("attnres", 4).equal(torch.eye(4))
    assert basis("block_attnres", 4).tolist() == [[1, 1, 1, 1]]
    assert basis("wav", 4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]


@pytest.mark.parametrize("S", [4, 8, 12, 16])
def test_details_sum_to_zero_and_the_three_rows_are_orthogonal(S):
    W = basis("wav", S)
    assert (W @ W.T).equal(S * torch.eye(3))
    assert W[1:].sum(1).tolist() == [0, 0]


def test_with_an_odd_number_of_layers_split_cuts_the_middle_one_and_overlaps_with_phase():
    W = basis("wav", 6)
    assert W[2].tolist() == [1, 1, 1, -1, -1, -1]
    assert (W @ W.T).tolist() == [[6, 0, 0], [0, 6, 2], [0, 2, 6]]


def test_with_one_layer_per_block_phase_and_split_would_be_the_same():
    W = basis("wav", 2)
    assert W[1].equal(W[2])


@pytest.mark.parametrize("residual", RESIDUALS)
def test_forward_equals_the_literal_method_in_values_and_every_gradient(residual):
    model, idx = make(residual), some_ids()
    targets = idx.roll(-1, 1)
    logits, loss = model(idx, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected, _ = literal(model, idx)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("n_layer, n_block", [(12, 4), (48, 8)])
def test_all_variants_are_the_same_network_at_init(n_layer, n_block):
    logits = {}
    for residual in RESIDUALS:
        model = make(residual, torch.float32, False, n_layer=n_layer, n_block=n_block)
        if residual == "wav":
            model.detail_bias.data.fill_(-1e4)  # without its details
        logits[residual] = model(some_ids())[0]
    for residual in ROUTED:
        difference = (logits[residual] - logits["standard"]).abs().max()
        assert difference < 2e-6 * logits["standard"].abs().max() + 1e-6, (residual, difference)


def test_the_norm_does_not_see_scale_down_to_the_size_of_a_mean_over_97_sources():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 1e-4, 1e-8):
        torch.testing.assert_close(wav.rms_norm(scale * x), x / rms(x), rtol=1e-5, atol=1e-6)
    assert wav.rms_norm(torch.zeros(2, 8)).equal(torch.zeros(2, 8))


def test_wav_with_its_details_switched_off_is_block_attnres():
    block, whole = make("block_attnres"), make("wav")
    whole.load_state_dict({**block.state_dict(), "detail_bias": torch.full((13, 2), -1e4)})
    torch.testing.assert_close(whole(some_ids())[0], block(some_ids())[0], rtol=1e-12, atol=1e-12)


def test_the_blocks_of_attnres_are_only_a_schedule():
    models = [make("attnres", n_block=n_block) for n_block in (1, 2, 3, 6)]
    expected = models[0](some_ids())[0]
    for model in models[1:]:
        torch.testing.assert_close(model(some_ids())[0], expected, rtol=1e-9, atol=1e-9)


def test_equal_updates_give_zero_details():
    update = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    made, scale = wav.offer(basis("wav", 4), [update] * 4, match=True)
    assert made[0].equal(4 * update)
    assert not made[1:].any()
    assert scale.isfinite().all()


def test_a_detail_has_the_rms_of_its_block_sum_and_its_scale_carries_no_gradient():
    generator = torch.Generator().manual_seed(1)
    updates = [torch.randn(2, 3, 8, generator=generator, requires_grad=True) for _ in range(4)]
    W = basis("wav", 4)
    made, scale = wav.offer(W, updates, match=True)
    total = sum(updates)
    for k in (1, 2):
        torch.testing.assert_close(rms(made[k]), rms(total))
        torch.testing.assert_close(scale[k], 1 / rms(total))
        detail = sum(w * u for w, u in zip(W[k], updates))
        gain = (rms(total) / rms(detail)).detach()
        seed = torch.randn(2, 3, 8, generator=generator)
        got = torch.autograd.grad(made[k], updates, seed, retain_graph=True)
        for j in range(4):  # linear in the updates, with the gain as a constant
            torch.testing.assert_close(got[j], W[k, j] * gain * seed)


@pytest.mark.parametrize("residual", ROUTED)
def test_at_init_the_weights_are_uniform_and_details_weigh_exp_of_their_bias(residual):
    model = make(residual, trained=False, detail_bias=-1.5)
    weights, names = model.routing(some_ids())
    S = 12 // 3
    for l, row in enumerate(weights):
        done, inside = l // S, l % S
        if residual == "attnres":
            expected = [1.0] * (1 + l)
        else:
            detail = [math.exp(-1.5)] * 2 if residual == "wav" else []
            expected = [1.0] + [1.0, *detail] * done + [1.0] * (inside > 0)
        got = row[row > 0]
        expected = torch.tensor(expected, dtype=got.dtype)
        torch.testing.assert_close(got, expected / expected.sum(), rtol=1e-6, atol=1e-6)
    assert len(names) == weights.size(1)


@pytest.mark.parametrize("residual", ROUTED)
def test_routing_shows_the_weights_of_the_literal_method(residual):
    model = make(residual)
    weights, names = model.routing(some_ids())
    assert weights.shape == (13, {"attnres": 13, "block_attnres": 5, "wav": 11}[residual])
    _, expected = literal(model, some_ids())
    for l, row in enumerate(expected):
        got = weights[l].to(row.dtype)
        if l % 4 and residual != "attnres":  # the running sum has the last column
            torch.testing.assert_close(got[-1], row[-1], rtol=1e-5, atol=1e-6)
            got, row = got[:-1], row[:-1]
        torch.testing.assert_close(got[: len(row)], row, rtol=1e-5, atol=1e-6)
        assert not got[len(row) :].any()
    assert names[0] == "x0"
    if residual == "wav":
        assert names[1:4] == ["sum 1", "phase 1", "split 1"]
        assert names[-1] == "running"


@pytest.mark.parametrize("residual", ROUTED)
def test_the_output_reads_every_block_and_not_only_the_last(residual):
    weights, _ = make(residual, trained=False).routing(some_ids())
    sources = weights[-1] if residual == "attnres" else weights[-1, :-1]
    assert (sources > 0.01).all()


def test_standard_has_no_routing_to_show():
    with pytest.raises(ValueError, match="standard"):
        make("standard").routing(some_ids())


def test_attention_sees_the_order_of_positions_and_their_distances_alone():
    cos, sin = wav.rope_table(16, 8)
    x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    turned = [v * cos[:, 0] + v.roll(4) * sin[:, 0] for v in (x, y)]  # (16, 8) each
    dots = turned[0] @ turned[1].T
    for distance in range(-15, 16):
        diagonal = dots.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert dots[0].std() > 0.1
    attention = make("standard").sublayers[0]
    h = torch.randn(1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    swapped = attention(h[:, [1, 0, 2, 3, 4]])
    assert not attention(h)[:, -1].isclose(swapped[:, -1]).any()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_change_at_one_position_changes_no_logit_before_it(residual):
    model, idx = make(residual), some_ids()
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    assert before[:, :9].equal(after[:, :9])
    assert not before[:, 9:].isclose(after[:, 9:]).all(-1).any()


@pytest.mark.parametrize("residual", ROUTED)
def test_the_first_query_has_one_source_so_its_gradient_is_zero(residual):
    model = make(residual)
    model(some_ids(), some_ids())[1].backward()
    assert not model.query.grad[0].any()
    assert model.query.grad[1:].abs().sum(1).min() > 0


def test_routing_adds_a_vector_and_two_biases_for_each_sublayer_and_the_output():
    count = {r: sum(p.numel() for p in make(r).parameters()) for r in RESIDUALS}
    assert count["attnres"] - count["standard"] == 13 * 12
    assert count["block_attnres"] - count["standard"] == 13 * 12
    assert count["wav"] - count["standard"] == 13 * (12 + 2)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_same_seed_gives_the_same_weights_whatever_the_residual(residual):
    state, standard = make(residual, trained=False).state_dict(), make("standard", trained=False)
    for name, p in standard.state_dict().items():
        assert state[name].equal(p), name
    for name in ("query", "detail_bias"):
        if name in state:
            assert (state[name] == (0.0 if name == "query" else -2.0)).all()
    for name, p in make(residual, torch.float32, False, n_embd=96).named_parameters():
        if name.endswith("weight"):  # what adds to the stream starts smaller, by sqrt(2L)
            last = name.endswith(("proj.weight", "down.weight"))
            assert p.std().item() == pytest.approx(0.02 / 12**0.5 if last else 0.02, rel=0.1), name


@pytest.mark.parametrize("residual", RESIDUALS)
def test_shapes_and_the_names_that_a_fork_relies_on(residual):
    model, idx = make(residual), some_ids()
    logits, loss = model(idx)
    assert logits.shape == (2, 16, 11)
    assert loss is None
    logits, loss = model(idx, idx)
    assert logits.shape == (2, 16, 11)
    assert loss.shape == ()
    assert model.embed.weight.shape == model.head.weight.shape == (11, 12)
    assert len(model.sublayers) == 12
    h = torch.randn(2, 5, 12, dtype=torch.float64)
    assert all(sublayer(h).shape == h.shape for sublayer in model.sublayers)
    if residual != "standard":
        assert model.query.shape == (13, 12)
    if residual == "wav":
        assert model.detail_bias.shape == (13, 2)


@pytest.mark.parametrize("residual", ROUTED)
def test_under_autocast_statistics_are_fp32_and_the_logits_stay_close(residual):
    model, idx = make(residual, torch.float32), some_ids()
    exact = model(idx)[0]
    seen = []
    model.mix = lambda *args: seen.append(wav.mix(*args)) or seen[-1]
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    assert loss.dtype == torch.float32
    for mixtures, lses in seen:
        assert {m.dtype for m in mixtures} == {torch.bfloat16}
        assert {lse.dtype for lse in lses} == {torch.float32}
    assert (logits - exact).std() < 0.1 * exact.std()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_compiled_regions_compute_the_same(residual):
    model, idx = make(residual), some_ids()
    expected, _ = model(idx)
    model.compile(backend="eager")
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_dropout_acts_in_training_alone(residual):
    model, idx = make(residual, dropout=0.5), some_ids()
    assert model(idx)[0].equal(model(idx)[0])
    model.train()
    assert not model(idx)[0].equal(model(idx)[0])


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("residual", RESIDUALS)
def test_cached_logits_equal_those_of_the_full_forward(residual):
    model, idx = make(residual), some_ids()
    expected, _ = model(idx)
    cache, pieces = {}, [5, 1, 1, 6, 3]  # a prompt, single positions, and several at once
    got = torch.cat([model(part, cache=cache)[0] for part in idx.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_generation_goes_on_past_n_ctx_over_a_sliding_window(residual):
    model, idx = make(residual), some_ids(B=2, T=3)
    got = model.generate(idx, 40, top_k=1)
    assert got.shape == (2, 43)
    length = 3
    for end in range(3, 43):
        length = length + 1 if end > 3 else length
        if length > 16:
            length = 8  # n_ctx / 2, once all n_ctx positions are taken
        logits, _ = model(got[:, end - length : end])
        assert got[:, end].equal(logits[:, -1].argmax(-1)), end


def test_a_prompt_longer_than_n_ctx_and_a_top_k_above_the_vocabulary_work():
    idx = some_ids(B=1, T=50)
    got = make("wav").generate(idx, 5, top_k=1000)
    assert got.shape == (1, 55)
    assert got[:, :50].equal(idx)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": math.nan}, {"top_k": 0}])
def test_generation_refuses_what_it_cannot_draw_from(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}="):
        make("wav").generate(some_ids(), 1, **settings)


def test_a_low_temperature_draws_the_likeliest():
    model, idx = make("wav"), some_ids()
    assert model.generate(idx, 5, temperature=1e-9).equal(model.generate(idx, 5, top_k=1))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_more_than_n_ctx_positions_are_an_error_that_says_so(residual):
    with pytest.raises(ValueError, match="17 positions are more than n_ctx=16"):
        make(residual)(some_ids(T=17))


# --------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_layer": 12, "n_block": 5}, "n_block=5 must cut n_layer=12 .*1, 2, 3, 4, 6]"),
        ({"n_embd": 10, "n_head": 4}, "n_embd=10 must be a multiple of 2 n_head=8"),
        ({"n_embd": 12, "n_head": 4}, "n_embd=12 must be a multiple of 2 n_head=8"),
        ({"n_layer": 4, "n_block": 4}, "2 or more layers: try one of .1, 2]"),
        ({"n_layer": 1, "n_block": 1}, "2 or more layers: add layers"),
        ({"residual": "attnres", "n_block": 5}, "1 or more layers: try one of .1, 2, 3, 4, 6, 12]"),
        ({"residual": "wave"}, "standard, attnres, block_attnres, wav"),
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"n_layer": -1}, "n_layer=-1"),
        ({"n_embd": 10**9}, "n_embd=1000000000"),
        ({"vocab_size": 1.5}, "vocab_size=1.5"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"detail_bias": math.inf}, "detail_bias=inf"),
    ],
)
def test_a_config_that_cannot_work_says_what_is_allowed(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        GPTConfig(**{"vocab_size": 11, **changes})
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Helpers: a tiny text, a tiny run, a server that may misbehave.

TEXT = "the quick brown fox jumps over the lazy dog\n" * 60
STORIES = ("Once upon a time… “hello”, said the fox. 🦊\n<|endoftext|>\n" * 40).encode()
NAMES = ("TINYSTORIES_URL", "TEXT8_URL", "TINYSTORIES_BYTES", "TIMEOUT")
OK = "HTTP/1.0 {status} OK\r\nContent-Length: {length}"
TINY = [
    *("--dataset", "a.txt", "--out_dir", "run", "--device", "cpu", "--n_layer", "4"),
    *("--n_block", "2", "--n_embd", "16", "--n_head", "2", "--n_ctx", "16", "--batch_size", "4"),
    *("--eval_batches", "2", "--max_iters", "4", "--eval_interval", "2"),
]
RESUME = ["--out_dir", "run", "--resume"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with a text in it; signal handlers are put back afterwards. A run ends
    without its sample, to save time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "write_sample", lambda *args: None)
    Path("a.txt").write_text(TEXT)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        Path("a.txt").write_text(TEXT)
        assert run(train.main, TINY) == 0
        return Path("run").resolve()


@pytest.fixture
def finished(home, trained):
    """A working directory with a text and, in run/, a finished run on it."""
    shutil.copytree(trained, "run")


def status(main, argv):
    """Exit status in this process, as the shell would see it."""
    try:
        return run(main, argv)
    except SystemExit as stop:
        return stop.code


def refused(capsys, main, argv, *words):
    """main refuses argv: status 2 and, below any progress bar, one line that names each of words.
    Returns what it had printed."""
    capsys.readouterr()
    assert status(main, argv) == 2
    out, error = capsys.readouterr()
    line = error.splitlines()[-1]
    assert line.startswith("error: ") and error.count("error: ") == 1 and "Traceback" not in error
    for word in words:
        assert word in line, line
    return out


@contextlib.contextmanager
def one_line(kind, words):
    """What is raised is of this kind and matches words, in one line."""
    with pytest.raises(kind, match=words) as error:
        yield
    assert len(str(error.value).splitlines()) == 1


def files_in(folder):
    """The content of every file, by its path inside the folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def log_rows(out_dir="run"):
    return [row.split(",") for row in Path(out_dir, "log.csv").read_text().splitlines()[1:]]


def read(name="run/ckpt.pt"):
    return torch.load(name, weights_only=True)


@pytest.fixture
def serve(monkeypatch):
    """serve() points data at a server on 127.0.0.1, which answers each request with `head` and what
    it asks for of `body`, and hangs up after `hang` seconds. Returns the list of the requests."""
    servers = []

    def start(body=STORIES, head=OK, first=1000, ranges=True, hang=0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted, status, content = self.headers["Range"], 200, body
                requests.append((self.path, wanted))
                if wanted and ranges:
                    status, content = 206, body[: int(wanted.removeprefix("bytes=0-")) + 1]
                lines = head.format(status=status, length=len(content)) + "\r\n\r\n"
                with contextlib.suppress(OSError):
                    self.wfile.write(lines.encode() + content)
                time.sleep(hang)

        requests, server = [], http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/"
        for name, value in zip(NAMES, (url, url, first, 0.3)):
            monkeypatch.setattr(data, name, value)
        return requests

    monkeypatch.setenv("no_proxy", "*")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# --------------------------------------------------------------------------------------------------
# Downloads


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_comes_whole_and_is_cached(serve, tmp_path, ranges):
    requests, names = serve(ranges=ranges), {"TinyStories-train-100MB.txt", "TinyStories-valid.txt"}
    for _ in range(2):  # the second time from the disk
        train_ids, val_ids, chars = data.load("tinystories", tmp_path)
        text = decoded(train_ids, chars)
        assert STORIES.decode().startswith(text) and 980 < len(text.encode()) <= 1000
        assert decoded(val_ids, chars) == STORIES.decode() and "🦊" in chars and "…" in chars
        assert files_in(tmp_path).keys() == names
        assert requests == [
            ("/TinyStories-train.txt", "bytes=0-999"),
            ("/TinyStories-valid.txt", None),
        ]


def test_a_character_cut_by_the_byte_range_is_left_out(serve, tmp_path, monkeypatch):
    serve()
    for first in range(1000, 1000 + 80):  # the cut falls on every byte of a story
        monkeypatch.setattr(data, "TINYSTORIES_BYTES", first)
        data.load("tinystories", tmp_path / str(first))
        kept = (tmp_path / str(first) / "TinyStories-train-100MB.txt").read_bytes()
        assert STORIES.startswith(kept) and first - 8 <= len(kept) <= first
        kept.decode()


@pytest.mark.parametrize(
    "words, server",
    [
        ("it ended after", {"head": OK + "0"}),  # it offers ten times what it sends
        ("it ended after", {"first": 5000}),
        ("timed out", {"head": OK + "0", "hang": 1}),
        ("404", {"head": "HTTP/1.0 404 Not Found"}),
        ("SSH", {"head": "SSH-2.0-OpenSSH_9.6"}),
        ("not TinyStories", {"body": b"<html>log in first</html>"}),
        ("offers 1,000,000,000,000 bytes", {"head": OK.replace("{length}", str(10**12))}),
        ("offers 0 bytes", {"head": "HTTP/1.0 200 OK"}),
        ("many", {"head": OK.replace("{length}", "many")}),
        ("not allowed", {"head": "HTTP/1.0 302 Found\r\nLocation: file:///etc/passwd"}),
        ("", {"head": "HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:0/"}),  # nobody is there
    ],
)
def test_a_bad_download_says_so_in_one_line_and_leaves_nothing(serve, tmp_path, words, server):
    # A server may claim any size for a file of which only the beginning is wanted.
    serve(**{"first": None, **server})
    began = time.perf_counter()
    with one_line(OSError, f"{words}.*--dataset pydoc"):
        data.load("tinystories", tmp_path)
    assert not files_in(tmp_path) and time.perf_counter() - began < 5


def test_a_redirect_from_https_to_http_is_refused(serve, tmp_path, monkeypatch):
    serve()
    http_url, urlopen = data.TINYSTORIES_URL, urllib.request.urlopen
    monkeypatch.setattr(data, "TINYSTORIES_URL", "https://127.0.0.1/")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **_: urlopen(http_url))
    with one_line(OSError, "redirected to http:.*--dataset pydoc"):
        data.load("tinystories", tmp_path)
    assert not files_in(tmp_path)


def zipped(members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in members.items():
            z.writestr(name, text)
    return content.getvalue()


def test_text8_is_checked_and_its_zip_creates_no_file_beside_itself(serve, home, monkeypatch):
    letters = "abcdefghijklmnopqrstuvwxyz " * 3
    body = zipped({"../../evil.txt": "x", "/tmp/evil-text8": "x", "text8": letters})
    serve(body)
    with one_line(OSError, "md5.*--dataset pydoc"):
        data.load("text8", "a/b/c")
    assert files_in(".").keys() == {"a.txt"}
    monkeypatch.setattr(data, "TEXT8_MD5", hashlib.md5(body).hexdigest())
    train_ids, _, chars = data.load("text8", "a/b/c")
    assert decoded(train_ids, chars) == letters
    assert files_in(".").keys() == {"a.txt", "a/b/c/text8.zip"}
    assert not Path("/tmp/evil-text8").exists()
    whole = zipped({"text8": letters})
    rotten = whole[:40] + b"\xff" * 4 + whole[44:]
    for content in (whole[: len(whole) // 2], rotten, zipped({"readme": "x"})):
        Path("a/b/c/text8.zip").write_bytes(content)
        with one_line(ValueError, "text8.zip is damaged"):
            data.load("text8", "a/b/c")


# --------------------------------------------------------------------------------------------------
# Text to ids


def decoded(ids, chars):
    return "".join(chars[i] for i in ids)


@pytest.mark.parametrize(
    "text",
    [
        "ab" * 50,
        "naïve café 🦊👩‍👩‍👧 e\u0301 \u0928\u093f " * 20,
        *("".join(map(chr, range(100, 100 + n))) * 10 for n in (256, 257, 50000)),
        "\u2028\x85\x0c\x1c odd line ends " * 10,
        "\ufeff" + "a byte-order mark\r\nand Windows' line ends 🦊\r\n" * 20,
    ],
    ids=ascii,
)
def test_ids_of_the_smallest_type_go_back_to_the_text(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    train_ids, val_ids, chars = data.load(str(path))
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    n = len(text) * 9 // 10
    assert decoded(train_ids, chars) == text[:n]
    assert decoded(val_ids, chars) == text[n:], "the last tenth is the validation text"
    assert chars == sorted(set(text[:n]))
    smallest = np.uint8 if len(chars) <= 256 else np.uint16
    assert train_ids.dtype == val_ids.dtype == smallest


def test_a_validation_file_is_used_but_for_characters_that_the_text_lacks(tmp_path, capsys):
    (tmp_path / "tale.md").write_text("abcd" * 30)
    (tmp_path / "tale_valid.md").write_text("a🦊bb\nc🦊")
    (tmp_path / "tale_valid.txt").write_text("no")
    train_ids, val_ids, chars = data.load(str(tmp_path / "tale.md"))
    assert decoded(train_ids, chars) == "abcd" * 30 and decoded(val_ids, chars) == "abbc"
    (said,) = capsys.readouterr().out.splitlines()
    assert "dropped 3 of 7 characters" in said and "'🦊'" in said and r"'\n'" in said


@pytest.mark.parametrize(
    "name, content, words",
    [
        *(("b.txt", content, "two or more distinct characters") for content in (b"", b"a" * 100)),
        ("b.txt", b"ab\0cd" * 20, "zero byte"),
        *(("b.txt", content, "not UTF-8") for content in (b"\xff\xfe\x00" * 9, b"caf\xe9")),
        *((name, None, "is a directory") for name in (".", "folder/")),
        *((name, None, "tinystories") for name in ("", "nowhere.txt", "x" * 5000, "a\nb")),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_what_is_not_text_is_refused_in_one_line(home, name, content, words):
    Path("folder").mkdir()
    if content is not None:
        Path(name).write_bytes(content)
    with one_line(ValueError, words):
        data.load(name)


def test_pydoc_is_split_by_pieces_and_always_in_the_same_way():
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    pieces = [whole[i : i + 4000] for i in range(0, len(whole), 4000)]
    val_text = "".join(pieces[9::10])
    del pieces[9::10]
    assert data.pydoc() == ("".join(pieces), val_text) == data.pydoc()


def test_batches_depend_on_seed_and_step_alone():
    ids, all_starts = np.arange(1000), []
    for seed, step in ((1, 5), (1, 6), (2, 5)):
        starts = data.random_starts(ids, 16, 8, seed, step)
        np.random.seed(3)
        torch.manual_seed(3)
        assert np.array_equal(starts, data.random_starts(ids, 16, 8, seed, step))
        assert not any(np.array_equal(starts, other) for other in all_starts)
        all_starts.append(starts)
    starts = data.random_starts(ids[:18], 16, 1000, seed=1, step=1)
    assert set(starts) == {0, 1}, "every window that fits can be drawn, and no other"


def test_targets_are_the_inputs_one_character_later():
    ids = data.to_device(np.arange(50, dtype=np.uint16), "cpu")
    x, y = data.windows(ids, 16, data.even_starts(ids, 16, 5))
    assert x.shape == y.shape == (5, 16) and torch.equal(x + 1, y)
    assert x[0, 0] == 0 and y[-1, -1] == 49


# --------------------------------------------------------------------------------------------------
# Checkpoints: stop, crash, resume


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """A signal as the batch after `step` steps is drawn. The step that it meets is finished: the
    checkpoint is of step + 1."""
    original = data.random_starts

    def random_starts(ids, n_ctx, n, seed, now):
        if now == step:
            signal.raise_signal(number)
        return original(ids, n_ctx, n, seed, now)

    monkeypatch.setattr(data, "random_starts", random_starts)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_stopped_and_resumed_run_is_the_unbroken_run_to_the_bit(
    home, monkeypatch, capsys, residual
):
    flags = ["--residual", residual, "--dropout", "0.1", "--max_iters", "12"]
    flags += ["--eval_interval", "4", "--warmup_iters", "3", "--grad_accum", "2"]
    assert status(train.main, [*TINY, *flags, "--out_dir", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 0)  # before an evaluation, ...
        assert status(train.main, [*TINY, *flags]) == 128 + signal.SIGTERM
    assert files_in("run").keys() == {"ckpt.pt", "log.csv"} and read()["step"] == 1
    assert "--resume" in capsys.readouterr().out.splitlines()[-1]
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGINT)  # between two, ...
        assert status(train.main, RESUME) == 128 + signal.SIGINT
    assert read()["step"] == 5
    with monkeypatch.context() as patch:
        stop_at(patch, 7)  # ... at one, ...
        assert status(train.main, RESUME) == 128 + signal.SIGTERM
    torch.manual_seed(99)
    assert status(train.main, RESUME) == 0  # ... and to the end
    for name in ("ckpt.pt", "best.pt"):
        whole, broken = read(f"whole/{name}"), read(f"run/{name}")
        assert whole.keys() == broken.keys()
        for key in ("config", "chars", "text"):
            assert whole[key] == broken[key]
        for key in whole.keys() - {"config", "chars", "text", "settings", "elapsed"}:
            torch.testing.assert_close(whole[key], broken[key], rtol=0, atol=0, msg=key)
    assert [row[:-2] for row in log_rows("whole")] == [row[:-2] for row in log_rows("run")]
    assert [row[0] for row in log_rows("run")] == ["4", "8", "12"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_20_random_moments_leaves_whole_checkpoints(home, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(train.__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forks = multiprocessing.get_context("forkserver")  # one process imports torch for all of them
    forks.set_forkserver_preload(["pytest", "train", "torch._dynamo"])
    flags = ["--max_iters", "100000", "--eval_interval", "1", "--eval_batches", "1"]
    chance, steps, ckpt = random.Random(1), [], Path("run/ckpt.pt")

    def saved():
        return ckpt.stat().st_mtime_ns if ckpt.exists() else 0

    for i in range(20):
        before = saved()
        argv = [*TINY, *flags, "--resume" if before else "--overwrite"]
        process = forks.Process(target=run, args=(train.main, argv))
        process.start()
        patience = time.monotonic() + 20
        while i % 4 and saved() == before:  # one in four dies as it starts, the rest as they save
            assert time.monotonic() < patience
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for path in Path("run").glob("*.pt"):
            load_checkpoint(path)
        if ckpt.exists():
            steps.append(read()["step"])
            logged = [row[0] for row in log_rows()][: steps[-1]]
            assert logged == [str(1 + i) for i in range(steps[-1])], "a saved step has its row"
    assert steps == sorted(steps) and steps[-1] > 20
    assert status(train.main, [*RESUME, "--max_iters", str(steps[-1] + 3)]) == 0
    assert [row[0] for row in log_rows()] == [str(1 + i) for i in range(steps[-1] + 3)]
    assert all(len(row) == 6 for row in log_rows())


class Killed(BaseException):
    """As kill -9: no handler for errors runs."""


@pytest.mark.parametrize("failure", ["crash", "disk full"])
@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_crash_or_a_full_disk_in_any_write_leaves_whole_checkpoints(
    home, monkeypatch, capsys, function, call, failure
):
    calls, original, before = itertools.count(1), getattr(os, function), []

    def fail(file, *args):
        if next(calls) < call:
            return original(file, *args)
        before.append({n: b for n, b in files_in("run").items() if not n.endswith(".part")})
        if failure == "disk full":
            raise OSError(28, "No space left on device")
        if function == "fsync":  # half of what was written reached the disk
            os.ftruncate(file, os.fstat(file).st_size // 2)
        raise Killed

    argv = [*TINY, "--max_iters", "3", "--eval_interval", "1", "--warmup_iters", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        if failure == "crash":
            with pytest.raises(Killed):
                train.main(argv)
        else:
            refused(capsys, train.main, argv, "No space left on device")
            assert files_in("run") == before[0]
    for path in Path("run").glob("*.pt"):
        load_checkpoint(path)
    how = "--resume" if Path("run/ckpt.pt").exists() else "--overwrite"
    assert status(train.main, [*argv, how]) == 0
    assert [row[0] for row in log_rows()] == ["1", "2", "3"]
    assert f"{read('run/best.pt')['best']:.6f}" == min(row[2] for row in log_rows())
    assert files_in("run").keys() == {"best.pt", "ckpt.pt", "log.csv"}, "something was left behind"


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("bad_update", [6, 7, 8])
def test_a_loss_that_is_not_finite_stops_and_saves_nothing(
    home, monkeypatch, capsys, bad_update, stopped
):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert status(train.main, [*TINY, "--max_iters", "12", "--eval_interval", "4"]) == 143
    before, clip, updates = files_in("run"), torch.nn.utils.clip_grad_norm_, itertools.count(6)

    def overflow(parameters, norm):  # update number `bad_update` makes every weight a nan
        parameters = list(parameters)
        if next(updates) == bad_update:
            for p in parameters:
                p.grad.fill_(math.inf)
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    if stopped:  # a signal in the very step whose update or loss is bad
        stop_at(monkeypatch, bad_update - 1)
    # The loss is a nan one step later; where the run saves before that step, nothing is saved.
    saves = bad_update == 8 or stopped
    named = "not finite" if saves else f"at step {bad_update + 1}"
    refused(capsys, train.main, RESUME, named, "--learning_rate")
    after = files_in("run")
    assert all(after[name] == before[name] for name in ("ckpt.pt", "best.pt"))


def test_a_second_run_does_not_replace_the_first(finished, capsys):
    before = files_in("run")
    refused(capsys, train.main, TINY, "--resume", "--overwrite")
    for bad in (["--n_block", "3"], ["--dataset", "none.txt"], ["--batch_size", "0"]):
        refused(capsys, train.main, [*TINY, "--overwrite", *bad], bad[0][2:])
    assert files_in("run") == before, "a refused run costs the one that it would overwrite"
    assert status(train.main, [*TINY, "--overwrite", "--seed", "2", "--max_iters", "2"]) == 0
    assert read()["settings"]["seed"] == 2 and [row[0] for row in log_rows()] == ["2"]


def test_resuming_a_finished_run_or_another_model_or_text_is_refused_by_name(finished, capsys):
    before = files_in("run")
    fixed = "n_embd 32, seed 2, dataset b.txt, residual standard, n_layer 8, n_head 1, n_ctx 8"
    fixed += ", n_block 1, dropout 0.5, batch_size 8, grad_accum 2, detail_bias -1"
    for name, value in map(str.split, fixed.split(",")):
        argv = [*RESUME, "--max_iters", "6", f"--{name}", value]
        refused(capsys, train.main, argv, f"{name}=", "contradicts")
    for max_iters in ("4", "3", "1"):
        argv = [*RESUME, "--max_iters", max_iters]
        refused(capsys, train.main, argv, "4 steps", "--max_iters")
    Path("a.txt").write_text(TEXT.replace("lazy", "idle", 1))
    refused(capsys, train.main, [*RESUME, "--max_iters", "6"], "a.txt", "not the text")
    assert files_in("run") == before


def test_resuming_for_longer_or_at_another_learning_rate_works(finished):
    flags = "--max_iters 6 --learning_rate 0.01 --min_lr 0.002 --warmup_iters 2 --beta2 0.9"
    assert status(train.main, [*RESUME, *flags.split()]) == 0
    assert [row[0] for row in log_rows()] == ["2", "4", "6"] and read()["step"] == 6
    assert read()["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.9)
    assert 0.002 < float(log_rows()[-1][3]) < 0.01


def test_no_run_to_go_on_from_and_no_place_to_write_are_one_line(home, capsys):
    refused(capsys, sample.main, [], "train.py", "--out_dir")
    refused(capsys, train.main, [*TINY, "--resume"], "nothing to resume", "run")
    refused(capsys, train.main, [*TINY, "--out_dir", "a.txt/run"], "a.txt")
    refused(capsys, train.main, [*TINY, "--out_dir", "a.txt"], "a.txt")
    refused(capsys, train.main, [*TINY, "--out_dir", "x" * 3000], "name too long")
    assert os.listdir() == ["a.txt"]


# --------------------------------------------------------------------------------------------------
# Files that are not what they claim


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["all", "config"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(finished, capsys, place, legacy):
    content = Evil() if place == "all" else {**read(), place: Evil()}
    for name in ("best.pt", "ckpt.pt"):
        torch.save(content, f"run/{name}", _use_new_zipfile_serialization=not legacy)
    refused(capsys, sample.main, ["--out_dir", "run"], "best.pt is refused")
    refused(capsys, train.main, RESUME, "ckpt.pt is refused")
    assert not Path("evil").exists()
    torch.load("run/best.pt", weights_only=False)
    assert Path("evil").exists(), "the file was not a danger: the test shows nothing"


def test_a_truncated_checkpoint_is_refused(finished, capsys):
    size = Path("run/best.pt").stat().st_size
    for length in (size - 1, size // 2, 100, 0):
        os.truncate("run/best.pt", length)
        refused(capsys, sample.main, ["--out_dir", "run"], "best.pt is")


@pytest.mark.parametrize(
    "content",
    [
        *(torch.zeros(3), None, {}, {"model": {"w": torch.zeros(2)}, "epoch": 3}),
        {"model": [], "config": {"vocab_size": 2}, "chars": ["a", "b"], "settings": {}},
        {"state\ndict": 1, "config": {"a\nb": 1}},
    ],
)
def test_another_programs_file_is_refused(home, content):
    torch.save(content, "best.pt")
    with one_line(ValueError, "not a checkpoint of train.py"):
        load_checkpoint("best.pt")


CHARS = sorted(set(TEXT))
LIES = [
    *({"config": {"n_layer": n}} for n in (2, 6, 10**6, 10**9, -1, "4", None, 4.0)),
    *({"config": {"n_embd": n}} for n in (8, 32, 10**6, 10**12)),
    *({"config": {"n_ctx": n}} for n in (0, 10**9, True)),
    *({"config": {"vocab_size": n}} for n in (1, 29, 10**12)),
    *({"config": {"residual": r}} for r in ("standard", "nonsense", [])),
    *({"config": {"n_head": n}} for n in (3, 10**9)),
    *({"config": {"dropout": x}} for x in ("a", math.nan)),
    *({"config": lie} for lie in ({"n_block": 3}, {"detail_bias": math.inf}, {"unknown": 1})),
    *({"chars": chars} for chars in (CHARS[::-1], [1, *CHARS[1:]])),
    {"chars": [*CHARS, "🦊"], "config": {"vocab_size": 29}},
    {"model": {"more": torch.zeros(1)}},
    {"model": {"head.weight": torch.zeros(16, 28)}},  # transposed
    {"model": {"embed.weight": None}},  # taken away
    # The shapes will be true, but every element the same four bytes.
    {"config": {"n_embd": 2**14}, "model": "stretched"},
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: ascii(lie)[:50])
def test_a_checkpoint_that_lies_is_refused_before_a_model_takes_memory(finished, monkeypatch, lie):
    content, built = read("run/best.pt"), []
    content["config"].update(lie.get("config", {}))
    content["chars"] = lie.get("chars", content["chars"])
    if lie.get("model") == "stretched":
        with torch.device("meta"):
            wide = GPT(GPTConfig(**content["config"])).state_dict()
        content["model"] = {name: torch.zeros(1).expand(w.shape) for name, w in wide.items()}
    else:
        weights = {**content["model"], **lie.get("model", {})}
        content["model"] = {name: w for name, w in weights.items() if w is not None}
    torch.save(content, "best.pt")

    def build(config):
        if torch.empty(0).device.type != "meta":
            built.append(config)
            raise ValueError("built")  # and not, in the test, for real
        return GPT(config)

    monkeypatch.setattr(sample, "GPT", build)
    began = time.perf_counter()
    with one_line(ValueError, "not a checkpoint of train.py"):
        load_checkpoint("best.pt")
    assert not built and time.perf_counter() - began < 3


@pytest.mark.parametrize("value", [None, "x"])
@pytest.mark.parametrize(
    "key", ["settings", "text", "optimizer", "step", "elapsed", "best", "losses"]
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(finished, capsys, key, value):
    torch.save({**read(), key: value}, "run/ckpt.pt")
    refused(capsys, train.main, [*RESUME, "--max_iters", "6"])


# --------------------------------------------------------------------------------------------------
# Every bad input is one line

COUNTS = ("n_ctx", "batch_size", "n_layer", "n_embd", "n_head", "n_block")
COUNTS += ("grad_accum", "eval_batches")
BAD = [
    *(f"--{name} {x}" for name in COUNTS for x in (0, -1, 10**9, "x", 1.5, "")),
    *(f"--{n} {x}" for n in ("max_iters", "eval_interval") for x in (0, -1, "x", 1.5, "")),
    *(f"--learning_rate {x}" for x in ("nan", "inf", "-1", "1e400", "x")),
    *("--min_lr nan", "--weight_decay -1", "--beta1 1", "--beta2 nan", "--grad_clip nan"),
    *("--dropout 1", "--dropout nan", "--dropout -0.1", "--warmup_iters -1", "--seed -1"),
    *(f"--seed {2**63}", f"--seed {10**30}", "--detail_bias nan", "--detail_bias 1e300"),
    *("--dataset tinystory", "--dataset none.txt", "--dataset .", "--dataset run"),
    *("--device tpu", "--device cuda", "--device cuda:7", "--device cuda:-1", "--device meta"),
    *("--device mps:0:0", "--dtype float16", "--residual wave", "--n_block 3", "--n_block 4"),
    *("--n_embd 15", "--n_embd 18 --n_head 6", "--n_head 3", "--compile maybe", "--resume 2"),
    *("--n_lay 3", "--unknown", "more", "--n_layer", "--n_layer 1_000_000_000 --n_block 7"),
    "--n_ctx 2600",
]


@pytest.mark.parametrize("flags", BAD)
def test_a_setting_that_cannot_work_is_named_in_one_line(home, monkeypatch, capsys, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("run").mkdir()
    name, _, value = flags.removeprefix("--").partition(" ")  # "--n_ctx " gives an empty value
    if name == "dataset":  # what is wrong with the file is said of its path
        name = value
    began = time.perf_counter()
    refused(capsys, train.main, [*TINY, *flags.split(" ")], name)
    assert not os.listdir("run") and time.perf_counter() - began < 3


@pytest.mark.parametrize("flag", ["--eval_batches", "--grad_accum"])
def test_a_batch_that_no_memory_holds_is_one_line(home, capsys, flag):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, before[1]))  # the starts alone take 160 GB
    try:
        refused(capsys, train.main, [*TINY, "--batch_size", "20_000", flag, "1_000_000"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_text_of_less_than_a_window_is_refused(home, capsys):
    for length in (10, 170):
        Path("a.txt").write_text(TEXT[:length])
        refused(capsys, train.main, TINY, "n_ctx=16 needs 18")
    Path("a.txt").write_text(TEXT[:171])  # its last tenth is 18 characters, n_ctx + 2
    assert status(train.main, [*TINY, "--max_iters", "1"]) == 0


@pytest.mark.parametrize(
    "flags, word",
    [
        *((f"--temperature {x}", "temperature") for x in ("0", "nan", "-1", "x", "-inf")),
        *((f"--top_k {x}", "top_k") for x in ("0", "-1", "x", "1.5")),
        *((f"--{n} {x}", n) for n in ("n_chars", "n_samples") for x in ("0", "-1", "x")),
        *(("--prompt the\u20accat", "'\u20ac'"), ("--prompt 0", "'0'"), ("--seed x", "seed")),
        *((f"--seed {10**30}", "seed"), (f"--seed -{10**30}", "seed")),
        *(("--out_dir nowhere", "nowhere"), ("--out_dir a.txt", "a.txt"), ("--promt x", "promt")),
    ],
)
def test_a_bad_sampling_argument_is_named_in_one_line(finished, capsys, flags, word):
    argv = ["--out_dir", "run", "--n_chars", "5", *flags.split(" ")]
    assert refused(capsys, sample.main, argv, word) == "", "the prompt is printed first"


@pytest.mark.parametrize(
    "flags, start, length",
    [
        *((["--prompt", text], text, len(text) + 5) for text in ("", TEXT[:300])),
        *((["--temperature", x], "", 5) for x in ("1e-3", "1e-45", "1e-300", "1e300", "inf")),
        *(([f"--{name}", x], "", 5) for name, x in (("seed", "-1"), ("top_k", str(10**30)))),
        (["--top_k", "1", "--n_chars", "40"], "", 40),  # past n_ctx
    ],
)
def test_unusual_sampling_arguments_work(finished, capsys, flags, start, length):
    assert status(sample.main, ["--out_dir", "run", "--n_chars", "5", *flags]) == 0
    text = capsys.readouterr().out
    assert text.startswith(start) and len(text) == length + 1


def test_the_same_seed_makes_the_same_text(finished, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        argv = ["--out_dir", "run", "--n_chars", "30", "--n_samples", "2", "--seed", seed]
        assert status(sample.main, argv) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and "-" * 80 in texts[0]


# --------------------------------------------------------------------------------------------------
# Properties

many = settings(max_examples=150, deadline=None, derandomize=True)
sizes = st.one_of(st.sampled_from([1, 2, 4, 8, 64]), st.integers(-2, 40), st.integers())
reals = st.one_of(st.floats(0, 1), st.floats(-5, 5), st.floats())


@many
@given(
    st.fixed_dictionaries(
        {"vocab_size": sizes},
        optional={
            **{n: sizes for n in ("n_ctx", "n_layer", "n_head", "n_embd", "n_block")},
            "residual": st.one_of(st.sampled_from(RESIDUALS), st.text(max_size=5)),
            "detail_bias": reals,
            "dropout": reals,
        },
    )
)
def test_any_config_works_or_is_refused_in_one_line(wanted):
    began = time.process_time()
    try:
        config = GPTConfig(**wanted)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        assert time.process_time() - began < 1
        return
    if config.n_layer <= 12 and max(config.n_embd, config.vocab_size, config.n_ctx) <= 128:
        logits, loss = GPT(config)(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1).long())
        assert logits.shape == (2, 1, config.vocab_size) and loss.isfinite()


some_bytes = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(str.encode),
    st.text("ab\r\n\ufeff\0\U0001f98a", max_size=60).map(str.encode),
)


@many
@given(some_bytes, st.one_of(st.none(), some_bytes))
def test_any_bytes_are_a_text_or_refused_in_one_line(tmp_path_factory, content, beside):
    path = tmp_path_factory.mktemp("bytes") / "a.txt"
    path.write_bytes(content)
    if beside is not None:
        path.with_name("a_valid.txt").write_bytes(beside)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train_ids, val_ids, chars = data.load(str(path))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    n = len(text) if beside is not None else len(text) * 9 // 10
    assert decoded(train_ids, chars) == text[:n]
    assert set(decoded(val_ids, chars)) <= set(chars) and len(chars) > 1


flag_names = [f"--{f}" for f in train.Settings.__dataclass_fields__]
values = st.one_of(
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.sampled_from(["", "wav", "pydoc", "true", "False", "-", "--", "nan", "1e9", "9" * 5000]),
    st.text(max_size=8),
)


@many
@given(st.lists(st.one_of(st.sampled_from(flag_names), values), max_size=8))
def test_any_command_line_works_or_is_refused_in_one_line(argv):
    def main(argv):
        train.check(train.Settings(**train.parse(argv)))

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = status(main, argv)
    assert code in ((0, None) if not said.getvalue() else (2,)), "-h exits with 0"
    assert len(said.getvalue().splitlines()) <= 1


# --------------------------------------------------------------------------------------------------
# Training


def test_a_few_steps_lower_the_loss_and_leave_a_log_and_two_checkpoints(home, capsys):
    assert run(train.main, [*TINY, "--max_iters", "40", "--eval_interval", "20"]) == 0
    (first, second) = log_rows()
    assert [row[0] for row in (first, second)] == ["20", "40"]
    assert float(second[2]) < float(first[2]) < math.log(len(set(TEXT)))
    assert files_in("run").keys() == {"best.pt", "ckpt.pt", "log.csv"}
    out = capsys.readouterr().out
    best = float(re.search(r"best validation loss ([\d.]+) nats \(([\d.]+) bits\)", out)[1])
    assert best == pytest.approx(float(second[2]), abs=1e-4)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    s = train.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(s, step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[60] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_gradient_accumulation_is_the_larger_batch(home):
    for name, argv in (("one", ["--batch_size", "8"]), ("two", ["--grad_accum", "2"])):
        assert run(train.main, [*TINY, *argv, "--out_dir", name]) == 0
    one, two = (read(f"{name}/ckpt.pt")["model"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_vectors_queries_and_biases_have_no_weight_decay(finished):
    groups = read()["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    n_matrix = 4 * 5 + 2  # qkv, proj, gate, up, down of each layer; embed and head
    assert [len(group["params"]) for group in groups] == [n_matrix, 2]


def test_a_compiler_that_fails_is_named_and_training_goes_on_without_it(home, monkeypatch, capsys):
    def broken(self):
        self.step = self.mix = None

    assert run(train.main, [*TINY, "--out_dir", "eager"]) == 0
    monkeypatch.setattr(GPT, "compile", broken)
    assert run(train.main, [*TINY, "--compile"]) == 0
    assert "torch.compile failed (TypeError: " in capsys.readouterr().out
    assert log_rows("run")[-1][:4] == log_rows("eager")[-1][:4]


def train_with_two_processes(argv):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launcher, str(Path(train.__file__).resolve()), *argv]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def test_two_processes_train_as_one(home):
    argv = [*TINY, "--grad_accum", "2", "--max_iters", "6", "--dtype", "float32"]
    assert run(train.main, [*argv, "--out_dir", "one"]) == 0
    train_with_two_processes([*argv, "--out_dir", "two"])
    one, two = log_rows("one"), log_rows("two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert [float(x) for x in a[:4]] == pytest.approx([float(x) for x in b[:4]], abs=2e-5)
    assert files_in("two").keys() == {"best.pt", "ckpt.pt", "log.csv"}


def test_dropout_is_drawn_anew_at_every_step(home, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    assert run(train.main, [*TINY, "--dropout", "0.5"]) == 0
    assert len(set(seeds)) >= 4  # TINY has four steps


def test_two_processes_resume_with_the_dropout_of_the_unbroken_run(home):
    argv = [*TINY, "--dropout", "0.5", "--learning_rate", "0.01", "--min_lr", "0.01"]
    train_with_two_processes(argv)
    train_with_two_processes([*argv, "--out_dir", "broken", "--max_iters", "2"])
    train_with_two_processes(["--out_dir", "broken", "--resume", "--max_iters", "4"])
    whole, broken = log_rows("run"), log_rows("broken")
    assert [row[:4] for row in whole] == [row[:4] for row in broken]


def test_a_batch_that_the_processes_cannot_share_is_refused(home, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(capsys, train.main, TINY, "batch_size=4", "3 processes")


def test_the_routing_map_has_a_row_for_each_sublayer_and_a_column_for_each_source(finished, capsys):
    assert run(sample.main, ["--out_dir", "run", "--routing"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["x0", "sum1", "pha1", "spl1", "sum2", "pha2", "spl2", "run"]
    rows = [line for line in lines[2:] if "%" not in line][:9]
    assert [row.split()[0] for row in rows] == ["attention", "MLP"] * 4 + ["output"]
    assert rows[0].split()[2:] == ["█100"]


def test_the_lesson_prints_the_bases_and_the_counts(capsys):
    wav.main()
    out = capsys.readouterr().out
    assert "split  +1 +1 -1 -1" in out
    assert "wav, detail_bias -100" in out
