import io
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.data import decoded
from cogview.data.decoded import Decoded
from cogview.data.files import write_json
from cogview.data.parts import PartWriter, group
from cogview.data.shards import PairDataset, ShardWriter
from cogview.data.tokens import TokenDataset, complete
from cogview.demo.scenes import build_scene_shards, caption, sample_scenes
from cogview.pipeline import decode, sizes_of, spread, tokenize_pairs
from cogview.recipes.cogview import CogView
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer

LANGUAGES = ("en", "zh")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    pairs = PairDataset(build_scene_shards(folder, 30, 2)["train"], languages=LANGUAGES)
    texts = [caption(s, language) for s in sample_scenes("train", 30) for language in LANGUAGES]
    text = TextTokenizer.train(texts, 500)
    torch.manual_seed(0)
    return pairs, text, VQVAE(VQConfig(codebook_size=32, dim=8, hidden=8))


def shard(path, captions: dict[str, str]):
    """Pairs of these keys and captions, each key a colour of its own."""
    with ShardWriter(path) as writer:
        for number, (key, words) in enumerate(captions.items()):
            png = io.BytesIO()
            Image.new("RGB", (64, 64), (number * 20, 200, 30)).save(png, "PNG")
            writer.write(key, {"png": png.getvalue(), "txt": words.encode()})
    return path


def words(tokens: TokenDataset, text: TextTokenizer) -> list[str]:
    return [text.decode(row[row >= 0].tolist()) for row in tokens.batch(range(len(tokens)))[0]]


def files(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}


def test_rows_are_pictures_by_languages(parts, tmp_path):
    pairs, text, vqvae = parts
    tokens = tokenize_pairs(pairs, text, vqvae, tmp_path / "tokens", batch=7)
    assert len(tokens) == 60
    assert tokens.meta["grid"] == [8, 8]
    captions, codes = tokens.batch(range(60))
    assert captions.shape == (60, tokens.meta["text_length"])
    for row, scene in enumerate(sample_scenes("train", 30)):
        for offset, language in enumerate(LANGUAGES):
            ids = captions[2 * row + offset]
            assert text.decode(ids[ids >= 0].tolist()) == caption(scene, language)
    pictures = decode(pairs, tmp_path, 64)
    assert pictures.numbers.tolist() == list(range(30))
    with torch.no_grad():
        assert torch.equal(codes[::2].view(30, 8, 8), vqvae.eval().encode(pictures.images.float() / 255))
    assert torch.equal(codes[::2], codes[1::2])
    assert not list((tmp_path / "tokens").glob(".*"))


def test_decoded_pictures_give_the_same_tokens(parts, tmp_path):
    """Whether all, some or none of them are decoded before; once each, and none is left."""
    pairs, *_ = parts
    expected = tokenize_pairs(*parts, tmp_path / "none").batch(range(60))
    for count in (30, 11):
        numbers = spread(30, count)
        pictures = Decoded.of(pairs, numbers, 64, tmp_path / "pixels")
        assert len(pictures) == count
        again = Decoded.of(pairs, numbers, 64, tmp_path / "pixels")
        assert torch.equal(pictures.images, again.images)
        found = tokenize_pairs(*parts, tmp_path / str(count), decoded=pictures).batch(range(60))
        assert all(map(torch.equal, expected, found))
    decoded.remove(tmp_path / "pixels")
    assert not (tmp_path / "pixels").exists()


def test_samples_are_spread_evenly():
    assert spread(10, 100).tolist() == list(range(10))
    assert spread(100, 3).tolist() == [0, 49, 99]
    assert len(spread(0)) == 0


def test_finished_folders_are_kept_and_others_rewritten(parts, tmp_path):
    pairs, text, vqvae = parts
    tokenize_pairs(pairs, text, vqvae, tmp_path)
    before = files(tmp_path)
    tokenize_pairs(pairs, text, vqvae, tmp_path)
    assert files(tmp_path) == before
    zh = PairDataset([s.path for s in pairs.shards], languages=["zh"])
    assert len(tokenize_pairs(zh, text, vqvae, tmp_path)) == 30
    assert not files(tmp_path).keys() & before.keys()
    longest = tokenize_pairs(pairs, text, vqvae, tmp_path, max_text=9)
    assert longest.meta["text_length"] <= 9
    assert longest.meta["skipped"]["captions of more than 9 tokens"] == 60 - len(longest)


