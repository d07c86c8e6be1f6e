"""Every layer and the root wrapped by FSDP2, and of CogView2's models with shared heads: two processes train to the
losses of one."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import in_two_processes, needs_processes
from test_superresolve import CAPTIONS, base, codes, make
from test_transformer import recipe_of

from cogview.config import TrainConfig
from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch, pad_text
from cogview.train import sharding

STEPS, ATTENTIONS = 4, ("three_region", "dense_pb_relax", "dalle")
COGVIEW2 = ("coglm", "direct", "iterative")


def _problem(attention: str) -> tuple[Recipe, torch.nn.Module, Batch]:
    torch.manual_seed(0)
    recipe = recipe_of(attention, init_std=0.1, image_positions="fixed")
    model = recipe.model()
    text = torch.randint(10, (4, 9))
    text[1, 4:] = -1
    return recipe, model, recipe.batch(text, torch.randint(20, (4, 16)), draws=torch.Generator().manual_seed(0))


def _of_cogview2(name: str) -> tuple[torch.nn.Module, Batch]:
    recipe, model = base() if name == "coglm" else make(name)
    of_four = codes(recipe, 4) if name != "coglm" else [torch.arange(64).view(4, 16) % 40]
    streams = [torch.Generator().manual_seed(n) for n in range(4)]
    return model, recipe.training_batch(pad_text([*CAPTIONS[:3], CAPTIONS[0]]), *of_four, draws=streams)


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
    for name in COGVIEW2:
        for sizes in ((2, 1), (1, 2)):
            model, batch = _of_cogview2(name)
            both = torch.distributed.init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
            sharding._cut(model, TrainConfig(steps=STEPS, dtype="float32"), SimpleNamespace(mesh=both, tensor=sizes[1]))
            part = batch.chunk(sizes[0])[both["data"].get_local_rank()]
            losses = torch.stack(_losses(model, part, batch.weights.sum(), sizes[0]))
            torch.distributed.all_reduce(losses, group=both["data"].get_group())
            if mesh.get_rank() == 0:
                torch.save(losses, folder / f"{name}-{sizes[1]}.pt")


@needs_processes
def test_two_ranks_train_to_the_losses_of_one(tmp_path: Path) -> None:
    in_two_processes(partial(_rank, folder=tmp_path))
    for attention in ATTENTIONS:
        _, model, batch = _problem(attention)
        expected = torch.stack(_losses(model, batch, batch.weights.sum(), 1))
        assert expected[-1] < 0.9 * expected[0]
        torch.testing.assert_close(torch.load(tmp_path / f"{attention}.pt"), expected, rtol=1e-4, atol=1e-5)
    for name in COGVIEW2:
        model, batch = _of_cogview2(name)
        expected = torch.stack(_losses(model, batch, batch.weights.sum(), 1))
        assert expected[-1] < 0.9 * expected[0]
        for tensor in (1, 2):
            torch.testing.assert_close(torch.load(tmp_path / f"{name}-{tensor}.pt"), expected, rtol=1e-4, atol=1e-5)
