"""What goes on inside a Transformer in a step of its training: the largest values of each layer, and which operation
was the first to give one that is not finite.

Both are of a forward of their own, with the step's samples and dropout, without gradients and not compiled: a step that
is not looked at costs nothing. Text and image tokens, whose states differ in scale (CogView paper, section 2.4), are
told apart; places of [PAD], and of an image token that is hidden, are neither. Shapes: B batch, S tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch
from cogview.train.ranks import Ranks

_PAIRS = 2**24  # of query and key, whose scores are alive at once: 64 MB
_PLACES = {
    "h + mlp_post_norm": "h",
    "h + mlp": "h",
    "attention.dense": "attention",
    "mlp.dense_4h_to_h": "mlp",
    "attention.query_key_value": "scores",
}

See = Callable[[int, str, Tensor], None]
"""Takes the layer that an operation is of, counted from 0, -1 ahead of them all; its name; its output [B, S, ...]."""


class Inside:
    """Of a recipe's model, cut over processes or not. All processes ask together, each with its own samples."""

    def __init__(self, recipe: Recipe, model: Transformer, ranks: Ranks):
        self.recipe, self.model, self.ranks = recipe, model, ranks

    def largest(self, part: Batch) -> dict[str, float]:
        """The largest absolute values in a forward of some samples, as "watch/03/scores/image": of layer 3, counted
        from 1, behind it the main branch "h", of its "attention" and "mlp" what enters the norm behind them, and the
        "scores" q·k/√d of all keys up to the last that the query may see but [PAD], whichever of them the attention
        sees; by the kind of a state's token or a score's query. inf where one is not finite."""
        kinds, pad = self.recipe.input_kinds(part.inputs), part.inputs == self.recipe.vocab["PAD"]
        reach = self.recipe.reach(part.context).expand(pad.shape)
        found: dict[str, Tensor] = {}

        def see(layer: int, name: str, x: Tensor) -> None:
            if name in _PLACES:
                each = self._scores(layer, x, pad, reach) if name.endswith("key_value") else x.abs().amax(-1).float()
                for kind, there in kinds.items():
                    found[f"watch/{layer + 1:02}/{_PLACES[name]}/{kind}"] = each.where(there, 0).amax()

        self._forward(part, see)
        values = torch.stack(list(found.values())).nan_to_num(nan=math.inf, posinf=math.inf)
        return dict(zip(found, self.ranks.largest(values).tolist(), strict=True))

    def first_not_finite(self, parts: Sequence[Batch]) -> str:
        """Which operation's output it was, the earliest in a forward of any of the parts on any process, in words;
        empty where all are finite."""
        found: list[tuple[int, str]] = []
        for part in parts:
            check = _Check(self.recipe.input_kinds(part.inputs), len(self.model.stack.layers))
            losses = self._forward(part, check)
            check(len(self.model.stack.layers), "embedding.nll", losses)
            found += check.found
        told = self.ranks.told(min(found, default=None, key=lambda one: one[0]))
        firsts = [(*one, rank) for rank, one in enumerate(told) if one is not None]
        if not firsts:
            return ""
        _, words, rank = min(firsts, key=lambda one: (one[0], one[2]))
        return words if self.ranks.mesh is None else f"{words} on rank {rank}"

    @torch.no_grad()
    def _forward(self, part: Batch, see: See) -> Tensor:
        with _shown(self.model, see):
            return self.model(part.inputs, part.context, targets=part.targets)

    def _scores(self, layer: Any, query_key_value: Tensor, pad: Tensor, reach: Tensor) -> Tensor:
        """float32 [B, S]: of each query the largest one, in float32 whatever the dtype, so that none overflows."""
        attention: Any = self.model.stack.layers[layer].attention
        q, k, _ = attention.split(query_key_value)
        k = k.float().masked_fill(pad[:, None, :, None], 0) / math.sqrt(attention.head_dim)
        at_once, found = max(1, _PAIRS // k[..., 0].numel()), []
        for start in range(0, k.shape[2], at_once):
            ends = reach[:, None, start : start + at_once, None]
            keys = torch.arange(int(ends.max()), device=k.device)
            scores = q[:, :, start : start + at_once].float() @ k[:, :, : len(keys)].mT
            found.append(scores.abs().masked_fill_(keys >= ends, 0).amax((1, 3)))
        return torch.cat(found, dim=1)


class _Check:
    """The first output of a forward that is not finite."""

    def __init__(self, kinds: dict[str, Tensor], layers: int):
        self.kinds, self.layers = kinds, layers
        self.seen, self.before = 0, math.nan  # outputs so far, and the largest |value| of the last of them
        self.found: list[tuple[int, str]] = []
        """One at most: how many were ahead of it, and words."""

    def __call__(self, layer: int, name: str, x: Tensor) -> None:
        if not self.found and not x.isfinite().all():
            self.found.append((self.seen, f"{self._place(layer)}, output of {name}: {self._values(x)}"))
        elif not self.found:
            self.seen, self.before = self.seen + 1, float(x.abs().amax())

    def _place(self, layer: int) -> str:
        if layer == -1:
            return "ahead of the layers"
        return f"in layer {layer + 1} of {self.layers}" if layer < self.layers else "behind the layers"

    def _values(self, x: Tensor) -> str:
        """As "inf at 0 text, 12 image tokens (largest |value| before: 6.1e+04, dtype float16)"."""
        what = [name for name, some in (("inf", x.isinf()), ("nan", x.isnan())) if some.any()]
        tokens = ~x.isfinite().reshape(*x.shape[:2], -1).all(-1)
        counts = {kind: int((tokens & there).sum()) for kind, there in self.kinds.items()}
        if other := int(tokens.sum()) - sum(counts.values()):
            counts["other"] = other
        where = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        before = "" if math.isnan(self.before) else f"largest |value| before: {self.before:.3g}, "
        return f"{' and '.join(what)} at {where} tokens ({before}dtype {str(x.dtype).removeprefix('torch.')})"


@contextmanager
def _shown(model: Transformer, see: See) -> Iterator[None]:
    """Forwards inside show what each operation gives, in the order of their computation."""
    with ExitStack() as hooks:

        def after(modules: Sequence[nn.Module], layer: int, name: str) -> None:
            show = _whole(see, len(modules))
            for module in modules:
                hooks.enter_context(module.register_forward_hook(lambda _, inputs, x: show(layer, name, x)))

        def ahead(modules: Sequence[nn.Module], layer: int, *names: str) -> None:
            show = _whole(see, len(modules))

            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                for name, x in zip(names, inputs, strict=False):
                    show(layer, name, x)

            for module in modules:  # ahead of what tensor parallelism makes of it
                hooks.enter_context(module.register_forward_pre_hook(hook, prepend=True))

        after([model.embedding], -1, "embedding")
        layer: Any
        for i, layer in enumerate(model.stack.layers):
            if i == 0:
                ahead([layer], -1, "dropout of embedding", "first_norm")
            into, out = (_projections(layer.attention, name) for name in ("query_key_value", "dense"))
            after(into, i, "attention.query_key_value")
            ahead(out, i, "attention.attend")
            after(out, i, "attention.dense")
            hooks.enter_context(_joins_shown(layer, i, see))
            after([layer.mlp.dense_h_to_4h], i, "mlp.dense_h_to_4h")
            ahead([layer.mlp.dense_4h_to_h], i, "mlp.gelu")
            after([layer.mlp.dense_4h_to_h], i, "mlp.dense_4h_to_h")
        yield


def _projections(attention: nn.Module, name: str) -> list[nn.Module]:
    """One of all tokens; of direct super-resolution one of those before the fine cells, and one of these."""
    return [part for own, part in attention.named_children() if own.endswith(name)]


def _whole(see: See, count: int) -> See:
    """Shows parts of a sequence, of which there are so many, as one."""
    parts: list[Tensor] = []

    def together(layer: int, name: str, x: Tensor) -> None:
        parts.append(x)
        if len(parts) == count:
            see(layer, name, x if count == 1 else torch.cat(parts, dim=1))
            parts.clear()

    return together


@contextmanager
def _joins_shown(layer: Any, index: int, see: See) -> Iterator[None]:
    """The same of a layer's norms, which are no modules that are called. Inside it is not compiled."""
    attributes: dict[str, Any] = vars(layer)
    own: dict[str, Any] = {name: attributes.pop(name) for name in ("forward", "join") if name in attributes}
    join = layer.join

    def shown(branch: Tensor, h: Tensor, post: nn.LayerNorm | None, pre: nn.LayerNorm, *rest: Any) -> Any:
        h, x = join(branch, h, post, pre, *rest)
        branch_is, norm_is = ("attention", "mlp_norm") if pre is layer.mlp_norm else ("mlp", "next_norm")
        if post is not None:
            branch_is = {"attention": "post_norm", "mlp": "mlp_post_norm"}[branch_is]
        see(index, f"h + {branch_is}", h)
        see(index, norm_is, x)
        return h, x

    attributes["join"] = shown
    try:
        yield
    finally:
        del attributes["join"]
        attributes.update(own)
