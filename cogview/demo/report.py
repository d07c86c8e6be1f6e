"""The demo's report: contact sheet, reconstructions, curves and a page of figures."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from cogview.data.files import write_text
from cogview.demo.measure import chance, score
from cogview.demo.scenes import Scene, caption
from cogview.pictures import contact_sheet, curves
from cogview.train.log import read_log

SHOWN = 24  # cells of the contact sheet
ATTRIBUTES = {
    "emoji": "the emoji asked for",
    "place": "its place, or the relation",
    "background": "the background",
    "all": "everything",
}


def write(
    out: Path, scenes: Sequence[Scene], drawn: dict[str, Tensor], true: Tensor, rebuilt: Tensor, facts: dict
) -> Path:
    """Writes samples.png, curves.png, figures.json and report.md into `out`; returns the report's path.

    drawn: pictures of each language's captions of the scenes, uint8 [N, 3, H, W]; rebuilt: the true pictures after
    the image tokenizer, the best that any drawing made of its codes can be.
    """
    figures = {
        "bound": score(rebuilt, scenes),
        "chance": chance(true, scenes),
        **{f"drawn_{language}": score(pictures, scenes) for language, pictures in drawn.items()},
    }
    languages = list(drawn)
    cells = []
    for k in range(min(SHOWN, len(scenes))):
        language = languages[k // 2 % len(languages)]
        cells.append((caption(scenes[k], language), [drawn[language][k], true[k]]))
    note = "left: drawn by the model for a caption it never saw; right: the scene the caption describes"
    contact_sheet(cells, out / "samples.png", columns=4, note=note)
    _curves(out)
    write_text(out / "figures.json", json.dumps(facts | {"figures": figures}, indent=1, default=str) + "\n")
    write_text(out / "report.md", _page(out, figures, languages, len(scenes), facts))
    return out / "report.md"


def share_of_bound(figures: dict, language: str, attribute: str) -> float:
    return figures[f"drawn_{language}"][attribute] / max(figures["bound"][attribute], 1e-9)


def _curves(out: Path) -> None:
    gpt, image = read_log(out / "gpt"), read_log(out, "vqvae.jsonl") + read_log(out / "vqvae")  # version 0.1, today's

    def line(entries: list[dict], name: str) -> tuple[list[float], list[float]]:
        found = [(e["step"], e[name]) for e in entries if name in e]
        return [x for x, _ in found], [y for _, y in found]

    gpt_lines = {
        "image": line(gpt, "image_loss"),
        "image, held out": line(gpt, "validation_image_loss"),
        "text": line(gpt, "text_loss"),
        "text, held out": line(gpt, "validation_text_loss"),
    }
    curves(
        [
            ("GPT: nats per token", gpt_lines),
            ("image tokenizer: loss", {"total": line(image, "total")}),
            ("image tokenizer: perplexity of the codes", {"batch": line(image, "perplexity")}),
        ],
        out / "curves.png",
    )


def _page(out: Path, figures: dict, languages: list[str], count: int, facts: dict) -> str:
    percent = "{:.0%}".format
    head = "| shown in the picture | chance | " + " | ".join(f"drawn, {name}" for name in languages)
    head += " | tokenizer's bound | share of the bound |"
    rows = [head, "|---" * (4 + len(languages)) + "|"]
    for name, words in ATTRIBUTES.items():
        cells = [percent(figures["chance"][name]), *(percent(figures[f"drawn_{n}"][name]) for n in languages)]
        shares = [share_of_bound(figures, n, name) for n in languages]
        cells += [percent(figures["bound"][name]), percent(sum(shares) / len(shares))]
        rows.append(f"| {words} | " + " | ".join(cells) + " |")
    image, validation, said = facts["image"], facts["validation"], facts["caption"]
    return f"""{facts["verdict"]}

# What this CogView learned

![samples](samples.png)

{count} scenes that training never saw, drawn from their captions in each language; judged by matching the pictures
against the emoji they are made of. The bound is what the true pictures score after the image tokenizer.

{chr(10).join(rows)}

## What it says of pictures

![captions](captions.png)

Finetuned to captioning, the GPT writes captions; {percent(said["captions_right"])} of {said["pictures"]} are right. How
badly it can explain a caption by a picture is CapLoss, and ranks what was drawn: at temperature
{said["temperature"]:g}, where {percent(said["candidates_right"])} of the pictures show everything that was asked for,
the best of {said["candidates"]} does for {percent(said["best_right"])} of the captions.

![ranked](ranked.png)

## How

- GPT: {facts["layers"]} layers x {facts["hidden"]}, {facts["parameters"] / 1e6:.1f}M parameters, {facts["attention"]}
  attention in every layer, {facts["tokens"]} tokens; {facts["steps"]:,} steps of {facts["batch_size"]} in
  {facts["gpt_seconds"] / 60:.1f} minutes ({facts["sequences_per_second"]:.0f} sequences a
  second, {facts["threads"]} threads), {facts["rows"]:,} captioned pictures. Held out: {validation["image_loss"]:.3f}
  nats per image token, {validation["text_loss"]:.3f} per text token. Drawn by {facts["drawn_by"]}.
- Image tokenizer: {image["steps"]:,} steps in {image["seconds"] / 60:.1f} minutes
  ({image["images_per_second"]:.0f} images a second), {image["psnr"]:.1f} dB, {image["used_codes"]} of
  {image["codebook"]} codes used, perplexity {image["perplexity"]:.0f}. Text tokenizer: {facts["text_pieces"]} pieces.
- Captions: {said["steps"]:,} further steps of the same weights in {said["seconds"] / 60:.1f} minutes.
- {facts["seconds_per_picture"]:.2f} seconds a picture.

![curves](curves.png)

The image tokenizer's reconstructions, originals above:

![reconstructions](reconstructions.png)

Draw your own, with the environment that made this activated (`source .venv/bin/activate`):

    cogview generate --run {out} --captions "a fox above a tree on a green background"
"""
