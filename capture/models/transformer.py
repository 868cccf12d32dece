"""A Transformer encoder as language model, with sinusoidal positions and a causal mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from capture.arguments import require_whole
from capture.store.errors import UsageError

# Embedding and output layer start uniformly within ± this.
INITIAL_RANGE = 0.1


def transformer(
    vocabulary: int,
    *,
    width: float = 1.0,
    layers: int = 12,
    heads: int = 4,
    features: int = 128,
    dropout: float = 0.2,
    literal: bool = False,
) -> Transformer:
    """Make the language model of the paper, ``features * width`` wide, feed-forward part too.

    The default has 9,747,454 parameters with a vocabulary of 33,278: input and output weights are
    not tied, the positions have none. With `literal`, attention runs across the batch axis, as it
    does in the authors' code. Raises `UsageError`.
    """
    units = round(features * width)
    require_whole("vocabulary", vocabulary, 1)
    require_whole("layers", layers, 1)
    require_whole("heads", heads, 1)
    require_whole("features * width, rounded,", units, 1)
    if units % heads:
        raise UsageError(
            f"a width of {units} is no multiple of {heads} heads",
            where=f"features = {features}, width = {width}",
            fix="give another width or other heads",
        )
    if not 0 <= dropout < 1:
        raise UsageError("dropout must be at least 0 and below 1", where=f"dropout = {dropout}")
    return Transformer(vocabulary, units, layers, heads, dropout, literal=literal)


class Transformer(nn.Module):
    """Maps tokens, int64 `[N, window]`, to logits of the next ones, `[N, window, vocabulary]`."""

    def __init__(
        self,
        vocabulary: int,
        units: int,
        layers: int,
        heads: int,
        dropout: float,
        *,
        literal: bool = False,
    ) -> None:
        super().__init__()
        self.literal = literal
        self.embedding = nn.Embedding(vocabulary, units)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(units, heads, units, dropout, batch_first=True)
        # All layers start as copies of one, as torch makes them and the authors had them.
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(units, vocabulary)
        nn.init.uniform_(self.embedding.weight, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.uniform_(self.output.weight, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits; those at a position know the tokens up to it, and no later one.

        `literal` takes the first axis for time: then they know the samples before in the batch.
        """
        states = self._encode(tokens.T).transpose(0, 1) if self.literal else self._encode(tokens)
        logits: Tensor = self.output(states)
        return logits

    def _encode(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states, `[N, length, units]`."""
        units, length = self.embedding.embedding_dim, tokens.shape[1]
        states = self.embedding(tokens) * math.sqrt(units)
        states = self.dropout(states + positions(length, units).to(states))
        mask = nn.Transformer.generate_square_subsequent_mask(
            length, device=states.device, dtype=states.dtype
        )
        # The faster kernels of CUDA add up in no fixed order.
        with sdpa_kernel(SDPBackend.MATH):
            encoded: Tensor = self.encoder(states, mask=mask, is_causal=True)
        return encoded


def positions(length: int, units: int) -> Tensor:
    """Return sines (even columns) and cosines (odd) of position / 10000^(2i / units).

    float32 `[length, units]`, for the pair of columns i; from *Attention is all you need*, 3.5.
    """
    rates = torch.exp(torch.arange(0, units, 2) * (-math.log(10000.0) / units))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :units]
