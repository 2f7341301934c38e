"""
The claims of the method, one test each, and of what surrounds it in wav.py.

Every form of the model is held against `literal`, which writes the equations down term by term, in
float64. Most tests run for each entry of wav.KINDS. What holds for any residual, a fork's own too,
runs for each of wav.RESIDUALS. The tests of the scripts: .ci/test_scripts.py.
"""

import functools
import itertools
import math
import runpy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import train
import wav
from wav import GPT, KINDS, RESIDUALS, SIGNS, GPTConfig, Refused

SMALL = {"vocab_size": 11, "n_ctx": 16, "n_layer": 6, "n_head": 2, "n_embd": 12, "n_block": 3}
routed = pytest.mark.parametrize("residual", KINDS)
every = pytest.mark.parametrize("residual", RESIDUALS)


def make(residual, dtype=torch.float64, trained=True, **changes):
    """A small model; `trained` moves its queries, biases and weights far from their start."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(residual=residual, **{**SMALL, **changes})).to(dtype)
    for name, p in model.named_parameters() if trained else ():
        p.data += (1.0 if name in ("query", "detail_bias") else 0.3) * torch.randn_like(p)
    return model.eval()


def some_ids(B=2, T=16, V=11):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def rms(x):
    return x.square().mean(-1, keepdim=True).sqrt()


def literal_sources(model, x0, updates):
    """What the next mixing point reads: {name: source (B, T, D)}, listed anew each time."""
    config, sources = model.config, {"x0": x0}
    S = 1 if config.residual == "attnres" else 2 * math.ceil(config.n_layer / config.n_block)
    for first in range(0, len(updates), S):
        block = updates[first : first + S]
        whole, total = len(block) == S, sum(block)  # the last block may stay short
        for kind in KINDS[config.residual] if whole else ("sum",):
            source = sum(SIGNS[kind](j, S) * u for j, u in enumerate(block))  # (3), (4), (5)
            g = (rms(total) / rms(source)).detach()  # (6)
            sources[f"{kind} {first // S + 1 if whole else 'running'}"] = g * source
    return sources


def literal(model, idx):
    """The method by the letter: logits, and for each mixing point its weights {name: (B, T)}."""
    x0, updates, read = model.embed(idx), [], []
    for l in range(len(model.sublayers) + 1):
        if model.config.residual not in KINDS:
            h = sum(updates, x0)  # (1)
        else:
            sources = literal_sources(model, x0, updates)
            logits = [(s / rms(s)) @ model.query[l] for s in sources.values()]
            for i, name in enumerate(sources):
                if name.split()[0] in model.details:
                    logits[i] = (
                        logits[i] + model.detail_bias[l, model.details.index(name.split()[0])]
                    )
            weights = torch.stack(logits).softmax(0)  # (2)
            h = sum(w[..., None] * s for w, s in zip(weights, sources.values()))
            read.append(dict(zip(sources, weights)))
        if l < len(model.sublayers):
            updates.append(model.sublayers[l](h))
    return (h / rms(h)) @ model.head.weight.T, read


def values_and_gradients(model, logits, idx):
    loss = F.cross_entropy(logits.flatten(0, 1), idx.roll(-1, 1).flatten())
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [*named.values()])
    return {"logits": logits, **dict(zip(named, gradients))}


def assert_same(got, expected, share=1e-9):
    for name, e in expected.items():
        assert (got[name] - e).norm() <= share * e.norm() + 1e-12, name


# --------------------------------------------------------------------------------------------------
# The method


def test_the_signs_of_a_block_of_two_layers_are_those_of_the_paper():
    assert make("block_attnres").basis.tolist() == [[1, 1, 1, 1]]
    assert make("wav").basis.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]
    assert make("attnres").basis.tolist() == [[1]]


@pytest.mark.parametrize("n_layer", [2, 4, 6, 8])
def test_details_are_zero_sum_and_orthogonal_in_blocks_of_an_even_number_of_layers(n_layer):
    W = make("wav", n_layer=n_layer, n_block=1).basis
    assert (W @ W.T).equal(2 * n_layer * torch.eye(3, dtype=W.dtype))
    assert W.sum(1).tolist() == [2 * n_layer, 0, 0]


def test_in_an_odd_number_of_layers_split_cuts_the_middle_one_and_overlaps_with_phase():
    W = make("wav", n_layer=3, n_block=1).basis
    assert W[2].tolist() == [1, 1, 1, -1, -1, -1]
    assert (W @ W.T).tolist() == [[6, 0, 0], [0, 6, 2], [0, 2, 6]]
    assert [SIGNS["phase"](j, 2) for j in (0, 1)] == [SIGNS["split"](j, 2) for j in (0, 1)]


UNEVEN = [(5, 2), (7, None), (13, None), (13, 3)]  # the last block is shorter


@pytest.mark.parametrize("n_layer, n_block", [(2, 1), (4, 2), (6, 3), (12, 4), (48, 8), *UNEVEN])
@pytest.mark.parametrize("residual", ["standard", *KINDS])
def test_fast_and_plain_equal_the_literal_in_values_and_gradients(residual, n_layer, n_block):
    model, idx = make(residual, n_layer=n_layer, n_block=n_block), some_ids()
    expected = values_and_gradients(model, literal(model, idx)[0], idx)
    assert_same(values_and_gradients(model, model(idx)[0], idx), expected)
    if residual in KINDS:
        model.route = model.route_plain
        assert_same(values_and_gradients(model, model(idx)[0], idx), expected)


def test_the_form_that_runs_is_the_one_that_GPT_route_names(monkeypatch):
    model, idx = make("wav"), some_ids()
    monkeypatch.setattr(wav, "route_fast", lambda model, x, cache: x)
    assert model(idx)[0].equal(model.head(wav.rms_norm(model.embed(idx))))
    monkeypatch.setattr(GPT, "route", lambda self, x, cache=None: self.route_plain(x, cache))
    torch.testing.assert_close(model(idx)[0], literal(model, idx)[0], rtol=1e-9, atol=1e-9)


def test_the_attention_of_layer_40_reads_79_terms_and_the_output_of_48_layers_97():
    weights, _ = make("attnres", trained=False, n_layer=48, n_block=8).routing(some_ids())
    assert isinstance(make("attnres", n_layer=48, n_block=8).sublayers[78], wav.Attention)
    assert [int((weights[l - 1, :, 0, 0] > 0).sum()) for l in (1, 79, 97)] == [1, 79, 97]


@pytest.mark.parametrize(
    "kinds", [("sum", "split"), ("phase", "sum"), ("split",), ("sum", "phase", "split", "twist")]
)
def test_another_variant_is_a_line_of_the_table(monkeypatch, kinds):
    monkeypatch.setitem(SIGNS, "twist", lambda j, S: SIGNS["phase"](j, S) * SIGNS["split"](j, S))
    monkeypatch.setitem(KINDS, "new", kinds)
    monkeypatch.setattr(wav, "RESIDUALS", (*RESIDUALS, "new"))
    model, idx = make("new"), some_ids()
    assert model.basis.shape == (len(kinds), 4)
    assert model.detail_bias.shape == (13, len(kinds) - ("sum" in kinds))
    expected = values_and_gradients(model, literal(model, idx)[0], idx)
    assert_same(values_and_gradients(model, model(idx)[0], idx), expected)
    names = [f"{kind} {block}" for block in (1, 2, 3) for kind in kinds]
    assert model.routing(idx)[1] == ["x0", "sum running", *names]
    monkeypatch.setitem(KINDS, "new", ("sum", "nowhere"))
    with pytest.raises(Refused, match="new offers .*nowhere.* but SIGNS knows"):
        make("new")


@pytest.mark.parametrize("n_layer", [12, 13, 48])
def test_all_variants_are_the_same_network_at_init(n_layer):
    changes = {"n_layer": n_layer, "n_block": None, "detail_bias": -1000.0}  # without details
    logits = {
        r: make(r, torch.float32, False, **changes)(some_ids())[0] for r in ("standard", *KINDS)
    }
    for residual in KINDS:
        difference = (logits[residual] - logits["standard"]).abs().max()
        assert difference < 2e-6 * logits["standard"].abs().max() + 1e-6, (residual, difference)


@pytest.mark.parametrize("n_layer, n_block", [(12, None), (13, None), (48, None), (48, 24)])
def test_at_the_default_start_a_detail_weighs_exp_of_minus_2_and_all_hold_8_to_21_percent(
    n_layer, n_block
):
    model = make("wav", trained=False, n_layer=n_layer, n_block=n_block)
    weights, names = model.routing(some_ids(T=2))
    output = dict(zip(names, weights[-1]))
    torch.testing.assert_close(output["phase 2"] / output["sum 1"], math.exp(-2) + 0 * output["x0"])
    held = weights[:, [name.startswith(("phase", "split")) for name in names]].sum(1)
    held = 100 * held[held > 0]  # of the readers that have details at all
    assert held.min().round() == 8 and 18 < held.max().round() <= 21
    assert n_block is None or held.max().round() == 21


def test_the_norm_does_not_see_scale_down_to_the_size_of_a_mean_over_97_sources():
    x = noise(4, 64).float()
    for scale in (1.0, 1e-4, 1e-8):
        torch.testing.assert_close(wav.rms_norm(scale * x), x / rms(x), rtol=1e-5, atol=1e-6)
    assert wav.rms_norm(torch.zeros(2, 8)).equal(torch.zeros(2, 8))
    assert (
        wav.rms(x.bfloat16()).dtype == torch.float32
        and wav.rms(x.double()).dtype == x.double().dtype
    )
    model = make("attnres", trained=False, n_layer=48, n_block=8, n_embd=128)
    mean_square = model.route(model.embed(some_ids())).square().mean().item()
    assert mean_square == pytest.approx(1e-7, rel=0.5)


def test_wav_with_its_details_switched_off_is_block_attnres():
    block, whole = make("block_attnres"), make("wav")
    off = {"detail_bias": torch.full_like(whole.detail_bias, -1e4)}
    whole.load_state_dict({**block.state_dict(), **off})
    torch.testing.assert_close(whole(some_ids())[0], block(some_ids())[0], rtol=1e-12, atol=1e-12)


def test_the_blocks_of_attnres_are_only_a_schedule():
    models = [make("attnres", n_layer=7, n_block=n) for n in (1, 2, 3, 4, 7)]
    assert [model.block_size for model in models] == [1] * 5
    first, *others = (model(some_ids())[0] for model in models)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


def offers(updates):
    """What a block offers, plainly and at once: two lists of sum, phase, split."""
    S, kinds = len(updates), KINDS["wav"]
    plain = wav.offer(kinds, updates, S, 7)
    assert [*plain] == [(kind, 7) for kind in kinds]
    basis = make("wav", updates[0].dtype, n_layer=S // 2, n_block=1).basis
    return [*plain.values()], [*wav.offer_at_once(basis, updates, sum(updates))[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_updates_give_no_detail_and_what_rounding_leaves_of_them_is_not_made_one(dtype):
    update = noise(2, 3, 8).to(dtype)
    nearly = [update * (1 + 1e-7 * n) for n in (3, -1, 0, 2, -2, 1)]
    for updates in ([update] * 6, nearly):
        for total, *details in offers(updates):
            torch.testing.assert_close(total, 6 * update)
            assert all((rms(detail) < 1e-3 * rms(total)).all() for detail in details)


def test_a_detail_has_the_rms_of_its_block_sum_and_its_scale_carries_no_gradient():
    updates = [*noise(4, 2, 3, 8).requires_grad_().unbind()]
    for sources in offers(updates):
        for source, signs in zip(sources, make("wav").basis):
            torch.testing.assert_close(rms(source), rms(sum(updates)))
            g = rms(sum(updates)) / rms(sum(sign * u for sign, u in zip(signs, updates)))
            seed = noise(2, 3, 8).flip(0)
            got = torch.autograd.grad(source, updates, seed, retain_graph=True)
            for sign, gradient in zip(signs, got):  # linear in the updates, g a constant
                torch.testing.assert_close(gradient, sign * g.detach() * seed)
    at_once, inv_rms = wav.offer_at_once(make("wav").basis, updates, sum(updates))
    torch.testing.assert_close(inv_rms, 1 / rms(at_once))  # rms(g d) = g rms(d)


def test_the_bias_is_learned_for_each_reader_and_kind_shared_by_all_blocks_and_else_zero():
    model = make("wav")
    c = model.bias([("x0", ""), ("phase", 1), ("sum", 2), ("split", 2), ("phase", 3)])
    phase, split = model.detail_bias.T
    assert c.equal(torch.stack([0 * phase, phase, 0 * phase, split, phase], dim=1))
    assert not make("block_attnres").bias([("x0", ""), ("sum", 1)]).any()


@routed
def test_at_init_the_weights_are_uniform_and_details_weigh_exp_of_their_bias(residual):
    weights, names = make(residual, trained=False, detail_bias=-1.5).routing(some_ids())
    share = [math.exp(-1.5) if n.split()[0] not in ("x0", "sum") else 1.0 for n in names]
    share = torch.tensor(share, dtype=weights.dtype)[:, None, None].expand_as(weights[0])
    for row in weights:
        expected = torch.where(row > 0, share, 0)
        torch.testing.assert_close(row, expected / expected.sum(0), rtol=1e-6, atol=1e-6)


@routed
def test_the_map_shows_the_weights_by_which_forward_mixed(residual):
    model, idx, inputs, updates = make(residual), some_ids(), [], []
    for sublayer in model.sublayers:
        sublayer.register_forward_hook(lambda _, i, u: (inputs.append(i[0]), updates.append(u))[1])
    model(idx)
    inputs, updates = [*inputs], [*updates]  # routing goes through the hooks again
    weights, names = model.routing(idx)
    _, expected = literal(model, idx)
    for l, row in enumerate(expected):
        shown = dict(zip(names, weights[l]))
        for name in names:
            torch.testing.assert_close(shown[name], row.get(name, torch.zeros_like(shown[name])))
        if l < len(model.sublayers):
            sources = literal_sources(model, model.embed(idx), updates[:l])
            mixed = sum(shown[name][..., None] * source for name, source in sources.items())
            torch.testing.assert_close(inputs[l], mixed, rtol=1e-8, atol=1e-8)


@routed
def test_the_output_reads_every_block_and_not_only_the_last(residual):
    weights, names = make(residual, trained=False).routing(some_ids())
    assert all((w > 0.01).all() for w, name in zip(weights[-1], names) if name != "sum running")


@pytest.mark.parametrize("training", [True, False])
def test_the_map_is_read_without_dropout_and_leaves_the_model_as_it_was(training):
    model, idx = make("wav", torch.float32, dropout=0.5), some_ids()
    expected, _ = model.routing(idx)
    with torch.autocast("cpu", torch.bfloat16):  # in full precision there, too
        assert model.train(training).routing(idx)[0].equal(expected)
    assert model.training == training and model.sublayers[0].training == training


@pytest.mark.parametrize("share", [1e-2, math.nan])
@routed
def test_there_is_no_map_of_weights_that_nobody_mixed_with(residual, share):
    model, idx = make(residual).train(), some_ids()
    model.route = lambda x, cache=None: model.route_plain(x, cache) * (1 + 1e-4)
    model.routing(idx)  # so far rounding may take them apart
    model.route = lambda x, cache=None: model.route_plain(x, cache) * (1 + share)
    with pytest.raises(Refused, match="GPT.route is .* off route_plain.*edit route_fast too"):
        model.routing(idx)
    assert model.training
    with pytest.raises(Refused, match="residual='standard' has no mixing weights"):
        make("standard").routing(idx)


def test_attention_sees_the_order_of_positions_and_their_distances_alone(monkeypatch):
    attention, h, seen = make("standard", n_head=1).sublayers[0], noise(1, 5, 12), []
    swapped = attention(h[:, [1, 0, 2, 3, 4]])
    assert not attention(h)[:, -1].isclose(swapped[:, -1]).any()
    see = lambda q, k, v, **_: seen.append(q @ k.mT) or v
    monkeypatch.setattr(F, "scaled_dot_product_attention", see)
    attention(noise(1, 1, 12).expand(1, 16, 12))  # the same vector at all positions, turned by RoPE
    (dots,) = seen[0][0]  # (16, 16)
    for diagonal in (dots.diagonal(distance) for distance in range(-15, 16)):
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    assert dots[0].std() > 0.01 * dots.abs().mean()


@every
def test_a_change_at_one_position_changes_no_logit_before_it(residual):
    model, idx = make(residual), some_ids()
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    assert before[:, :9].equal(after[:, :9])
    assert not before[:, 9:].isclose(after[:, 9:]).all(-1).any()


@routed
def test_the_first_query_has_one_source_so_its_gradient_is_zero(residual):
    model = make(residual)
    model(some_ids(), some_ids())[1].backward()
    assert not model.query.grad[0].any()
    assert model.query.grad[1:].abs().sum(1).min() > 0


def test_routing_adds_a_vector_and_a_bias_per_detail_for_each_sublayer_and_the_output():
    count = {r: sum(p.numel() for p in make(r).parameters()) for r in RESIDUALS}
    for residual, kinds in KINDS.items():
        assert count[residual] - count["standard"] == 13 * (12 + len({*kinds} - {"sum"}))


@every
def test_the_same_seed_gives_the_same_weights_whatever_the_residual(residual):
    state, standard = make(residual, trained=False).state_dict(), make("standard", trained=False)
    for name, p in standard.state_dict().items():
        assert state[name].equal(p), name
    for name, start in (("query", 0.0), ("detail_bias", -2.0)):
        assert (state.get(name, torch.tensor(start)) == start).all()
    for name, p in make(residual, torch.float32, False, n_embd=96).named_parameters():
        if name.endswith("weight"):  # what adds to the stream starts smaller, by sqrt(2L)
            last = name.endswith(("proj.weight", "down.weight"))
            assert p.std().item() == pytest.approx(0.02 / 12**0.5 if last else 0.02, rel=0.1), name


@every
def test_what_a_fork_adds_keeps_its_own_start_and_moves_nobody_elses(monkeypatch, residual):
    class Attention(wav.Attention):
        def __init__(self, config):
            super().__init__(config)
            self.mine = torch.nn.Parameter(torch.randn(3))
            self.layer = torch.nn.Linear(5, 5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, after = make(residual, trained=False).state_dict(), torch.rand(1)
    monkeypatch.setattr(wav, "Attention", Attention)
    with pytest.warns(UserWarning) as warned:
        forked = make(residual, trained=False).state_dict()
    said = "init_weights does not know sublayers.{}.layer.weight: it keeps the start it has"
    assert [str(warning.message) for warning in warned] == [said.format(i) for i in range(0, 12, 2)]
    assert all(forked[name].equal(p) for name, p in expected.items()) and torch.rand(1) == after
    assert forked["sublayers.0.mine"].std() > 0.1 and forked["sublayers.0.layer.bias"].any()


def test_the_gated_mlp_has_about_as_many_weights_as_one_4_D_wide_without_the_gate():
    for D in (64, 128, 512):
        mlp = make("standard", n_layer=1, n_block=1, n_embd=D).sublayers[1]
        assert sum(p.numel() for p in mlp.parameters()) == pytest.approx(2 * 4 * D * D, rel=0.04)


@every
def test_shapes_and_the_names_that_a_fork_relies_on(residual):
    model, idx = make(residual), some_ids()
    assert model(idx)[0].shape == (2, 16, 11) and model(idx)[1] is None
    logits, loss = model(idx, idx)
    nats = logits.exp().sum(-1).log() - logits.gather(2, idx[..., None])[..., 0]
    torch.testing.assert_close(loss, nats.mean())
    assert model.embed.weight.shape == model.head.weight.shape == (11, 12)
    assert len(model.sublayers) == 12
    for h, sublayer in ((noise(2, 5, 12), sublayer) for sublayer in model.sublayers):
        assert sublayer(h).shape == (2, 5, 12)
        torch.testing.assert_close(sublayer(100 * h), sublayer(h))  # PreNorm does not see scale
    if residual in KINDS:
        assert model.query.shape == (13, 12)
    if residual == "wav":
        assert model.detail_bias.shape == (13, len(KINDS["wav"]) - 1)


@pytest.mark.parametrize("form", ["route", "route_plain"])
@every
def test_under_autocast_sources_are_fp32_as_the_stream_is_and_products_bf16(
    monkeypatch, residual, form
):
    model, idx = make(residual, torch.float32, trained=False), some_ids()
    if residual in KINDS:
        model.query.data.normal_()
        model.route = getattr(model, form)
    exact, calls = model(idx)[0], []
    forms = {name: getattr(wav, name) for name in ("mix", "offer", "offer_at_once")}

    def spy(name, *args):
        args = [[*arg] if isinstance(arg, list) else arg for arg in args]  # updates grow
        calls.append((name, args, forms[name](*args)))
        return calls[-1][2]

    for name in ("mix", "offer", "offer_at_once"):
        monkeypatch.setattr(wav, name, functools.partial(spy, name))
    updated = []  # what each sublayer, then the head, read and made of it
    for module in (*model.sublayers, model.head):
        module.register_forward_hook(lambda _, h, u: updated.append((h[0].dtype, u.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    assert updated == [(torch.float32, torch.bfloat16)] * 13 and loss.dtype == torch.float32
    assert bool(calls) == (residual in KINDS)
    for name, args, got in calls:
        if name == "mix":
            (sources, inv_rms, *_), (mixtures, lses) = args, got
            assert {x.dtype for x in (sources, inv_rms, *mixtures, *lses)} == {torch.float32}
        else:  # sums are not rounded
            (updates,) = [arg for arg in args if isinstance(arg, list)]
            assert {u.dtype for u in updates} == {torch.float32}
            torch.testing.assert_close(got, forms[name](*args), rtol=0, atol=0)
    assert (logits - exact).std() < 0.03 * exact.std()


@pytest.mark.parametrize("residual, form", [*((r, "route") for r in RESIDUALS), ("wav", "plain")])
def test_compiled_regions_have_no_break_and_do_not_grow_with_depth(monkeypatch, residual, form):
    compile, counts = torch.compile, []
    for n_layer in (13, 49):  # the last block is shorter: other shapes
        torch._dynamo.reset()
        counter = CompileCounter()
        how = {"backend": counter, "fullgraph": True}  # a graph break is an error
        with monkeypatch.context() as patch:
            for name in ("mix", "merge", "offer_at_once"):
                patch.setattr(wav, name, getattr(wav, name))  # to be put back
            patch.setattr(GPT, "route", GPT.route if form == "route" else GPT.route_plain)
            patch.setattr(torch, "compile", lambda f, how=how: compile(f, **how))
            model, idx = make(residual, torch.float32, n_layer=n_layer, n_block=None), some_ids()
            expected = values_and_gradients(model, model(idx)[0], idx)
            train.compile_parts(model)
            got = values_and_gradients(model, model(idx)[0], idx)
        assert_same(got, expected, share=1e-3)
        counts.append(counter.frame_count)
    assert 0 < counts[1] <= counts[0], counts


@every
def test_dropout_acts_in_training_alone(residual):
    model, idx = make(residual, dropout=0.5), some_ids()
    assert model(idx)[0].equal(model(idx)[0])
    model.train()
    assert not model(idx)[0].equal(model(idx)[0])
    zeros = torch.stack(
        [(sublayer(noise(2, 16, 12)) == 0).double() for sublayer in model.sublayers]
    )
    assert zeros.mean((1, 2, 3)).sub(0.5).abs().max() < 0.2  # half of each update


def test_dropout_drops_attention_weights_too(monkeypatch):
    attention, h = make("standard", dropout=0.5).train().sublayers[0], noise(2, 5, 12)
    monkeypatch.setattr(F, "dropout", lambda update, *_: update)
    assert not attention(h).equal(attention(h)) and attention.eval()(h).equal(attention(h))


def lesson(capsys):
    """The exit status of `python wav.py`, and what it prints."""
    return wav.main(), capsys.readouterr().out


def test_the_lesson_finds_nothing_wrong_and_shows_signs_sizes_and_the_default_start(capsys):
    status, out = lesson(capsys)
    assert status == 0 and out.endswith("all as it should be\n") and "WRONG" not in out
    assert "split                       +1        +1        -1        -1" in out
    shown = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert all(float(shown[residual][1]) < 1e-12 for residual in KINDS)  # without details
    assert 0.1 < float(shown["wav"][2]) < 0.3  # as it starts by default
    assert all(float(shown[residual][3]) < 1e-9 for residual in KINDS)
    for residual in RESIDUALS:
        n = sum(p.numel() for p in GPT(GPTConfig(65, residual=residual)).parameters())
        assert shown[residual][0] == f"{n:,}"


@pytest.mark.parametrize("wrong", [False, True])
def test_python_wav_py_exits_with_the_verdict(monkeypatch, wrong):
    if wrong:  # no two models start from the same weights
        monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(wav.__file__, run_name="__main__")
    assert end.value.code == wrong


def test_a_fast_form_that_errs_in_a_shorter_last_block_alone_makes_the_lesson_exit_1(
    monkeypatch, capsys
):
    fast = wav.route_fast
    errs = lambda model: len(model.sublayers) % model.chunk > 0
    monkeypatch.setattr(wav, "route_fast", lambda m, x, cache: (fast(m, x, cache), x)[errs(m)])
    status, out = lesson(capsys)
    assert status == 1 and all(
        f"{residual}: GPT.route and route_plain" in out for residual in KINDS
    )


@pytest.mark.parametrize("eps", [1e-6, math.nan])
def test_a_larger_eps_in_the_norm_makes_the_lesson_exit_1(monkeypatch, capsys, eps):
    monkeypatch.setattr(wav, "rms", lambda x: (x.square().mean(-1, keepdim=True) + eps).sqrt())
    status, out = lesson(capsys)
    assert status == 1 and "an eps too large" in out
    assert all(f"{residual} does not start as standard" in out for residual in KINDS)
    if math.isnan(eps):
        assert all(f"{residual}: GPT.route and route_plain differ" in out for residual in KINDS)


def test_a_source_counted_twice_makes_the_lesson_exit_1(monkeypatch, capsys):
    merge = wav.merge
    twice = lambda h, lse, running, query: merge(h, lse, torch.cat([running, running]), query)
    monkeypatch.setattr(wav, "merge", twice)
    status, out = lesson(capsys)
    assert status == 1 and "counted twice" in out
    assert all(f"{residual} does not start as standard" in out for residual in KINDS)


def test_a_variant_that_offers_no_sum_makes_the_lesson_exit_1(monkeypatch, capsys):
    monkeypatch.setitem(KINDS, "new", ("phase", "split"))
    monkeypatch.setattr(wav, "RESIDUALS", ("standard", "new"))
    status, out = lesson(capsys)
    assert status == 1 and "new does not start as standard" in out
    assert "the sum of a block not offered" in out and "GPT.route" not in out


def test_an_additive_residual_of_a_fork_may_start_as_it_likes(monkeypatch, capsys):
    class Zero(GPT):
        def forward(self, idx, targets=None, cache=None):
            logits, loss = super().forward(idx, targets, cache)
            return (0 * logits if self.config.residual == "zero" else logits), loss

    monkeypatch.setattr(wav, "RESIDUALS", ("standard", "zero"))
    monkeypatch.setattr(wav, "GPT", Zero)
    status, out = lesson(capsys)
    assert status == 0 and "zero" in out
    with pytest.raises(Refused, match="residual='zero' has no mixing weights"):
        GPT(GPTConfig(65, residual="zero")).routing(some_ids())


EDITS = {  # the same values at the start, where queries are zero; the same values, other gradients
    "values": lambda model, x: model.query[-1] ** 2,
    "gradients": lambda model, x: x - x.detach(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("owner, form", [(GPT, "route_plain"), (wav, "route_fast")])
def test_one_form_edited_alone_makes_the_lesson_exit_1_and_its_cure_0(
    monkeypatch, capsys, owner, form, edit
):
    monkeypatch.setattr(wav, "RESIDUALS", ("standard", "wav"))
    original = getattr(owner, form)
    edited = lambda model, x, *args, **how: original(model, x, *args, **how) + EDITS[edit](model, x)
    monkeypatch.setattr(owner, form, edited)
    status, out = lesson(capsys)
    assert status == 1 and "wav: GPT.route and route_plain differ" in out
    assert "Edit route_fast too" in out and "let GPT.route call self.route_plain" in out
    assert "does not start" not in out
    monkeypatch.setattr(GPT, "route", lambda self, x, cache=None: self.route_plain(x, cache))
    assert lesson(capsys)[0] == 0


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("form", ["route", "route_plain"])
@every
def test_cached_logits_equal_those_of_the_full_forward(residual, form):
    model, idx = make(residual), some_ids()
    if residual in KINDS:
        model.route = getattr(model, form)
    expected, cache = model(idx)[0], {}
    parts = [model(part, cache=cache)[0] for part in idx.split([5, *[1] * 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(Refused, match="17 positions are over n_ctx=16"):
        model(idx[:, :1], cache=cache)
    with pytest.raises(Refused, match="2 ids at once"):
        cache.clear()
        [model(idx[:, :2], cache=cache) for _ in range(2)]


def generate(model, idx, n, **how):
    return torch.cat([idx, *model.stream(idx, n, **how)], dim=1)


@every
def test_generation_goes_on_past_n_ctx_over_a_window_that_starts_again_at_half(residual):
    model = make(residual)
    got, length = generate(model, some_ids(T=3), 40, temperature=0), 3
    assert got.shape == (2, 43)
    for end in range(3, 43):
        assert got[:, end].equal(model(got[:, end - length : end])[0][:, -1].argmax(-1)), end
        length = length + 1 if length < 16 else 8  # n_ctx / 2, once all n_ctx are taken


def test_a_prompt_longer_than_n_ctx_and_a_top_k_above_the_vocabulary_work():
    model, idx = make("wav"), some_ids(T=50)
    got = generate(model, idx, 5, top_k=1000)
    assert got.shape == (2, 55) and got[:, :50].equal(idx)
    for start in range(30):  # of a prompt the last n_ctx ids count
        likeliest = generate(model, idx[:, : 20 + start], 1, temperature=0)[:, -1]
        assert likeliest.equal(model(idx[:, 4 + start : 20 + start])[0][:, -1].argmax(-1))
    assert generate(make("wav", n_ctx=1), idx, 5).shape == (2, 55)


@pytest.mark.parametrize("how", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}])
def test_generation_refuses_what_it_cannot_draw_from(how):
    with pytest.raises(Refused, match=f"^{next(iter(how))}="):
        generate(make("wav"), some_ids(), 1, **how)
    with pytest.raises(Refused, match="no id to go on from"):
        generate(make("wav"), some_ids(T=0), 1)


def draws(model, **how):
    """The share of each id among 20,000 that go on from id 1, and the logits they come from."""
    idx = torch.ones(1, 1).long()
    drawn = next(model.stream(idx.expand(20_000, 1), 1, **how)).flatten()
    return drawn.bincount(minlength=11) / len(drawn), model(idx)[0][0, 0].float()


def test_temperature_0_and_top_1_draw_the_likeliest_and_infinity_anything():
    model, idx = make("wav"), some_ids()
    for how in ({"temperature": 0}, {"temperature": 1e-300}, {"top_k": 1}):
        got = generate(model, idx, 1, **how)
        assert got[:, -1].equal(model(idx)[0][:, -1].argmax(-1))
    torch.testing.assert_close(draws(model, temperature=math.inf)[0], torch.ones(11) / 11, **FEW)


FEW = {"rtol": 0, "atol": 0.015}  # 4 standard deviations of a share


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_are_drawn_as_trained_at_temperature_1_and_sharper_below(temperature):
    share, logits = draws(make("wav"), temperature=temperature)
    torch.testing.assert_close(share, (logits / temperature).softmax(-1), **FEW)


def test_top_k_draws_from_exactly_the_k_likeliest_at_ties_and_at_any_temperature():
    model = make("wav")
    share, logits = draws(model, top_k=2, temperature=math.inf)
    assert {*share.nonzero().flatten().tolist()} == {*logits.topk(2).indices.tolist()}
    model.head.weight.data.zero_()  # all ids are equally likely
    for k in (1, 3, 11):
        share = draws(model, top_k=k)[0]
        assert len(share.nonzero()) == k
        torch.testing.assert_close(share[share > 0], torch.ones(k) / k, **FEW)


# --------------------------------------------------------------------------------------------------
# Configuration


@every
def test_the_default_number_of_blocks_is_about_8_of_an_even_number_of_layers(residual):
    expected = {48: 8, 24: 6, 12: 6, 6: 3, 4: 2, 22: 6, 5: 3, 2: 1, 9: 5, 7: 4, 13: 7, 96: 8}
    for n_layer, n_block in expected.items():
        assert GPTConfig(11, n_layer=n_layer, residual=residual).n_block == n_block
    for n_layer in range(2, 200):  # for prime depths too: no reader of details is left without
        n_block = GPTConfig(11, n_layer=n_layer, residual=residual).n_block
        assert math.ceil(n_layer / n_block) % 2 == 0 and abs(math.log(n_block / 8)) <= math.log(8)
        assert n_layer < 12 or 5 <= n_block <= 12, n_layer


def test_any_number_of_blocks_that_is_allowed_is_what_the_model_has():
    for n_layer, config in itertools.product((4, 7, 12, 13), ("block_attnres", "wav")):
        allowed = wav.block_counts(n_layer)
        for n_block in allowed if config == "block_attnres" else allowed[:-1]:
            model = make(config, trained=False, n_layer=n_layer, n_block=n_block)
            weights, names = model.routing(some_ids(T=2))
            read = [name for name, w in zip(names, weights[-1]) if "sum" in name and w.all()]
            assert len(read) == n_block  # the last, where it is shorter, as its running sum
    for n_layer in (1, 7, 13, 48):
        cuts = {len(range(0, n_layer, size)) for size in range(1, n_layer + 1)}
        assert wav.block_counts(n_layer) == sorted(cuts)


REFUSED = {
    "n_block=5 .* n_layer=12 .*3 sublayers.*: try one of .1, 2, 3, 4, 6]": {"n_block": 5},
    "n_embd=10 must be a multiple of 2 n_head=8": {"n_embd": 10, "n_head": 4},
    "n_block=4 .*3 sublayers or more .*: try one of .1, 2]": {"n_layer": 4, "n_block": 4},
    "n_layer=1 is too short for the 3 sources of a block: add layers": {"n_layer": 1},
    "1 sublayers or more .*: try one of .*6, 12]": {"residual": "attnres", "n_block": 5},
    f"residual='wave' is none of {', '.join(RESIDUALS)}$": {"residual": "wave"},
    **{f"{k}={v}": {k: v} for k, v in (("n_block", True), ("n_ctx", 0), ("n_layer", -1))},
    **{f"{k}={v}": {k: v} for k, v in (("n_embd", 10**9), ("vocab_size", 1.5), ("dropout", 1.0))},
    **{f"{k}={v}": {k: v} for k, v in (("dropout", math.nan), ("detail_bias", math.inf))},
}


@pytest.mark.parametrize("words, changes", REFUSED.items())
def test_a_config_that_cannot_work_says_what_is_allowed(words, changes):
    with pytest.raises(Refused, match=words) as error:
        GPTConfig(**{"vocab_size": 11, **changes})
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


sizes = st.one_of(st.sampled_from([1, 2, 4, 8, 64]), st.integers(-2, 40), st.integers())
reals = st.one_of(st.floats(0, 1), st.floats(-5, 5), st.floats())
names = st.one_of(st.sampled_from(RESIDUALS), st.text(max_size=5))
optional = dict.fromkeys(("n_ctx", "n_layer", "n_head", "n_embd", "n_block"), sizes)
optional |= {"residual": names, "detail_bias": reals, "dropout": reals}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({"vocab_size": sizes}, optional=optional))
def test_any_config_works_or_is_refused_in_one_line(wanted):
    try:
        config = GPTConfig(**wanted)
    except Refused as error:
        assert str(error) and "\n" not in str(error)
        return
    if config.n_layer <= 12 and max(config.n_embd, config.vocab_size, config.n_ctx) <= 128:
        logits, loss = GPT(config)(torch.zeros(2, 1).long(), torch.zeros(2, 1).long())
        assert logits.shape == (2, 1, config.vocab_size) and loss.isfinite()
