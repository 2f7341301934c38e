"""
WAV: multi-resolution block residual routing for deep decoder-only Transformers, in one file.

A decoder of L layers is a stack of 2L sublayers: attention, MLP, attention, MLP, ... Sublayer l
reads an input h_l and computes an update u_l. With the usual residual connections, its input is
the token embedding x_0 plus every update so far:

    standard        h_l = x_0 + u_1 + ... + u_{l-1}                                        (1)

The attention of layer 40 thus reads a sum of 79 terms, all with weight 1. *Attention Residuals* let
every sublayer weigh the terms: they are attention over depth instead of over the text. The vectors
that a sublayer can choose from are called its *sources*. It reads a mixture,

    h_l = sum over s of a_s s,    a = softmax over s of ( q_l . RMSNorm(s) + c_ls )        (2)

where s runs over its sources and q_l is a learned vector, its *query*. The output head reads such a
mixture with its own query q_{2L+1}. A source is both a key and a value. As a key, inside the
softmax, it is normalized, so that none is preferred for being large. As a value it is not, so that
a plain mean of x_0 and all updates is (1), up to a factor. The bias c_ls is 0 except for details,
which come below.

Three *routed* variants work like this. They differ only in their sources. In the last two,
consecutive layers form *blocks*: the one being computed is *running*, those before it are
*finished*.

    attnres         x_0 and every update so far                                            (3)
    block_attnres   x_0, the sum of the updates of each finished block, and the sum so far
                    of the running block. Far fewer sources, so cheaper, but only sums     (4)
    wav             those of (4) and, for each finished block, two differences between its
                    updates, called *details*,
                    phase = attention updates minus MLP updates
                    split = updates of the first half minus those of the second half       (5)

The sum shows a block at a coarse resolution, the details show it at a finer one. A mixture with
w sum + p phase + t split contains the updates of the block with these factors:

                     attention       MLP
    first half       w + p + t       w - p + t
    second half      w + p - t       w - p - t

Softmax weights are positive: attention gets a larger factor than MLP in the same half, and the
first half a larger one than the second for the same kind of sublayer, never the other way round.

For example, in blocks of two layers (the default at 12 layers), the attention of layer 9 begins the
fifth block. It reads 13 sources: x_0 and the sum, phase and split of four finished blocks. The MLP
of layer 9 also reads the sum so far of the fifth.

Even at the sum's weight, a detail much smaller than the sum would add almost nothing as a value.
So it is scaled to the size of the sum. The source is

    g detail,    g = rms(sum) / rms(detail), at most 1000, without gradient                (6)

Each token has its own g: a shared one would leak later tokens to earlier ones. The limit keeps a
detail of mere rounding errors small, in fp32 though not in bf16. There is no gradient through g, or
else reading a detail would train the size of its sum.

Each of the 2L + 1 queries learns one bias per kind of detail, whatever block it reads. It starts
at -2 by default, so a detail starts with e^-2 = 0.14 times the weight of a sum. Queries start at
zero, so without details every mixture starts as a plain mean: (1) divided by the number of sources.
Every sublayer, and the head, normalizes what it reads, so this factor drops out: attnres and
block_attnres start as the standard network, which is known to train well. wav only starts near it:
after n finished blocks, their sums, x_0 and the sum so far count 1 each, the 2n details e^-2 each.
So details have 2n e^-2 / (n + 2 + 2n e^-2) of the weight: 8 % for n = 1 (12 % where a block begins,
without a sum so far), and below 22 % for any n.

Shapes: B batch, T time, D width, H heads, V vocabulary, S sublayers in a block, N sources,
Q queries, K kinds of detail. The text counts sublayers from 1, the code from 0.

References
    WAV v1                    https://arxiv.org/abs/2606.06564v1: (5), (6) with its stopped
                              gradient, details that start low. Ours: a bias of -2 for that; in
                              (6), one g per token and the limit.
    Attention Residuals       https://arxiv.org/abs/2603.15031: (2) to (4), queries at zero, and
                              (7) below, with all queries of a block in one pass
    RoPE, RMSNorm, SwiGLU     https://arxiv.org/abs/2104.09864, 1910.07467, 2002.05202
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Each kind of detail is one line: the sign that update j (0 to S-1) of a block gets. Updates with
# an even j are attention's, those with an odd j the MLP's. The signs must add up to zero. Then what
# all updates share cancels; the sum already offers it.
SIGNS = {
    "phase": lambda j, S: +1 if j % 2 == 0 else -1,
    "split": lambda j, S: +1 if j < S // 2 else -1,
}

# Each routed variant is one line: the kinds of detail that a finished block offers besides its sum.
DETAILS = {
    "attnres": (),  # no sums either: in `route`, each update is a source of its own
    "block_attnres": (),
    "wav": ("phase", "split"),
}
RESIDUALS = ("standard", *DETAILS)


class Refused(ValueError):
    """What was asked for cannot work. The scripts print it as one line, without a traceback."""


def require(condition, message):
    if not condition:
        raise Refused(message)


@dataclass
class GPTConfig:
    vocab_size: int
    n_ctx: int = 128  # longest context, in tokens
    n_layer: int = 12  # each layer is two sublayers, attention and MLP
    n_head: int = 4
    n_embd: int = 128
    residual: str = "wav"
    # None: about n_layer / 8, at least 2 and even, so that split cuts between two layers. Where it
    # does not divide n_layer, the last block is shorter: it never finishes, and only its sum so far
    # is read. In attnres, every update is a source, so layers_per_block changes only the speed.
    layers_per_block: int | None = None
    detail_bias: float = -2.0
    dropout: float = 0.0

    @property
    def S(self):
        """Sublayers in a block."""
        return 2 * (self.layers_per_block or 2 * max(1, round(self.n_layer / 16)))

    def signs(self):
        """K rows of S signs, one row per kind of detail. Checks that they offer something new."""
        kinds = DETAILS.get(self.residual, ())
        rows = [[SIGNS[kind](j, self.S) for j in range(self.S)] for kind in kinds]
        setting = f"layers_per_block={self.S // 2}"
        fits = self.S <= 2 * self.n_layer
        require(fits or not rows, f"{setting} exceeds n_layer={self.n_layer}: no block finishes")
        for kind, row in zip(kinds, rows):
            require(sum(row) == 0, f"the signs of {kind} must add up to 0: {row}")
            require(rows.count(row) == 1, f"{setting} makes two of {kinds} the same: use more")
        return rows

    def __post_init__(self):
        for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd", "layers_per_block"):
            n = getattr(self, name)
            require(n is None or n >= 1, f"{name}={n} must be at least 1")
        require(
            self.residual in RESIDUALS,
            f"residual={self.residual!r} must be one of {', '.join(RESIDUALS)}",
        )
        require(
            self.n_embd % (2 * self.n_head) == 0,
            f"n_embd={self.n_embd} must be a multiple of 2 * n_head={2 * self.n_head}, for RoPE",
        )
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be from 0 to below 1")
        self.signs()  # for its checks


# ----------------------------------------------------------------------------------------------
# The ordinary decoder. A sublayer maps its input h (B, T, D) to an update (B, T, D).


def rms(x):
    """Root mean square over the last dimension, (..., D) -> (..., 1), in fp32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    # Only zeros need this floor: a detail may be zero, an update hardly ever. The usual eps of 1e-6
    # under the root would distort: a mean of 97 sources (attnres, 48 layers of width 128) starts
    # with a mean square of about 1e-7, of which x_0 gives 0.02^2 / 97^2 = 4e-8.
    return (norm / x.size(-1) ** 0.5).clamp_min(1e-12)


