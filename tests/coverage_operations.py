"""Sequence models, own uses of parameters and losses that the forward-AD engine must follow, one line each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.cases import Case, Tied
from tests.coverage_layers import ROWS, SEQUENCES, chain, named

POSITIVE = torch.linspace(0.5, 3, 6, dtype=torch.float64)
TOKENS = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(1))
LABELS, TARGETS = torch.tensor([3, 1, 0, 4, 1, 2]), torch.softmax(ROWS.cos(), 1)

# --- sequences ----------------------------------------------------------------------------------------------------


def _recurrent(layer: Any, **options: Any) -> Case:
    return named(f"{layer.__name__} {options}", lambda: layer(8, 5, **options), lambda m: m(SEQUENCES)[0])


def _packed() -> Any:
    return nn.utils.rnn.pack_padded_sequence(SEQUENCES, torch.tensor([4, 4, 3, 2, 2, 1]))


TWO_LAYERS = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3}

RECURRENT = [
    *(_recurrent(layer) for layer in (nn.RNN, nn.GRU, nn.LSTM)),
    *(_recurrent(layer, **TWO_LAYERS) for layer in (nn.RNN, nn.GRU, nn.LSTM)),
    *(_recurrent(layer, bias=False) for layer in (nn.RNN, nn.GRU, nn.LSTM)),
    _recurrent(nn.RNN, nonlinearity="relu"),
    _recurrent(nn.LSTM, proj_size=3),
    *(named(f"packed {f.__name__}", lambda f=f: f(8, 5), lambda m: m(_packed())[0].data) for f in (nn.GRU, nn.LSTM)),
    named(
        "GRU from a state", lambda: nn.GRU(8, 5), lambda m: m(SEQUENCES, torch.ones(1, 6, 5, dtype=torch.float64))[0]
    ),
    named("LSTM's final state", lambda: nn.LSTM(8, 5), lambda m: torch.cat(m(SEQUENCES)[1])),
    named("LSTMCell", lambda: nn.LSTMCell(8, 5), lambda m: m(SEQUENCES[1], m(SEQUENCES[0]))[0]),
    named("GRUCell", lambda: nn.GRUCell(8, 5), lambda m: m(SEQUENCES[1], m(SEQUENCES[0]))),
    named("RNNCell", lambda: nn.RNNCell(8, 5), lambda m: m(SEQUENCES[1], m(SEQUENCES[0]))),
    chain("embedding", TOKENS, lambda: nn.Embedding(7, 5), lambda: nn.Linear(5, 2)),
    chain("embedding with padding", TOKENS, lambda: nn.Embedding(7, 5, padding_idx=0), lambda: nn.Linear(5, 2)),
    named("tied weights", Tied, lambda m: m(TOKENS % 5)),
]


def _attention(**options: Any) -> Case:
    def out(m: nn.Module) -> Tensor:
        q, k, v = m(SEQUENCES).view(4, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)

    return named(f"attention {list(options)}", lambda: nn.Linear(8, 24), out)


def _grouped_queries(m: nn.Module) -> Tensor:
    q, k, v = m(SEQUENCES).view(4, 6, 8, 2).transpose(1, 2).split([4, 2, 2], 1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).flatten(1)


def _multihead(*, train: bool, need_weights: bool, **options: Any) -> Case:
    name = f"multi-head attention {train=} {need_weights=} {options}"
    kv = SEQUENCES[..., : options.get("kdim", 8)], SEQUENCES[..., : options.get("vdim", 8)]
    return named(
        name,
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1, **options).train(train),
        lambda m: m(SEQUENCES, *kv, need_weights=need_weights)[0],
    )


def _encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


_PADDING = torch.tensor([[False] * 5 + [True]] * 4)
_CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)

ATTENTION = [
    _attention(),
    _attention(is_causal=True),
    _attention(attn_mask=torch.ones(6, 6).tril().bool(), dropout_p=0.2),
    _attention(attn_mask=torch.ones(6, 6, dtype=torch.float64), scale=0.3),
    named("attention with grouped queries", lambda: nn.Linear(8, 16), _grouped_queries),
    *(_multihead(train=train, need_weights=weights) for train in (True, False) for weights in (True, False)),
    _multihead(train=True, need_weights=False, add_bias_kv=True),
    _multihead(train=True, need_weights=True, kdim=5, vdim=4),
    *(
        named(
            f"encoder layer {train=} {first=}",
            lambda train=train, first=first: _encoder_layer(norm_first=first).train(train),
            lambda m: m(SEQUENCES),
        )
        for train in (True, False)
        for first in (True, False)
    ),
    named(
        "encoder with padding, eval",
        lambda: nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False).eval(),
        lambda m: m(SEQUENCES, src_key_padding_mask=_PADDING),
    ),
    named("encoder, eval", lambda: nn.TransformerEncoder(_encoder_layer(), 2).eval(), lambda m: m(SEQUENCES)),
    named(
        "transformer",
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        lambda m: m(SEQUENCES, SEQUENCES[:, :3], tgt_is_causal=True, tgt_mask=_CAUSAL),
    ),
]

# --- modules that use their parameters themselves -----------------------------------------------------------------


class Weights(nn.Module):
    """A matrix `w`, a vector `v`, the data `x` and h = x w^T."""

    x = ROWS

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))
        self.v = nn.Parameter(torch.randn(6))

    @property
    def h(self) -> Tensor:
        return F.linear(self.x, self.w)


def _add_in_place(h: Tensor, v: Tensor) -> Tensor:
    h += v
    h *= v
    h -= 1
    h /= 2
    return h.add_(h * 2).mul_(v)


def _set_items(h: Tensor) -> Tensor:
    h[:, 0] = h[:, 1] * 3
    h[1] = 2.0
    return h


def _set_items_of_plain_tensor(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :3] = h[:, :3]
    return out + h


def _change_views(h: Tensor) -> Tensor:
    h[:, :2].mul_(3.0)
    h.view(-1)[:4].add_(1)
    return h


def _write_later_into_a_view(h: Tensor, v: Tensor) -> Tensor:
    h[:, :2].add_(v[:2])
    return h


def _change_a_view_after_its_use(h: Tensor, v: Tensor) -> Tensor:
    view = h[:, :2]
    total = h + v
    view.mul_(2)
    return h + total


def _write_both_into_a_plain_tensor(h: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :3] = h[:, :3]
    out[:, 3:] += v[3:]
    return out * h


def _standardized(h: Tensor) -> Tensor:
    return (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True) + h.var(0)


def _in_no_grad(m: Any) -> Tensor:
    with torch.no_grad():
        h = m.h.relu_()
    return h * m.v


def _changed_in_no_grad(m: Any) -> Tensor:
    h = m.h
    with torch.no_grad():
        h.mul_(2)
    return h


def _segments(x: Tensor, reduce: str) -> Tensor:
    segment_reduce = vars(torch)["segment_reduce"]  # which torch's stubs leave out
    return segment_reduce(x, reduce, offsets=torch.tensor([0, 2, 3, 6]))


_USES: dict[str, Callable[[Any], Tensor]] = {
    "einsum": lambda m: torch.einsum("bi,oi->bo", m.x, m.w),
    "einsum of two parameters": lambda m: torch.einsum("bi,oi,o->bo", m.x, m.w, m.v),
    "@": lambda m: m.x @ m.w.T + m.v,
    "@ of two parameters": lambda m: (m.v @ m.w)[None],
    "mT": lambda m: m.x @ m.w.mT,
    "tensordot": lambda m: torch.tensordot(m.x, m.w, dims=([1], [1])),
    "linear on sliced weights": lambda m: F.linear(m.x, m.w[1:4], m.v[1:4]),
    "linear on sliced columns": lambda m: F.linear(m.x[:, :3], m.w[:, :3]),
    "linear on chunks": lambda m: torch.stack([F.linear(m.x, w) for w in m.w.chunk(3)]).sum(0),
    "residual": lambda m: m.h + F.linear(F.relu(m.h)[:, :5], m.w),
    "in-place sums and products": lambda m: _add_in_place(m.h, m.v),
    "in-place residual": lambda m: m.h.add_(m.h.relu_()),
    "in-place functions": lambda m: m.h.square_().neg_().exp_(),
    "x[...] = y": lambda m: _set_items(m.h),
    "x[...] = y of a plain tensor": lambda m: _set_items_of_plain_tensor(m.h),
    "in-place changes of views": lambda m: _change_views(m.h),
    "a view into which a later parameter is written": lambda m: _write_later_into_a_view(m.h, m.v),
    "a view that is changed after its use": lambda m: _change_a_view_after_its_use(m.h, m.v),
    "two parameters in a plain tensor": lambda m: _write_both_into_a_plain_tensor(m.h, m.v),
    "norms": lambda m: m.x / m.w.norm(dim=1)[:5] + m.v.norm(),
    "normalize": lambda m: F.normalize(m.h),
    "cosine_similarity": lambda m: F.cosine_similarity(m.h, m.v[None]),
    "where": lambda m: torch.where(m.h > 0, m.h, 0.5 * m.v),
    "masked_fill": lambda m: m.h.masked_fill(m.x[:, :1] > 0, 2.0),
    "powers": lambda m: 2**m.h + m.v**3 + torch.pow(m.v.abs(), m.v),
    "quotients": lambda m: m.h / (m.v**2 + 1) + 1 / (m.v**2 + 1) - m.v / 3,
    "differences": lambda m: 1 - m.h - m.v.neg() + m.h.mul(2.0).add(1).sub(m.v, alpha=0.5),
    "moments": lambda m: _standardized(m.h),
    "extremes": lambda m: m.h.max(1, keepdim=True)[0] + m.h.amax(0) + m.h.sort(1)[0] + m.h.topk(6)[0],
    "sums": lambda m: m.h.logsumexp(1, keepdim=True) + m.h.cumsum(1) + m.h.prod(1, keepdim=True),
    "clamp": lambda m: m.h.clamp(-1, 1) + m.h.clamp_min(m.v) + torch.maximum(m.h, m.v),
    "cat and stack": lambda m: torch.cat([m.h, m.x, torch.stack([m.v] * 6)], 1),
    "indices": lambda m: m.h[torch.tensor([0, 2, 3])][:, [1, 2]] + m.h[m.h[:, 0] > -99][0, 0],
    "None and indices": lambda m: m.h[:, None, torch.tensor([1, 2])].flatten(1),
    "inverse": lambda m: torch.linalg.inv(m.w[:5] @ m.w[:5].T + torch.eye(5, dtype=m.w.dtype)) @ m.x.T,
    "detach": lambda m: m.h.detach() * m.v,
    "no_grad": _in_no_grad,
    "changed under no_grad": _changed_in_no_grad,
    "straight-through": lambda m: m.h + (m.h.round() - m.h).detach(),
    "interpolate": lambda m: F.interpolate(m.h[None, None], (9, 11), mode="bilinear")[0, 0],
    "pad": lambda m: F.pad(m.h, (1, 2), value=3.0),
    "unfold and fold": lambda m: F.fold(F.unfold(m.h[None, None], 2), (6, 6), 2)[0, 0],
    "addmm": lambda m: torch.addmm(m.v, m.x, m.w.t()) + torch.addcmul(m.v, m.v, m.v) + torch.lerp(m.v, m.v * 2, 0.3),
    "baddbmm": lambda m: torch.baddbmm(m.v, m.x[None], m.w.t()[None])[0],
    "bilinear": lambda m: F.bilinear(m.x, m.x, m.w[None, :5].expand(2, 5, 5), m.v[:2]),
    "rolled and flipped": lambda m: torch.roll(m.h, 1, 1).flip(0).tril(),
    "item": lambda m: m.h * (m.h.sum().item() > -99),
    "repeated": lambda m: m.h.repeat(2, 1) + m.h.expand(6, 6).repeat_interleave(2, 0),
    "reshaped": lambda m: m.h.unflatten(1, (2, 3)).movedim(1, 0).reshape(12, 3),
    "zeros_like": lambda m: torch.zeros_like(m.h) + m.v,
    "gumbel_softmax": lambda m: F.gumbel_softmax(m.h),
    "scatter_add": lambda m: torch.zeros_like(m.h).scatter_add(1, torch.arange(6).repeat(6, 1), m.h),
    "index_add": lambda m: torch.zeros_like(m.h).index_add(0, torch.tensor([0, 1, 1, 2, 3, 3]), m.h),
    "fft": lambda m: torch.fft.rfft(m.h).abs(),
    "grid_sample": lambda m: F.grid_sample(m.h[None, None], m.h.tanh().view(1, 6, 3, 2), align_corners=False)[0, 0],
    "filled at random": lambda m: (
        m.h * m.h.clone().normal_(1, 2) * m.h.clone().bernoulli_(0.4) + m.v.clone().random_(3)
    ),
    "segment_reduce": lambda m: torch.cat([_segments(m.h, name) for name in ("sum", "mean", "max", "min", "prod")]),
    "fake_quantize": lambda m: torch.fake_quantize_per_tensor_affine(3 * m.h, 0.3, 1, -4, 3),
    "fake_quantize by channel": lambda m: torch.fake_quantize_per_channel_affine(
        3 * m.h, 0.1 + 0.1 * torch.arange(6), torch.zeros(6, dtype=torch.int32), 1, -4, 3
    ),
    "gamma distribution": lambda m: torch.igamma(POSITIVE, m.h.exp()) * torch.special.gammaincc(POSITIVE, m.v.exp()),
    "zeta": lambda m: torch.special.zeta(1 + POSITIVE, m.h.exp()) + torch.special.zeta(2.5, m.v.exp()),
    "rotary": lambda m: torch.view_as_real(torch.view_as_complex(m.h.view(6, 3, 2)) * 1j),
}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):  # 2.11 lacks its derivative
    del _USES["grid_sample"]

USES_OF_PARAMETERS = [named(name, Weights, use) for name, use in _USES.items()]


class Symmetric(nn.Module):
    """W = (A + A^T) / 2."""

    def forward(self, a: Tensor) -> Tensor:
        return (a + a.T) / 2


def _symmetric() -> nn.Module:
    layer = nn.Linear(5, 5)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


PARAMETRIZATIONS = [
    chain("custom parametrization", ROWS, _symmetric, nn.Tanh),
    chain(
        "orthogonal, matrix_exp",
        ROWS,
        lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="matrix_exp"),
    ),
    chain("orthogonal, cayley", ROWS, lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley")),
    chain("spectral_norm", ROWS, lambda: parametrizations.spectral_norm(nn.Linear(5, 3)), nn.Tanh),
    chain("weight_norm", ROWS, lambda: parametrizations.weight_norm(nn.Linear(5, 3)), nn.Tanh),
]

# --- losses -------------------------------------------------------------------------------------------------------

_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy of each": lambda o: F.cross_entropy(o, LABELS, reduction="none"),
    "cross entropy": lambda o: F.cross_entropy(o, LABELS),
    "cross entropy, ignored labels": lambda o: F.cross_entropy(o, torch.where(LABELS == 1, -100, LABELS)),
    "cross entropy, soft": lambda o: F.cross_entropy(o, TARGETS),
    "cross entropy, weighted": lambda o: F.cross_entropy(o, LABELS, weight=torch.arange(1, 6, dtype=o.dtype)),
    "cross entropy, smoothed": lambda o: F.cross_entropy(o, LABELS, label_smoothing=0.1, reduction="none"),
    "cross entropy of sequences": lambda o: F.cross_entropy(
        o.view(2, 3, 5).transpose(1, 2), LABELS.view(2, 3), reduction="sum"
    ),
    "mse": lambda o: F.mse_loss(o, TARGETS),
    "mse of each": lambda o: F.mse_loss(o, TARGETS, reduction="none").mean(1),
    "bce": lambda o: F.binary_cross_entropy(o.sigmoid(), TARGETS),
    "bce with logits": lambda o: F.binary_cross_entropy_with_logits(o, TARGETS),
    "bce with logits, weighted": lambda o: F.binary_cross_entropy_with_logits(
        o, TARGETS, pos_weight=torch.arange(1, 6, dtype=o.dtype)
    ),
    "nll": lambda o: F.nll_loss(o.log_softmax(1), LABELS),
    "l1": lambda o: F.l1_loss(o, TARGETS),
    "huber": lambda o: F.huber_loss(o, TARGETS),
    "smooth l1": lambda o: F.smooth_l1_loss(o, TARGETS),
    "kl": lambda o: F.kl_div(o.log_softmax(1), TARGETS, reduction="batchmean"),
    "cosine embedding": lambda o: F.cosine_embedding_loss(o, TARGETS, torch.ones(6)),
    "cosine similarity": lambda o: F.cosine_similarity(o, TARGETS),
    "triplet": lambda o: F.triplet_margin_loss(o, TARGETS, TARGETS.flip(0)),
    "gaussian nll": lambda o: F.gaussian_nll_loss(o, TARGETS, o.exp()),
    "poisson nll": lambda o: F.poisson_nll_loss(o, TARGETS),
    "multilabel soft margin": lambda o: F.multilabel_soft_margin_loss(o, TARGETS.round()),
    "soft margin": lambda o: F.soft_margin_loss(o, TARGETS.sign()),
    "hinge embedding": lambda o: F.hinge_embedding_loss(o, TARGETS.sign()),
}

LOSSES = [Case(f"loss: {k}", lambda: nn.Linear(5, 5), lambda m, f=f: f(m(ROWS))) for k, f in _LOSSES.items()]

OPERATIONS = [*RECURRENT, *ATTENTION, *USES_OF_PARAMETERS, *PARAMETRIZATIONS, *LOSSES]
