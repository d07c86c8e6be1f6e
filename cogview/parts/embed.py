"""Tokens to states and back: the tables, the gradient shrink, the tied head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ModelConfig
from cogview.loss import token_nll, weighted_nll
from cogview.parts.linear import linear


class Embedding(nn.Module):
    """Token and position tables. The head is the token table (CogView paper, section 2.4, shrinks its gradient)."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.words = nn.Embedding(vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.position_rows, config.hidden_size)
        self.grid = config.image_grid if config.image_positions == "rows_columns" else 0
        self.grad_scale = config.embedding_grad_scale

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """States [B, S, C] of tokens [B, S] at places [B, S] or [S], rows of the position table."""
        h = self.words(tokens) + F.embedding(positions, self.table())
        return torch.lerp(h.detach(), h, self.grad_scale)  # value h, gradient times the scale

    def table(self) -> Tensor:
        """A row for each place; of the places of an image by rows and columns the sums of the last ones."""
        if not self.grid:
            return self.positions.weight
        before, rows, columns = self.positions.weight.tensor_split([-2 * self.grid, -self.grid])
        return torch.cat([before, (rows[:, None] + columns).flatten(0, 1)])

    def logits(self, x: Tensor, among: slice = slice(None)) -> Tensor:
        """float32 [..., V] of states [..., C], or of some ids alone: the others' rows of the table are not read."""
        return linear(x, self.words.weight[among]).float()

    def nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood, float32 [B, S], of targets [B, S] from states [B, S, C]."""
        return token_nll(x, self.words.weight, targets)

    def weighted_nll(self, x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Their sum by weights [B, S], which alone has gradients, and they."""
        return weighted_nll(x, self.words.weight, targets, weights)
