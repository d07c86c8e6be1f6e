"""`cogview train`."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cogview.commands.console import console
from cogview.commands.presets import of_preset, option
from cogview.commands.train_model import (
    DROPOUT,
    SHAPE,
    advice,
    before,
    check_grid,
    check_room,
    chosen_recipe,
    recipe_for,
    training_of,
)
from cogview.commands.train_watch import watched
from cogview.config import Recompute, TrainConfig, require
from cogview.device import available
from cogview.parts.transformer import Transformer
from cogview.progress import progress
from cogview.recipes import RECIPES
from cogview.recipes.cogview import Kind
from cogview.recipes.dalle import Kind as Layer
from cogview.train.identity import AnotherRun
from cogview.train.loop import Result, Trainer
from cogview.train.ranks import Ranks, joined, own_device

PRESETS = tuple(dict.fromkeys(name for recipe in RECIPES.values() for name in recipe.presets))
RISEN = 1.005  # times the best held-out loss, from which on it is said
DROPOUTS = ", ".join(f"tiny {value:g} from {least:,} sequences on" for least, value in DROPOUT.items() if least)


@dataclass(frozen=True)
class Train:
    """Train a GPT on tokens; the same command goes on where it was stopped. By several processes, on one machine or on
    many that share the folders: torchrun --nproc-per-node 8 -m -- cogview train …

    A run that is there already and --from have a recipe and sizes, which are not asked for again."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/mine")
    """Folder of the run, with tokens/train and maybe tokens/test, or for superresolution tokens/pairs-train."""
    name: str = "gpt"
    """Of the model: its checkpoints, log and config.json are in RUN/NAME, so that a run can have several."""
    source: Annotated[Path | None, option("PATH", "new weights", name="from")] = None
    """Begin with the best weights of this model folder, or of this run's gpt, made with the same tokenizers."""
    recipe: Annotated[Literal[*RECIPES] | None, option("{" + ",".join(RECIPES) + "}", "cogview")] = None  # type: ignore[valid-type]
    """The system or task."""
    preset: Annotated[Literal[*PRESETS] | None, option("{" + ",".join(PRESETS) + "}", "tiny")] = None  # type: ignore[valid-type]
    """Of the recipe: sizes and training. What is said of presets below is of the first recipe that has them."""
    mix: Annotated[tuple[str, ...], option("[NAME=WEIGHT [NAME=WEIGHT ...]]", "train=1")] = ()
    """Splits to train on (tokenize --split NAME), each with how often its sequences come in an epoch: of 1.5 all come
    once, and half of them, others every time, once more. A run goes on with its own."""
    hold_out: float = 0.1
    """Share of the sequences, by a hash of their captions, to validate on where there is no tokens/test; 0: none."""
    steps: Annotated[int | None, of_preset("steps")] = None
    """Length of the run in steps; bit for bit repeatable."""
    minutes: Annotated[float | None, of_preset("seconds", lambda s: "no limit" if s is None else f"{s / 60:g}")] = None
    """Or its length in minutes; with both it ends at whichever comes first."""
    attention: Annotated[Kind | None, of_preset("attention")] = None
    """Of the recipe cogview."""
    layers: Annotated[int | None, of_preset("num_layers")] = None
    """Layers of the transformer."""
    hidden_size: Annotated[int | None, of_preset("hidden_size")] = None
    """Width of the transformer, a multiple of its heads."""
    heads: Annotated[int | None, of_preset("num_heads")] = None
    """Attention heads of a layer."""
    norms: Annotated[Literal["sandwich", "pre"] | None, of_preset("norms")] = None
    """Around each branch, or before it alone."""
    padding: Annotated[Literal["masked", "learned"] | None, of_preset("padding")] = None
    """Of the recipe dalle, behind a text that is shorter than there are places: hidden, or a token for each place."""
    schedule: Annotated[tuple[Layer, ...] | None, option("KIND [KIND ...]", "row, column, row, row, …")] = None
    """Of the recipe dalle, what the image sees of itself in each layer: row, column, convolutional or dense."""
    max_text: Annotated[int | None, option("INT", "as the captions need; of dalle 29 to 256, dalle-12b 256")] = None
    """Places for a caption's tokens in a new model. Longer captions are refused, or cut (--truncate-text)."""
    truncate_text: bool = False
    """Cut captions that are longer than the model has places for, and count them."""
    dropout: Annotated[float | None, option("FLOAT", f"{DROPOUTS}, {DROPOUT[0]:g} below; others 0.1")] = None
    """Share of the embeddings and of each branch that a training step drops: more against learning by heart."""
    batch_size: Annotated[int | None, of_preset("batch_size")] = None
    """Sequences a step."""
    accumulate: Annotated[int | None, of_preset("accumulate")] = None
    """Parts that a step is computed in one after the other, for less memory; divides the batch size."""
    learning_rate: Annotated[float | None, of_preset("learning_rate")] = None
    """The highest, behind the warm-up."""
    final_rate: Annotated[float | None, of_preset("final_rate")] = None
    """Share of the learning rate that it falls to, as a cosine."""
    warmup: Annotated[float | None, of_preset("warmup")] = None
    """Share of the run in which the learning rate rises."""
    weight_decay: Annotated[float | None, of_preset("weight_decay")] = None
    """Of AdamW, on matrices and embeddings."""
    clip: Annotated[float | None, of_preset("clip")] = None
    """Largest norm of a step's gradients; inf: any."""
    text_weight: Annotated[float | None, of_preset("text_weight")] = None
    """Of text tokens in the loss."""
    image_weight: Annotated[float | None, of_preset("image_weight")] = None
    """Of image tokens in the loss."""
    hide_context: Annotated[float | None, of_preset("hide_context")] = None
    """Share of sequences that see only a part of their own image, so that the text has to tell."""
    loss_mean: Annotated[Literal["tokens", "kinds"] | None, of_preset("loss_mean")] = None
    """Of a step's losses: over all tokens by these weights, or of text and of images alone, then by the weights."""
    bpe_dropout: Annotated[float | None, of_preset("bpe_dropout")] = None
    """Chance of each merge of a caption's tokens to be left out, so that it is cut into other pieces every time."""
    drop_text: Annotated[float | None, of_preset("drop_text")] = None
    """Of the sequences to draw pictures the share that loses its caption, for generate --guidance."""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, of_preset("dtype")] = None
    """Of the computation; master weights are float32."""
    gradient_scaling: Annotated[Literal["loss", "blocks"] | None, of_preset("gradient_scaling")] = None
    """Of float16: one scale, or one for each attention and MLP, between which all is float32 (DALL-E)."""
    average: Annotated[
        float | Literal["none"] | None, option("{FLOAT,none}", "dalle-12b 0.99, tiny of dalle 0.98, others none")
    ] = None
    """Decay of a weighted average of the parameters, which is validated and drawn with."""
    average_every: Annotated[int | None, of_preset("average_every")] = None
    """Steps between two that are averaged."""
    optimizer: Annotated[Literal["adamw", "muon"] | None, of_preset("optimizer")] = None
    """Of the layers' matrices."""
    checkpoint_activations: Annotated[Recompute | None, of_preset("checkpoint_activations")] = None
    """What a backward computes again instead of keeping it, for less memory: nothing, all of a layer, or all but
    its attention (selective)."""
    reshard: bool = True
    """Under torchrun: drop a layer's gathered parameters between its forward and its backward, for less memory."""
    tensor_parallel: int = 1
    """Under torchrun: processes that share the heads and MLP of each layer; a divisor of the heads."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    validate_every: Annotated[int | None, of_preset("validate_every")] = None
    """Steps between validations; the checkpoint of the best one is kept."""
    validate_samples: Annotated[int | None, of_preset("validate_samples")] = None
    """Held-out sequences of a validation."""
    save_every: Annotated[int | None, of_preset("save_every")] = None
    """Steps between checkpoints."""
    save_seconds: Annotated[float | None, of_preset("save_seconds")] = None
    """Or seconds between them."""
    keep: Annotated[int | None, of_preset("keep")] = None
    """Newest checkpoints that are kept, beside the best."""
    log_every: Annotated[int | None, of_preset("log_every")] = None
    """Steps that an entry of log.jsonl is the mean of."""
    watch: bool = False
    """Log the largest absolute values of each layer, too, and draw them in RUN/NAME/watch.png."""
    seed: int = 0
    """Of the first weights, the order of the data, dropout and all else that is drawn."""
    device: str = "cpu"
    """Where to train, as torch names it: cpu, cuda, cuda:1. Under torchrun cuda is each process's own."""

    def run(self) -> Result:
        """Alone, or as one of those that torchrun started."""
        self.check()
        device = available(own_device(self.device))
        with joined(device, self.tensor_parallel) as ranks:
            return self._train(device, ranks)

    def _train(self, device: torch.device, ranks: Ranks) -> Result:
        from cogview.commands.train_data import Tokens
        from cogview.runs import folder_of
        from cogview.tokenizers.text import TextTokenizer
        from cogview.train.finetune import start_from
        from cogview.train.sharding import built
        from cogview.train.token_task import TokenTask

        say = console.print if ranks.first else _nothing
        folder = folder_of(self.run_folder, self.name)
        known = ranks.of_first(lambda: before(folder, self.source))
        header = known.header if known is not None and known.own else None
        tokens = Tokens(self.run_folder, self.hold_out, header, chosen_recipe(known, self.recipe).sizes, self.mix)
        names = ("recipe", "preset", "dropout", "max_text", "truncate_text", *SHAPE)
        asked = {name: getattr(self, name) for name in names}
        recipe, name, said = recipe_for(known, tokens, asked)
        training = self._training(training_of(known, name, recipe.name))
        with torch.device("meta"):
            count = sum(p.numel() for p in recipe.model().parameters())
        say(f"{count:,} parameters, {len(tokens.data):,} sequences; {tokens.said}")
        if said:
            say(said)
        if ranks.mesh is not None:
            say(f"{ranks.count} processes, {ranks.parts} parts of each batch, {ranks.tensor} of each layer")

        def begin(model: Transformer) -> None:
            if known is not None and not known.own:
                start_from(known.path, known.recipe, recipe, model)
                say(f"beginning with the weights of {known.path}")

        with progress("preparing the model", shown=ranks.first) as update:
            model = built(recipe, device, training, ranks, begin)
            of_data: dict[str, Any] = tokens.identity
            text = TextTokenizer.load(self.run_folder / "text.model") if training.bpe_dropout else None
            if text is not None and recipe.name == "dalle" and not text.lowercase:
                say("captions keep their capital letters; DALL-E has none (tokenize --text-lowercase, in a new run)")
            task = TokenTask(recipe, model, tokens.data, training, tokens.held_out, ranks, text, **of_data)
            origin = None if known is None else known.origin()
            trainer = Trainer(task, training, folder, {"preset": name, "from": origin})
            try:
                if resumed := trainer.resume():
                    check_grid(folder, recipe, tokens)
                    say(f"going on at step {trainer.state.step:,}")
            except AnotherRun as error:
                raise ValueError(f"{error}. {advice(folder)}") from error
            update(1)
        if (resumed or not hasattr(recipe.config, "max_caption")) and not training.truncate_text:
            check_room(folder, recipe, tokens)
        tokens.check(ranks)
        with watched(folder, training.watch and ranks.first) as picture:
            result = trainer.run(picture)
        for sentence in report(result):
            say(sentence)
        if not all(map(math.isfinite, result.validation.values())):
            raise ValueError("the held-out loss is no number: this model has diverged; try a lower --learning-rate")
        return result

    def check(self) -> None:
        """ValueError for what is wrong with the options alone."""
        for name in ("steps", "layers", "hidden_size", "heads", "max_text"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        fits = self.minutes is None or 0 < self.minutes < math.inf
        require(fits, "minutes", "a positive and finite number", self.minutes)

    def _training(self, base: TrainConfig) -> TrainConfig:
        if self.steps is not None or self.minutes is not None:
            seconds = None if self.minutes is None else 60 * self.minutes
            base = dataclasses.replace(base, steps=self.steps, seconds=seconds)
        names = {f.name for f in dataclasses.fields(base)} - {"steps", "seconds"}
        given = {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}
        if self.average == "none":
            given["average"] = None
        return dataclasses.replace(base, **given)


def _nothing(*words: str) -> None:
    """What a process says that is not the first."""


def report(result: Result) -> Iterator[str]:
    """What a training came to, in lines."""
    state, of = result.state, ""
    if result.validation:
        of = f"; held-out figures of step {result.validated:,}"
    yield f"{'done' if result.finished else 'stopped'} at step {state.step:,}{of}"
    for name, value in result.validation.items():
        yield f"  held-out {name} {value:.3f}"
    if state.best_step is not None and state.best_loss is not None:
        yield f"best: step {state.best_step:,}, held-out loss {state.best_loss:.3f}; generate takes it"
        if result.validation.get("loss", 0) > RISEN * state.best_loss:
            yield f"held-out loss has risen since step {state.best_step:,}: more pictures, dropout or fewer steps"
    yield f"{result.checkpoint}{'' if result.finished else '; the same command goes on'}"
