"""
The claims of the method and of the scripts around it, one test each: `pytest` runs them all.

The model is held against `literal`, which writes the equations down term by term, in float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import wav
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
        ({"n_layer": 12, "n_block": 5}, "n_block=5 must divide n_layer=12.*1, 2, 3, 4, 6, 12"),
        ({"n_embd": 10, "n_head": 4}, "n_embd=10 must be divisible by n_head=4"),
        ({"n_embd": 12, "n_head": 4}, "odd head width"),
        ({"n_layer": 4, "n_block": 4}, "one layer per block"),
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
