"""
WAV: multi-resolution block residual routing for deep decoder-only Transformers, in one file.

A decoder of L layers is a chain of 2L sublayers: attention, MLP, attention, MLP, ... Sublayer l reads
an input h_l and returns an update u_l. A *residual variant* is the rule that builds h_l from the token
embedding x_0 and the updates so far; everything else is the same ordinary decoder.

    standard        h_l = x_0 + u_1 + ... + u_{l-1}                                               (1)
    attnres         a softmax mixture of x_0, u_1 ... u_{l-1}: attention over depth, not time     (2)
    block_attnres   the same over x_0, the sum of each completed block of sublayers, and the
                    running sum of the current block once it has an update                        (3)
    wav             and two details of each completed block: phase (attention minus MLP) and
                    split (first half minus second half)                                          (6)

The weights are the softmax over sources s of  w_l . RMSNorm(s) + c_s  (4): a learned query w_l for
each sublayer and one for the output, zero at first, and a bias c_s, learned for details and 0 for all
else. A block's sources are W U, fixed combinations of its updates U (5). What the completed blocks
say and what the running block says merge by a sigmoid gate (7). README lists the seven equations.

Read on in this order: the decoder's ordinary parts, the basis that names a block's sources, the
mixer, and GPT.route, where the variants differ. `python wav.py` prints the lesson in small.

Letters in shapes: B batch, T time, D width, H heads, S sublayers of a block, N sources, K basis rows,
V vocabulary.

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

RESIDUALS = ("standard", "attnres", "block_attnres", "wav")
KINDS = ("sum", "phase", "split")  # what wav offers of a block; block_attnres has the first alone


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, in one line, for what cannot work."""

    vocab_size: int
    n_ctx: int = 128  # longest context, in tokens
    n_layer: int = 12  # attention + MLP pairs: twice as many sublayers
    n_head: int = 4
    n_embd: int = 128  # D, the width of the residual stream
    n_block: int = 4  # equal blocks of whole layers; to attnres only a matter of speed
    residual: str = "wav"
    detail_bias: float = -2.0  # where c of (4) starts for details: each weighs e^-2 of a block sum
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd", "n_block"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 1_000_000:
                raise ValueError(f"{name}={value!r} must be an integer from 1 to 1,000,000")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual!r} must be one of {', '.join(RESIDUALS)}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd={self.n_embd} must be a multiple of 2 n_head={2 * self.n_head}: "
                "heads have equal widths, and RoPE turns pairs"
            )
        if self.residual != "standard":
            least = 2 if self.residual == "wav" else 1  # in one layer phase and split are the same
            allowed = [n for n in range(1, self.n_layer // least + 1) if self.n_layer % n == 0]
            if self.n_block not in allowed:
                raise ValueError(
                    f"n_block={self.n_block} must cut n_layer={self.n_layer} into equal blocks of "
                    f"{least} or more layers: {f'try one of {allowed}' if allowed else 'add layers'}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not -1000 <= self.detail_bias <= 1000:
            raise ValueError(f"detail_bias={self.detail_bias} must be from -1000 to 1000")


# --------------------------------------------------------------------------------------------------
# The ordinary decoder. A sublayer maps its input h (B, T, D) to its update (B, T, D).


def inverse_rms(x):
    """1 / root mean square over the last dimension, (..., D) -> (..., 1), in fp32 or better."""
    # The floor only keeps an all-zero vector from dividing by zero. The usual eps of 1e-6 would do
    # harm: at 48 layers a mean of the 97 sources starts with a mean square of 4e-8.
    dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 is summed in fp32
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) / x.size(-1) ** 0.5
    return rms.clamp_min(1e-12).reciprocal()


def rms_norm(x):
    """RMSNorm without a gain: the linear layer that always follows would absorb it."""
    return (x * inverse_rms(x)).to(x.dtype)


def rope_table(n_ctx, head_width):
    """Cosines and sines (n_ctx, 1, D/H) of rotary positions.

    RoPE turns the pair (a, b) to (a cos - b sin, b cos + a sin). With a in the first half of a head and
    b in the second, a roll by half the head swaps them, and the signs are those of the sines.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
    angle = torch.outer(torch.arange(n_ctx), frequency)[:, None]  # (n_ctx, 1, D/H/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and PreNorm."""

    def __init__(self, config, cos, sin):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, h, cache=None):
        (B, T, D), H = h.shape, self.n_head
        seen = cache.get(self) if cache else None  # the keys and values of earlier calls
        past = seen[0].size(2) if seen else 0
        if past + T > len(self.cos):
            raise ValueError(f"{past + T} positions are more than n_ctx={len(self.cos)}")
        qk, v = self.qkv(rms_norm(h)).view(B, T, 3 * H, D // H).split([2 * H, H], dim=2)
        swapped = qk.roll(D // H // 2, dims=-1)  # (B, T, 2H, D/H), as qk
        cos, sin = self.cos[past : past + T], self.sin[past : past + T]
        qk = torch.addcmul(qk * cos, swapped, sin)  # + swapped * sin, in one pass fewer
        q, k = qk.to(v.dtype).transpose(1, 2).chunk(2, dim=1)  # (B, H, T, D/H) each
        v = v.transpose(1, 2)  # (B, H, T, D/H)
        mask = None
        if seen:
            k, v = torch.cat([seen[0], k], dim=2), torch.cat([seen[1], v], dim=2)
            if T > 1:  # a single new position sees all
                mask = torch.ones(T, past + T, dtype=torch.bool, device=h.device).tril(past)
        if cache is not None:
            cache[self] = k, v
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=not seen)
        y = self.proj(y.transpose(1, 2).reshape(B, T, D))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU with PreNorm. A width of 8/3 D, to the next multiple of 8, costs what a plain MLP of 4 D does."""

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
# Routing: what a block offers to later sublayers, and how a sublayer reads what it is offered.


def basis(residual, S):
    """The matrix W (K, S): a block with updates U (S, D) offers the K sources W U.            (5)

    phase and split sum to zero. With an even number of layers in a block the three rows are orthogonal
    (Walsh functions over depth, if S is a power of two); with an odd number split cuts the middle
    layer, between its attention and its MLP, and overlaps with phase a little.
    """
    if residual == "attnres":
        return torch.eye(S)
    sublayer = torch.arange(S)
    total = torch.ones(S)  # where the block moved the stream
    phase = torch.where(sublayer % 2 == 0, 1.0, -1.0)  # attention minus MLP
    split = torch.where(sublayer < S // 2, 1.0, -1.0)  # first half minus second half
    return torch.stack([total, phase, split] if residual == "wav" else [total])


def mix(sources, inv_rms, query, bias=None):
    """Softmax mixtures of N sources, one for each of S queries, token by token.

    sources (N, B, T, D); inv_rms (N, B, T, 1), theirs; query (S, D); bias (N, 1, 1, S).
    Returns the S mixtures, each (B, T, D), and the S log-sum-exps of their logits, each (B, T).
    The keys are RMS-normalised, w . RMSNorm(s) = (w . s) / rms(s); the values are the raw sources.
    """
    # A single query multiplies as a vector: for attnres at 48 layers that saves 13 % of a step.
    dots = sources @ query.T if len(query) > 1 else (sources @ query[0])[..., None]
    logits = dots * inv_rms  # (N, B, T, S), in fp32 even where the dots are bf16               (4)
    if bias is not None:
        logits = logits + bias
    if len(sources) == 1:  # the first block, and every running sum: a softmax over one source is 1
        return [sources[0]] * len(query), logits[0].unbind(-1)
    lse = logits.logsumexp(0)  # (B, T, S)
    weights = (logits - lse).exp().to(sources.dtype)  # (N, B, T, S)
    # For each token a product (S, N) @ (N, D): all the queries read the sources in one pass.
    weights = weights.permute(1, 2, 3, 0).contiguous()  # else matmul goes token by token on a CPU
    mixtures = weights @ sources.permute(1, 2, 0, 3)  # (B, T, S, D)
    return mixtures.unbind(2), lse.unbind(-1)


def step(sublayer, history, history_lse, running, query, cache=None):
    """Run a sublayer on the mixture of its history, the completed blocks, and of the running block.

    history (B, T, D) and history_lse (B, T), from mix; running (N, B, T, D), the sources that the
    running block has made so far, or None at its start; query (D). Returns the update (B, T, D).
    Two softmaxes merge by their log-sum-exps into the softmax over both: a sigmoid gate.
    """
    h = history
    if running is not None:
        (now,), (now_lse,) = mix(running, inverse_rms(running), query[None])
        gate = torch.sigmoid(history_lse - now_lse)[..., None]  # (B, T, 1)
        h = torch.lerp(now, history, gate.to(now.dtype))  # now + gate * (history - now)        (7)
    return sublayer(h, cache)


def offer(W, updates, match):
    """What a completed block offers: its sources (K, B, T, D) and their inverse rms (K, B, T, 1).

    With match, each detail gets the magnitude of its block's sum, token by token, and no gradient
    flows through that factor.
    """
    U = torch.stack(updates)  # (S, B, T, D)
    sources = torch.tensordot(W.to(U.dtype), U, 1)  # W U                                       (5)
    inv_rms = inverse_rms(sources)
    if match:
        gain = (inv_rms / inv_rms[0]).detach()  # rms(sum) / rms(detail); 1 for the sum itself  (6)
        sources = sources * gain.to(sources.dtype)
        inv_rms = inv_rms / gain  # that of the matched sources, gradient and all
    return sources, inv_rms


class GPT(nn.Module):
    """A decoder-only Transformer with a choice of residual variant.

    A fork can rely on: embed; sublayers, 2L modules in depth order, each callable with its input h
    alone; head; and, where the variant has them, query (2L+1, D), one for each sublayer and a last one
    for the output, and detail_bias (2L+1, 2), for phase and split.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        rope = rope_table(config.n_ctx, config.n_embd // config.n_head)
        layers = [(Attention(config, *rope), MLP(config)) for _ in range(config.n_layer)]
        self.sublayers = nn.ModuleList(sublayer for layer in layers for sublayer in layer)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.residual != "standard":
            n_query = len(self.sublayers) + 1
            W = basis(config.residual, len(self.sublayers) // config.n_block)
            self.register_buffer("basis", W, persistent=False)
            self.query = nn.Parameter(torch.empty(n_query, config.n_embd))
            if config.residual == "wav":
                self.detail_bias = nn.Parameter(torch.empty(n_query, 2))
        self.mix, self.step, self.offer = mix, step, offer  # compile() replaces them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The same weights from the same seed, whatever the residual.

        embed, head, qkv, gate, up    normal, std 0.02
        proj, down                    normal, std 0.02 / sqrt(2L): 2L updates add up in the stream
        query                         zero: at first nothing but detail_bias tells sources apart
        detail_bias                   config.detail_bias: below 0, so that details start low
        """
        for name, p in self.named_parameters():
            if name == "query":
                p.zero_()
            elif name == "detail_bias":
                p.fill_(self.config.detail_bias)
            elif name.endswith(("proj.weight", "down.weight")):
                p.normal_(std=0.02 / math.sqrt(len(self.sublayers)))
            else:
                p.normal_(std=0.02)

    def forward(self, idx, targets=None, cache=None):
        """Ids (B, T) to logits (B, T, V) and, given targets (B, T), the loss in nats per token.

        cache: a dict, empty at first, that keeps the keys and values of the ids seen so far, so that
        the next call gets the new ids alone. Raises ValueError where they exceed n_ctx.
        """
        x = self.embed(idx)  # (B, T, D), the x_0 of the method
        if self.config.residual == "standard":
            for sublayer in self.sublayers:
                x = x + sublayer(x, cache)  # (1)
        else:
            x = self.route(x, cache)  # (2) to (7)
        logits = self.head(rms_norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def queries(self, first, last, n_source):
        """The queries first to last - 1 (S, D), and their bias for n_source sources (N, 1, 1, S)."""
        query = self.query[first:last]
        if self.config.residual != "wav":
            return query, None
        # c of (4): 0 for x_0; then, for each completed block, 0, phase's and split's.
        bias = F.pad(self.detail_bias[first:last], (1, 0))  # (S, 3)
        bias = F.pad(bias.repeat(1, n_source // 3), (1, 0))  # (S, N)
        return query, bias.T[:, None, None]

    def route(self, x, cache=None):
        """The routed variants, from x_0 (B, T, D) to what the head reads (B, T, D).

        A query is a parameter and not a function of the token. So before a block runs, all its queries
        can read the completed sources at once; inside it only what the block itself has made so far is
        new, and step merges it in. `routing` computes the same by the letter.
        """
        if torch.is_autocast_enabled(x.device.type):  # bf16 sources; norms and softmax in fp32
            x = x.to(torch.get_autocast_dtype(x.device.type))
        attnres, wav = self.config.residual == "attnres", self.config.residual == "wav"
        S, n_sublayer = self.basis.size(1), len(self.sublayers)
        sources, inv_rms = x[None], inverse_rms(x)[None]  # completed: x_0, then K of each block
        for first in range(0, n_sublayer, S):
            query, bias = self.queries(first, first + S, len(sources))
            history, history_lse = self.mix(sources, inv_rms, query, bias)
            updates, running = [], None
            for j in range(S):
                sublayer = self.sublayers[first + j]
                u = self.step(sublayer, history[j], history_lse[j], running, query[j], cache)
                updates.append(u)
                if attnres:
                    running = torch.stack(updates)  # each update so far is a source            (2)
                else:
                    running = u[None] if j == 0 else running + u  # their sum is one            (3)
            new, new_inv_rms = self.offer(self.basis, updates, match=wav)
            sources, inv_rms = torch.cat([sources, new]), torch.cat([inv_rms, new_inv_rms])
        # The output reads every block with the last query, not only the last block.
        query, bias = self.queries(n_sublayer, n_sublayer + 1, len(sources))
        (h,), _ = self.mix(sources, inv_rms, query, bias)
        return h

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Yield max_new_tokens ids (B, 1) that go on from idx (B, T), one at a time.

        Each costs one position through the layers: keys and values are cached, and routing, which
        mixes over depth at one position, needs no cache. When n_ctx positions are full, the window
        slides: it starts again from the last n_ctx / 2. So every id is drawn from the full forward's
        logits of the window, which from then on is n_ctx / 2 to n_ctx long.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be 1 or more")
        n_ctx, cache = self.config.n_ctx, {}
        window = new = idx[:, -n_ctx:]
        for _ in range(max_new_tokens):
            if window.size(1) > n_ctx:
                window = new = window[:, -max(1, n_ctx // 2) :]
                cache = {}
            logits = self(new, cache=cache)[0][:, -1].float()  # (B, V)
            # Below 0 before they are divided: a tiny temperature makes no inf - inf of them.
            logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            new = torch.multinomial(logits.softmax(-1), num_samples=1)  # (B, 1)
            window = torch.cat([window, new], dim=1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) and max_new_tokens more ids: (B, T + max_new_tokens). See stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

    @torch.no_grad()
    def routing(self, idx):
        """What each sublayer reads: the method by the letter, one softmax at a time, for its weights.

        Returns weights (2L+1, N), averaged over the ids idx (B, T), a row for each sublayer and one for
        the output, each with sum 1; and the N names of the sources. Raises ValueError for the standard
        residual, which mixes nothing.
        """
        if self.config.residual == "standard":
            raise ValueError("residual='standard' has no routing to show: every weight is 1")
        W, kinds = self.basis, KINDS[: len(self.basis)]
        if self.config.residual == "attnres":
            W, kinds = W[:1, :1], ("u",)  # its blocks are only a schedule: here, one sublayer each
        S = W.size(1)
        completed, updates, rows = {"x0": self.embed(idx)}, [], []
        for l in range(len(self.sublayers) + 1):
            query, bias = self.queries(l, l + 1, len(completed))
            read = completed | ({"running": sum(updates)} if updates else {})
            sources = torch.stack([*read.values()])  # (N, B, T, D)
            logits = sources @ query.T * inverse_rms(sources)  # (N, B, T, 1)
            if bias is not None:
                logits[: len(completed)] += bias
            weights = logits.softmax(0)  # (4)
            rows.append(dict(zip(read, weights.mean((1, 2, 3)).tolist())))
            if l < len(self.sublayers):
                updates.append(self.sublayers[l]((weights * sources).sum(0)))
            if len(updates) == S:
                made, _ = offer(W, updates, match=self.config.residual == "wav")
                completed |= {f"{kind} {(l + 1) // S}": s for kind, s in zip(kinds, made)}
                updates = []
        names = [*completed, "running"] if S > 1 else [*completed]
        return torch.tensor([[row.get(name, 0.0) for name in names] for row in rows]), names

    def compile(self, **options):
        """torch.compile the regions that repeat, not their 2L repetitions unrolled."""
        # A region is compiled anew for attention and MLP, for training and evaluation, and for other
        # strides: more often than the 8 times after which torch would go on without compiling it.
        torch._dynamo.config.cache_size_limit = 64
        if self.config.residual == "standard":
            for sublayer in self.sublayers:
                sublayer.compile(**options)
        else:
            self.mix, self.step, self.offer = (
                torch.compile(f, **options) for f in (mix, step, offer)
            )


def main():
    """The lesson in small."""
    print("What wav knows of a block of two layers (attention, MLP, attention, MLP):")
    for kind, row in zip(KINDS, basis("wav", 4).int().tolist()):
        print(f"  {kind:6}", *(f"{w:+d}" for w in row))
    print("12 layers of width 128 at initialisation: parameters, and how far the logits are from")
    print("standard's, as a share of their size")
    idx = torch.randint(65, (2, 64), generator=torch.Generator().manual_seed(1))
    for residual, bias in [*((residual, -2.0) for residual in RESIDUALS), ("wav", -100.0)]:
        torch.manual_seed(1)
        model = GPT(GPTConfig(65, residual=residual, detail_bias=bias)).eval()
        logits, n_params = model(idx)[0].detach(), sum(p.numel() for p in model.parameters())
        if residual == "standard":
            standard = logits
        name = residual if bias == -2.0 else f"wav, detail_bias {bias:.0f}"
        print(f"  {name:23} {n_params:,}  {(logits - standard).norm() / standard.norm():.1e}")


if __name__ == "__main__":
    main()
