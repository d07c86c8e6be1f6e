"""Every layer and the root wrapped by FSDP2: two processes train to the losses of one."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_two_processes, needs_processes
from test_transformer import recipe_of

from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch

STEPS, ATTENTIONS = 4, ("three_region", "dense_pb_relax", "dalle")


def _problem(attention: str) -> tuple[Recipe, torch.nn.Module, Batch]:
    torch.manual_seed(0)
    recipe = recipe_of(attention, init_std=0.1, image_positions="fixed")
    model = recipe.model()
    text = torch.randint(10, (4, 9))
    text[1, 4:] = -1
    return recipe, model, recipe.batch(text, torch.randint(20, (4, 16)), draws=torch.Generator().manual_seed(0))


def _losses(model: torch.nn.Module, part: Batch, total: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(STEPS):
        nll = model(part.inputs, part.context, targets=part.targets, recompute=("none", "full")[step % 2])
        loss = (nll * part.weights).sum() / total
        optimizer.zero_grad()
        (loss * ranks).backward()  # FSDP takes the mean over ranks
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _rank(mesh: Any, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    for attention in ATTENTIONS:
        _, model, batch = _problem(attention)
        for layer in model.stack.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert {type(p.data).__name__ for p in model.parameters()} == {"DTensor"}
        losses = torch.stack(_losses(model, batch.chunk(2)[mesh.get_rank()], batch.weights.sum(), 2))
        torch.distributed.all_reduce(losses)
        if mesh.get_rank() == 0:
            torch.save(losses, folder / f"{attention}.pt")


@needs_processes
def test_two_ranks_train_to_the_losses_of_one(tmp_path: Path) -> None:
    in_two_processes(partial(_rank, folder=tmp_path))
    for attention in ATTENTIONS:
        _, model, batch = _problem(attention)
        expected = torch.stack(_losses(model, batch, batch.weights.sum(), 1))
        assert expected[-1] < 0.9 * expected[0]
        torch.testing.assert_close(torch.load(tmp_path / f"{attention}.pt"), expected, rtol=1e-4, atol=1e-5)
