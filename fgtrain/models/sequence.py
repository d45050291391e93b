"""Small language models: a causal transformer and an LSTM over characters or bytes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerLM(nn.Module):
    """A decoder-only transformer with pre-norm blocks and learned positions.

    Args:
        vocab_size: number of tokens.
        context: longest sequence.
        width: width of the residual stream; a multiple of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        dropout: probability in [0, 1) of dropping an entry of a block's output.
        tie: use the embedding as output layer too.

    Raises:
        ValueError: `depth` is below 1, or `width` is not a positive multiple of `heads`.

    Source: Vaswani et al. 2017, arXiv:1706.03762; pre-norm blocks: Radford et al. 2019 (GPT-2).
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        *,
        tie: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"width must be a positive multiple of heads, got {width} and {heads}")
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        if tie:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of `tokens` (B, T)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm2(x)))))


class LSTMLM(nn.Module):
    """An LSTM language model.

    Args:
        vocab_size: number of tokens.
        width: width of the embedding and of the hidden state.
        depth: number of layers.
        dropout: probability in [0, 1) between layers.

    Source: Hochreiter and Schmidhuber 1997.
    """

    def __init__(self, vocab_size: int, width: int = 64, depth: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=dropout)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of `tokens` (B, T)."""
        return self.head(self.lstm(self.tokens(tokens))[0])
