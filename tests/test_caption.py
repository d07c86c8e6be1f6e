"""Captioning: its sequence, its positions, CapLoss against a formula."""

import pytest
import torch
import torch.nn.functional as F
from test_transformer import SIZES

from cogview.parts.transformer import Transformer
from cogview.recipes.caption import Caption, CaptionConfig, caploss
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.sequence import Context

TEXT, BASE, BOI1, EOI1, ROI1, SEP = 20, 46, 31, 34, 37, 40  # of 20 image codes and 10 text ids
CAPTIONS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 0, 1, 2, 3]]
KINDS = ["dense", "dense_pb_relax", "three_region"]


def make(attention: str = "dense", **change) -> tuple[Caption, Transformer]:
    torch.manual_seed(0)
    three_region = {"block_size": 4, "window_blocks": 2, "num_pivots": 16}
    recipe = Caption(CaptionConfig(**SIZES | three_region | {"attention": attention} | change))
    model = recipe.model().eval()
    for p in model.parameters():  # away from the symmetric start: every parameter matters
        torch.nn.init.normal_(p, std=0.3)
    return recipe, model


def test_what_is_fed_and_learned():
    recipe, _ = make()
    codes = torch.arange(16)[None]
    batch = recipe.batch(torch.tensor([[1, 2, -1]]), codes, text_weight=2.0, image_weight=0.0)
    fed = [BASE, BOI1, *range(16), EOI1, ROI1, TEXT + 1, TEXT + 2, SEP, *[30] * 6]
    assert batch.inputs.tolist() == [fed]
    assert batch.targets.tolist() == [[*fed[1:], 30]]
    weights = [2.0 * (token >= 20 and token != 30) for token in batch.targets[0].tolist()]
    assert batch.weights.tolist() == [weights]
    assert sum(weights) == 2.0 * (1 + 2 + 2 + 1)  # [BOI1], [EOI1] [ROI1], text, [SEP]
    assert recipe.length == batch.inputs.shape[1] == recipe.config.max_positions
    kinds = recipe.kinds(batch.targets)
    assert {name: int(kind.sum()) for name, kind in kinds.items()} == {"text": 2, "stop": 1, "image": 16}


def test_the_longest_text_fits_the_positions_of_text_to_image():
    longest = SIZES["max_positions"] - 20
    text, codes = torch.ones(1, longest, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64)
    for stop in (True, False):
        batch = make(stop=stop)[0].batch(text, codes)
        assert batch.targets[0, -1] == (SEP if stop else TEXT + 1)
        assert int(batch.context.positions.max()) == SIZES["max_positions"] - (1 if stop else 2)
        with pytest.raises(ValueError, match=f"text: expected at most {longest} tokens beside 16 image tokens"):
            make(stop=stop)[0].batch(torch.ones(1, longest + 1, dtype=torch.int64), codes)


def test_positions_of_image_and_text_are_those_of_the_model_it_begins_with():
    source = CogView(CogViewConfig(**SIZES, image_positions="fixed"))
    recipe, _ = make(image_positions="fixed")
    text, codes = torch.tensor([[1, 2, 3]]), torch.arange(16)[None]
    found = []
    for r in (source, recipe):
        batch = r.batch(text, codes)
        found.append(dict(zip(batch.inputs[0].tolist(), batch.context.positions[0].tolist(), strict=True)))
    for token in (*range(16), TEXT + 1, TEXT + 2, TEXT + 3, BOI1, ROI1):
        assert found[0][token] == found[1][token]


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("stop", [True, False])
def test_caploss_is_the_mean_over_the_texts_tokens(attention, stop):
    """By hand: sequences without padding, whole logits, log-softmax over all ids, no [SEP]; pivots see everything."""
    recipe, model = make(attention, stop=stop, num_pivots=29)
    codes, expected = torch.randint(20, (3, 4, 4)), []
    for image, caption in zip(codes.flatten(1).tolist(), CAPTIONS, strict=True):
        tokens = [BASE, BOI1, *image, EOI1, ROI1, *(TEXT + t for t in caption)]
        attends = {"pivots": torch.arange(len(tokens)).int().expand(1, 2, -1)} if attention == "three_region" else {}
        logits = model(torch.tensor([tokens]), Context(torch.arange(len(tokens)), attends))[0]
        log_p = F.log_softmax(logits.detach(), -1)
        expected.append(-sum(float(log_p[19 + i, TEXT + t]) for i, t in enumerate(caption)) / len(caption))
    scores = caploss(recipe, model, codes, CAPTIONS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0


@pytest.mark.parametrize("attention", KINDS)
def test_caploss_does_not_depend_on_its_batch(attention):
    recipe, model = make(attention)
    codes = torch.randint(20, (7, 4, 4))
    captions = [CAPTIONS[n % 3] for n in range(7)]
    model.train()
    together = caploss(recipe, model, codes, captions)
    assert model.training
    for size in (1, 3):
        torch.testing.assert_close(together, caploss(recipe, model, codes, captions, batch_size=size))
    torch.testing.assert_close(together[4:5], caploss(recipe, model, codes[4:5], captions[4:5]))
    assert caploss(recipe, model, codes[:0], []).shape == (0,)


def test_the_right_caption_has_the_lower_caploss():
    """After some steps on two pictures that are told apart by their text."""
    recipe, model = make(dropout=0.0)
    torch.manual_seed(0)
    model = recipe.model()
    codes, captions = torch.stack([torch.zeros(16), torch.ones(16)]).long(), [[1, 2], [3, 4, 5]]
    batch = recipe.batch(torch.tensor([[1, 2, -1], [3, 4, 5]]), codes, image_weight=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        loss = (model(batch.inputs, batch.context, targets=batch.targets) * batch.weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right, wrong = (caploss(recipe, model, c.view(2, 4, 4), captions) for c in (codes, codes.flip(0)))
    assert (right < 0.5).all()
    assert (wrong > right + 1).all()


def test_bad_pairs_are_refused_before_anything_is_computed():
    recipe, model = make()
    codes = torch.zeros(2, 4, 4, dtype=torch.int64)
    for images, captions, said in (
        (codes, [[1], []], "captions: expected none that is empty, got 'one of 0 tokens'"),
        (codes[:1], [[1], [2]], r"codes: expected \[2, 4, 4\], one image a caption, got \[1, 4, 4\]"),
        (codes[:, :3], [[1], [2]], r"codes: expected \[2, 4, 4\], one image a caption, got \[2, 3, 4\]"),
        (codes + 20, [[1], [2]], "codes: expected ids 0 to 19, got 20 to 20"),
        (codes, [[1], [10]], "text: expected ids -1 to 9, got 1 to 10"),
        (codes, ["a fox", "a tree"], "captions: expected lists of token ids, got text"),
        (codes, [[1], [2] * 10], "text: expected at most 9 tokens beside .* got 10 in caption 1"),
    ):
        with pytest.raises(ValueError, match=said):
            caploss(recipe, model, images, captions)
    with torch.no_grad():
        model.embedding.positions.weight[20] = torch.nan
    with pytest.raises(ValueError, match="the model's logits are not finite, in row 0 of 2"):
        caploss(recipe, model, codes, [[1, 2], [2]])
