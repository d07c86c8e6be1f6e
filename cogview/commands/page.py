"""`cogview page`: a run's models in a browser, on this machine."""

import contextlib
import html
import importlib
import math
import os
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.commands.stages import Run, Ways
from cogview.config import require

if TYPE_CHECKING:
    from cogview.page import Models, Update

# nothing is sent or loaded from elsewhere, and no run is written down
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_OFFLINE": "1"}
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'"
_FORMATS = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # those that are there: Gradio's own are fetched
_STYLE = """
.note p {margin: 0; min-height: 1.5em}
.note .wrong {border-left: 4px solid #dc2626; padding-left: 8px; font-weight: 600}
.pictures .grid-wrap {height: auto !important; min-height: 0 !important; max-height: none !important}
.pictures .grid-container {padding-top: 32px !important}
.pictures .grid-container {grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)) !important}
.small .grid-container {grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important}
.pictures .caption-label {font-size: 11px; padding: 2px 6px; opacity: 0.85}
footer {display: none !important}
"""


@dataclass(frozen=True)
class Page:
    """Draw and edit pictures in a browser: a page over a run's models, which this machine alone can reach, without a
    network."""

    models: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)
    name: Annotated[str | None, option("NAME", "trained last, in a run without coglm")] = None
    """Which of its models draws instead of CogView2 (recipe cogview, say). A captioning model of the run ranks then,
    and one of recipe superresolution enlarges, where there are such."""
    settings: Literal["ours", "published"] = "ours"
    """Of CogView2's stages. published: those of the released code, for its weights."""
    host: str = "127.0.0.1"
    """Address to listen at. Another one lets others use the page: it asks nobody for a password."""
    port: int = 7860
    """Port to listen at."""

    def run(self) -> None:
        gr = _gradio()
        _check_free(self.host, self.port)
        models = self.load()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with tempfile.TemporaryDirectory(prefix="cogview-page-") as kept:
            os.environ["GRADIO_TEMP_DIR"] = kept  # of what is uploaded and shown
            page = laid_out(gr, models)
            try:
                _serve(gr, page, self.host, self.port)
                console.print(f"http://{self.host}:{self.port} has the page; Ctrl-C ends it")
                threading.Event().wait()
            finally:
                page.close(verbose=False)

    def load(self) -> "Models":
        """What the run has, once."""
        from cogview.page import Models
        from cogview.runs import last_of, last_run

        folder = last_run() if self.models.folder is None else self.models.folder
        if self.name is None and (self.models.base is not None or last_of(folder, ["coglm"]) is not None):
            there = [getattr(self.models, stage) or last_of(folder, [stage]) for stage in ("direct", "iterative")]
            stages: Any = min(self.models.stages, 1 if there[0] is None else 2 if there[1] is None else 3)
            cogview2, at_once = replace(self.models, folder=folder, stages=stages).load()
            found = Models.of(cogview2, Ways(settings=self.settings).of(cogview2, at_once))
        else:
            found = _of_parts(folder, self.name, self.models)
            for what, model in (("draws", found.base), ("ranks", found.judge), ("enlarges", found.lens)):
                if model is not None:
                    console.print(f"{what}: {model.source}")
        return found


def _of_parts(folder: Path, name: str | None, run: Run) -> "Models":
    """One model, and the last captioning and magnifying ones that fit it."""
    from cogview.cogview2 import Settings
    from cogview.page import Models
    from cogview.runs import last_of
    from cogview.sampling import Sampling
    from cogview.system import System

    how: dict[str, Any] = {"device": run.device, "dtype": getattr(torch, run.dtype)}
    base = System.load(folder, name=name, draws="pictures", **how)
    others = [None if last_of(folder, [r]) is None else base.beside(r, **how) for r in ("caption", "superresolution")]
    judge, lens = (other if other is not None and other.side == base.side else None for other in others)
    ways = Sampling(0.9, batch_size=run.batch_size), Sampling(top_k=1, batch_size=run.batch_size)  # of generate
    return Models(base, Settings(*ways), judge, lens=lens)


