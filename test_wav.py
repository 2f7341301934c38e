"""
What wav.py promises. `literal` states the method once more, as the equations stand: slow, and easy
to believe. After an edit of the method, repeat it in `literal`; what stays red is what you gave up.

    pytest test_wav.py
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import train
import wav
from wav import DETAILS, GPT, RESIDUALS, SIGNS, GPTConfig, Refused

# n_layer, layers_per_block; None is the default. Of 5, 7 and 13 layers the last block is shorter.
DEPTHS = [(2, None), (4, None), (5, None), (6, 3), (7, None), (12, None), (13, 3), (48, None)]
every = pytest.mark.parametrize("residual", RESIDUALS)
routed = pytest.mark.parametrize("residual", DETAILS)
at_depths = pytest.mark.parametrize("n_layer, layers_per_block", DEPTHS)


def make(residual="wav", n_layer=4, layers_per_block=None, trained=True, **settings):
    """A small model in float64; trained: all its weights are far from their start."""
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "n_ctx": 16, "n_head": 2, "n_embd": 16, **settings}
    config = GPTConfig(
        residual=residual, n_layer=n_layer, layers_per_block=layers_per_block, **shape
    )
    model = GPT(config).double()
    if trained:
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.fixture
def ids():
    return torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))


def rms(x):
    return x.square().mean(-1, keepdim=True).sqrt()


def literal(model, ids, hidden=None):
    """Logits (B, T, V), and the weights of each mixture, {name of a source: (B, T)}. A hidden kind
    is read only where there is no other."""
    config = model.config
    x = model.embed(ids)
    updates = []
    table = []
    for l in range(1, 2 * config.n_layer + 2):
        if config.residual == "standard":
            h = x + sum(updates)  # (1)
        else:
            sources = literal_sources(config, x, updates)
            logits = []
            for name, s in sources.items():
                kind = name.split()[0]
                c = 0.0
                if kind in DETAILS[config.residual]:
                    c = model.detail_bias[l - 1, DETAILS[config.residual].index(kind)]
                if kind == hidden:
                    c = -1e4
                logits.append((s / rms(s)) @ model.query[l - 1] + c)
            a = torch.stack(logits).softmax(0)
            h = sum(a_s[..., None] * s for a_s, s in zip(a, sources.values()))  # (2)
            table.append(dict(zip(sources, a)))
        if l <= 2 * config.n_layer:
            updates.append(model.sublayers[l - 1](h))
    return model.head(h / rms(h)), table


def literal_sources(config, x, updates):
    """All that can be read after these updates, by name."""
    sources = {"x0": x}
    if config.residual == "attnres":
        for i, u in enumerate(updates):
            sources[f"update {i + 1}"] = u  # (3)
        return sources
    layers = config.layers_per_block or {2: 2, 4: 2, 5: 2, 7: 2, 12: 2, 48: 6}[config.n_layer]
    S = 2 * layers
    for b in range(math.ceil(len(updates) / S)):
        block = updates[b * S : (b + 1) * S]
        total = sum(block)
        sources[f"sum {b + 1}"] = total  # (4)
        if len(block) == S:
            for kind in DETAILS[config.residual]:
                d = sum(SIGNS[kind](j, S) * u for j, u in enumerate(block))  # (5)
                sources[f"{kind} {b + 1}"] = d * (rms(total) / rms(d)).detach()  # (6)
    return sources


def loss_and_gradients(model, logits, ids):
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return loss, dict(zip(dict(model.named_parameters()), found))


# ----------------------------------------------------------------------------------------------
# The method


@at_depths
@every
def test_values_and_gradients_are_the_literal_ones(residual, n_layer, layers_per_block, ids):
    model = make(residual, n_layer, layers_per_block)
    logits, _ = model(ids)
    expected, _ = literal(model, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    _, gradients = loss_and_gradients(model, logits, ids)
    _, expected = loss_and_gradients(model, expected, ids)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-9 * expected[name].norm() + 1e-12, name


@at_depths
@routed
def test_the_map_shows_the_weights_that_were_used_by_name(residual, n_layer, layers_per_block, ids):
    model = make(residual, n_layer, layers_per_block)
    weights, names = model.routing(ids)
    _, table = literal(model, ids)
    assert weights.shape == (2 * n_layer + 1, len(names), 2, 16)
    assert names == list(table[-1])  # the output reads every source
    for row, expected in zip(weights, table):
        for name, weight in zip(names, row):
            torch.testing.assert_close(weight, expected.get(name, torch.zeros(2, 16).double()))


def test_the_signs_are_those_of_the_paper():
    phase = [SIGNS["phase"](j, 4) for j in range(4)]
    split = [SIGNS["split"](j, 4) for j in range(4)]
    assert phase == [+1, -1, +1, -1]  # attention minus MLP
    assert split == [+1, +1, -1, -1]  # first half minus second half
    assert isinstance(make().sublayers[0], wav.Attention) and DETAILS["wav"] == ("phase", "split")


@pytest.mark.parametrize("layers", [2, 4, 6, 8])
def test_sum_phase_and_split_are_orthogonal_in_blocks_of_an_even_number_of_layers(layers):
    signs = torch.tensor(GPTConfig(20, n_layer=24, layers_per_block=layers).signs())
    rows = torch.cat([torch.ones(1, 2 * layers), signs])
    assert torch.equal(rows @ rows.T, 2 * layers * torch.eye(3))


def test_an_update_that_all_sublayers_share_gives_no_detail():
    u = torch.randn(1, 2, 3, 64)
    nearly = u * (1 + 1e-7 * torch.tensor([3.0, -1.0, 0.0, 2.0])[:, None, None, None])
    for updates in (u.expand(4, -1, -1, -1), nearly):
        total = updates.sum(0)
        d = wav.details(make().float().signs, updates, total)
        assert (rms(d) < 1e-3 * rms(total)).all()


def test_a_detail_is_as_large_as_its_sum_and_no_gradient_flows_through_its_scale():
    updates = torch.randn(4, 2, 3, 8, dtype=torch.double, requires_grad=True)
    signs = make().signs
    total = updates.sum(0)
    d = wav.details(signs, updates, total)
    torch.testing.assert_close(rms(d), rms(total).expand(2, -1, -1, -1))  # token by token
    (gradient,) = torch.autograd.grad(d[0].sum(), updates)
    g = rms(total) / rms(torch.tensordot(signs, updates, 1)[0])
    expected = signs[0].view(4, 1, 1, 1) * g
    torch.testing.assert_close(gradient, expected.expand_as(gradient).detach())


@pytest.mark.parametrize("n_layer", [12, 13, 48])
@routed
def test_without_details_training_starts_from_the_standard_network(residual, n_layer, ids):
    settings = {"n_layer": n_layer, "trained": False, "detail_bias": -1e4}
    logits, _ = make(residual, **settings)(ids)
    standard, _ = make("standard", **settings)(ids)
    torch.testing.assert_close(logits, standard, rtol=1e-9, atol=1e-9)
    as_trained, _ = make(residual, **settings).float()(ids)  # 1e-6 in place of rms's floor fails
    torch.testing.assert_close(as_trained.double(), standard, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_layer, most", [(12, 19), (48, 20)])
def test_at_the_start_details_have_8_to_21_percent_of_the_weight(n_layer, most, ids):
    weights, names = make(n_layer=n_layer, trained=False).routing(ids)
    output = dict(zip(names, weights[-1].mean((1, 2)).tolist()))
    assert output["sum 1"] == pytest.approx(output["x0"], rel=1e-6)
    assert output["phase 1"] == pytest.approx(output["sum 1"] * math.exp(-2), rel=1e-6)
    assert output["split 2"] == pytest.approx(output["phase 1"], rel=1e-6)
    is_detail = torch.tensor([name.startswith(("phase", "split")) for name in names])
    share = 100 * weights[:, is_detail].sum(1).mean((1, 2))
    share = share[share > 0]  # of the readers that have details at all
    assert round(share.min().item()) == 8 and most - 1 < share.max() < most + 1


def test_wav_with_its_details_switched_off_is_block_attnres(ids):
    block, whole = make("block_attnres"), make("wav")
    off = torch.full_like(whole.detail_bias, -1e4)
    whole.load_state_dict({**block.state_dict(), "detail_bias": off})
    torch.testing.assert_close(whole(ids)[0], block(ids)[0], rtol=1e-12, atol=1e-12)


def test_in_attnres_blocks_change_nothing(ids):
    first, *others = (make("attnres", 7, layers)(ids)[0] for layers in (1, 2, 3, 4, 7, 9))
    for logits in others:
        torch.testing.assert_close(logits, first, rtol=1e-9, atol=1e-9)


def test_the_output_reads_every_block_and_layer_40_reads_79_terms(ids):
    weights, _ = make("attnres", 48, trained=False).routing(ids)
    n_source = (weights[:, :, 0, 0] > 0).sum(1)
    assert [n_source[l - 1] for l in (1, 79, 97)] == [1, 79, 97]  # 79: the attention of layer 40
    weights, _ = make("wav", 18, 2).routing(ids)
    n_source = (weights[:, :, 0, 0] > 0).sum(1)
    assert [n_source[l - 1] for l in (17, 18, 37)] == [13, 14, 28]  # 17: the attention of layer 9


def test_the_first_query_and_biases_without_details_get_no_gradient(ids):
    model = make()
    _, gradients = loss_and_gradients(model, model(ids)[0], ids)
    assert gradients["query"].abs().sum(1).gt(0).tolist() == [False] + [True] * 8
    assert gradients["detail_bias"].abs().sum(1).gt(0).tolist() == [False] * 4 + [True] * 5


def test_extra_parameters():
    count = {r: sum(p.numel() for p in make(r, 12).parameters()) for r in RESIDUALS}
    assert count["attnres"] - count["standard"] == 25 * 16
    assert count["block_attnres"] - count["standard"] == 25 * 16
    assert count["wav"] - count["standard"] == 25 * (16 + 2)


# ----------------------------------------------------------------------------------------------
# A fork


@pytest.mark.parametrize("kinds", [("split",), ("ends", "split", "phase")])
def test_a_detail_is_a_line_of_SIGNS_and_a_variant_a_line_of_DETAILS(kinds, monkeypatch, ids):
    monkeypatch.setitem(SIGNS, "ends", lambda j, S: +1 if S // 4 <= j < S - S // 4 else -1)
    monkeypatch.setitem(DETAILS, "new", kinds)
    monkeypatch.setattr(wav, "RESIDUALS", (*RESIDUALS, "new"))
    model = make("new", 5)
    expected, table = literal(model, ids)
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-9, atol=1e-9)
    assert model.routing(ids)[1] == list(table[-1])


def test_signs_that_do_not_add_up_to_zero_or_that_repeat_are_refused(monkeypatch):
    monkeypatch.setitem(SIGNS, "uneven", lambda j, S: +1 if j == 0 else -1)
    monkeypatch.setitem(SIGNS, "again", SIGNS["phase"])
    monkeypatch.setattr(wav, "RESIDUALS", (*RESIDUALS, "new"))
    for kinds, words in ((("uneven",), "uneven must add up to 0"), (("phase", "again"), "same")):
        monkeypatch.setitem(DETAILS, "new", kinds)
        with pytest.raises(Refused, match=words):
            make("new")
    monkeypatch.setitem(DETAILS, "new", ("split",))
    make("new", layers_per_block=1)  # one layer is enough where nothing repeats


def test_a_gain_that_a_fork_adds_keeps_its_start(monkeypatch):
    class MLP(wav.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.zeros(16, 16))

    monkeypatch.setattr(wav, "MLP", MLP)
    assert not make(trained=False).sublayers[1].gain.any()


def test_a_config_copied_to_another_depth_has_blocks_for_that_depth():
    config = dataclasses.replace(GPTConfig(20, n_layer=12), n_layer=48)
    assert (GPTConfig(20, n_layer=12).S, config.S, GPTConfig(20, n_layer=24).S) == (4, 12, 8)


# ----------------------------------------------------------------------------------------------
# The decoder


@every
def test_all_variants_start_from_the_same_numbers_and_these_are_gpt_2s(residual):
    state = make(residual, trained=False, n_embd=64).state_dict()
    for name, p in make("standard", trained=False, n_embd=64).state_dict().items():
        assert torch.equal(state[name], p), name
        std = 0.02 / math.sqrt(8) if name.endswith(("proj.weight", "down.weight")) else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.1), name
    assert not state.get("query", torch.zeros(1)).any()


@every
def test_the_future_is_not_seen(residual, ids):
    model = make(residual)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 20
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not before[:, 9:].isclose(after[:, 9:]).all(-1).any()


@every
def test_with_a_cache_the_logits_are_the_same(residual, ids):
    model = make(residual, 5)
    cache = {}
    parts = [model(ids[:, :10], cache=cache)[0]]
    parts += [model(ids[:, t : t + 1], cache=cache)[0] for t in range(10, 16)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids)[0])
    with pytest.raises(Refused, match="17 positions exceed n_ctx=16"):
        model(ids[:, :1], cache=cache)


def test_a_cache_takes_one_id_at_a_time(ids):
    model = make()
    cache = {}
    model(ids[:, :4], cache=cache)
    with pytest.raises(Refused, match="2 new ids"):  # the second would not be masked from the first
        model(ids[:, 4:6], cache=cache)


def test_attention_sees_distances_and_a_sublayer_normalizes_what_it_reads(monkeypatch):
    attention, mlp = make(n_head=1).sublayers[:2]
    h = torch.randn(1, 5, 16).double()
    for sublayer in (attention, mlp):
        torch.testing.assert_close(sublayer(100 * h), sublayer(h))
    seen = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **_: seen.append(q @ k.mT) or v
    )
    # One vector at all positions: RoPE alone tells them apart.
    attention(h[:, :1].expand(1, 16, 16))
    dots = seen[0][0, 0]  # (T, T)
    for distance in range(-15, 16):
        diagonal = dots.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert dots[0].std() > 0.01


def test_the_mlp_is_swiglu_with_about_as_many_weights_as_4_D_without_a_gate():
    mlp = make(n_embd=64).sublayers[1]
    h = torch.randn(2, 3, 64).double()
    gate, up = (h / rms(h) @ layer.weight.T for layer in (mlp.gate, mlp.up))
    torch.testing.assert_close(mlp(h), (gate * gate.sigmoid() * up) @ mlp.down.weight.T)
    assert sum(p.numel() for p in mlp.parameters()) == pytest.approx(2 * 4 * 64 * 64, rel=0.04)


def test_the_loss_is_in_nats_per_token(ids):
    logits, loss = make()(ids, ids)
    p = logits.softmax(-1).gather(2, ids[..., None])
    torch.testing.assert_close(loss, -p.log().mean())


def test_dropout_is_for_training_alone(ids):
    model = make(dropout=0.5)
    h = torch.randn(4, 16, 16).double()
    for sublayer in model.sublayers[:2]:
        assert sublayer(h).eq(0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


@every
def test_under_autocast_every_sublayer_reads_fp32_and_the_logits_are_near(residual, ids):
    model = make(residual, 12, trained=False).float()
    for p in model.parameters():
        p.data *= 3
    exact, _ = model(ids)
    dtypes = []
    for sublayer in model.sublayers:
        sublayer.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(ids)
    assert set(dtypes) == {torch.float32}
    assert (logits - exact).norm() < 0.02 * exact.norm()


def test_autocast_does_not_round_the_differences_of_a_detail():
    updates = torch.randn(4, 2, 3, 16)
    exact = wav.details(make().signs, updates.double(), updates.double().sum(0))
    with torch.autocast("cpu", torch.bfloat16):
        d = wav.details(make().float().signs, updates, updates.sum(0))
    torch.testing.assert_close(d, exact.float(), rtol=1e-4, atol=1e-4)


def test_compiled_parts_compute_the_same(ids, monkeypatch):
    for name in ("mix", "merge", "details"):
        monkeypatch.setattr(wav, name, getattr(wav, name))  # put back at the end
    model = make(n_layer=3)
    expected, _ = model(ids)
    _, expected_gradients = loss_and_gradients(model, expected, ids)
    train.compile_parts(model)
    logits, _ = model(ids)
    _, gradients = loss_and_gradients(model, logits, ids)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_stream_draws_from_the_k_likeliest():
    model = make().eval()
    idx = torch.zeros(200, 1, dtype=torch.long)
    likeliest = model(idx)[0][0, -1].topk(2).indices
    drawn = next(model.stream(idx, 1, temperature=100.0, top_k=2))
    assert set(drawn.flatten().tolist()) == set(likeliest.tolist())
    assert next(model.stream(idx, 1, temperature=0)).eq(likeliest[0]).all()
    many = next(model.stream(torch.zeros(5000, 1, dtype=torch.long), 1, temperature=1.0))
    share = many.flatten().bincount(minlength=20) / 5000
    torch.testing.assert_close(
        share.double(), model(idx[:1])[0][0, -1].softmax(-1), rtol=0, atol=0.03
    )


def test_stream_goes_on_beyond_the_context():
    model = make().eval()
    ids = torch.zeros(1, 20, dtype=torch.long)  # a prompt longer than n_ctx: its end counts
    for new in model.stream(ids, 30, temperature=0):
        ids = torch.cat([ids, new], 1)
    assert ids.shape == (1, 50)
    assert ids[0, 20] == model(ids[:, 4:20])[0][0, -1].argmax()
    assert ids[0, 21] == model(ids[:, 13:21])[0][0, -1].argmax()  # from the last 8 on
    with pytest.raises(Refused, match="the prompt is empty"):
        next(model.stream(ids[:, :0], 1))


BAD = [
    ({"n_layer": 0}, "n_layer=0 must be at least 1"),
    ({"n_embd": 12, "n_head": 4}, "n_embd=12 must be a multiple of 2 [*] n_head=8, for RoPE"),
    ({"residual": "none"}, "residual='none' must be one of standard, attnres, block_attnres, wav"),
    ({"dropout": 1.0}, "dropout=1.0 must be from 0 to below 1"),
    ({"layers_per_block": 0}, "layers_per_block=0 must be at least 1"),
    ({"layers_per_block": 1}, "layers_per_block=1 makes two of .'phase', 'split'. the same"),
    ({"layers_per_block": 13}, "layers_per_block=13 exceeds n_layer=12"),
    ({"n_layer": 1}, "layers_per_block=2 exceeds n_layer=1"),
]


@pytest.mark.parametrize("wrong, words", BAD)
def test_what_cannot_work_is_refused_in_one_line(wrong, words):
    with pytest.raises(Refused, match=words):
        GPTConfig(20, **wrong)