def test_only_what_is_new_is_tokenised(parts, tmp_path):
    """Shards come, go and change their order; a corrected one of the same name, length and time is another."""
    _, text, vqvae = parts
    out = tmp_path / "tokens"
    a = shard(tmp_path / "a.tar", {"1": "a fox", "2": "a cow"})
    b = shard(tmp_path / "b.tar", {"3": "a bee"})
    assert words(tokenize_pairs(PairDataset([a]), text, vqvae, out), text) == ["a fox", "a cow"]
    of_a = files(out)
    both = tokenize_pairs(PairDataset([b, a]), text, vqvae, out)
    assert words(both, text) == ["a bee", "a fox", "a cow"]
    assert of_a.items() <= files(out).items()
    contents, stat = a.read_bytes(), a.stat()
    a.write_bytes(contents.replace(b"a cow", b"a cat"))
    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert a.stat().st_size == stat.st_size
    corrected = tokenize_pairs(PairDataset([a, b]), text, vqvae, out)
    assert words(corrected, text) == ["a fox", "a cat", "a bee"]
    assert not files(out).keys() & of_a.keys()
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "a.tar"
    other.write_bytes(contents.replace(b"a cow", b"a dog"))
    assert words(tokenize_pairs(PairDataset([other]), text, vqvae, out), text) == ["a fox", "a dog"]


def test_an_interrupted_folder_is_the_old_one(parts, tmp_path, monkeypatch):
    """And what was done is kept."""
    _, text, vqvae = parts
    shards = [shard(tmp_path / f"{k}.tar", {k: f"number {k}"}) for k in "123"]
    out = tmp_path / "tokens"
    tokenize_pairs(PairDataset(shards[:1]), text, vqvae, out)
    finish = PartWriter.finish

    def killed(self, *what):
        if len(list(out.glob("part-*.json"))) == 2:
            raise KeyboardInterrupt
        finish(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize_pairs(PairDataset(shards), text, vqvae, out)
    assert words(TokenDataset(out), text) == ["number 1"]
    done = files(out)
    assert words(tokenize_pairs(PairDataset(shards), text, vqvae, out), text) == [f"number {k}" for k in "123"]
    assert done.items() <= files(out).items()


def test_what_is_left_out_is_counted(parts, tmp_path):
    _, text, vqvae = parts
    captions = {"a": "a fox", "b": "fox " * 90, "c": "a bee"}
    path = shard(tmp_path / "a.tar", captions)
    contents = path.read_bytes()
    place = contents.rindex(b"\x89PNG")
    path.write_bytes(contents[:place] + b"no" + contents[place + 2 :])
    tokens = tokenize_pairs(PairDataset([path]), text, vqvae, tmp_path / "out")
    assert words(tokens, text) == ["a fox"]
    assert tokens.meta["skipped"] == {"captions of more than 64 tokens": 1, "pictures that cannot be read": 1}
    with pytest.raises(
        ValueError, match=r"no pair with a caption that could be tokenised \(3 captions of more than 1 to"
    ):
        tokenize_pairs(PairDataset([path]), text, vqvae, tmp_path / "out", max_text=1)
    assert words(TokenDataset(tmp_path / "out"), text) == ["a fox"]


def test_held_out_rows_are_those_of_some_captions(parts, tmp_path):
    """Of a tenth, whatever else there is; all captions of a picture on one side."""
    _, text, vqvae = parts
    names = {f"{k:03d}": f"number {k % 90}" for k in range(120)}
    paths = [shard(tmp_path / f"{n}.tar", dict(list(names.items())[n * 60 : n * 60 + 60])) for n in range(2)]
    both = tokenize_pairs(PairDataset(paths), text, vqvae, tmp_path / "both")
    train, held = both.hold_out(0.1)
    assert len(train) + len(held) == 120
    assert 3 <= len(held) <= 30
    captions = words(both, text)
    assert not {captions[k] for k in train.numbers} & {captions[k] for k in held.numbers}
    assert [group(captions[k]) < 0.1 * 2**64 for k in range(120)] == [k in held.numbers for k in range(120)]
    first = tokenize_pairs(PairDataset(paths[:1]), text, vqvae, tmp_path / "first").hold_out(0.1)[1]
    assert first.numbers.tolist() == [k for k in held.numbers if k < 60]
    assert torch.equal(held.batch([1, 0])[0], both.batch(held.numbers[[1, 0]])[0])
    assert np.array_equal(np.sort(train.order(3, 1)), np.arange(len(train)))
    assert sizes_of(train) == sizes_of(both)
    assert len(both.hold_out(0)[1]) == 0
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="hold_out: expected a share"):
            both.hold_out(share)


