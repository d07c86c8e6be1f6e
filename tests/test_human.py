"""Human evaluation: a form that tells nothing of the models, and what answers with known figures come to."""

import json
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from cogview import cli
from cogview.data.numbered import pictures_in
from cogview.human.answers import read
from cogview.human.form import MOST_EVALUATORS, Form
from cogview.human.key import SCORES, Key, Picture
from cogview.human.report import bars
from cogview.human.results import measure
from cogview.pictures import image_of

CAPTIONS = [
    "a fox & a tree",
    "</script><script>alert(1)</script>",
    '<img src="x" onerror="alert(2)">',
    "一只狐狸 🦊",
    "five",
    "six",
]
MODELS = {"CogView": (40, 64), "Some GAN": (90, 64), "truth": (140, 64), "enlarged": (190, 128)}  # grey, side
ASKED = ["--count", "4", "--evaluators", "6", "--seed", "0"]
Given = dict


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Folders of pictures, each of the grey of its model plus its number, and captions."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, (grey, side) in MODELS.items():
        (folder / name).mkdir()
        for number in range(1, len(CAPTIONS) + 1):
            said = PngImagePlugin.PngInfo()
            said.add_text("Software", name)
            image = image_of(torch.full((3, side, side), grey + number, dtype=torch.uint8))
            image.save(folder / name / f"{number:03d}-1-of-{name}.png", pnginfo=said)
    (folder / "captions.txt").write_text("\n\n".join(CAPTIONS), encoding="utf-8")
    return folder


