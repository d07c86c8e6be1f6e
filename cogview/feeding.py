"""How a model is fed sequences of which some places are drawn: what is given goes in as soon as it can, the KV cache
holds what was."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Prompt


class Walk:
    """The way through sequences of which `drawn` places (bool [B, S]) are drawn, one a step in each row; rows with
    fewer of them wait at their last."""

    def __init__(self, drawn: Tensor):
        counts = drawn.sum(dim=1)
        self.count = int(counts.max()) if len(counts) else 0
        """N, of steps."""
        ordered = (~drawn).int().argsort(dim=1, stable=True)[:, : max(1, self.count)]
        last = ordered.gather(1, (counts - 1).clamp_min(0)[:, None])
        self.waits = torch.arange(ordered.shape[1]) >= counts[:, None]
        """bool [B, N]: a row has been drawn to its end before."""
        self.waiting = self.waits.any(dim=0).tolist()
        self.places = torch.where(self.waits, last, ordered)
        """int64 [B, N]: what is drawn in step n."""
        self.lengths = self.places.diff(dim=1).clamp_min(1)
        """int64 [B, N - 1]: tokens from the one drawn in step n to before the next that is."""
        self.widths = self.lengths.amax(dim=0).tolist()
        self.widest = max([1, *self.widths])
        exact = (self.places.diff(dim=1) == self.lengths.amax(dim=0)).all(dim=0)
        self.steady = [False, *exact.tolist()]
        """Whether the cache ends where step n's token belongs: nothing was padded, no row waited."""


class Feed:
    """A prompt's sequences in a model; of the logits only those of the ids `low` to `high` (excluded) are computed."""

    def __init__(self, model: Transformer, prompt: Prompt):
        self.model, self.prompt, self.walk, device = model, prompt, Walk(prompt.drawn), model.device
        self.low, self.high = prompt.span
        self.tokens, self.context = prompt.inputs.to(device, copy=True), prompt.context.to(device)
        self.positions = self.context.positions.expand(self.tokens.shape)
        if prompt.stop is not None:
            self.tokens.masked_fill_(prompt.drawn.to(device), prompt.stop)
        self.places, self.lengths, self.waits = (
            x.to(device) for x in (self.walk.places, self.walk.lengths, self.walk.waits)
        )
        self.cache = model.make_cache(len(self.tokens), self.tokens.shape[1] + self.walk.widest - 1)
        self._step: Callable[[Tensor, Tensor], Tensor] | None = None

    def begin(self) -> Tensor:
        """Logits [B, V] of the first drawn places, behind what is given before them; rows with the same are computed
        once."""
        model, starts = self.model, self.prompt.starts
        same = torch.arange(len(starts)) if self.prompt.same is None else self.prompt.same
        chosen, which = (x.to(model.device) for x in same.unique(return_inverse=True))
        alone, longest = len(chosen) == len(starts), int(starts.max())
        # as wide as the whole one: what attention is told of later places stays inside
        begun = self.cache if alone else model.make_cache(len(chosen), self.tokens.shape[1])
        own = dataclasses.replace(self.context, positions=self.positions).rows(chosen)
        before = dataclasses.replace(own, positions=own.positions[:, :longest], prompt=True)
        at = starts.to(model.device)[chosen] - 1
        logits = model(self.tokens[chosen, :longest], before, at=at, cache=begun, among=self._among)
        if not alone:
            for whole, part in zip(self.cache, begun, strict=True):
                whole.keys[:, :, :longest] = part.keys[which, :, :longest]
                whole.values[:, :, :longest] = part.values[which, :, :longest]
        return logits[which]

    def put(self, n: int, drawn: Tensor) -> Tensor:
        """Writes what was drawn in step n, int64 [B]; the tokens that stand there now, [B, 1]."""
        at, drawn = self.places[:, n : n + 1], drawn[:, None]
        if self.walk.waiting[n]:
            drawn = torch.where(self.waits[:, n : n + 1], self.tokens.gather(1, at), drawn)
        self.tokens.scatter_(1, at, drawn)
        return drawn

    def next(self, n: int, drawn: Tensor) -> Tensor:
        """Logits [B, V] of the places that are drawn in step n + 1, behind step n's tokens [B, 1] and what is given."""
        at, width = self.places[:, n : n + 1], self.walk.widths[n]
        if not self.walk.steady[n]:  # padding is forgotten, later tokens overwrite it
            for layer in self.cache:
                layer.lengths.copy_(at[:, 0])
        if width == 1:
            step = self._step = self._step or (self._recorded() if self.model.records_steps else self._one)
            return step(drawn, self.positions.gather(1, at))
        fed = (at + torch.arange(width, device=at.device)).clamp_max(self.tokens.shape[1] - 1)
        now = dataclasses.replace(self.context, positions=self.positions.gather(1, fed))
        last = self.lengths[:, n] - 1
        return self.model(self.tokens.gather(1, fed), now, at=last, cache=self.cache, among=self._among)

    @property
    def _among(self) -> slice:
        return slice(self.low, self.high)

    def _one(self, token: Tensor, positions: Tensor) -> Tensor:
        now = dataclasses.replace(self.context, positions=positions)
        return self.model.step(token, now, cache=self.cache, among=self._among)

    def _recorded(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`_one` as a CUDA graph: a step is one launch."""
        token, positions = self.tokens[:, :1].clone(), self.positions[:, :1].clone()
        before = [layer.lengths.clone() for layer in self.cache]

        def forget() -> None:
            for layer, length in zip(self.cache, before, strict=True):
                layer.lengths.copy_(length)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compilers and libraries allocate in their first calls, which no graph may
            for _ in range(3):
                forget()
                self._one(token, positions)
        torch.cuda.current_stream().wait_stream(aside)
        forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._one(token, positions)  # recorded, not run

        def replay(new: Tensor, place: Tensor) -> Tensor:
            token.copy_(new)
            positions.copy_(place)
            graph.replay()
            return logits

        return replay
