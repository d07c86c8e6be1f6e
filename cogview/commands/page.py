"""`cogview page`: a run's models in a browser, on this machine."""

import contextlib
import importlib
import os
import signal
import socket
import tempfile
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from cogview.commands.console import console
from cogview.commands.page_tabs import STYLE, laid_out
from cogview.commands.presets import option
from cogview.commands.stages import Run, Ways
from cogview.config import require

if TYPE_CHECKING:
    from cogview.page import Models

# nothing is sent or loaded from elsewhere, and no run is written down
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_OFFLINE": "1"}
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'"
_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # those that are there: Gradio's own are fetched


@dataclass(frozen=True)
class Page:
    """Draw, caption and edit pictures in a browser: a page over a run's models, which this machine alone can reach,
    without a network."""

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
    looks: dict[str, Any] = {"theme": theme, "css": STYLE, "footer_links": []}
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
