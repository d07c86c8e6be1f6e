"""Token ids and layouts of cogview.sequence."""

import pytest
import torch

from cogview.sequence import COMMANDS, Batch, Context, Vocabulary, pad_text, text_lengths, truncate_text

V = Vocabulary(image_size=100, text_size=50)
TEXT = torch.tensor([[1, 2, 3], [4, -1, -1], [-1, -1, -1]])
CODES = torch.tensor([[10, 11], [12, 13], [0, 99]])


def ids(*names: str | int) -> list[int]:
    """Commands by name, text ids as t<n>, image codes as ints."""
    return [n if isinstance(n, int) else 100 + int(n[1:]) if n[0] == "t" else V[n] for n in names]


def test_published_vocabulary():
    published = Vocabulary(8192, 50000)
    assert len(COMMANDS) == 27
    assert published["PAD"] == 58192
    assert published["POS8"] == 58218
    assert published.size == 58240


def test_text2image_layout():
    assert V.text2image(TEXT, CODES, 10).tolist() == [
        ids("ROI1", "t1", "t2", "t3", "BASE", "BOI1", 10, 11, "EOI1", "PAD"),
        ids("ROI1", "t4", "BASE", "BOI1", 12, 13, "EOI1", "PAD", "PAD", "PAD"),
        ids("ROI1", "BASE", "BOI1", 0, 99, "EOI1", "PAD", "PAD", "PAD", "PAD"),
    ]


def test_caption_layout():
    assert V.caption(TEXT, CODES, 9, stop=False).tolist() == [
        ids("BASE", "BOI1", 10, 11, "EOI1", "ROI1", "t1", "t2", "t3"),
        ids("BASE", "BOI1", 12, 13, "EOI1", "ROI1", "t4", "PAD", "PAD"),
        ids("BASE", "BOI1", 0, 99, "EOI1", "ROI1", "PAD", "PAD", "PAD"),
    ]
    assert V.caption(TEXT, CODES, 10).tolist() == [
        ids("BASE", "BOI1", 10, 11, "EOI1", "ROI1", "t1", "t2", "t3", "SEP"),
        ids("BASE", "BOI1", 12, 13, "EOI1", "ROI1", "t4", "SEP", "PAD", "PAD"),
        ids("BASE", "BOI1", 0, 99, "EOI1", "ROI1", "SEP", "PAD", "PAD", "PAD"),
    ]
    with pytest.raises(ValueError, match="text: expected at most 2 tokens beside 2 image tokens in 9, got 3"):
        V.caption(TEXT, CODES, 9)


def test_fixed_text_layout():
    inputs, targets = V.fixed_text(TEXT, CODES, 4)
    assert inputs.tolist() == [
        ids("ROI1", "t1", "t2", "t3", "BASE", "PAD", "BOI1", 10, 11),
        ids("ROI1", "t4", "BASE", "PAD", "PAD", "PAD", "BOI1", 12, 13),
        ids("ROI1", "BASE", "PAD", "PAD", "PAD", "PAD", "BOI1", 0, 99),
    ]
    assert targets.tolist() == [
        ids("t1", "t2", "t3", "BASE", "BOI1", "PAD", 10, 11, "EOI1"),
        ids("t4", "BASE", "BOI1", "PAD", "PAD", "PAD", 12, 13, "EOI1"),
        ids("BASE", "BOI1", "PAD", "PAD", "PAD", "PAD", 0, 99, "EOI1"),
    ]
    full = V.fixed_text(TEXT[:1], CODES[:1], 3)
    tight = V.text2image(TEXT[:1], CODES[:1], 9)
    assert [x.tolist() for x in full] == [tight[:, :-1].tolist(), tight[:, 1:].tolist()]


def test_batches_in_parts():
    positions, pivots = torch.arange(15).view(3, 5), torch.arange(6).view(3, 2)
    rows = torch.arange(15).view(3, 5)
    first, second = Batch(rows, rows + 1, rows / 2, Context(positions, {"pivots": pivots})).chunk(2)
    assert (len(first), len(second)) == (2, 1)
    assert torch.equal(second.inputs, rows[2:])
    assert torch.equal(second.targets, rows[2:] + 1)
    assert torch.equal(second.context.positions, positions[2:])
    assert torch.equal(first.context.attention["pivots"], pivots[:2])


def test_text_padded_beyond_the_room_is_no_error():
    wide = torch.nn.functional.pad(TEXT, (0, 20), value=-1)
    assert torch.equal(V.text2image(wide, CODES, 9), V.text2image(TEXT, CODES, 9))
    assert V.text2image(wide.int(), CODES.int(), 9).dtype == torch.int64


def test_kinds_and_loss_weights():
    tokens = V.text2image(TEXT, CODES, 10)
    text, image = V.is_text(tokens), V.is_image(tokens)
    assert text[1].tolist() == [True, True, True, True, False, False, True, False, False, False]
    assert image[1].tolist() == [False, False, False, False, True, True, False, False, False, False]
    assert V.loss_weights(tokens, text=0.5, image=7.0)[1].tolist() == [0.5] * 4 + [7.0] * 2 + [0.5] + [0.0] * 3


def test_allowed_tokens():
    image, text = V.allowed_after("BOI1"), V.allowed_after("ROI1")
    assert len(image) == len(text) == V.size
    assert image.nonzero().flatten().tolist() == list(range(100))
    assert text.nonzero().flatten().tolist() == list(range(100, 150))
    with pytest.raises(ValueError, match="command: expected BOI1 to BOI3 or ROI1 to ROI3, got 'PAD'"):
        V.allowed_after("PAD")


def test_long_captions_are_an_error_or_cut():
    with pytest.raises(
        ValueError, match="text: expected at most 2 tokens beside 2 image tokens in 8, got 3 in caption 0"
    ):
        V.text2image(TEXT, CODES, 8)
    cut, count = truncate_text(TEXT, 2)
    assert count == 1
    assert V.text2image(cut, CODES, 8)[0].tolist() == ids("ROI1", "t1", "t2", "BASE", "BOI1", 10, 11, "EOI1")


@pytest.mark.parametrize(
    ("text", "codes", "message"),
    [
        ([[50]], [[1]], "text: expected ids -1 to 49"),
        ([[-2]], [[1]], "text: expected ids -1 to 49"),
        ([[1]], [[100]], "codes: expected ids 0 to 99"),
        ([[1]], [[-1]], "codes: expected ids 0 to 99"),
        ([[-1, 1]], [[1]], "text: expected -1 at the end of a row only"),
        ([[1], [1]], [[1]], r"text, codes: expected \[B, T\] and \[B, N\]"),
    ],
)
def test_bad_ids(text, codes, message):
    with pytest.raises(ValueError, match=message):
        V.text2image(torch.tensor(text), torch.tensor(codes), 20)


def test_pad_text():
    text = pad_text([[1, 2], [], [3]])
    assert text.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert text_lengths(text).tolist() == [2, 0, 1]
    assert pad_text([]).shape == (0, 0)