def rms_norm(x):
    """RMSNorm without a gain, here and in `mix`: the next matrix or query would absorb it."""
    return (x * (1 / rms(x))).to(x.dtype)


def rotate(x, cos, sin):
    """RoPE: rotate each pair (a_i, b_i) of x (B, T, H, D/H); cos and sin are (T, 1, D/H/2)."""
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
        kv = None if cache is None else cache.get(self)  # keys and values of earlier calls
        past = kv[0].size(2) if kv else 0
        require(past + T <= len(self.cos), f"{past + T} positions exceed n_ctx={len(self.cos)}")
        require(
            past == 0 or T == 1, f"{T} new ids: after its first call a cache takes one at a time"
        )

        q, k, v = self.qkv(rms_norm(h)).view(B, T, 3, self.n_head, -1).unbind(2)  # (B, T, H, D/H)
        cos, sin = self.cos[past : past + T], self.sin[past : past + T]
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, T, D/H)
        k = rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if kv:
            k, v = torch.cat([kv[0], k], dim=2), torch.cat([kv[1], v], dim=2)
        if cache is not None:
            cache[self] = k, v

        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=past == 0)
        y = self.proj(y.transpose(1, 2).reshape(B, T, D))
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

    def forward(self, h, cache=None):  # an MLP sees one position at a time and needs no cache
        h = rms_norm(h)
        y = self.down(F.silu(self.gate(h)) * self.up(h))
        return F.dropout(y, self.dropout, self.training)


