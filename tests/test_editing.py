"""Masks, the square around them, and how what is drawn comes into a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogview import editing
from cogview.editing import Box, laid_over, masked_by, read_mask, surrounding, touched


def mask(height: int, width: int, *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    return masked_by(boxes, torch.zeros(3, height, width))


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((480, 480), (100, 200, 240, 270), Box(135, 70, 200)),  # 140 wide: 200, around its middle
        ((480, 480), (0, 0, 14, 14), Box(0, 0, 20)),
        ((480, 480), (466, 400, 480, 414), Box(397, 460, 20)),
        ((480, 480), (40, 40, 440, 440), Box(0, 0, 480)),
        ((60, 90), (10, 0, 40, 60), Box(0, 0, 60)),
        ((60, 90), (50, 0, 90, 60), Box(0, 30, 60)),
    ],
)
def test_the_square_around(size, box, expected):
    assert surrounding(mask(*size, box), float("inf")).side == min(size)
    found = surrounding(mask(*size, box))
    assert found == expected
    assert bool(found.of(mask(*size, box)).sum() == mask(*size, box).sum())
    assert surrounding(mask(*size, box), least=50).side == max(found.side, 50)
    assert surrounding(mask(90, 90, (4, 4, 5, 6))).side == 3  # of 2 pixels not these alone


def test_cells_that_are_touched():
    some = torch.zeros(70, 70, dtype=torch.bool)
    some[13, 69] = True  # a pixel
    assert touched(some, 7).nonzero().tolist() == [[1, 6]]
    assert touched(some, 70).nonzero().tolist() == [[13, 69]]
    assert touched(torch.ones(5, 5, dtype=torch.bool), 8).all()


@pytest.mark.parametrize("feather", [0, 3])
def test_what_is_not_masked_stays(feather):
    stream = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (3, 40, 50), generator=stream).to(torch.uint8)
    hidden = mask(40, 50, (10, 5, 30, 25)) | mask(40, 50, (31, 30, 32, 31))
    box = surrounding(hidden)
    drawn = torch.full((3, box.side, box.side), 200, dtype=torch.uint8)
    found = laid_over(picture, box, drawn, hidden, feather)
    assert found.shape == (3, 40, 50)
    assert torch.equal(found[:, ~hidden], picture[:, ~hidden])
    if not feather:
        assert bool((found[:, hidden] == 200).all())
    else:
        assert bool((found[:, 12:18, 17:23] == 200).all())  # the middle
        assert not bool((found[:, 5, 10:30] == 200).all())  # the border
        far = (found.float() - 200).abs()[:, 10, 10:14].mean(dim=0)
        assert bool((far.diff() <= 0).all())
    see_through = torch.cat([picture, picture[:1]])
    again = laid_over(see_through, box, drawn, hidden, feather)
    assert torch.equal(again[:3], found)
    assert torch.equal(again[3, ~hidden], see_through[3, ~hidden])
    assert bool((again[3, 12:18, 17:23] == 255).all())


def test_masks_of_files(tmp_path):
    picture = torch.zeros(3, 8, 12)
    grey = np.zeros((8, 12), np.uint8)
    grey[2:4, 3:5] = 255
    Image.fromarray(grey).save(tmp_path / "light.png")
    rgba = np.zeros((8, 12, 4), np.uint8)
    rgba[1, 1] = (0, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    assert torch.equal(read_mask(tmp_path / "light.png", picture), mask(8, 12, (3, 2, 5, 4)))
    assert torch.equal(read_mask(tmp_path / "opaque.png", picture), mask(8, 12, (1, 1, 2, 2)))
    with pytest.raises(ValueError, match="mask: expected 8 x 12 pixels, as the picture, got '12 x 8'"):
        read_mask(tmp_path / "light.png", torch.zeros(3, 12, 8))
    with pytest.raises(ValueError, match=r"mask: cannot read .*none\.png"):
        read_mask(tmp_path / "none.png", picture)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"mask: .*broken.png: image: not a readable picture"):
        read_mask(tmp_path / "broken.png", picture)


def test_bad_masks():
    picture = torch.zeros(3, 8, 12, dtype=torch.uint8)
    for bad, said in (
        (torch.zeros(8, 12), r"mask: expected bool \[H, W\]"),
        (mask(12, 8, (0, 0, 2, 2)), "mask: expected 12 x 8 pixels, as the picture, got '8 x 12'"),
        (mask(8, 12), "mask: expected some of the picture, which is drawn anew, got 'nothing of it'"),
        (mask(8, 12, (0, 0, 12, 8)), "mask: expected a part of the picture; all of it is `cogview2 generate`"),
    ):
        with pytest.raises(ValueError, match=said):
            editing.check(bad, picture)
    with pytest.raises(ValueError, match=r"mask: expected what a square of .* \(8 pixels\) holds, got '10 x 2'"):
        surrounding(mask(8, 12, (0, 0, 10, 2)))
    with pytest.raises(ValueError, match=r"around: expected at least 1, got 0\.5"):
        surrounding(mask(8, 12, (0, 0, 2, 2)), 0.5)
    with pytest.raises(ValueError, match="box: expected LEFT TOP RIGHT BOTTOM inside 12 x 8 pixels"):
        mask(8, 12, (0, 0, 13, 2))
    with pytest.raises(ValueError, match="feather: expected at least 0 pixels, got -1"):
        laid_over(picture, Box(0, 0, 4), picture[:, :4, :4], mask(8, 12, (0, 0, 2, 2)), -1)
