import json

import numpy as np
import pytest
import torch

from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo.scenes import build_scene_shards, caption, sample_scenes
from cogview.pipeline import load_images, sizes_of, tokenize_pairs
from cogview.recipes.cogview import CogView
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    pairs = PairDataset(build_scene_shards(folder, 30, 2)["train"])
    texts = [caption(s, language) for s in sample_scenes("train", 30) for language in ("en", "zh")]
    text = TextTokenizer.train(texts, 500, folder / "text.model")
    torch.manual_seed(0)
    return pairs, text, VQVAE(VQConfig(codebook_size=32, dim=8, hidden=8))


def test_rows_are_pictures_by_languages(parts, tmp_path):
    pairs, text, vqvae = parts
    tokens = tokenize_pairs(pairs, text, vqvae, tmp_path, batch=7)
    assert len(tokens) == 60
    assert tokens.meta["grid"] == [8, 8]
    captions, codes = tokens.batch(range(60))
    assert captions.shape == (60, tokens.meta["text_length"])
    for row, scene in enumerate(sample_scenes("train", 30)):
        for offset, language in enumerate(("en", "zh")):
            ids = captions[2 * row + offset]
            assert text.decode(ids[ids >= 0].tolist()) == caption(scene, language)
    with torch.no_grad():
        assert torch.equal(codes[::2].view(30, 8, 8), vqvae.eval().encode(load_images(pairs).float() / 255))
    assert torch.equal(codes[::2], codes[1::2])
    assert not list(tmp_path.glob(".*"))


def test_finished_folders_are_kept_and_others_rewritten(parts, tmp_path):
    pairs, text, vqvae = parts
    tokenize_pairs(pairs, text, vqvae, tmp_path)
    before = (tmp_path / "codes.npy").stat().st_mtime_ns
    tokenize_pairs(pairs, text, vqvae, tmp_path)
    assert (tmp_path / "codes.npy").stat().st_mtime_ns == before
    assert len(tokenize_pairs(pairs, text, vqvae, tmp_path, languages=["zh"])) == 30
    longest = tokenize_pairs(pairs, text, vqvae, tmp_path, max_text=9)
    assert longest.meta["text_length"] <= 9
    assert longest.meta["skipped"]["captions too long"] == 60 - len(longest)


def test_order_is_a_permutation_of_seed_and_epoch(parts, tmp_path):
    tokens = tokenize_pairs(*parts, tmp_path)
    orders = [tokens.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(o), np.arange(60)) for o in orders)
    assert len({o.tobytes() for o in orders}) == 4
    assert np.array_equal(tokens.order(1, 1), TokenDataset(tmp_path).order(1, 1))


def test_pictures_are_the_first_that_can_be_read(parts, monkeypatch):
    pairs = parts[0]
    whole = load_images(pairs)
    get = PairDataset.__getitem__
    monkeypatch.setattr(PairDataset, "__getitem__", lambda self, i: get(self, i) if i else None)
    assert torch.equal(load_images(pairs, limit=5), whole[1:6])


def test_mismatch_and_damage_are_refused(parts, tmp_path):
    pairs, text, vqvae = parts
    tokens = tokenize_pairs(pairs, text, vqvae, tmp_path)
    tokens.check(text.sha256, vqvae.sha256)
    with pytest.raises(ValueError, match="image tokenizer: expected"):
        tokens.check(text.sha256, VQVAE(vqvae.config).sha256)
    with pytest.raises(ValueError, match="indices: expected"):
        tokens.batch([60])
    with pytest.raises(ValueError, match="no pair with a caption in fr"):
        tokenize_pairs(pairs, text, vqvae, tmp_path / "fr", languages=["fr"])
    assert not list((tmp_path / "fr").glob("*"))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"codebook_size": 1}))
    damaged = TokenDataset(tmp_path)
    recipe = CogView(CogView.fit(CogView.presets["tiny"][0], **sizes_of(damaged)))
    with pytest.raises(ValueError, match="codes: expected ids 0 to 0"):
        recipe.batch(*damaged.batch(range(60)))
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"rows": 59}))
    with pytest.raises(ValueError, match="expected int32"):
        TokenDataset(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(ValueError, match="not of version"):
        TokenDataset(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "text.npy").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is damaged"):
        TokenDataset(tmp_path)
    with pytest.raises(ValueError, match="no tokenised pairs at"):
        TokenDataset(tmp_path / "nowhere")
