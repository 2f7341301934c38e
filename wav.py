"""
WAV: multi-resolution block residual routing for deep decoder-only Transformers, in one file.

What should layer 40 read? A decoder is a chain of sublayers: attention, MLP, attention, MLP, ...
Sublayer l = 1, 2, 3, ... reads an input h_l and returns an update u_l. In the standard residual
stream it reads the token embedding x_0 plus every update so far, each with weight 1:

    standard        h_l = x_0 + u_1 + ... + u_{l-1}                                     (1)

For the attention of layer 40, l = 79, that is a sum of 79 terms, and none can be weighed.
*Attention Residuals* change that. Each sublayer mixes *sources* s by a softmax: attention over
depth instead of time. Its query q_l is a learned vector. The output, which feeds the head, is one
more reader, l = 2L + 1.

    h_l = sum over s of a_s s,
    a   = softmax over s of ( q_l . RMSNorm(s) + c )                                    (2)

The keys are normalised, so that no source is preferred for being large. The values stay raw: where
q and c are 0 every weight is 1/N, and a mixture of x_0 and updates, or their sums, is (1) divided
by N. So training can start from the standard network.

The routed variants differ in their sources, and only wav has a bias c:

    attnres         x_0 and each update u_1 ... u_{l-1}                                 (3)
    block_attnres   x_0, the sum of each completed block of layers and, from a block's second
                    sublayer on, its running sum: far fewer sources, but only sums      (4)
    wav             those of (4), and two *details* of each completed block: how did its
                    sum come about? phase is its attentions minus its MLPs, and split
                    its first half minus its second half                                (5)

So wav sees a block at two resolutions: what it adds up to, and where its updates differ. A running
block offers no details. A detail d may be much smaller than its block's sum, so it is scaled to
the same size; the source is g d with

    g = rms(sum) / rms(d), at most 1000; a number for each token, without gradient      (6)

The bias is learned for details: 2 (2L + 1) numbers, one c_{l,kind} for each reader l and each of
the two kinds, shared by all blocks; for all other sources it is 0. It starts at -2: at first a
detail weighs e^-2 of a sum, and all details together 8 to 21 % of any mixture that they are in.

Read on: the ordinary decoder; the method, plainly (`offer` and `GPT.route_plain`); the same,
fast (`route_fast`, where a softmax is computed in two parts and merged exactly (7)).
`python wav.py` shows the method in small and holds the form that runs against the plain one: run
it after every edit.

Letters in shapes: B batch, T time, D width, H heads, V vocabulary, L layers, N sources,
S sublayers of a block (two a layer; attnres: 1), K kinds of source that a block offers.

References
    WAV v1                        https://arxiv.org/abs/2606.06564v1
    Attention Residuals           https://arxiv.org/abs/2603.15031 (route_fast: "two-phase")
    RoPE, RMSNorm, SwiGLU         https://arxiv.org/abs/2104.09864, 1910.07467, 2002.05202
"""

import math
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Each variant is one line: what a completed block offers to all that read after it.
KINDS = {
    "attnres": ("sum",),  # here alone a block is a single sublayer
    "block_attnres": ("sum",),
    "wav": ("sum", "phase", "split"),
}
RESIDUALS = ("standard", *KINDS)