@pytest.fixture
def there(drawn, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (*MODELS, "captions.txt"):
        Path(name).symlink_to(drawn / name)


@pytest.fixture(scope="module")
def key(drawn, tmp_path_factory) -> Path:
    """Of a form of four captions for six."""
    models = {name: drawn / name for name in ("CogView", "Some GAN", "truth")}
    path = tmp_path_factory.mktemp("form") / "key.json"
    Form(CAPTIONS, models, count=4, evaluators=6, seed=0).write(path.parent / "human", path)
    return path


def form(*more: str) -> Key:
    models = ["CogView=CogView", "Some GAN=Some GAN", "truth=truth"]
    cli.main(["human", "form", "--models", *models, "--captions-file", "captions.txt", *ASKED, *more])
    return Key.read(Path("runs/human-key.json"))


def ab() -> Key:
    return form("--ab", "CogView=enlarged")


def page() -> dict:
    """What the page knows."""
    text = Path("runs/human/index.html").read_text(encoding="utf-8")
    [inside] = re.findall(r'<script type="application/json" id="form">(.*?)</script>', text)
    return json.loads(inside)


def levels(picture: Picture) -> int:
    return {"CogView": 3, "Some GAN": 2, "truth": 4}[picture.model]


def judged(key: Key, evaluator: int, level=levels) -> Given:
    """Answers without holes: the aspects of a level, overall twice of it, and the best the first of the highest."""
    answers = list[Given]()
    for shown in key.shown[evaluator - 1]:
        of = {n: level(key.pictures[n]) for n in shown}
        scores = {str(n): dict.fromkeys(SCORES, k) | {"overall": 2 * k} for n, k in of.items()}
        answers.append({"scores": scores, "best": max(of, key=of.__getitem__)})
    return {"form": key.form, "evaluator": evaluator, "answers": answers}


def saved(given: Given, name: str = "") -> Path:
    path = Path(name or f"answers-{given['evaluator']}.json")
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def said(key: Key, *given: Given) -> dict:
    """Figures of these answers."""
    return measure(read([saved(one) for one in given], key), key)


# --- the form --------------------------------------------------------------------------------------------------------


def test_the_form_tells_nothing_of_the_models(there, capsys):
    key = ab()
    out = capsys.readouterr().out
    assert "16 pictures of 4 captions for 6 evaluators in runs/human" in out
    assert "whose they are is in runs/human-key.json: keep it from evaluators" in out
    files = sorted(path for path in Path("runs/human").rglob("*") if path.is_file())
    assert [path.name for path in files] == ["index.html", *(f"{n:04d}.png" for n in range(1, 17))]
    for path in files:
        assert not re.search(rb"CogView|GAN|truth|enlarged|of-", path.read_bytes())
    for number, picture in key.pictures.items():
        caption = CAPTIONS.index(key.captions[picture.caption]) + 1
        grey, side = MODELS["enlarged" if picture.enlarged else picture.model]
        with Image.open(f"runs/human/pictures/{number:04d}.png") as image:
            assert (image.size, image.getpixel((5, 5)), image.info) == ((side, side), (grey + caption,) * 3, {})
    owners = [key.pictures[number].model for number in sorted(key.pictures)]
    assert owners != sorted(owners)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["human", "human-key.json"]


def test_the_page_needs_nothing_else_and_captions_stay_text(there):
    key, known = form(), page()
    assert known == {"id": key.form, "scores": SCORES, "captions": key.captions, "shown": key.shown}
    assert set(key.captions) < set(CAPTIONS)
    text = Path("runs/human/index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|@import|url\(|<link|<img|alert\(1\)</script>", text)
    assert text.count("<script") == text.count("</script>") == 2
    assert "default-src 'none'" in text


def test_everybody_sees_a_picture_of_each_model_in_an_order_of_their_own(there):
    key = form()
    orders = Counter(tuple(key.pictures[n].model for n in some) for shown in key.shown for some in shown)
    assert len(orders) > 3  # of 6, in 24 draws
    assert len({json.dumps(shown) for shown in key.shown}) > 4  # of 6, each one of 1,296
    again = Form(CAPTIONS, {name: Path(name) for name in key.models}, None, 4, 6, seed=0)
    assert again.write(Path("again"), Path("again.json")) == key
    assert (Path("again") / "index.html").read_bytes() == Path("runs/human/index.html").read_bytes()
    other = Form(CAPTIONS, {name: Path(name) for name in key.models}, None, 4, 6, seed=1)
    assert other.write(Path("other"), Path("other.json")).shown != key.shown
    assert len({Form(CAPTIONS, other.models, count=4).seed for _ in range(9)}) == 9
    more = Form(CAPTIONS, {name: Path(name) for name in key.models}, None, 4, 8, seed=0)
    assert more.write(Path("more"), Path("more.json")).shown[:6] == key.shown


def test_halves_of_the_a_b_test_are_equal(there):
    key = ab()
    seen = [
        [next(key.pictures[n].enlarged for n in some if key.pictures[n].model == "CogView") for some in shown]
        for shown in key.shown
    ]
    assert [sum(row) for row in seen] == [2] * 6  # each evaluator, half of the captions
    assert [sum(column) for column in zip(*seen, strict=True)] == [3] * 4  # each caption, half of the evaluators
    assert len({tuple(row) for row in seen}) == 2
    assert seen[0] in ([not x for x in row] for row in seen)
    others = [n for shown in key.shown for some in shown for n in some if key.pictures[n].model != "CogView"]
    assert not any(key.pictures[n].enlarged for n in others)


def test_pictures_are_found_by_the_numbers_of_their_names(tmp_path):
    names = [
        "7.jpg",
        "0008.PNG",
        "009-1-fox.png",
        "009-1-fox-candidates.png",
        "notes.txt",
        "10.txt",
        "x11.png",
        "12x.png",
        "²3.png",
    ]
    for name in names:
        (tmp_path / name).touch()
    assert {n: path.name for n, path in pictures_in(tmp_path, "models").items()} == {
        7: "7.jpg",
        8: "0008.PNG",
        9: "009-1-fox.png",
        12: "12x.png",
    }
    (tmp_path / "07-2.png").touch()
    with pytest.raises(ValueError, match=r"models: expected one picture of each caption, got '07-2.png and 7.jpg in"):
        pictures_in(tmp_path, "models")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--models", "CogView=CogView"], r"models: expected at least two, got \['CogView'\]"),
        (["--models", "CogView", "b=b"], "models: expected NAME=FOLDER, got 'CogView'"),
        (["--models", "a=CogView", "a=truth"], r"models: expected names that differ, got \['a', 'a'\]"),
        (["--models", "a|b=CogView", "c=truth"], r"models: expected names of at most 40 letters, .*, got 'a|b'"),
        (["--models", "a=CogView", "b=none"], "models: expected a folder of pictures, got 'none'"),
        (["--models", "a=CogView", "b=empty"], "models: expected pictures whose names begin .*, got 'none in empty'"),
        (
            ["--models", "a=CogView", "b=few"],
            "models: expected pictures of all captions, got 'none of caption 2 in that of b'",
        ),
        (["--models", "a=CogView", "b=broken"], r"broken/001\.png: image: not a readable picture"),
        (["--count", "7"], r"count: expected a number from 1 to the captions that there are \(6\), got 7"),
        (["--evaluators", "0"], f"evaluators: expected a number from 1 to {MOST_EVALUATORS:,}, got 0"),
        (["--ab", "DALL-E=enlarged"], "ab: expected one of the models CogView, truth, got 'DALL-E'"),
        (["--ab", "CogView=few"], "ab: expected pictures of all captions, got 'none of caption 2 in that of CogView'"),
        (["--ab", "CogView=enlarged", "--count", "3"], "count: expected an even number with ab, for two halves, got 3"),
        (["--ab", "CogView=enlarged", "--evaluators", "3"], "evaluators: expected an even number with ab, .*, got 3"),
        (
            ["--key", "out/key.json", "--out", "out"],
            "key: expected a file outside out, which evaluators get, got 'out/key.json'",
        ),
        (["--key", "captions.txt"], "key: expected a new file, since answers are worth nothing .*, got 'captions.txt'"),
        (["--out", "CogView"], "out: expected a new folder, got 'CogView'"),
        (["--captions-file", "none.txt"], "captions-file: cannot read none.txt"),
    ],
)
def test_what_is_wrong_with_a_form_is_a_sentence(there, more, said):
    picture = Path("truth/001-1-of-truth.png").read_bytes()
    for name in ("empty", "few", "broken"):
        Path(name).mkdir()
    for name in ("few", "broken"):
        Path(name, "001.png").write_bytes(picture[: None if name == "few" else 60])
    for n in range(2, 7):
        Path("broken", f"{n}.png").write_bytes(picture)
    before = sorted(Path().rglob("*"))
    given = ["--models", "CogView=CogView", "truth=truth", "--captions-file", "captions.txt", "--count", "6"]
    with pytest.raises(SystemExit, match=said):
        cli.main(["human", "form", *given, "--evaluators", "2", *more])
    left = set(Path().rglob("*")) - set(before)
    assert not {path.name for path in left} - {"runs"}  # nothing half done


