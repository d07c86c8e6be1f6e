"""`cogview caption`, `cogview rerank` and `cogview generate --rerank`: order, files, and what is left out by name."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_caption import make
from test_system import saved_run, small_image, small_text, system_of

from cogview import cli
from cogview.generate import describe
from cogview.inputs import images
from cogview.pictures import image_of
from cogview.recipes.caption import caploss
from cogview.reranking import candidate_sheet, draw_ranked
from cogview.sampling import Sampling
from cogview.system import System

SIZES = {"text_vocab": 300, "max_positions": 40, "num_pivots": 30}
NASTY = ["[BOI1]", "[SEP] a", "<unk>", "</s>", "<0x41>", "▁", "a▁b"]


def captioning() -> System:
    return System(small_text(), small_image(), *make("three_region", **SIZES))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """runs/mine with a model that draws and one that captions, which was trained last; three pictures, a broken one."""
    monkeypatch.chdir(tmp_path)
    saved_run(tmp_path / "runs/mine", gpt=system_of(small_text(), small_image()), caption=captioning())
    torch.manual_seed(3)
    for name in ("a", "b", "c"):
        image_of(torch.randint(256, (3, 40, 50), dtype=torch.uint8)).save(f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return tmp_path


def judge() -> System:
    return System.load("runs/mine", draws="captions")


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_model_that_was_trained_last_and_draws_that(run):
    assert System.load("runs/mine").source.path.parent.name == "gpt"  # pictures, where there is a model that draws some
    assert System.load("runs/mine", draws="pictures").source.path.parent.name == "gpt"
    assert judge().source.path.parent.name == "caption"
    with pytest.raises(ValueError, match="name: expected a model that draws captions, got 'gpt, of cogview'"):
        System.load("runs/mine", name="gpt", draws="captions")
    with pytest.raises(ValueError, match="name: expected a model that draws pictures, got 'caption, of caption'"):
        judge().draw("a fox")
    (run / "runs/mine/gpt").rename(run / "aside")
    assert System.load("runs/mine").source.path.parent.name == "caption"
    (run / "aside").rename(run / "runs/mine/gpt")
    (run / "runs/mine/caption/step-00000001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"name: expected a model of recipe caption or coglm in .*mine, got 'gpt'"):
        judge()


def test_captions_of_files(run, capsys):
    """Of those that can be read, best first, each as System draws and scores it; the others by name."""
    files, how = ["a.png", "broken.png", "c.png", "gone.png"], ["--count", "3", "--temperature", "3", "--seed", "5"]
    cli.main(["caption", *files, *how, "--out", "out/c.jsonl"])
    said = lines(capsys)
    assert "runs/mine, caption, step 1" in said[0]
    left = [line for line in said if line.startswith("left out: ")]
    assert [name for line, name in zip(left, ("broken.png", "gone.png"), strict=True) if name in line]
    assert said[-1] == "captions of 2 pictures, 2 left out: out/c.jsonl"
    records = [json.loads(line) for line in (run / "out" / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["file_name"] for record in records] == ["a.png", "c.png"]
    system = judge()
    for record in records:
        picture = Image.open(record["file_name"])
        assert sorted(text for text, _ in record["captions"]) == sorted(
            system.caption([picture] * 3, seeds=[5, 6, 7], temperature=3.0)
        )
        losses = [loss for _, loss in record["captions"]]
        assert losses == sorted(losses)
        ids = describe(system.recipe, system.model, system.tokenize(picture), Sampling(temperature=3.0), seeds=[5])
        scored = caploss(system.recipe, system.model, system.tokenize(picture), ids)
        first = [text for text, _ in record["captions"]].index(
            system.text.decode([i for i in ids[0] if i < system.text.vocab_size]).strip()
        )
        assert losses[first] == pytest.approx(float(scored), rel=1e-4)
        assert record["caption"] == record["captions"][0][0]
    with pytest.raises(SystemExit, match="pictures: expected at least one that can be read"):
        cli.main(["caption", "broken.png"])
    with pytest.raises(SystemExit, match="name: expected a model that draws captions"):
        cli.main(["caption", "a.png", "--name", "gpt"])


def test_pictures_in_order(run, capsys):
    cli.main(["rerank", "a.png", "broken.png", "b.png", "c.png", "--caption", "a fox", "--out", "order.png"])
    said = lines(capsys)
    assert said[1].startswith("left out: broken.png: image: not a readable picture")
    scores = {name: float(judge().caploss("a fox", Image.open(name))) for name in ("a.png", "b.png", "c.png")}
    best_first = sorted(scores, key=scores.__getitem__)
    assert said[2:] == [f"{scores[name]:.3f}  {name}" for name in best_first] + ["3 of 3 pictures on order.png"]
    with Image.open("order.png") as sheet:
        zoomed = images(Image.open(best_first[0]), 32)[0]
        assert torch.equal(images(sheet.convert("RGB").crop((10, 37, 138, 165)).resize((32, 32), 0), 32)[0], zoomed)
    with pytest.raises(SystemExit, match="captions: expected at most 20 tokens"):
        cli.main(["rerank", "a.png", "--caption", "a fox " * 40])
    for command in (["rerank", "a.png", "--caption", "a fox"], ["caption", "a.png"]):
        with pytest.raises(SystemExit, match=r"out: expected a place where a\.png is not written over, got 'a.png'"):
            cli.main([*command, "--out", "a.png"])


def test_the_best_candidates_are_kept_best_first(run, capsys):
    more = ["--candidates", "5", "--count", "2", "--seed", "7", "--batch-size", "3"]
    cli.main(["generate", "--captions", "fox", "--rerank", "caption", *more])
    said = lines(capsys)
    assert said[1] == "ranked by runs/mine, caption, step 1 (newest)"
    assert sorted(path.name for path in (run / "pictures").iterdir()) == [
        "001-1-fox-candidates.png",
        "001-1-fox.png",
        "001-2-fox.png",
    ]
    system = System.load("runs/mine", draws="pictures")
    codes = torch.cat(list(system.code_batches(["fox"] * 5, Sampling(temperature=0.9), seeds=range(7, 12))))
    losses = judge().caploss("fox", codes)
    for number, best in enumerate(losses.argsort()[:2].tolist(), 1):
        with Image.open(run / "pictures" / f"001-{number}-fox.png") as picture:
            assert torch.equal(images(picture, 32), system.pictures(codes[best]))
    with pytest.raises(SystemExit, match="candidates: expected --rerank NAME, which ranks them, got 3"):
        cli.main(["generate", "--captions", "fox", "--candidates", "3"])
    with pytest.raises(SystemExit, match=r"candidates: expected at least count \(4\), got 3"):
        cli.main(["generate", "--captions", "fox", "--rerank", "caption", "--candidates", "3"])
    with pytest.raises(SystemExit, match="name: expected a model that draws captions, got 'gpt, of cogview'"):
        cli.main(["generate", "--captions", "fox", "--rerank", "gpt"])


def test_candidates_of_several_captions_do_not_depend_on_the_batch(run, tmp_path):
    system, ranks = System.load("runs/mine", draws="pictures"), judge()
    found = [
        list(draw_ranked(system, ranks, ["a fox", "a red car"], Sampling(batch_size=size), seeds=[4, 5, 6]))
        for size in (2, 32)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert sorted(one.order.tolist()) == [0, 1, 2]
        torch.testing.assert_close(one.caploss, other.caploss)
        assert (one.caploss.diff() >= 0).all()
    first = found[0][0]
    drawn = torch.cat(list(system.code_batches(["a fox"] * 3, Sampling(), seeds=[4, 5, 6])))
    assert torch.equal(first.codes, drawn[first.order])
    assert candidate_sheet(system.pictures(first.codes), first.caploss, tmp_path / "sheet.png", "a fox") == 3
    with pytest.raises(ValueError, match="seeds: expected at least one"):
        draw_ranked(system, ranks, ["a fox"], Sampling(), seeds=[])


def test_one_bad_picture_of_several(run):
    """Is named by its number, and the others have what they have without it."""
    system, good = captioning(), [Image.open("a.png"), Image.open("b.png")]
    some = [good[0], run / "broken.png", good[1], Image.new("RGB", (0, 5)), "b.png"]
    bad: dict[int, str] = {}
    losses = system.caploss("a fox", some, bad=bad)
    assert list(bad) == [1, 3, 4]
    assert "broken.png" in bad[1]
    assert "at least one pixel each, got '0 x 5'" in bad[3]
    assert "PIL images or a uint8 tensor, got 'b.png'" in bad[4]
    assert losses.isnan().tolist() == [False, True, False, True, True]
    torch.testing.assert_close(losses[[0, 2]], system.caploss("a fox", good))
    captions = system.caption(some, seeds=[0, 9, 1, 9, 9], bad=bad)
    assert captions == [captions[0], "", captions[2], "", ""]
    assert [captions[0], captions[2]] == system.caption(good)
    order, scores = system.rerank("a fox", some, bad=bad)
    assert order[:2].tolist() == [n for _, n in sorted((float(losses[n]), n) for n in (0, 2))]
    torch.testing.assert_close(scores, losses, equal_nan=True)
    for call in (system.caption, system.tokenize, lambda p: system.caploss("a fox", p)):
        with pytest.raises(ValueError, match=r"broken\.png: image: not a readable picture .*, in picture 2"):
            call(some)
    for mode in ("L", "P", "CMYK", "RGBA", "I;16", "1"):
        assert system.caploss("a fox", Image.new(mode, (7, 9))).isfinite().all()


def test_candidates_that_are_none_and_captions_that_are_no_text(run):
    system = captioning()
    for candidates in ([], torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, 4, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="candidates: expected at least one, got 'none'"):
            system.rerank("a fox", candidates)
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    for caption, said in (("", "one that is not blank"), ("a fox " * 40, "at most 20 tokens"), (7, "a string")):
        with pytest.raises(ValueError, match=f"expected {said}"):
            system.rerank(caption, codes)
    assert system.caploss([], codes[:0]).shape == (0,)
    assert system.caption([]) == []
    with pytest.raises(ValueError, match="guidance: expected 1 for captions, got 2"):
        system.caption(codes, guidance=2)


@pytest.mark.parametrize("caption", NASTY)
def test_commands_that_are_spelled_in_a_caption_stay_text(run, caption):
    """As letters; SentencePiece's own mark for a space is one."""
    system = captioning()
    ids = system.encode(caption)[0]
    assert 0 not in ids  # what is unknown
    assert system.text.decode(ids) == caption.replace("▁", " ")
    tokens, _ = system.recipe.layout(torch.tensor([ids]), torch.zeros(1, 16, dtype=torch.int64))
    assert int((tokens == system.recipe.vocab["SEP"]).sum()) == 1
    assert int((tokens == system.recipe.vocab["BOI1"]).sum()) == 1
    assert system.caploss(caption, torch.zeros(1, 4, 4, dtype=torch.int64)).isfinite().all()


def test_one_bad_picture_with_several_captions_has_no_scores(run):
    bad = {}
    assert judge().caploss(["a fox", "a red car"], [Path("none.png")], bad=bad).isnan().all()
    assert list(bad) == [0]
    assert not judge().caploss(["a fox", "a red car"], [Path("a.png")]).isnan().any()


def test_pictures_are_kept_where_no_sheet_of_candidates_can_be_made(run, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("cogview.reranking.contact_sheet", fail)
    how = ["--rerank", "caption", "--candidates", "2", "--count", "1"]
    cli.main(["generate", "--captions", "fox", *how, "--out", "kept.png"])
    assert "no sheet of the candidates of 'fox' could be made (disk full)" in lines(capsys)
    assert [path.name for path in (run / "kept").iterdir()] == ["001-1-fox.png"]