# Each kind is one line: the sign of sublayer j = 0 ... S-1 of a block; even j is attention, odd j
# MLP. S is even where there are details, so the signs of a detail add up to 0: what all updates
# share is in the sum already. In a block of an even number of layers the rows are orthogonal.
SIGNS = {
    "sum": lambda j, S: +1,
    "phase": lambda j, S: +1 if j % 2 == 0 else -1,  # attention minus MLP
    "split": lambda j, S: +1 if j < S // 2 else -1,  # first half minus second half
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises Refused, a ValueError of one line, for what cannot work."""

    vocab_size: int
    n_ctx: int = 128  # longest context, in tokens
    n_layer: int = 12  # L; a layer is two sublayers, attention and MLP
    n_head: int = 4
    n_embd: int = 128  # D, the width of the residual stream
    # Blocks that the layers are cut into. None: near 8, with an even number of layers in each (48
    # layers: 8; 12: 6). The last may be shorter (7 layers: 2+2+2+1): it never completes, and only
    # its running sum is read, by its own sublayers and the output. In attnres each sublayer is a
    # block, whatever this is; it then sets the chunks of route_fast: speed, not the result.
    n_block: int | None = None
    residual: str = "wav"
    detail_bias: float = -2.0  # where the c of details starts
    dropout: float = 0.0

    def __post_init__(self):
        check_sizes(self)
        if self.n_block is None:
            self.n_block = default_n_block(self.n_layer)
        check_blocks(self)


# ----------------------------------------------------------------------------------------------
# The ordinary decoder. A sublayer maps its input h (B, T, D) to its update (B, T, D).


def rms(x):
    """Root mean square over the last dimension, (..., D) -> (..., 1), in fp32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    # The floor is for vectors that are all zero. The usual eps of 1e-6 under the root would do
    # harm: at 48 layers of width 128 a mean of 97 sources starts with a mean square of 1e-7.
    return (norm / x.size(-1) ** 0.5).clamp_min(1e-12)


def rms_norm(x):
    """RMSNorm without a gain: the linear layer or the query that follows would absorb it."""
    return (x * rms(x).reciprocal()).to(x.dtype)


def rotate(x, cos, sin):
    """RoPE: turn each pair (a_i, b_i) of x (B, T, H, D/H) by an angle that grows with its
    position; cos and sin are (T, 1, D/H/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and PreNorm."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        head_width = config.n_embd // config.n_head
        frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angle = torch.outer(torch.arange(config.n_ctx), frequency)[:, None]  # (n_ctx, 1, D/H/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, h, cache=None):
        B, T, D = h.shape
        past_k, past_v = cache.get(self, (None, None)) if cache is not None else (None, None)
        past = 0 if past_k is None else past_k.size(2)  # positions so far
        require(past + T <= len(self.cos), f"{past + T} positions are over n_ctx={len(self.cos)}")
        require(past == 0 or T == 1, f"{T} ids at once: after the first call the cache takes one")

        q, k, v = self.qkv(rms_norm(h)).view(B, T, 3, self.n_head, -1).unbind(2)  # (B, T, H, D/H)
        cos, sin = self.cos[past : past + T], self.sin[past : past + T]
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, T, D/H)
        k = rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if past > 0:
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)
        if cache is not None:
            cache[self] = k, v

        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=past == 0)
        y = self.proj(y.transpose(1, 2).reshape(B, T, D))  # the heads side by side again
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU with PreNorm, 8/3 D wide: about as many weights as 4 D without the gate."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        width = 8 * math.ceil(config.n_embd / 3)
        self.gate = nn.Linear(config.n_embd, width, bias=False)
        self.up = nn.Linear(config.n_embd, width, bias=False)
        self.down = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, h, cache=None):  # no use for the cache: an MLP sees one position at a time
        h = rms_norm(h)
        y = self.down(F.silu(self.gate(h)) * self.up(h))
        return F.dropout(y, self.dropout, self.training)


# ----------------------------------------------------------------------------------------------
# The method, plainly.


def offer(kinds, updates, S, block):
    """What a block of S sublayers offers after these updates: {(kind, block): source (B, T, D)},
    where block is its number, or "running"."""
    total = sum(updates)
    sources = {}
    for kind in kinds:
        source = sum(SIGNS[kind](j, S) * u for j, u in enumerate(updates))  # (5)
        sources[kind, block] = match(total, source) * source
    return sources


def match(total, source):
    """The factor g of (6), (..., D) -> (..., 1), that makes a source as large as its block's total.
    For the sum itself it is 1.

    A mixture adds raw values, so a small detail would hardly be heard beside the sums. Detached:
    otherwise a reader of the detail would send a gradient through rms(total), and so train how
    large the sum is. At most 1000: where all updates are equal a detail is a rounding error, and
    must not become as large as the sum.
    """
    return (rms(total) / rms(source)).detach().clamp_max(1000)


class GPT(nn.Module):
    """A decoder-only Transformer with a choice of residual variant.

    embed, head; sublayers, 2L modules; where routed query (2L+1, D), in wav detail_bias (2L+1, 2):
    row l-1 belongs to sublayer l, the last one to the output.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.kinds = KINDS.get(config.residual, ())
        self.details = [kind for kind in self.kinds if kind != "sum"]

        # S: sublayers of a block. chunk: sublayers that route_fast takes at once, a block or more.
        self.chunk = 2 * math.ceil(config.n_layer / config.n_block)
        self.block_size = 1 if config.residual == "attnres" else self.chunk  # S

        # PyTorch starts each layer with random numbers; init_weights draws them anew. The generator
        # goes back to where it was: so a layer added here, under a name of its own, does not move
        # the others' start.
        with torch.random.fork_rng(devices=()):
            self.embed = nn.Embedding(config.vocab_size, config.n_embd)
            self.sublayers = nn.ModuleList()
            for _ in range(config.n_layer):
                self.sublayers += [Attention(config), MLP(config)]
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

        # With zero queries a mixture of x_0 and sums is a plain mean: the standard stream divided
        # by the number of sources. The norm that opens each sublayer and the head cancels that
        # number. So all variants start as the same network, but for what details add.
        n_reader = 2 * config.n_layer + 1
        if self.kinds:
            self.query = nn.Parameter(torch.zeros(n_reader, config.n_embd))
            S = self.block_size
            signs = [[float(SIGNS[kind](j, S)) for j in range(S)] for kind in self.kinds]
            self.register_buffer("basis", torch.tensor(signs), persistent=False)  # (K, S)
        if self.details:
            start = torch.full((n_reader, len(self.details)), float(config.detail_bias))
            self.detail_bias = nn.Parameter(start)

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's start, by the names of the layers. (Other matrices keep theirs, with a warning.)

        embed, head, qkv, gate, up    normal, 0.02
        proj, down                    normal, 0.02 / sqrt(2L), since 2L of them add up in (1)
        """
        for name, p in self.named_parameters():
            layer = name.removesuffix(".weight").split(".")[-1]
            if layer in ("embed", "head", "qkv", "gate", "up"):
                p.normal_(std=0.02)
            elif layer in ("proj", "down"):
                p.normal_(std=0.02 / math.sqrt(len(self.sublayers)))
            elif p.ndim > 1:
                warnings.warn(f"init_weights does not know {name}: it keeps the start it has")

    def forward(self, idx, targets=None, cache=None):
        """Ids (B, T), up to n_ctx of them, to logits (B, T, V) and, given targets (B, T), the mean
        loss in nats per token. With a cache, a dict that is empty at first, the ids of all calls
        but the first come one at a time."""
        x = self.embed(idx)  # (B, T, D), the x_0 of the method
        if self.kinds:
            x = self.route(x, cache)  # (2) to (7)
        else:
            for sublayer in self.sublayers:
                x = x + sublayer(x, cache)  # (1)
        logits = self.head(rms_norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def route(self, x, cache=None):
        """From x_0 (B, T, D) to what the head reads (B, T, D).

        Under bf16 autocast sources, their rms, g, logits and softmax stay fp32, like the standard
        stream (by `rms`, each `.to`, and autocast(enabled=False) in offer_at_once). Two products
        are bf16: query times source and, in the fast form alone, weights times sources; so the two
        forms then differ a little.
        """
        return route_fast(self, x, cache)  # or the plain form: self.route_plain(x, cache)

    def route_plain(self, x, cache=None, weights=None):
        """The routed variants by the letter. Training does not run this form but GPT.route, which
        calls route_fast. After an edit here edit that, too, or let GPT.route call this form; until
        then train.py refuses, and `python wav.py` says WRONG. To a list `weights` it adds, for each
        sublayer and the output, the weights of what it read: {(kind, block): (B, T)}."""
        S = self.block_size
        completed = {("x0", ""): x}  # what all later sublayers can read
        updates = []  # of the current block
        for l, query in enumerate(self.query, start=1):
            read = dict(completed)  # (3), or (4) and (5)
            if updates:
                read |= offer(("sum",), updates, S, "running")  # (4), never in attnres
            sources = torch.stack([*read.values()])  # (N, B, T, D)
            bias = self.bias(read)[l - 1]  # (N,)
            logits = rms_norm(sources) @ query + bias[:, None, None]  # (N, B, T)
            mixing = logits.softmax(0)  # (N, B, T)
            h = (mixing[..., None] * sources).sum(0)  # (B, T, D), (2)
            if weights is not None:
                weights.append(dict(zip(read, mixing)))
            if l > len(self.sublayers):
                return h  # the output reads every block, too
            u = self.sublayers[l - 1](h, cache)
            updates.append(u.to(x.dtype))  # bf16 under autocast: back to fp32
            if len(updates) == S:
                completed |= offer(self.kinds, updates, S, l // S)
                updates = []

    def bias(self, sources):
        """c of (2) for N sources, given as (kind, block): (2L+1, N), 0 for all but details."""
        columns = dict(zip(self.details, self.detail_bias.T)) if self.details else {}
        zero = self.query.new_zeros(len(self.sublayers) + 1)
        return torch.stack([columns.get(kind, zero) for kind, _ in sources], dim=1)

    @torch.no_grad()
    def routing(self, idx):
        """Mixing weights on ids (B, T), by route_plain in eval mode, without autocast:
        (2L+1, N, B, T), 0 where a reader has no such source, and the N names of the sources: "x0",
        "sum running", "split 3", ... Refused if on these ids the output of GPT.route, whose own
        weights are not seen, is more than 1e-3 off."""
        require(self.kinds, f"residual={self.config.residual!r} has no mixing weights to show")
        rows = []
        training = self.training
        self.eval()
        with torch.autocast(idx.device.type, enabled=False):
            x = self.embed(idx)
            plain = self.route_plain(x, weights=rows)
            apart = (self.route(x) - plain).norm() / plain.norm()
        self.train(training)
        cure = "edit route_fast too, or let GPT.route call self.route_plain"
        require(apart < 1e-3, f"GPT.route is {apart:.0e} off route_plain: {cure}")
        sources = dict.fromkeys(source for row in rows for source in row)
        absent = torch.zeros_like(rows[0]["x0", ""])
        weights = [torch.stack([row.get(source, absent) for source in sources]) for row in rows]
        return torch.stack(weights), [f"{kind} {block}".strip() for kind, block in sources]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Yield max_new_tokens ids (B, 1) that go on from idx (B, T), one by one. Call eval first.

        temperature: 1 as trained, 0 for the likeliest id; top_k: draw from the k likeliest only.
        Keys and values are cached; routing mixes over depth, at one position, and needs no cache.
        When n_ctx positions are full, the window starts again from its last n_ctx / 2.
        """
        require(temperature >= 0, f"temperature={temperature} must be 0 or more")
        require(top_k is None or top_k >= 1, f"top_k={top_k} must be 1 or more")
        require(idx.size(1) > 0, "there is no id to go on from: give one at least")
        n_ctx, V = self.config.n_ctx, self.config.vocab_size
        window = idx[:, -n_ctx:]
        new = window  # what the cache has not seen yet
        cache = {}
        for _ in range(max_new_tokens):
            if window.size(1) > n_ctx:
                window = window[:, -max(1, n_ctx // 2) :]
                new = window
                cache = {}
            logits, _ = self(new, cache=cache)
            values, ids = logits[:, -1].float().topk(min(top_k or V, V))  # (B, k), the best first
            probabilities = (values / max(temperature, 1e-30)).softmax(-1)
            drawn = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            new = ids.gather(1, drawn)
            window = torch.cat([window, new], dim=1)
            yield new


# ----------------------------------------------------------------------------------------------
# The same method, fast. A query is a parameter, not a function of the token. So before a block
# runs, all its queries can read the completed sources at once; inside it only what it has made
# itself is new. The two parts of a softmax, over what is done and over what is running, merge
# exactly. If Z = exp(lse) is the sum of exp(logits) of a part, the mixture of both is
#
#     (Z_done h_done + Z_run h_run) / (Z_done + Z_run)
#         = h_run + sigmoid(lse_done - lse_run) (h_done - h_run)                          (7)
#
# The sigmoid is this arithmetic, not a gate that learns. For example wav, 12 layers in 6 blocks:
# sublayers 9 to 12 read 7 sources, x_0 and 3 of each of 2 blocks, in one pass; then 10, 11 and 12,
# one by one, merge the running sum in.


def route_fast(model, x, cache=None):
    """As GPT.route_plain: from x_0 (B, T, D) to what the head reads (B, T, D)."""
    S, n_sublayer = model.block_size, len(model.sublayers)
    c_block = model.bias([(kind, "") for kind in model.kinds])  # (2L+1, K), alike in all blocks
    c = F.pad(c_block.repeat(1, n_sublayer // S), (1, 0))  # (2L+1, N), with a 0 for x_0
    done = x[None]  # the completed sources (N, B, T, D): x_0, then K of each block
    inv_rms = 1 / rms(done)  # kept beside them: (N, B, T, 1)
    for first in range(0, n_sublayer + 1, model.chunk):  # + 1: the output reads last
        # All queries of a chunk (a block; in attnres, several) read what is done in one pass.
        readers = slice(first, first + model.chunk)
        h_done, lse_done = mix(done, inv_rms, model.query[readers], c[readers, : len(done)])
        updates, running = [], None  # running: the sources made in this chunk so far, set below
        for j, query in enumerate(model.query[readers]):
            h = h_done[j]
            if updates:
                h = merge(h, lse_done[j], running, query)
            if first + j == n_sublayer:
                return h  # to the head: no sublayer follows
            u = model.sublayers[first + j](h, cache).to(x.dtype)
            updates.append(u)
            if S == 1:
                running = torch.stack(updates)  # (j+1, B, T, D): each update is a source (3)
            else:
                running = u[None] if j == 0 else running + u  # (1, B, T, D): their sum is one (4)
        # Complete. Without details `running` is what it offers: its sum, in attnres each update.
        if model.details:
            new, new_inv_rms = offer_at_once(model.basis, updates, running[0])
        else:
            new, new_inv_rms = running, 1 / rms(running)
        done = torch.cat([done, new])
        inv_rms = torch.cat([inv_rms, new_inv_rms])


def mix(sources, inv_rms, query, bias):
    """Softmax mixtures (2) of N sources for each of Q queries, token by token.

    sources (N, B, T, D), inv_rms (N, B, T, 1), query (Q, D), bias (Q, N). Returns Q mixtures
    (B, T, D) and the log-sum-exps of their logits, Q times (B, T).
    """
    # Plainly, as in route_plain: logits = q . RMSNorm(s) + c, h = sum over N of softmax(logits) s.
    dots = sources @ query.T  # (N, B, T, Q); as q . RMSNorm(s) = (q . s) / rms(s), no key is stored
    logits = torch.addcmul(bias.T[:, None, None], dots, inv_rms)  # bias + dots * inv_rms
    if len(sources) == 1:  # as in the first block, and a running sum: its weight is 1
        return [sources[0]] * len(query), logits[0].unbind(-1)
    lse = logits.logsumexp(0)  # (B, T, Q)
    mixing = (logits - lse).exp()  # (N, B, T, Q)
    # For each token a product (Q, N) @ (N, D): all queries read the sources in one pass.
    mixing = mixing.permute(1, 2, 3, 0).contiguous()  # else a CPU multiplies token by token
    mixtures = mixing @ sources.permute(1, 2, 0, 3)  # (B, T, Q, D)
    mixtures = mixtures.to(sources.dtype)  # autocast multiplies in bf16
    return mixtures.unbind(2), lse.unbind(-1)


def merge(h_done, lse_done, running, query):
    """What one query (D) reads: the running sources (N, B, T, D) merged into the mixture of the
    completed ones, h_done (B, T, D) with its lse_done (B, T). Returns (B, T, D)."""
    no_bias = query.new_zeros(1, len(running))  # a running source is no detail
    (h_run,), (lse_run,) = mix(running, 1 / rms(running), query[None], no_bias)
    from_done = torch.sigmoid(lse_done - lse_run)[..., None]  # Z_done / (Z_done + Z_run)
    return torch.lerp(h_run, h_done, from_done)  # h_run + from_done (h_done - h_run), (7)


def offer_at_once(basis, updates, total):
    """As `offer` for a block with this total (B, T, D): K sources (K, B, T, D), in one product with
    their signs, the rows of basis (K, S), and 1 / rms of each, (K, B, T, 1)."""
    with torch.autocast(total.device.type, enabled=False):  # which would round to bf16
        sources = torch.tensordot(basis, torch.stack(updates), 1)  # (5)
    gain = match(total, sources)  # (K, B, T, 1)
    return gain * sources, 1 / (rms(sources) * gain)  # (6); rms(g d) = g rms(d), above its floor


# ----------------------------------------------------------------------------------------------
# What a configuration cannot be.


class Refused(ValueError):
    """What was asked for cannot work. The scripts print it as one line; other errors in full."""


def require(condition, message):
    if not condition:
        raise Refused(message)


def check_sizes(config):
    for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd"):
        n = getattr(config, name)
        require(type(n) is int and 1 <= n <= 10**6, f"{name}={n!r} must be an int, 1 to 10**6")
    D, H = config.n_embd, config.n_head
    require(D % (2 * H) == 0, f"n_embd={D} must be a multiple of 2 n_head={2 * H}, for RoPE")
    p, bias = config.dropout, config.detail_bias
    require(0 <= p < 1, f"dropout={p} must be at least 0 and below 1")
    require(-1000 <= bias <= 1000, f"detail_bias={bias} must be from -1000 to 1000")
    residual = config.residual
    require(residual in RESIDUALS, f"residual={residual!r} is none of {', '.join(RESIDUALS)}")
    kinds = KINDS.get(residual, ())
    require({*kinds} <= {*SIGNS}, f"{residual} offers {kinds}, but SIGNS knows {[*SIGNS]} alone")


def check_blocks(config):
    """A block needs at least as many sublayers as kinds: with one layer, phase and split would
    both be attention minus MLP."""
    L, n_block = config.n_layer, config.n_block
    least = len(KINDS.get(config.residual, ()))
    counts = [n for n in block_counts(L) if 2 * math.ceil(L / n) >= least]
    require(counts, f"n_layer={L} is too short for the {least} sources of a block: add layers")
    message = (
        f"n_block={n_block!r} does not cut n_layer={L} into blocks of one size, {least} sublayers "
        f"or more (the last may be shorter): try one of {counts}"
    )
    require(type(n_block) is int and n_block in counts, message)


def block_counts(n_layer):
    """All possible numbers of blocks, ceil(L / size) for every size. For 7 layers: 1, 2, 3, 4, 7,
    where 4 is 2+2+2+1."""
    return sorted({math.ceil(n_layer / size) for size in range(1, n_layer + 1)})


def default_n_block(n_layer):
    """Nearest to 8, in ratio, of those with an even number of layers in a block (so that sum,
    phase and split are orthogonal); a single layer is a single block."""
    even = [n for n in block_counts(n_layer) if math.ceil(n_layer / n) % 2 == 0]
    return min(even or [1], key=lambda n: abs(math.log(n / 8)))


# ----------------------------------------------------------------------------------------------
# The method in small: `python wav.py`.


def main():
    """Print the signs, and judge the code in float64. Two columns must be 0 up to rounding (1e-9),
    or the exit status is 1: how far the start is from standard's with details switched off, and
    how far the fast form is from the plain one, values and gradients, with random weights, at 12
    layers and at 7, where the last block is shorter. The start with details is only shown."""
    print("a block of two layers:   attention      MLP  attention      MLP")
    for kind, sign in SIGNS.items():
        print(f"  {kind:20}" + "".join(f"{sign(j, 4):+10g}" for j in range(4)))

    print("\n12 layers (fast form: 7, too)         the start, off standard        fast form,")
    print("                       parameters      no details         details       off plain")
    idx = torch.arange(32).view(2, 16)
    wrong = []
    for residual in RESIDUALS:
        off, model = start(residual, idx, detail_bias=-1000.0)
        as_is, model = start(residual, idx)
        line = f"  {residual:18} {sum(p.numel() for p in model.parameters()):12,}"
        line += f"{off:16.0e}{as_is:16.0e}"
        if model.kinds and not off <= 1e-9:  # nan is wrong, too
            wrong.append(f"{residual} does not start as standard: is an eps too large, a source")
            wrong.append("  counted twice, the sum of a block not offered, an addition not 0?")
        if model.kinds:
            uneven = start(residual, idx, n_layer=7)[1]
            apart = torch.stack([fast_off_plain(m, idx) for m in (model, uneven)]).max()
            line += f"{apart:16.0e}"
            if not apart <= 1e-9:
                wrong.append(
                    f"{residual}: GPT.route and route_plain differ. Was one of them edited?"
                )
                wrong.append("  Edit route_fast too, or let GPT.route call self.route_plain.")
        print(line)
    print("\n".join(["WRONG", *wrong]) if wrong else "all as it should be")
    return 1 if wrong else 0


def start(residual, idx, **config):
    """How far the first logits are from standard's, and the model."""
    logits = []
    for name in ("standard", residual):
        torch.manual_seed(1)
        model = GPT(GPTConfig(65, residual=name, **config)).double()
        logits.append(model(idx)[0].detach())
    return (logits[1] - logits[0]).norm() / logits[0].norm(), model


def fast_off_plain(model, idx):
    """How far GPT.route is from route_plain, in values and gradients, far from the start."""
    for p in model.parameters():
        p.data = 0.1 * torch.randn_like(p)
    found = []
    for form in (model.route, model.route_plain):
        torch.manual_seed(1)  # both drop the same, where something drops
        h = rms_norm(form(model.embed(idx)))
        loss = F.cross_entropy(model.head(h).flatten(0, 1), idx.flatten())
        learned = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, learned, materialize_grads=True)
        found.append(torch.cat([h.flatten(), *(g.flatten() for g in gradients)]))
    return (found[0] - found[1]).norm() / found[1].norm()


if __name__ == "__main__":
    sys.exit(main())