# --- results ---------------------------------------------------------------------------------------------------------


def test_answers_with_known_means(there, capsys):
    key = ab()

    def level(picture: Picture) -> int:
        return {"CogView": 3 + picture.enlarged, "Some GAN": 1, "truth": 3 + picture.caption % 2}[picture.model]

    paths = [str(saved(judged(key, e, level))) for e in range(1, 7)]
    cli.main(["human", "results", *paths, "--key", "runs/human-key.json", "--out", "results"])
    figures = json.loads(Path("results/figures.json").read_text())
    assert figures["evaluators"] == {"asked": 6, "answered": 6, "kept": 6, "dropped": {}}
    assert figures["comparisons"] == 24
    for name, given in {"CogView": [3, 4], "Some GAN": [1], "truth": [3, 4]}.items():
        scores = figures["models"][name]["scores"]
        for score, factor in zip(SCORES, (1, 1, 1, 2), strict=True):
            assert scores[score]["mean"] == pytest.approx(factor * statistics.fmean(given))
            assert scores[score]["deviation"] == pytest.approx(factor * statistics.pstdev(given))
    shares = {name: model["best"] for name, model in figures["models"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["Some GAN"] == 0
    chosen = Counter(key.pictures[a["best"]].model for p in paths for a in json.loads(Path(p).read_text())["answers"])
    assert shares["CogView"] == chosen["CogView"] / 24
    against = figures["super_resolution"]
    assert (against["model"], against["captions"]) == ("CogView", 4)
    assert [against[kind]["judgements"] for kind in ("without", "with")] == [12, 12]
    assert against["difference"]["clarity"] == {"difference": 1.0, "interval": [1.0, 1.0]}
    assert against["difference"]["overall"] == {"difference": 2.0, "interval": [2.0, 2.0]}
    report = Path("results/report.md").read_text()
    assert capsys.readouterr().out.splitlines()[-2] == report.splitlines()[0]
    means = "3.50 ± 0.50 | 3.50 ± 0.50 | 3.50 ± 0.50 | 7.00 ± 1.00"
    assert f"| CogView | 24 | {shares['CogView']:.1%} | {means} |" in report
    assert "| CogView with SR | 12 |" in report
    assert "overall +2.00 (+2.00 to +2.00)" in report
    assert "Nobody who answered was dropped." in report
    with Image.open("results/scores.png") as image:
        assert image.width > 1_000


def test_who_is_dropped_and_why(there):
    """Over 80 % have to agree: 4 of 5 are not enough. Of several with the highest score any agrees."""
    models = {"a": Path("CogView"), "b": Path("truth")}
    key = Form(CAPTIONS, models, count=5, evaluators=6, seed=0).write(Path("form"), Path("key.json"))
    same = judged(key, 1, lambda picture: 3)
    same["answers"][0]["best"] = key.shown[0][0][1]
    four, all_five, holes, hole = (judged(key, e, lambda p: 2 + (p.model == "a")) for e in (2, 3, 4, 5))
    four["answers"][2]["best"] = next(n for n in key.shown[1][2] if key.pictures[n].model == "b")
    del holes["answers"][0]["scores"][str(key.shown[3][0][0])]
    holes["answers"][1]["best"] = None
    del hole["answers"][4]["scores"][str(key.shown[4][4][1])]["texture"]
    figures = said(key, hole, same, four, all_five, holes)
    assert figures["evaluators"] == {
        "asked": 6,
        "answered": 5,
        "kept": 2,
        "dropped": {
            "2": "80% of the best pictures have the highest overall score, not over 80%",
            "4": "5 answers missing",
            "5": "1 answer missing",
        },
    }
    assert figures["agreement"] == {"1": 1.0, "3": 1.0}
    assert figures["models"]["a"]["scores"]["clarity"]["mean"] == 3
    assert "super_resolution" not in figures
    with pytest.raises(
        ValueError, match=r"answers: expected those of at least one .*, got 'evaluator 4: 5 answers missing"
    ):
        said(key, holes)


def test_super_resolution_judged_one_way_alone(there):
    key = ab()
    figures = said(key, judged(key, 1))
    assert [figures["super_resolution"][kind]["judgements"] for kind in ("without", "with")] == [2, 2]
    assert figures["super_resolution"]["difference"] is None
    saved(judged(key, 1), "one.json")
    cli.main(["human", "results", "one.json", "--key", "runs/human-key.json", "--out", "results"])
    assert "No caption was judged both with and without it" in Path("results/report.md").read_text()


def test_long_and_chinese_names_have_their_bars(tmp_path):
    score = {"mean": 3.0, "deviation": 0.5}
    model = {"best": 0.25, "scores": dict.fromkeys(SCORES, score)}
    names = ["恢复的真图", "w" * 40, "a name (of several words) + more", "b"]
    with Image.open(bars({"models": dict.fromkeys(names, model)}, tmp_path / "scores.png")) as image:
        assert image.width == 3 * 110 * 4.8


def change(place: list, value) -> "object":
    """Of answers, something set elsewhere; the last of a place may be new."""

    def changed(given: Given) -> Given:
        *inner, last = place
        part = given
        for step in inner:
            part = part[next(iter(part))] if step == "first" else part[step]
        part[last] = value
        return given

    return changed


OF = ["answers", 0, "scores", "first"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (change(["form"], "0"), "expected answers to the form [0-9a-f]{16} in x.json, got '0'"),
        (change(["evaluator"], 7), "expected an evaluator from 1 to 6 in x.json, got 7"),
        (change(["evaluator"], True), "expected an evaluator from 1 to 6 in x.json, got True"),
        (change(["evaluator"], "1"), "expected an evaluator from 1 to 6 in x.json, got '1'"),
        (
            change(["more"], 1),
            r"expected form, evaluator and answers in x.json, got \['form', 'evaluator', 'answers', 'more'\]",
        ),
        (change(["answers"], {}), "expected a list of answers in x.json, got 'dict'"),
        (change(["answers"], []), "expected answers to 4 captions in x.json, got 0"),
        (change(["answers", 1], 5), "expected scores and best in caption 2 of x.json, got 5"),
        (
            change(["answers", 1, "scores"], []),
            r"expected scores of the pictures \d+, \d+, \d+ in caption 2 of x.json, got \[\]",
        ),
        (
            change(["answers", 0, "scores", "99"], {}),
            "expected scores of the pictures .* in caption 1 of x.json, got {",
        ),
        (
            change(["answers", 0, "scores", "<b>"], {}),
            "expected scores of the pictures .* in caption 1 of x.json, got {",
        ),
        (
            change([*OF, "beauty"], 3),
            "expected scores of clarity, texture, relevance, overall in caption 1 of x.json, got {",
        ),
        (change([*OF, "clarity"], 6), "expected a number from 1 to 5 for clarity in caption 1 of x.json, got 6"),
        (change([*OF, "clarity"], 0), "expected a number from 1 to 5 for clarity in caption 1 of x.json, got 0"),
        (change([*OF, "overall"], 11), "expected a number from 1 to 10 for overall in caption 1 of x.json, got 11"),
        (change([*OF, "overall"], 7.0), "expected a number from 1 to 10 for overall in caption 1 of x.json, got 7.0"),
        (change([*OF, "overall"], None), "expected a number from 1 to 10 for overall in caption 1 of x.json, got None"),
        (
            change(["answers", 3, "best"], 99),
            "expected one of the pictures .* or null as the best in caption 4 of x.json, got 99",
        ),
        (change(["answers", 3, "best"], [1]), r"expected one of the pictures .* or null as the best .*, got \[1\]"),
    ],
)
def test_answers_that_are_none(key, tmp_path, monkeypatch, changed, said):
    monkeypatch.chdir(tmp_path)
    saved(changed(judged(Key.read(key), 1)), "x.json")
    with pytest.raises(SystemExit, match=f"cogview: answers: {said}"):
        cli.main(["human", "results", "x.json", "--key", str(key), "--out", "results"])
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "expected JSON in x.json, got something else"),
        (b"\xff\xfe{", "expected JSON in x.json, got something else"),
        (b'{"form": NaN', "expected JSON in x.json, got something else"),
        (b"[" * 200_000, "expected JSON in x.json, got something else"),
        (b"[1]", "expected a JSON object in x.json, got 'list'"),
        (b" " * (4 << 20) + b"{}", "expected at most 4,194,304 bytes, got 'more in x.json'"),
    ],
)
def test_files_that_are_no_answers(key, tmp_path, monkeypatch, data, said):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_bytes(data)
    with pytest.raises(SystemExit, match=f"cogview: answers: {said}"):
        cli.main(["human", "results", "x.json", "--key", str(key)])


