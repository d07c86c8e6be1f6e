"""`cogview evaluate`: how good the pictures are that a run draws, by machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cogview.commands.console import console
from cogview.commands.pictures import RunFolder, Step
from cogview.commands.presets import option
from cogview.config import require


@dataclass(frozen=True)
class Evaluate:
    """Draw held-out captions with a run's model and compare the pictures with the true ones: FID and Inception Score at
    several radii of blur, CMMD and CapLoss (CogView paper, section 4.1). A stopped evaluation goes on in its folder."""

    shards: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")]
    """Tar shards of pairs that the model was not trained on."""
    features: Path
    """The network that pictures are compared by: a file of cogview train-features, a folder of CLIP, DINOv2 or SigLIP
    as transformers saves it, or pt_inception-2015-12-05-6726825d.pth. Scores by different ones are not comparable."""
    cmmd: Annotated[Path | None, option("PATH", "that of --features")] = None
    """The network of CMMD, likewise; the article's is CLIP."""
    run_folder: RunFolder = None
    """Folder of the run: both tokenizers and its models."""
    name: Annotated[str | None, option("NAME", "trained last")] = None
    """Which of the run's models draws."""
    step: Step = None
    """Which of its checkpoints. The best has the lowest held-out loss."""
    judge: Annotated[str | None, option("NAME", "none")] = None
    """A captioning model of the run: it chooses the best of the candidates, and gives CapLoss."""
    candidates: Annotated[int | None, option("INT", "60 with --judge, else 1")] = None
    """Drawn of each caption."""
    compare: Annotated[tuple[str, ...], option("[NAME=FOLDER [NAME=FOLDER ...]]", "none")] = ()
    """Folders of pictures that other models drew of the same captions, named as in captions.jsonl of --out."""
    count: int = 1_000
    """Captions, drawn by chance; as many other pairs, where there are, tell what chance alone comes to. The paper has
    30,000."""
    contrast: float = 1.0
    """Also evaluate what was drawn with so many times its contrast; the paper does with 1.5."""
    radii: tuple[float, ...] = (0, 1, 2, 4, 8)
    """Standard deviations of the blur in pixels, the first 0."""
    out: Path = Path("runs/evaluation")
    """Folder for the pictures, report.md and figures.json."""
    temperature: float = 0.9
    """Below 1 likely tokens become likelier, above 1 less likely."""
    top_k: int = 200
    """Of the likeliest tokens so many may be drawn; 1: always the likeliest."""
    top_p: float = 1.0
    """And of those only the likeliest whose probabilities come to this share."""
    guidance: float = 1.0
    """Above 1 pictures keep closer to their captions, see cogview generate."""
    seed: int = 0
    """Of which captions there are, and of the first candidate; the others have the following ones."""
    batch_size: int = 64
    """Pictures drawn at once."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def run(self) -> None:
        from cogview.data.shards import PairDataset
        from cogview.evaluation import evaluate
        from cogview.evaluation.networks import Network
        from cogview.pictures import check_place
        from cogview.runs import last_run
        from cogview.sampling import Sampling
        from cogview.system import System

        judged = self.judge is not None or self.candidates in (None, 1)
        require(judged, "candidates", "--judge NAME, which ranks them", self.candidates)
        candidates = self.candidates if self.candidates is not None else 1 if self.judge is None else 60
        settings = evaluate.Settings(self.count, candidates, self.seed, self.contrast, self.radii)
        how = Sampling(self.temperature, self.top_k, self.top_p, self.guidance, batch_size=self.batch_size)
        compare = folders_of(self.compare)
        data = PairDataset(self.shards)
        network = Network.load(self.features, self.device)
        encoder = network if self.cmmd is None else Network.load(self.cmmd, self.device, "cmmd")
        folder = last_run() if self.run_folder is None else self.run_folder
        system = System.load(folder, self.device, name=self.name, step=self.step, draws="pictures")
        judge = None
        if self.judge is not None:
            judge = System.load(folder, self.device, name=self.judge, draws="captions")
        check_place(self.out / "report.md")  # behind all that can be wrong, since it makes the folder
        console.print(str(system.source))
        judges = evaluate.Judges(network, encoder, judge)
        console.print(evaluate.run(self.out, data, system, judges, how, settings, compare))
        console.print(f"Read {self.out / 'report.md'}")


def folders_of(given: tuple[str, ...]) -> dict[str, Path]:
    """Of NAME=FOLDER; ValueError where that is none, or a name comes twice."""
    found: dict[str, Path] = {}
    for pair in given:
        name, _, folder = pair.partition("=")
        plain = re.fullmatch(r"\w[\w .+-]{0,39}", name) is not None and bool(folder)
        require(plain, "compare", "NAME=FOLDER, the name of letters, digits, spaces and .+-", pair)
        require(name not in found, "compare", "every name once", name)
        found[name] = Path(folder)
    return found
