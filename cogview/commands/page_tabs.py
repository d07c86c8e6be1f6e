"""The tabs of `cogview page`: what is laid out in each, and what of `cogview.page` answers. gr is gradio."""

import html
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cogview.page import Models, Update
    from cogview.system import Described

_FORMATS = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
STYLE = """
.note .wrap.translucent {background: var(--body-background-fill) !important}
.note p {margin: 0; min-height: 1.5em}
.note .wrong {border-left: 4px solid #dc2626; padding-left: 8px; font-weight: 600}
.pictures .grid-wrap {height: auto !important; min-height: 0 !important; max-height: none !important}
.pictures .grid-container {padding-top: 32px !important}
.pictures .grid-container {grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)) !important}
.small .grid-container {grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important}
.pictures .caption-label {font-size: 11px; padding: 2px 6px; opacity: 0.85}
.said ol {margin: 0; padding: 24px 0 0; list-style: none}
.said li {display: flex; justify-content: space-between; gap: 16px; padding: 8px 0; overflow-wrap: anywhere}
.said li + li {border-top: 1px solid var(--border-color-primary)}
.said span {white-space: nowrap; opacity: 0.65; font-size: 12px}
footer {display: none !important}
"""


def laid_out(gr: Any, models: "Models") -> Any:
    """The page, with the tabs that there are models for."""
    with gr.Blocks(title="CogView", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        sources = [
            f"{model.source.path.parent.name}, step {model.source.step:,}" for model in models.all if model.source
        ]
        gr.HTML(f"<h1>CogView</h1><p>{html.escape(' · '.join(dict.fromkeys(sources)))}</p>", padding=False)
        with gr.Tabs():
            for tab in TABS:
                if tab.there(models):
                    with gr.Tab(tab.title):
                        tab.lay(gr, models)
    return page


class Tab(NamedTuple):
    title: str
    there: "Callable[[Models], bool]"
    lay: "Callable[[Any, Models], None]"
    """Makes what is in it, and says what answers."""


def _drawing(gr: Any, models: "Models") -> None:
    from cogview.page import draw

    ranked = models.judge is not None
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            caption = _caption(gr, "What the picture is to show.")
            candidates, count = _counts(gr, "Pictures to choose from", 8, 2 if ranked else 4, ranked)
            seed = _seed(gr)
            button, note = gr.Button("Draw", variant="primary"), _note(gr)
        with gr.Column(scale=2, min_width=300):
            larger = _gallery(gr, "Pictures")
            all_of_them = "All that were drawn, once ranked the best first" if ranked else "As they were drawn"
            small = _gallery(gr, all_of_them, "small", visible=not models.as_drawn)

    def answer(update: "Update", text: str, candidates: int, count: int, seed: int) -> Iterator[Sequence[Any]]:
        for found in draw(models, text, candidates if ranked else None, count, seed, update):
            yield found.pictures, found.candidates, found.said

    _answers(gr, [button.click, caption.submit], answer, [caption, candidates, count, seed], [larger, small, note])


def _captioning(gr: Any, models: "Models") -> None:
    from cogview.page import describe

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label="Picture", file_types=_FORMATS, height=150)
            count = gr.Slider(1, 16, 4, step=1, label="Captions", info="One that comes twice is shown once.")
            named = [({"en": "English", "zh": "Chinese"}[name], name) for name in models.languages]
            language = gr.Radio(named, value=next(iter(models.languages), None), label="Language", visible=bool(named))
            seed = _seed(gr, "captions")
            button, note = gr.Button("Caption", variant="primary"), _note(gr)
        with gr.Column(scale=2, min_width=300):
            seen = _gallery(gr, "What the model sees")
            looks: dict[str, Any] = {"container": True, "show_label": True, "elem_classes": "said", "min_height": 80}
            captions = gr.HTML(label="Captions, the likeliest first", **looks)

    def answer(update: "Update", path: str | None, count: int, language: str | None, seed: int) -> Iterator[Any]:
        for found in describe(models, None if path is None else Path(path), count, language, seed, update):
            yield found.pictures, _listed(found.captions), found.said

    def clear(update: "Update", path: str | None) -> Iterator[Any]:
        yield None, "", ""  # they are of the picture before

    shown = [seen, captions, note]
    _answers(gr, [button.click], answer, [file, count, language, seed], shown)
    _answers(gr, [file.change], clear, [file], shown, "pictures")


def _listed(captions: "Sequence[Described]") -> str:
    from cogview.labels import printable

    lines = (f"<li>{html.escape(printable(text))}<span>CapLoss {loss:.2f}</span></li>" for text, loss in captions)
    return f"<ol>{''.join(lines)}</ol>"