def test_tokens_of_version_1_are_read(parts, tmp_path):
    """A folder of one part and no groups: the rows of one picture, which follow each other, stay together."""
    tokens = tokenize_pairs(*parts, tmp_path / "new")
    text, codes = (x.numpy().astype(np.int32) for x in tokens.batch(range(60)))
    old = tmp_path / "old"
    old.mkdir()
    np.save(old / "text.npy", text)
    np.save(old / "codes.npy", codes)
    meta = {k: v for k, v in tokens.meta.items() if k != "parts"} | {"version": 1, "shards": [], "pairs": 30}
    write_json(old / "meta.json", meta)
    read = TokenDataset(old)
    assert all(map(torch.equal, read.batch(range(60)), tokens.batch(range(60))))
    train, held = read.hold_out(0.3)
    assert len(train) + len(held) == 60
    assert set(held.numbers // 2).isdisjoint(train.numbers // 2)
    tokenize_pairs(*parts, old)
    assert not (old / "text.npy").exists()


def test_order_is_a_permutation_of_seed_and_epoch(parts, tmp_path):
    tokens = tokenize_pairs(*parts, tmp_path)
    orders = [tokens.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(o), np.arange(60)) for o in orders)
    assert len({o.tobytes() for o in orders}) == 4
    assert np.array_equal(tokens.order(1, 1), TokenDataset(tmp_path).order(1, 1))


def test_mismatch_and_damage_are_refused(parts, tmp_path):
    pairs, text, vqvae = parts
    tokens = tokenize_pairs(pairs, text, vqvae, tmp_path)
    with pytest.raises(ValueError, match="indices: expected"):
        tokens.batch([60])
    fr = PairDataset([s.path for s in pairs.shards], languages=["fr"])
    with pytest.raises(ValueError, match="no pair with a caption"):
        tokenize_pairs(fr, text, vqvae, tmp_path / "fr")
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"codebook_size": 1}))
    damaged = TokenDataset(tmp_path)
    recipe = CogView(CogView.fit(CogView.presets["tiny"][0], **sizes_of(damaged)))
    with pytest.raises(ValueError, match="codes: expected ids 0 to 0"):
        recipe.batch(*damaged.batch(range(60)))
    for change, message in (
        ({"rows": 59}, "expected 59 rows"),
        ({"version": 99}, "not of version"),
        ({"grid": [8, 7]}, "expected int32"),
        ({"parts": ["../../etc/passwd"]}, "parts: expected names of 32 digits"),
        ({"parts": ["0" * 32]}, "is damaged"),
        ({"parts": None}, "is damaged"),
    ):
        (tmp_path / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=message):
            TokenDataset(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    next(tmp_path.glob("*.text.npy")).write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is damaged"):
        TokenDataset(tmp_path)
    with pytest.raises(ValueError, match="no tokenised pairs at"):
        TokenDataset(tmp_path / "nowhere")


def test_parts_without_rows(tmp_path):
    """Of shards with nothing to tokenise; some, but not all."""
    for name, count in (("a" * 32, 0), ("b" * 32, 3), ("c" * 32, 0)):
        with PartWriter(tmp_path, name, {"codes": 4}) as writer:
            for k in range(count):
                writer.write([k] * (k + 1), {"codes": np.full(4, k, np.int32)}, k)
            writer.finish(Counter({"kind": 1 - count % 2}))
    sizes = {"grid": [2, 2], "codebook_size": 9, "text_vocab_size": 9, "image_size": 16}
    sizes |= {"text_sha256": "1", "image_sha256": "2"}
    tokens = complete(tmp_path, ["a" * 32, "b" * 32, "c" * 32], sizes)
    text, codes = tokens.batch([2, 0, 1])
    assert text.tolist() == [[2, 2, 2], [0, -1, -1], [1, 1, -1]]
    assert codes[:, 0].tolist() == [2, 0, 1]
    assert tokens.meta["skipped"] == {"kind": 2}
    with pytest.raises(ValueError, match="no pair with a caption"):
        complete(tmp_path, ["a" * 32], sizes)
