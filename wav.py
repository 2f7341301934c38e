"""
WAV: multi-resolution block residual routing for deep decoder-only Transformers, in one file.

What should layer 40 read? A decoder is a chain of sublayers: attention, MLP, attention, MLP, ...
Sublayer l reads an input h_l and returns an update u_l. In the standard residual stream it reads
the token embedding x_0 plus every update so far, each with weight 1:

    standard        h_l = x_0 + u_1 + ... + u_{l-1}                                            (1)

At layer 40 that is a sum of eighty terms, and no sublayer can weigh one of them alone.
*Attention Residuals* let it. Each sublayer mixes *sources* s by a softmax: attention over depth
instead of time, with one learned query q_l for each sublayer and a last one for the output:

    h_l = sum over s of a_s s,    a = softmax over s of ( q_l . RMSNorm(s) + c_s )             (2)

where c_s is 0 but for the details below. The routed variants differ only in their sources:

    attnres         x_0 and each update u_1 ... u_{l-1}                                        (3)
    block_attnres   x_0, the sum of each completed block of sublayers, and the running sum of
                    the current block: far fewer sources, but of a block only its sum is left  (4)
    wav             these, and two *details* of each completed block that say how its sum came
                    about: phase (attention minus MLP), split (first half minus second half)   (5)

A detail d may be small beside its block's sum, so it is matched: it enters as g d, with the factor
g = rms(sum) / rms(d) held constant, without gradient (6). Its bias c_s is learned and starts
negative: wav starts near block_attnres and finds out what details are worth. So a block is seen
at two resolutions, as by a wavelet (the abstract does not spell out WAV).

Read on: the ordinary decoder; the method, plainly (`offer`, `GPT.route_plain`); the same, fast
(`route`: each softmax is computed in two parts and merged exactly (7)). `python wav.py` prints the
lesson in small and holds fast against plain: run it after every edit.

Letters in shapes: B batch, T time, D width, H heads, V vocabulary, L layers, S sublayers of a
block, N sources, K kinds of source that a block offers, Q queries.

References
    WAV v1                        https://arxiv.org/abs/2606.06564v1
    Attention Residuals           https://arxiv.org/abs/2603.15031
    RoPE, RMSNorm, SwiGLU         https://arxiv.org/abs/2104.09864, 1910.07467, 2002.05202
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

KINDS = {  # a variant is a line: what a completed block offers to all later sublayers
    "attnres": ("sum",),  # here alone a block is a single sublayer
    "block_attnres": ("sum",),
    "wav": ("sum", "phase", "split"),
}
RESIDUALS = ("standard", *KINDS)

# A kind is a line: the sign of sublayer j = 0 ... S-1 of a block. Even j is attention, odd j MLP.
# The signs of a detail add up to 0: what all updates share is in the sum already, so a detail says
# only where they differ. In blocks of an even number of layers the three are orthogonal, too.
SIGNS = {
    "sum": lambda j, S: +1,  # what the block adds to the stream: without it the start differs
    "phase": lambda j, S: +1 if j % 2 == 0 else -1,  # attention minus MLP
    "split": lambda j, S: +1 if j < S // 2 else -1,  # first half minus second half
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, in one line, for what cannot work."""

    vocab_size: int
    n_ctx: int = 128  # longest context, in tokens
    n_layer: int = 12  # L; a layer is two sublayers, attention and MLP
    n_head: int = 4
    n_embd: int = 128  # D, the width of the residual stream
    n_block: int | None = None  # equal blocks of layers; None: nearest to 8 that fits, see below
    residual: str = "wav"
    detail_bias: float = -2.0  # where c of (2) starts for details: each weighs e^-2 of a sum
    dropout: float = 0.0

    def __post_init__(self):
        L, D, H, bias = self.n_layer, self.n_embd, self.n_head, self.detail_bias
        require(self.residual in RESIDUALS, f"residual={self.residual!r} is none of {RESIDUALS}")
        for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd"):
            n = getattr(self, name)
            require(type(n) is int and 1 <= n <= 10**6, f"{name}={n!r} must be an int, 1 to 10**6")
        require(D % (2 * H) == 0, f"n_embd={D} must be a multiple of 2 n_head={2 * H}, for RoPE")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0 and below 1")
        require(-1000 <= bias <= 1000, f"detail_bias={bias} must be from -1000 to 1000")
        kinds = KINDS.get(self.residual, ("sum",))
        require({*kinds} <= {*SIGNS}, f"KINDS names {kinds}: SIGNS has a line for {[*SIGNS]} alone")
        least = len(kinds)  # fewer sublayers would make linearly dependent sources
        fits = [n for n in range(1, L + 1) if L % n == 0 and 2 * L // n >= least]
        if self.n_block is None:
            # Blocks of two layers or more, of an even number if L is even; nearest to 8 in ratio.
            good = [n for n in fits if n < L and L // n % 2 == L % 2]
            self.n_block = min(good or [1], key=lambda n: abs(math.log(n / 8)))
        what = f"n_block={self.n_block!r} must cut n_layer={L} into equal blocks of {least} or more"
        hint = f"try one of {fits}" if fits else "add layers"
        require(type(self.n_block) is int and self.n_block in fits, f"{what} sublayers: {hint}")


def require(condition, message):
    if not condition:
        raise ValueError(message)


# --------------------------------------------------------------------------------------------------
# The ordinary decoder. A sublayer maps its input h (B, T, D) to its update (B, T, D).


def rms(x):
    """Root mean square over the last dimension, (..., D) -> (..., 1), in fp32 or better."""
    # The floor only keeps an all-zero vector from dividing by zero. The usual eps of 1e-6 would do
    # harm: at 48 layers of width 128 a mean of the 97 sources starts with a mean square of 1e-7.
    dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 is summed in fp32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return (norm / x.size(-1) ** 0.5).clamp_min(1e-12)


def rms_norm(x):
    """RMSNorm without a gain: the linear layer that always follows would absorb it."""
    return (x * rms(x).reciprocal()).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and PreNorm."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        head_width = config.n_embd // config.n_head
        frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angle = torch.outer(torch.arange(config.n_ctx), frequency)[:, None]  # (n_ctx, 1, D/H/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, h, cache=None):
        (B, T, D), H = h.shape, self.n_head
        seen = cache.get(self) if cache else None  # keys and values of the positions so far
        past = seen[0].size(2) if seen else 0
        require(past + T <= len(self.cos), f"{past + T} positions are over n_ctx={len(self.cos)}")
        require(past == 0 or T == 1, f"{T} ids at once: after the first call the cache takes one")
        qk, v = self.qkv(rms_norm(h)).view(B, T, 3 * H, D // H).split([2 * H, H], dim=2)
        cos, sin = self.cos[past : past + T], self.sin[past : past + T]
        a, b = qk.chunk(2, dim=-1)  # (B, T, 2H, D/H/2): RoPE turns the pairs (a, b)
        qk = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(v.dtype)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)  # (B, H, T, D/H) each
        v = v.transpose(1, 2)  # (B, H, T, D/H)
        if seen:
            k, v = torch.cat([seen[0], k], dim=2), torch.cat([seen[1], v], dim=2)
        if cache is not None:
            cache[self] = k, v
        dropout = self.dropout * self.training
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=not past)
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

    def forward(self, h, cache=None):  # no use for the cache: an MLP sees one position at a time
        h = rms_norm(h)
        y = self.down(F.silu(self.gate(h)) * self.up(h))
        return F.dropout(y, self.dropout, self.training)


# --------------------------------------------------------------------------------------------------
# The method, plainly.


def offer(kinds, updates, S, block):
    """What a block of S sublayers offers after these updates: {(kind, block): source (B, T, D)}."""
    total, sources = sum(updates), {}
    for kind in kinds:
        source = sum(SIGNS[kind](j, S) * u for j, u in enumerate(updates))  # (B, T, D)         (5)
        # (2) mixes raw values: a source counts for its weight times its size. Matched to the sum, a
        # difference counts for its weight alone. Without gradient, since the factor is a unit of
        # measure: else whoever reads a detail would also pull at the size of the block's sum.
        gain = (rms(total) / rms(source)).detach()  # (B, T, 1); 1 for the sum itself           (6)
        sources[kind, block] = source * gain.to(source.dtype)
    return sources


class GPT(nn.Module):
    """A decoder-only Transformer with a choice of residual variant. Forks can rely on embed, head,
    sublayers (2L modules, input h to update), query (2L+1, D) and detail_bias (2L+1, details)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        random_state = torch.get_rng_state()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        layers = [(Attention(config), MLP(config)) for _ in range(config.n_layer)]
        self.sublayers = nn.ModuleList(sublayer for layer in layers for sublayer in layer)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        torch.set_rng_state(random_state)  # so what a fork adds above moves nobody else's draws
        self.init_weights()
        self.kinds = KINDS.get(config.residual, ())
        self.details = [kind for kind in self.kinds if kind != "sum"]
        Q, S = 2 * config.n_layer + 1, 2 * config.n_layer // config.n_block
        self.S = S = 1 if config.residual == "attnres" else S  # sublayers of a block
        if self.kinds:
            # All start as the same network (wav: but for its details, of weight e^detail_bias).
            # Zero queries make every mixture a plain mean: standard's stream divided by the number
            # of sources. And the norm that opens each sublayer and the head cancels that number. A
            # norm with a larger eps, or a source counted twice, breaks it: see `python wav.py`.
            self.query = nn.Parameter(torch.zeros(Q, config.n_embd))
            signs = [[float(SIGNS[kind](j, S)) for j in range(S)] for kind in self.kinds]
            self.register_buffer("basis", torch.tensor(signs), persistent=False)  # (K, S)
        if self.details:
            self.detail_bias = nn.Parameter(torch.ones(Q, len(self.details)) * config.detail_bias)

    @torch.no_grad()
    def init_weights(self):
        """The same weights from the same seed, whatever the residual."""
        for name, p in self.named_parameters():
            layer = name.removesuffix(".weight").split(".")[-1]
            if layer in ("embed", "head", "qkv", "gate", "up"):
                p.normal_(std=0.02)
            elif layer in ("proj", "down"):  # 2L of these add up in the standard stream
                p.normal_(std=0.02 / math.sqrt(len(self.sublayers)))

    def forward(self, idx, targets=None, cache=None):
        """Ids (B, T), up to n_ctx, to logits (B, T, V) and, given targets (B, T), the loss in nats
        per token. With a cache (a dict, empty at first) ids come singly after the first call."""
        x = self.embed(idx)  # (B, T, D), the x_0 of the method
        if self.config.residual == "standard":
            for sublayer in self.sublayers:
                x = x + sublayer(x, cache)  # (1)
        else:
            x = self.route(x, cache)  # (2) to (7)
        logits = self.head(rms_norm(x))
        flat = logits.flatten(0, 1)  # (B T, V)
        return logits, None if targets is None else F.cross_entropy(flat, targets.flatten())

    def route_plain(self, x, cache=None, weights=None):
        """The routed variants by the letter: from x_0 (B, T, D) to what the head reads (B, T, D).
        The list weights gets what each sublayer and the output read, {(kind, block): (B, T)}."""
        completed, updates = {("x0", ""): x}, []  # what all later sublayers can read; running block
        for l, query in enumerate(self.query):
            running = offer(("sum",), updates, self.S, "running") if updates else {}
            read = completed | running  # (3), (4), (5)
            sources = torch.stack([*read.values()])  # (N, B, T, D)
            bias = self.bias(l, [kind for kind, _ in read])  # (N,), 0 but for details
            logits = rms_norm(sources) @ query + bias[:, None, None]  # (N, B, T)
            mixing = logits.softmax(0)  # (N, B, T)                                             (2)
            h = (mixing[..., None] * sources).sum(0)  # (B, T, D)
            if weights is not None:
                weights.append(dict(zip(read, mixing)))
            if l == len(self.sublayers):
                return h  # the output reads every block, not only the last
            updates.append(self.sublayers[l](h, cache))
            if len(updates) == self.S:
                completed |= offer(self.kinds, updates, self.S, (l + 1) // self.S)
                updates = []

    route = route_plain  # what `forward` runs; the last line of the fast form replaces it

    def bias(self, l, kinds):
        """c of (2) for N sources of these kinds: (N,), or (Q, N) for a slice l of the queries."""
        zero = self.query.new_zeros(self.query[l].shape[:-1])
        learned = {kind: self.detail_bias[l][..., i] for i, kind in enumerate(self.details)}
        return torch.stack([learned.get(kind, zero) for kind in kinds], -1)

    @torch.no_grad()
    def routing(self, idx):
        """What route_plain reads on ids (B, T): mixing weights (2L+1, N, B, T), 0 where there is no
        such source yet, and the N names of the sources: "x0", "sum running", "split 3", ..."""
        require(self.kinds, "residual='standard' has no routing to show: every weight is 1")
        rows = []
        self.route_plain(self.embed(idx), weights=rows)
        absent = torch.zeros_like(next(iter(rows[0].values())))
        keys = dict.fromkeys(key for row in rows for key in row)
        weights = [torch.stack([row.get(key, absent) for key in keys]) for row in rows]
        return torch.stack(weights), [f"{kind} {block}".strip() for kind, block in keys]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Yield max_new_tokens ids (B, 1) that go on from idx (B, T), one by one. Call eval first.
        temperature: 1 as trained, 0 for the likeliest id; top_k: draw from the k likeliest only.
        Keys and values are cached; routing mixes over depth, at one position, and needs no cache.
        When n_ctx positions are full, the window starts again from its last n_ctx / 2."""
        require(temperature >= 0, f"temperature={temperature} must be 0 or more")
        require(top_k is None or top_k >= 1, f"top_k={top_k} must be 1 or more")
        n_ctx, cache = self.config.n_ctx, {}
        window = new = idx[:, -n_ctx:]
        for _ in range(max_new_tokens):
            if window.size(1) > n_ctx:
                window = new = window[:, -max(1, n_ctx // 2) :]
                cache = {}
            logits = self(new, cache=cache)[0][:, -1].float()  # (B, V)
            # Shift the maximum to 0 first: a tiny temperature then makes -inf, but no inf - inf.
            logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            new = torch.multinomial(logits.softmax(-1), num_samples=1)  # (B, 1)
            window = torch.cat([window, new], dim=1)
            yield new


# --------------------------------------------------------------------------------------------------
# The same method, fast. A query is a parameter, not a function of the token. So before a block
# runs, all its S queries can read the completed sources at once; inside it only what it has made
# itself is new. (The papers call it two-phase computation.) The two parts of a softmax merge
# exactly: with Z = exp(lse), the sum of exp(logits) of a part, the mixture of both is
#     (Z_done h_done + Z_run h_run) / (Z_done + Z_run)
#         = h_run + sigmoid(lse_done - lse_run) (h_done - h_run)                                 (7)
# The sigmoid is this arithmetic, not a gate that learns.


def mix(sources, inv_rms, query, bias=None):
    """Softmax mixtures of N sources, one for each of Q queries, token by token.                (2)
    sources (N, B, T, D); inv_rms (N, B, T, 1), their 1 / rms; query (Q, D); bias (Q, N).
    Returns the Q mixtures, each (B, T, D), and the log-sum-exps of their logits, each (B, T)."""
    # No key is ever made: q . RMSNorm(s) = (q . s) / rms(s). And a single query multiplies as a
    # vector: for attnres at 48 layers that saves 13 % of a step.
    dots = sources @ query.T if len(query) > 1 else (sources @ query[0])[..., None]
    logits = dots * inv_rms  # (N, B, T, Q), in fp32 even where the dots are bf16
    if bias is not None:
        logits = logits + bias.T[:, None, None]
    if len(sources) == 1:  # the first block, and every running sum: a softmax over one source is 1
        return [sources[0]] * len(query), logits[0].unbind(-1)
    lse = logits.logsumexp(0)  # (B, T, Q)
    mixing = (logits - lse).exp().to(sources.dtype)  # (N, B, T, Q)
    # For each token a product (Q, N) @ (N, D): all the queries read the sources in one pass.
    mixing = mixing.permute(1, 2, 3, 0).contiguous()  # else matmul goes token by token on a CPU
    mixtures = mixing @ sources.permute(1, 2, 0, 3)  # (B, T, Q, D)
    return mixtures.unbind(2), lse.unbind(-1)


def merge(h_done, lse_done, running, query):
    """What one query (D) reads: the running sources (N, B, T, D) merged into the mixture of the
    completed ones, h_done (B, T, D) with its lse_done (B, T). Returns (B, T, D)."""
    (h_run,), (lse_run,) = mix(running, rms(running).reciprocal(), query[None])
    share = torch.sigmoid(lse_done - lse_run)[..., None]  # Z_done / (Z_done + Z_run), (B, T, 1)
    return torch.lerp(h_run, h_done, share.to(h_run.dtype))  # h_run + share (h_done - h_run)   (7)


def offer_at_once(basis, updates, total):
    """As `offer`: K matched sources (K, B, T, D) of a block with this total (B, T, D), all in one
    product, and their 1 / rms (K, B, T, 1)."""
    sources = torch.tensordot(basis.to(total.dtype), torch.stack(updates), 1)  # (K, B, T, D)   (5)
    inv_rms = rms(sources).reciprocal()
    gain = (rms(total) * inv_rms).detach()  # (K, B, T, 1)                                      (6)
    return sources * gain.to(sources.dtype), inv_rms / gain


def route(self, x, cache=None):
    """As GPT.route_plain: from x_0 (B, T, D) to what the head reads (B, T, D)."""
    if torch.is_autocast_enabled(x.device.type):  # bf16 sources; norms and softmax in fp32
        x = x.to(torch.get_autocast_dtype(x.device.type))
    n_sublayer, n_block, details = len(self.sublayers), self.config.n_block, self.details
    stretch = n_sublayer // n_block  # sublayers routed at once: a block (attnres: any number does)
    bias = self.bias(slice(None), ["x0", *(self.kinds * n_block)]) if details else None  # (2L+1, N)
    sources, inv_rms = x[None], rms(x)[None].reciprocal()  # completed: x_0, then K of each block
    for first in range(0, n_sublayer + 1, stretch):
        now = slice(first, first + stretch)  # the block's queries; at last the output's alone
        c = bias[now, : len(sources)] if details else None
        h_done, lse_done = mix(sources, inv_rms, self.query[now], c)  # all of the block at once
        if first == n_sublayer:
            return h_done[0]
        updates, running = [], None
        for j in range(stretch):
            h, query = h_done[j], self.query[first + j]
            h = merge(h, lse_done[j], running, query) if updates else h
            updates.append(self.sublayers[first + j](h, cache))
            if self.S == 1:
                running = torch.stack(updates)  # each update so far is a source                (3)
            else:
                running = running + updates[j] if j else updates[0][None]  # their sum is one   (4)
        new = running, rms(running).reciprocal()
        if details:
            new = offer_at_once(self.basis, updates, running[0])
        sources, inv_rms = torch.cat([sources, new[0]]), torch.cat([inv_rms, new[1]])


GPT.route = route  # a fork that edits route_plain takes this line out, or runs what it did not edit


def main():
    """The lesson, in float64: the start, details off; far from it, values and gradients."""
    print("a block of two layers:   attention      MLP  attention      MLP")
    for kind, sign in SIGNS.items():
        print(f"  {kind:20}" + "".join(f"{sign(j, 4):+10g}" for j in range(4)))
    print("12 layers:              parameters    start vs standard     fast vs plain")
    idx, starts = torch.arange(32).view(2, 16), []
    for residual in RESIDUALS:
        torch.manual_seed(1)
        model, found = GPT(GPTConfig(65, residual=residual, detail_bias=-1000.0)).double(), []
        starts.append(model(idx)[0].detach())
        line = f"  {residual:20} {sum(p.numel() for p in model.parameters()):11,}"
        line += f"{(starts[-1] - starts[0]).norm() / starts[0].norm():20.0e}"
        for p in model.parameters():
            p.data = 0.1 * torch.randn_like(p)  # far from the start, details on
        for form in {GPT.route, GPT.route_plain} if model.kinds else ():
            h = rms_norm(form(model, model.embed(idx)))
            loss = F.cross_entropy(model.head(h).flatten(0, 1), idx.flatten())
            gradients = torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True)
            found.append(torch.cat([h.flatten(), *(g.flatten() for g in gradients)]))
        if len(found) == 2:  # else the plain form is what runs, and there is nothing to compare
            apart = (found[0] - found[1]).norm() / found[1].norm()
            note = "" if apart < 1e-9 else "  edit route too, or take out GPT.route"
            line += f"{apart:20.0e}{note}"
        print(line)


if __name__ == "__main__":
    main()