def _editing(gr: Any, models: "Models") -> None:
    from cogview.editing import AROUND
    from cogview.page import edit, opened, to_paint_on

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            file = gr.File(label="Picture", file_types=_FORMATS, height=150)
            brush = gr.Brush(colors=["#e010b0"], default_size=40, color_mode="fixed")
            tools: dict[str, Any] = {"sources": [], "transforms": [], "layers": False, "height": "min(520px, 90vw)"}
            editor = gr.ImageEditor(type="pil", label="Paint over a part", brush=brush, visible=False, **tools)
        with gr.Column(scale=1, min_width=300):
            caption = _caption(gr, "What the painted part and its surroundings are to show.")
            candidates, count = _counts(gr, "Pictures to choose from", 8, 2, True)
            info = "What the words above tell of; else the painted part and its surroundings."
            scene = gr.Checkbox(False, label="The whole picture", info=info)
            feather = gr.Slider(0, 32, 0, step=1, label="Soft border", info="Pixels in which what is new fades in.")
            seed = _seed(gr)
            button, note = gr.Button("Draw anew", variant="primary"), _note(gr)
    results = _gallery(gr, "Before and after")

    def show(update: "Update", path: str | None) -> Iterator[Sequence[Any]]:
        if path is None:
            yield gr.update(value=None, visible=False), None, ""
            return
        yield gr.update(value=None, visible=False), None, ""  # whatever is wrong with the file, the one before is gone
        background = to_paint_on(opened(Path(path)))
        shown = {"background": background, "layers": [], "composite": None}
        yield gr.update(value=shown, visible=True), None, ""

    def answer(
        update: "Update",
        path: str | None,
        painted: Any,
        text: str,
        candidates: int,
        count: int,
        seed: int,
        feather: int,
        scene: bool,
    ) -> Iterator[Sequence[Any]]:
        strokes = [layer for layer in (painted or {}).get("layers", []) if layer is not None]
        file = None if path is None else Path(path)
        around = math.inf if scene else AROUND
        found = edit(models, file, strokes, text, candidates, count, seed, feather, around, update)
        yield found.pictures, found.said

    _answers(gr, [file.change], show, [file], [editor, results, note], "pictures")
    given = [file, editor, caption, candidates, count, seed, feather, scene]
    _answers(gr, [button.click, caption.submit], answer, given, [results, note])


TABS = (
    Tab("Text to picture", lambda models: True, _drawing),
    Tab("Picture to text", lambda models: models.judge is not None, _captioning),
    Tab("Edit", lambda models: models.cogview2 is not None, _editing),
)


def _answers(
    gr: Any, events: list[Any], function: Callable, given: list[Any], shown: list[Any], queue: str = "models"
) -> None:
    """One request of a queue at a time, of whatever tab. The function takes an update and what was given, and yields
    what is to be shown, last the words of the note; an error is a sentence there."""
    from cogview.page import sentence

    def answer(progress=gr.Progress(), *values: Any) -> Iterator[Any]:  # noqa: B008  # found by this default
        try:
            with tempfile.TemporaryDirectory() as folder:
                for *parts, said in function(lambda share, doing: progress(share, desc=doing), *values):
                    files = [_as_files(part, Path(folder), str(number)) for number, part in enumerate(parts)]
                    yield *files, f"<p role='status'>{html.escape(said)}</p>"
        except Exception as error:
            if not isinstance(error, ValueError):
                traceback.print_exception(error)
            yield *[gr.skip()] * (len(shown) - 1), f"<p role='alert' class='wrong'>{html.escape(sentence(error))}</p>"

    how: dict[str, Any] = {"show_progress_on": shown[-1], "api_visibility": "private"}
    gr.on(events, answer, given, shown, concurrency_limit=1, concurrency_id=queue, **how)


def _as_files(value: Any, folder: Path, name: str) -> Any:
    """What a gallery shows as files, which Gradio copies once: pictures it would write again whenever they are shown,
    also while a browser gets them."""
    if not isinstance(value, list):
        return value
    files = [(folder / f"{name}-{number}.png", text) for number, (_, text) in enumerate(value)]
    for (picture, _), (path, _) in zip(value, files, strict=True):
        picture.save(path)
    return [(str(path), text) for path, text in files]


def _caption(gr: Any, info: str) -> Any:
    return gr.Textbox(label="Caption", info=info, max_length=2000, autofocus=False)


def _counts(gr: Any, label: str, candidates: int, kept: int, ranked: bool) -> tuple[Any, Any]:
    return (
        gr.Slider(1, 64, candidates, step=1, label=label, visible=ranked),
        gr.Slider(1, 8, kept, step=1, label="Best of them to keep" if ranked else "Pictures"),
    )


def _seed(gr: Any, what: str = "pictures") -> Any:
    return gr.Number(0, label="Seed", info=f"The same one draws the same {what}.", precision=0)


def _note(gr: Any) -> Any:
    return gr.HTML("<p></p>", elem_classes="note", min_height=48)


def _gallery(gr: Any, label: str, *sizes: str, visible: bool = True) -> Any:
    looks: dict[str, Any] = {"object_fit": "contain", "elem_classes": ["pictures", *sizes], "visible": visible}
    looks["buttons"] = ["download", "fullscreen"]
    return gr.Gallery(label=label, format="png", interactive=False, **looks)  # png keeps every pixel
