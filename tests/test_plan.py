"""The plan of a training: bytes of ranks as FSDP2 has them, times as formulas say, layouts that there are."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_memory import recipe_of
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.scaling_page import PAGE, filled
from cogview import cli
from cogview.hardware import GPUS
from cogview.memory import parameters
from cogview.plan import ACHIEVED, Planner, remedy
from cogview.recipes import RECIPES
from cogview.recipes.cogview import CogView

RANKS = 8


@pytest.fixture
def mesh() -> Iterator[Any]:
    """This process is one of 8 ranks, whose communication is pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_bytes_of_a_rank(mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    recipe = recipe_of("dense")
    model: Any = recipe.model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*model.stack.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    planned = Planner(recipe, 16 * RANKS, GPUS["H100"]).at(RANKS, micro_batch=8).bytes
    shards = sum(p.to_local().nbytes for p in model.parameters())
    assert shards == pytest.approx(planned["parameters"], rel=0.005)
    batch = recipe.batch(torch.randint(50, (2, 29)), torch.randint(100, (2, 64)))

    def losses() -> torch.Tensor:
        return model(batch.inputs, batch.context, targets=batch.targets)

    model.set_requires_gradient_sync(False)
    nll = losses()
    sizes = parameters(recipe)
    root = model._get_fsdp_state()._fsdp_param_group.fsdp_params
    gathered = sum(x.untyped_storage().nbytes() for p in root for x in p.all_gather_outputs)
    assert gathered == pytest.approx(2 * sizes.root, rel=0.03)  # the shards' padding
    nll.sum().backward()
    groups = [part._get_fsdp_state()._fsdp_param_group for part in (model, *model.stack.layers)]
    added_up = sum(p.unsharded_accumulated_grad.nbytes for group in groups for p in group.fsdp_params)
    assert added_up == 4 * sizes.total
    model.set_requires_gradient_sync(True)
    losses().sum().backward()
    assert sum(p.grad.to_local().nbytes for p in model.parameters()) == shards
    flying = 2 * (sizes.root + sizes.layer) + 2 * 4 * sizes.layer
    assert planned["gradients"] == 4 * sizes.total // RANKS + added_up + flying


def planner(name: str = "cogview-4b", gpu: str = "H100", **change: Any) -> Planner:
    config, training = CogView.presets[name]
    return Planner(CogView(config), training.batch_size, GPUS[gpu], **change)


def test_seconds():
    plans = planner()
    eight, many = (plans.at(gpus, micro_batch=12) for gpus in (8, 512))
    total, flops = plans.parameters.total, plans.flops
    operations = 6144 * (flops.total + flops.projections + flops.attention)
    assert eight.compute == pytest.approx(operations / (8 * 989.4e12 * 0.4)) == pytest.approx(64 * many.compute)
    assert many.gather == pytest.approx(511 / 512 * 8 * total / (ACHIEVED * 8 * 50e9))  # 8 cards are slower than a link
    assert eight.gather == pytest.approx(7 / 8 * (64 * 4 + 4) * total / (ACHIEVED * 450e9))
    assert many.seconds == max(many.compute, many.gather) + many.optimizer
    slow = dataclasses.replace(plans, network=1e9).at(512, micro_batch=12)
    assert slow.gather == pytest.approx(511 / 512 * 8 * total / (ACHIEVED * 8e9))
    assert slow.seconds < slow.seconds_without_overlap


def test_tensor_parallel_ranks_share_layers_and_wait_for_each_other():
    one, four = (planner(tensor_parallel=n).at(8, micro_batch=4) for n in (1, 4))
    assert one.tensor == 0 < four.tensor
    assert four.bytes["activations"] < one.bytes["activations"]
    states = 2 * 2560 * 1088 * 6144 / 2
    assert four.tensor == pytest.approx(48 * 6 * states * 2 * 3 / 4 / (ACHIEVED * 450e9))


def test_micro_batches_are_the_largest_that_fit():
    plan = planner().at(8)
    assert (plan.micro_batch, plan.accumulate) == (64, 12)
    assert plan.fits
    assert not planner().at(8, micro_batch=96).fits
    assert planner().at(512).accumulate == 1


def test_what_would_fit():
    alone = planner().at(1)
    assert not alone.fits
    assert remedy(planner(), 1) == "2 GPUs"
    assert planner(gpu="H200").at(1).fits
    assert remedy(planner(gpu="L4"), 8) == "--tensor-parallel 2"
    assert remedy(planner("fashion-3b", "RTX 3090", checkpointing="none"), 8) == "--checkpoint-activations selective"
    assert remedy(planner("cogview-large", "RTX 3090"), 8) == "384 GPUs"  # where gradients need not add up


@pytest.mark.parametrize(("name", "recipe"), [(p, recipe) for recipe in RECIPES.values() for p in recipe.presets])
def test_every_preset_can_be_planned(name, recipe):
    config, training = recipe.presets[name]
    plan = Planner(recipe(config), training.batch_size, GPUS["B200"]).at(8)
    assert plan.fits
    assert plan.seconds > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--gpu t4", "gpu: expected one of A100, .*, got 't4'"),
        ("--tensor-parallel 3", r"tensor_parallel: expected a divisor of the 40 heads, at most 8, got 3"),
        ("--gpus 12", r"gpus: expected a multiple of .* whole machines of 8, got 12"),
        ("--gpus 4096", "batch_size: expected a multiple of the 4096 data-parallel ranks, got 6144"),
        ("--micro-batch 5", "micro_batch: expected a divisor of the 6144 samples"),
        ("--utilisation 0", "utilisation: expected above 0, at most 1"),
        ("--memory 0", "memory: expected above 0"),
        ("--batch-size 0", "batch_size: expected at least 1"),
        ("--gpus", "gpus: expected at least one number"),
    ],
)
def test_what_there_is_not_is_a_sentence(options, said):
    with pytest.raises(SystemExit, match=f"^cogview: {said}"):
        cli.main(["plan", *options.split()])


def test_the_command_prints_a_table(capsys):
    cli.main(["plan", "tiny", "--gpu", "rtx-4090", "--gpus", "1", "2", "--dtype", "float32", "--memory", "10"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert re.match(r"4,274,176 parameters, 5 layers of width 256; 96 tokens a sequence\.", lines[0])
    assert any(re.match(r"\| all, of 9\.2 GiB +\| +0\.\d+ \| +0\.\d+ \|", row) for row in rows)
    assert not any("days" in row for row in rows)  # its length is in seconds


def test_the_page_is_what_the_command_prints():
    text = PAGE.read_text()
    assert filled(text) == text, "python -m benchmarks.scaling_page writes it"
    assert text.count("<!-- end -->") == text.count("\n| GPUs ") + 1 == 7


def test_the_recipe_is_the_first_that_has_the_preset(capsys):
    """DALL-E's averages its parameters, and has a main branch in float32."""
    cli.main(["plan", "dalle-12b", "--gpus", "64"])
    said = capsys.readouterr().out
    assert "12,195,810,688 parameters, 64 layers of width 3968" in said
    assert re.search(r"\| averaged parameters +\| +0.71 \|", said)
    cli.main(["plan", "dalle-12b", "--gpus", "64", "--dtype", "bfloat16", "--micro-batch", "16"])
    narrow, wide = (
        float(re.search(r"full \(chosen\) \| +([\d.]+)", text)[1]) for text in (capsys.readouterr().out, said)
    )
    assert narrow < wide < 2 * narrow
