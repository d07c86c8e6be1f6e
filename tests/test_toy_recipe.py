"""A system of one's own is one recipe: what it says here is all that it takes to be trained, resumed and sampled."""

import dataclasses
import inspect
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_train_run import Pairs
from test_transformer import SIZES

from cogview import recipes
from cogview.config import ModelConfig, TrainConfig, require
from cogview.generate import generate
from cogview.models import load_model
from cogview.parts.attend import Attention, seen
from cogview.recipes.recipe import Recipe
from cogview.train.loop import Trainer
from cogview.train.token_task import TokenTask


@dataclass(frozen=True)
class PictureConfig(ModelConfig):
    windows: tuple[int, ...] = (8, 16)
    """Of each layer."""

    def __post_init__(self):
        super().__post_init__()
        require(min(self.windows) >= 1, "windows", "at least 1 each", self.windows)


class Near(Attention):
    """To the last tokens, as many as the layer's window."""

    def __init__(self, config: PictureConfig, index: int):
        super().__init__(config, index)
        self.window = config.windows[index]

    def attend(self, q, k, v, context):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def decode(self, q, k, v, context, cache, ends):
        mask = seen(cache, ends, q.shape[2]) & ~seen(cache, ends - self.window, q.shape[2])
        return F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=mask)


class Picture(Recipe):
    """Pictures without their captions."""

    name = "picture"
    Config = PictureConfig

    def attention(self, index):
        return Near(self.config, index)

    @property
    def length(self):
        return self.config.image_tokens + 3

    def layout(self, text, codes):
        tokens = self.vocab.text2image(text[:, :0], codes, codes.shape[1] + 4)
        return tokens[:, :-1], tokens[:, 1:]


CONFIG = PictureConfig(**SIZES | {"max_positions": 21})


def test_it_is_short():
    assert sum(len(inspect.getsource(part).splitlines()) for part in (PictureConfig, Near, Picture)) < 60


def test_it_trains_resumes_and_draws(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, Picture.name, Picture)
    data, config = Pairs(4), TrainConfig(steps=150, batch_size=4, learning_rate=1e-2, dtype="float32", save_every=40)
    data.codes[:] = data.codes[0]

    def trainer(folder):
        torch.manual_seed(0)
        recipe = Picture(CONFIG)
        return Trainer(TokenTask(recipe, recipe.model(), data, config, data), config, tmp_path / folder)

    whole = trainer("whole").run()
    begun = trainer("parts")
    for _ in range(30):
        begun.step()
    begun.save()
    resumed = trainer("parts")
    assert resumed.resume()
    assert resumed.run().validation == whole.validation
    assert whole.validation["image_loss"] < 0.1
    recipe, model = load_model(whole.checkpoint)
    assert recipe.config == CONFIG
    assert torch.equal(generate(recipe, model, [[1], []], top_k=1).flatten(1), data.codes[:2])


def test_its_cache_sees_what_its_training_saw():
    torch.manual_seed(0)
    recipe = Picture(CONFIG)
    model = recipe.model().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    codes = generate(recipe, model, [[], [1]], top_k=1).flatten(1)
    batch = recipe.batch(torch.zeros(2, 0, dtype=torch.int64), codes)
    image = model(batch.inputs, batch.context)[:, 2:18, :20]
    assert torch.equal(image.argmax(-1), codes)
    assert len(codes.unique()) > 2
    with pytest.raises(ValueError, match="windows: expected at least 1 each"):
        dataclasses.replace(CONFIG, windows=(8, 0))