def test_answers_twice_and_keys_that_are_none(there):
    key = form()
    one, two = saved(judged(key, 2), "one.json"), saved(judged(key, 2), "two.json")
    with pytest.raises(
        ValueError, match=r"answers: expected one file of each evaluator, got two of evaluator 2: one.json and"
    ):
        read([one, two], key)
    with pytest.raises(ValueError, match=r"answers: cannot read gone.json"):
        read([Path("gone.json")], key)
    with pytest.raises(ValueError, match=r"answers: expected at least one file, got 'none'"):
        read([], key)
    fields = json.loads(Path("runs/human-key.json").read_text())
    swapped = [fields["shown"][0][::-1], *fields["shown"][1:]]
    wrong = [{"shown": 3}, {"pictures": {}}, {"shown": swapped}, {"more": 1}, {"captions": []}, {"pictures": []}]
    for bad in [*wrong, {"ab": "none of the models"}]:
        Path("bad.json").write_text(json.dumps(fields | bad))
        with pytest.raises(ValueError, match=r"key: expected the key that `cogview human form` wrote, got 'bad.json'"):
            Key.read(Path("bad.json"))


@pytest.mark.parametrize(("place", "said"), [("taken", "Not a directory"), ("folder", "it is a folder")])
def test_results_with_no_place_for_a_report(there, place, said):
    path = saved(judged(form(), 1))
    Path("taken").touch()
    Path("folder/report.md").mkdir(parents=True)
    with pytest.raises(SystemExit, match=rf"cogview: out: cannot write {place}/report.md \({said}\)"):
        cli.main(["human", "results", str(path), "--key", "runs/human-key.json", "--out", place])
    assert not Path(place, "figures.json").exists()
