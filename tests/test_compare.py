"""`cogview compare`: which figures it shows, of which models, and where the names of curves stand."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from test_system import small_image, small_text, system_of, write

from cogview import cli
from cogview.pictures import curves
from cogview.system import System
from cogview.train.log import RunLog

LOSSES = {"validation_loss": 3.0, "validation_image_loss": 4.0}


def model(folder, system, entries, step=30, **run):
    folder.mkdir(parents=True)
    write(folder, step, system, **run)
    if run.get("best_step") not in (None, step):
        write(folder, run["best_step"], system, **run)
    log = RunLog(folder, 0)
    for n, values in entries:
        log.write(n, **values)
    log.close()
    return folder


def table(capsys, *arguments):
    """Columns by the name of their model, each its cells by their title."""
    cli.main(["compare", *map(str, arguments)])
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in re.split("[│┃]", x)[1:-1]] for x in said.splitlines() if x[:1] in ("│", "┃")]
    titles, *columns = zip(*lines, strict=True)
    return {name: dict(zip(titles[1:], cells, strict=True)) for name, *cells in columns}


@pytest.fixture(scope="module")
def system():
    return system_of(small_text(), small_image())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_best_is_that_of_the_checkpoint(here, system, capsys):
    """Whatever lower losses the log has of before held-out data changed, or of after the checkpoint."""
    old, again = LOSSES | {"validation_loss": 1.0}, LOSSES | {"validation_loss": 2.5}
    entries = [(10, old), (20, LOSSES), (20, again), (25, {"loss": 2.0}), (30, LOSSES), (40, old)]
    model(here / "r/best", system, entries, best_step=20, best_loss=2.5)
    model(here / "r/none", system, entries[:-1])
    model(here / "r/bare", system, [(20, {"loss": 2.0, "image_loss": 1.0})])
    model(here / "r/lost", system, [], best_step=20, best_loss=2.5)
    found = table(capsys, "r")
    shown = {n: [c[f"held-out {k}"] for k in ("loss", "image loss")] + [c["of step"]] for n, c in found.items()}
    assert shown == {
        "r/best": ["2.500", "4.000", "20"],
        "r/none": ["3.000", "4.000", "30"],
        "r/bare": ["–", "–", "–"],
        "r/lost": ["2.500", "–", "20"],
    }
    system.text.save("r/text.model")
    system.image.save("r/vqvae.safetensors")
    assert str(System.load("r", name="best").source) == "r, best, step 20 (best held-out loss 2.500)"


def test_a_model_is_shown_once_by_its_short_name(here, system, capsys, monkeypatch):
    model(here / "run/gpt", system, [(10, LOSSES)])
    model(here / "run/dense", system, [(10, LOSSES)])
    (here / "link").symlink_to("run")
    assert list(table(capsys, "run/gpt", here / "run", "./link", "run/../run/gpt")) == ["run/gpt", "run/dense"]
    monkeypatch.chdir(here / "run/gpt")
    assert list(table(capsys, ".")) == ["run/gpt"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("a.xyz", r"out: expected a name that ends in \.png, .*, got 'a.xyz'"),
        ("folder.png", r"out: cannot write folder.png \(it is a folder\)"),
        ("file/a.png", r"out: cannot write file/a.png \(Not a directory\)"),
        ("..", "out: expected a file's name"),
    ],
)
def test_out_is_checked_before_the_table(here, system, capsys, out, message):
    model(here / "run/gpt", system, [(10, LOSSES)])
    (here / "folder.png").mkdir()
    (here / "file").write_text("mine")
    capsys.readouterr()  # what training said
    with pytest.raises(SystemExit, match=f"^cogview: {message}"):
        cli.main(["compare", "run", "--out", out])
    assert capsys.readouterr().out == ""


def test_the_format_is_that_of_out(here, system):
    with pytest.raises(SystemExit, match="runs: expected at least one model"):
        cli.main(["compare", "nowhere", "--out", "new/a"])
    assert not (here / "new").exists()
    model(here / "run/gpt", system, [(10, LOSSES)])
    for out, name, kind in (("a.jpg", "a.jpg", "JPEG"), ("new/a", "new/a.png", "PNG")):
        cli.main(["compare", "run", "--out", out])
        with Image.open(here / name) as picture:
            assert picture.format == kind


@pytest.mark.parametrize(("count", "name"), [(1, "run/m"), (2, "run/m"), (12, "run/m"), (40, "run/m"), (2, "长" * 30)])
def test_names_leave_the_panels_their_room(tmp_path, count, name):
    """However many and long: a frame is as high as without any, and no two models have the same colour."""
    x = [float(n) for n in range(20)]
    lines = {f"{name}{n}{end}": (x, [float(n)] * 20) for n in range(count) for end in ("", ", held out")}

    def drawn(lines):
        with Image.open(curves([("loss", lines), ("text loss", lines)], tmp_path / "c.png")) as picture:
            return np.asarray(picture)

    def height(pixels):
        return int((pixels < 60).all(-1).sum(0).max())  # of the longest dark column, a side of a frame

    pixels = drawn(lines)
    assert abs(height(pixels) - height(drawn({}))) < 20
    colours, often = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    assert ((often > 300) & (colours.min(1) < 220)).sum() >= count  # lines, not their edges, frames or grids


def test_a_damaged_line_of_a_log_is_no_end(here, system, capsys):
    folder = model(here / "run/gpt", system, [(10, LOSSES)])
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 90, "loss": 10**400}) + "\n")
    assert table(capsys, "run")["run/gpt"]["of step"] == "10"