# ----------------------------------------------------------------------------------------------
# The method: mixing, merging, details. `GPT.route` puts them together.


def mix(sources, inv_rms, queries, biases=None):
    """Equation (2) for Q queries at once, all with the same N sources.

    sources (N, B, T, D) come with inv_rms = 1 / rms(sources), which `route` keeps from block to
    block. Queries are (Q, D) and biases (Q, N), or None for zeros. Returns three sequences with an
    entry per query: its mixture (B, T, D), the log-sum-exp of its logits (B, T), which `merge`
    needs, and its weights (N, B, T).

    Under bf16 autocast the two matrix products are bf16, all else is fp32.
    """
    # q . RMSNorm(s) = (q . s) / rms(s)
    logits = (sources @ queries.T) * inv_rms  # (N, B, T, Q)
    if biases is not None:
        logits = logits + biases.T[:, None, None]
    if len(sources) == 1:  # shortcut: a sole source, x_0 or running, has the weight 1
        ones = torch.ones_like(logits)
        return [sources[0]] * len(queries), logits[0].unbind(-1), ones.unbind(-1)
    lse = logits.logsumexp(0)  # (B, T, Q)
    weights = (logits - lse).exp()  # the softmax over sources, (N, B, T, Q)
    # For each token a small product, (Q, N) @ (N, D): all queries read the sources in one pass.
    a = weights.permute(1, 2, 3, 0).contiguous()  # without this copy a CPU is far slower
    mixtures = (a @ sources.permute(1, 2, 0, 3)).to(sources.dtype)  # (B, T, Q, D)
    return mixtures.unbind(2), lse.unbind(-1), weights.unbind(-1)


def merge(h, lse, weights, running, query):
    """Add the R sources of the running block, (R, B, T, D), to a mixture of finished ones.

    h (B, T, D), lse (B, T) and weights are what `mix` returned for this query (D) and the finished
    sources. Returns the mixture of all of them and its weights.

    A mixture is the sum of exp(logit) s, divided by Z = exp(lse), the sum of exp(logit). Over two
    sets of sources, both add up. So multiply by Z, add, and divide again:

        (Z h + Z_run h_run) / (Z + Z_run) = h_run + share (h - h_run)                      (7)
        share = Z / (Z + Z_run) = 1 / (1 + exp(lse_run - lse)) = sigmoid(lse - lse_run)

    To replace the softmax, change lse, weights and the shortcut in `mix`, and this function.
    """
    (h_run,), (lse_run,), (weights_run,) = mix(running, 1 / rms(running), query[None])
    share = torch.sigmoid(lse - lse_run)
    h = torch.lerp(h_run, h, share[..., None])  # (7)
    return h, torch.cat([share * weights, (1 - share) * weights_run])


def details(signs, updates, total):
    """The scaled details (K, B, T, D) of a finished block, from signs (K, S), updates (S, B, T, D)
    and their sum, total (B, T, D)."""
    with torch.autocast(total.device.type, enabled=False):  # keeps differences in fp32
        d = torch.tensordot(signs, updates, 1)  # (5)
    # Where all updates are alike, d is nothing but rounding errors, which must not grow to the size
    # of the sum. For updates in fp32 the limit prevents this, but not where autocast or TF32 has
    # rounded them.
    with torch.no_grad():
        g = (rms(total) / rms(d)).clamp_max(1000)
    return g * d  # (6)