def _gradio() -> Any:
    os.environ.update(_QUIET)  # which it reads when it is imported
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ValueError("page: needs the package gradio, which is missing here: `pip install 'gradio>=6'`") from error


def _check_free(host: str, port: int) -> None:
    require(0 < port < 65536, "port", "1 to 65535", port)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ValueError(f"port: expected a free one, got '{port} of {host} ({error.strerror})'") from error


def _serve(gr: Any, page: Any, host: str, port: int) -> None:
    from cogview.data.images import MAX_BYTES

    theme = gr.themes.Default(font=_FONTS[0], font_mono=_FONTS[1])
    looks: dict[str, Any] = {"theme": theme, "css": _STYLE, "footer_links": []}
    no: dict[str, Any] = dict.fromkeys(
        ("share", "ssr_mode", "pwa", "mcp_server", "enable_monitoring", "inbrowser"), False
    )
    middleware = importlib.import_module("starlette.middleware").Middleware(_Policy)
    page.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [middleware], "docs_url": None, "redoc_url": None},
        **looks,
        **no,
    )


class _Policy:
    """Tells browsers to load nothing from elsewhere, and to show the page in none of other sites'. That one of them
    breaks off an upload, as it does for the next one, is no error."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        with contextlib.suppress(importlib.import_module("starlette.requests").ClientDisconnect):
            await self.app(scope, receive, sent)


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
            all_of_them = "All that were drawn, the best first" if ranked else "As they were drawn"
            small = _gallery(gr, all_of_them, "small", visible=ranked or models.enlarge)

    def answer(update: "Update", text: str, candidates: int, count: int, seed: int) -> Iterator[Sequence[Any]]:
        for found in draw(models, text, candidates if ranked else None, count, seed, update):
            yield found.pictures, found.candidates, found.said

    _answers(gr, [button.click, caption.submit], answer, [caption, candidates, count, seed], [larger, small, note])


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
            for *parts, said in function(lambda share, doing: progress(share, desc=doing), *values):
                yield *map(_for_galleries, parts), f"<p role='status'>{html.escape(said)}</p>"
        except Exception as error:
            if not isinstance(error, ValueError):
                traceback.print_exception(error)
            yield *[gr.skip()] * (len(shown) - 1), f"<p role='alert' class='wrong'>{html.escape(sentence(error))}</p>"

    how: dict[str, Any] = {"show_progress_on": shown[-1], "api_visibility": "private"}
    gr.on(events, answer, given, shown, concurrency_limit=1, concurrency_id=queue, **how)


def _for_galleries(value: Any) -> Any:
    return [tuple(one) for one in value] if isinstance(value, list) else value


def _caption(gr: Any, info: str) -> Any:
    return gr.Textbox(label="Caption", info=info, max_length=2000, autofocus=False)


def _counts(gr: Any, label: str, candidates: int, kept: int, ranked: bool) -> tuple[Any, Any]:
    return (
        gr.Slider(1, 64, candidates, step=1, label=label, visible=ranked),
        gr.Slider(1, 8, kept, step=1, label="Best of them to keep" if ranked else "Pictures"),
    )


def _seed(gr: Any) -> Any:
    return gr.Number(0, label="Seed", info="The same one draws the same pictures.", precision=0)


def _note(gr: Any) -> Any:
    return gr.HTML("<p></p>", elem_classes="note", min_height=48)


def _gallery(gr: Any, label: str, *sizes: str, visible: bool = True) -> Any:
    looks: dict[str, Any] = {"object_fit": "contain", "elem_classes": ["pictures", *sizes], "visible": visible}
    looks["buttons"] = ["download", "fullscreen"]
    return gr.Gallery(label=label, format="png", interactive=False, **looks)  # png keeps every pixel
