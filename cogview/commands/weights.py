"""`cogview import-weights` and `cogview export-weights`: CogView's and CogView2's released files as runs, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.published.families import RELEASED, RELEASES
from cogview.recipes.superresolution import Restart

_NAMES = [f"{release.name} of {folder}" for folder, release in RELEASES.items() if release.name != "gpt"]


@dataclass(frozen=True)
class ImportWeights:
    """Take a released CogView or CogView2 model into a run, without running code from its files.

    Several models, as cogview-base, cogview-sr and cogview-caption, or coglm, cogview2-dsr and cogview2-itersr, may go
    into one run one after the other."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help_behavior_hint="(required)")]
    """Folder of the model, unpacked: latest_checkpointed_iteration.txt (CogView2: latest) and a folder with
    mp_rank_*_model_states.pt."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/published")
    """Folder of the run."""
    vqvae: Annotated[Path | None, option("FILE", "the run's")] = None
    """Image tokenizer, vqvae_hard_biggerset_011.pt; of CogView2's codes ice_image.pt."""
    text: Annotated[Path | None, option("FILE", "the run's")] = None
    """Text tokenizer, cog-pretrain.model (SentencePiece); CogView2's is ice_text.model."""
    name: Annotated[str | None, option("NAME", f"by the folder's name {', '.join(_NAMES)}; gpt of others")] = None
    """Of the model in the run."""
    recipe: Annotated[Literal[*RELEASED] | None, option("{" + ",".join(RELEASED) + "}", "by the folder's name")] = None  # type: ignore[valid-type]
    """What the model is for. Weights of another one are refused."""
    heads: Annotated[int | None, option("INT", "model_config.json's, or width / 64")] = None
    """Attention heads, which the tensors do not tell."""
    image_grid: Annotated[int | None, option("INT", "20 of CogView2, or the largest fitting power of 2")] = None
    """Image tokens a side, which the files do not tell: 32 of what was released; of CogView2's super-resolutions the
    coarse picture's."""
    restart: Annotated[Restart | None, option("{on,behind}", "on, as it was trained")] = None
    """Of recipe superresolution: positions begin anew on [ROI2], or behind it, as the released code draws."""

    def run(self) -> None:
        from cogview.published.convert import import_model

        kind = RELEASES.get(self.source.resolve().name, RELEASES["cogview-base"])
        path = import_model(
            self.source,
            self.run_folder,
            name=self.name or kind.name,
            recipe=self.recipe or kind.recipe,
            vqvae=self.vqvae,
            text=self.text,
            heads=self.heads,
            image_grid=self.image_grid,
            restart=self.restart,
            tell=console.print,
        )
        console.print(f"imported as {path}")


@dataclass(frozen=True)
class ExportWeights:
    """Write a run's model and tokenizers as the released files of its kind, in float16: CogView's, or for recipes
    coglm, direct and iterative CogView2's, as SwissArmyTransformer reads them."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help_behavior_hint="(required)")]
    """Folder of the run."""
    out: Path
    """Folder for the files."""
    name: Annotated[str | None, option("NAME", "trained last")] = None
    """Which of the run's models."""
    step: Annotated[int | None, option("INT", "the best, or newest")] = None
    """Which of its checkpoints."""
    parts: int = 1
    """Tensor-parallel parts that the model is cut into."""

    def run(self) -> None:
        from cogview.published.convert import export_run

        folder = export_run(
            self.run_folder, self.out, name=self.name, step=self.step, parts=self.parts, tell=console.print
        )
        console.print(f"{folder}, and the tokenizers beside it")