class GPT(nn.Module):
    """A decoder-only Transformer with a choice of residual variant.

    Routed variants add query (2L+1, D) and, with details, detail_bias (2L+1, K). Row l-1 belongs to
    sublayer l, the last row to the output. query[0], with one source to choose from, and
    detail_bias[:S], with no details yet, only get zero gradients.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.sublayers = nn.ModuleList()
        for _ in range(config.n_layer):
            self.sublayers += [Attention(config), MLP(config)]
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

        # What a variant adds is not random, so all variants start from the same numbers.
        if config.residual in DETAILS:
            n_query = 2 * config.n_layer + 1
            self.query = nn.Parameter(torch.zeros(n_query, config.n_embd))
            signs = torch.tensor(config.signs(), dtype=torch.float32)  # (K, S)
            if len(signs) > 0:
                self.register_buffer("signs", signs, persistent=False)
                start = torch.full((n_query, len(signs)), float(config.detail_bias))
                self.detail_bias = nn.Parameter(start)

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: normal with 0.02, and 0.02 / sqrt(2L) for the matrices that end a sublayer."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                last = name.endswith(("proj", "down"))
                module.weight.normal_(std=0.02 / math.sqrt(len(self.sublayers)) if last else 0.02)

    def forward(self, idx, targets=None, cache=None):
        """Ids (B, T) to logits (B, T, V) and, with targets (B, T), the mean loss in nats per token.

        With a cache, a dict that starts empty, later calls pass one new id per sequence.
        """
        x = self.embed(idx)  # x_0 (B, T, D)
        if self.config.residual in DETAILS:
            x = self.route(x, cache)
        else:
            for sublayer in self.sublayers:
                x = x + sublayer(x, cache)  # (1)
        logits = self.head(rms_norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def route(self, x, cache=None, table=None):
        """From the embedding x_0 (B, T, D) to the mixture that the head reads (B, T, D).

        A query is a parameter: it depends on no token and no update. So when a block begins, all
        its queries can read the finished sources in one pass (`mix`). Only the updates of the block
        itself come later; before each sublayer, those so far are added (`merge`).

        If table is a list, the weights of each mixture, (N, B, T), are appended to it.
        """
        S, residual = self.config.S, self.config.residual
        # The finished sources, at first only x_0, as three tensors. A block that finishes only
        # appends to each:
        finished = x[None]  # their values (N, B, T, D)
        inv_rms = 1 / rms(finished)  # (N, B, T, 1)
        c = self.query.new_zeros(len(self.query), 1)  # their biases for each query (2L+1, N)
        # One block per iteration. The output's query joins a short last block or comes alone.
        for first in range(0, len(self.query), S):
            queries = self.query[first : first + S]
            hs, lses, weights = mix(finished, inv_rms, queries, c[first : first + S])
            updates, running = [], None
            for i, (query, h, lse, a) in enumerate(zip(queries, hs, lses, weights), start=first):
                if running is not None:
                    h, a = merge(h, lse, a, running, query)
                if table is not None:
                    table.append(a)
                if i == len(self.sublayers):
                    return h
                u = self.sublayers[i](h, cache).to(x.dtype)  # autocast may have made it bf16
                updates.append(u)
                if residual == "attnres":
                    running = torch.stack(updates)  # (3)
                else:
                    running = u[None] if running is None else running + u  # (4)
            # The block has finished. Only now are its details offered: until half way, split would
            # be the sum once more.
            offered = [running]  # `routing` names them in this order
            c = F.pad(c, (0, len(running)))  # 0 for the sum (attnres: for each update)
            if DETAILS[residual]:
                offered.append(details(self.signs, torch.stack(updates), running[0]))
                c = torch.cat([c, self.detail_bias], dim=1)
            finished = torch.cat([finished, *offered])
            inv_rms = torch.cat([inv_rms, *(1 / rms(new) for new in offered)])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Yield max_new_tokens ids (B, 1) that continue idx (B, T), one by one. Call eval() first.

        temperature: 0 takes the likeliest id; top_k: draw from the k likeliest only. Attention's
        keys and values are cached; routing needs no cache, since it mixes over depth at one
        position. When n_ctx positions are full, the window starts again from its last half.
        """
        require(idx.size(1) > 0, "the prompt is empty: give at least one id")
        n_ctx, V = self.config.n_ctx, self.config.vocab_size
        window = new = idx[:, -n_ctx:]
        cache = {}
        for _ in range(max_new_tokens):
            if window.size(1) > n_ctx:
                window = new = window[:, -max(1, n_ctx // 2) :]
                cache = {}
            logits, _ = self(new, cache=cache)
            values, ids = logits[:, -1].float().topk(min(top_k or V, V))  # (B, k), the best first
            probabilities = (values / max(temperature, 1e-30)).softmax(-1)
            new = ids.gather(1, torch.multinomial(probabilities, 1))  # (B, 1)
            window = torch.cat([window, new], dim=1)
            yield new

    @torch.no_grad()
    def routing(self, idx):
        """The weights of all mixtures on ids (B, T), as (2L+1, N, B, T), and the names of the N
        sources. Row l-1 is sublayer l, the last row the output. A source that is yet to come has
        weight 0; "sum b" is the sum so far while block b is running. Call eval() first."""
        residual = self.config.residual
        require(residual in DETAILS, f"{residual} has no mixing weights to show")
        table = []
        self.route(self.embed(idx), table=table)
        N = len(table[-1])  # the output reads the most
        kinds = ("update",) if residual == "attnres" else ("sum", *DETAILS[residual])
        names = ["x0", *(f"{kind} {i + 1}" for i in range(N) for kind in kinds)]
        return nn.utils.rnn.pad_sequence(table, batch_first=True), names[:N]  # pads with 0
