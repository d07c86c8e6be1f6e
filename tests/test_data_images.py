"""Pictures of every kind become right RGB."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from cogview.data.images import TooLarge, decode_image, pixels, to_rgb

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = Image.fromarray(RAMP)
COLOURS = Image.merge("RGB", (GREY, GREY.rotate(90), GREY.rotate(180)))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, depth: int, colour: int, rows: list[bytes], *, transparent: bytes = b"", palette=b"") -> bytes:
    """A PNG as no one's library would write it, of any depth and colour type."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header)]
    chunks += [chunk(b"PLTE", palette)] * bool(palette) + [chunk(b"tRNS", transparent)] * bool(transparent)
    chunks += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def sixteen_bits(mode: str) -> Image.Image:
    big = mode.endswith("B")
    return Image.frombytes(mode, (16, 16), (np.arange(256) * 257).astype(">u2" if big else "<u2").tobytes())


@pytest.mark.parametrize("mode", ["L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I", "F"])
def test_modes_of_grey(mode):
    if mode.startswith("I;16"):
        image = sixteen_bits(mode)
    elif mode == "I":
        image = Image.fromarray(RAMP.astype(np.int32) * 257)
    else:
        image = GREY.convert("LA").convert(mode) if mode == "La" else GREY.convert(mode)
    assert image.mode == mode
    assert np.array_equal(values(to_rgb(image)), np.stack([RAMP] * 3, -1))
    assert np.array_equal(values(to_rgb(image, "RGBA"))[..., 3], np.full((16, 16), 255))


@pytest.mark.parametrize(
    ("mode", "bound"),  # what 8 bits of other colours keep, on average
    [
        ("RGB", 0),
        ("RGBA", 0),
        ("RGBa", 0),
        ("RGBX", 0),
        ("CMYK", 0),
        ("YCbCr", 1.5),
        ("HSV", 1),
        ("LAB", 1.5),
        ("PA", 0),
    ],
)
def test_modes_of_colour(mode, bound):
    image = COLOURS.convert("RGBA").convert(mode) if mode in ("RGBa", "PA") else COLOURS.convert(mode)
    assert image.mode == mode
    for asked in ("RGB", "RGBA"):
        assert np.abs(values(to_rgb(image, asked))[..., :3] - values(COLOURS)).mean() <= bound
        assert to_rgb(image, asked).mode == asked


def test_one_bit_and_palettes():
    assert values(to_rgb(Image.fromarray(RAMP > 127)))[..., 0].tolist() == np.where(RAMP > 127, 255, 0).tolist()
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert values(to_rgb(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    image.info["transparency"] = 1
    assert values(to_rgb(image)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    image.info["transparency"] = bytes([0, 255, 128])
    assert values(to_rgb(image)).tolist() == [[[255, 255, 255], [0, 255, 0], [127, 127, 255]]]
    image.info.pop("transparency")
    image.putpalette([255, 0, 0, 255, 0, 255, 0, 0, 0, 0, 255, 255], "RGBA")
    assert values(to_rgb(image)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_half_transparent_is_half_white():
    for mode in ("RGBA", "RGBa"):
        image = Image.new("RGBA", (1, 1), (200, 0, 100, 128)).convert(mode)
        assert np.abs(values(to_rgb(image))[0, 0] - [227, 127, 177]).max() <= 1
        assert np.abs(values(to_rgb(image, "RGBA"))[0, 0] - [200, 0, 100, 128]).max() <= 1
    for mode in ("LA", "La"):
        grey = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0))).convert(mode)
        assert values(to_rgb(grey))[0, 0].tolist() == [255, 255, 255]


def test_what_grey_of_many_bits_clips():
    wide = Image.fromarray(np.array([[-5, 0, 65535, 70000]], np.int32))
    assert values(to_rgb(wide))[0, :, 0].tolist() == [0, 0, 255, 255]
    floats = Image.fromarray(np.array([[-3.0, np.nan, 99.6, 300.0, np.inf]], np.float32))
    assert values(to_rgb(floats))[0, :, 0].tolist() == [0, 0, 100, 255, 255]


def test_pngs_of_every_depth():
    ramp = (np.arange(256) * 257).astype(">u2").tobytes()
    assert values(decode_image(png(256, 16, 0, [ramp])))[0, :, 1].tolist() == list(range(256))
    seen = values(decode_image(png(256, 16, 0, [ramp], transparent=struct.pack(">H", 10 * 257))))[0, :, 1].tolist()
    assert seen == [*range(10), 255, *range(11, 256)]
    for depth, row, expected in (
        (1, b"\x40", [0, 255]),
        (2, b"\x1b", [0, 85, 170, 255]),
        (4, b"\x0f\x50", [0, 255, 85]),
    ):
        plain = values(decode_image(png(len(expected), depth, 0, [row])))[0, :, 0].tolist()
        assert plain == expected
        first = png(len(expected), depth, 0, [row], transparent=struct.pack(">H", 1))
        level = 255 // ((1 << depth) - 1)
        assert values(decode_image(first, mode="RGBA"))[0, :, 3].tolist() == [
            0 if v == level else 255 for v in expected
        ]
    key = struct.pack(">HHH", 5 * 257, 6 * 257, 7 * 257)
    deep = png(2, 16, 2, [key + struct.pack(">HHH", 257, 0, 0)], transparent=key)
    assert values(decode_image(deep)).tolist() == [[[255, 255, 255], [1, 0, 0]]]
    close = struct.pack(">HHHHHH", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x9ABD)  # another in its last bit
    near = png(2, 16, 2, [close, close[6:] + close[:6]], transparent=close[:6])
    assert values(decode_image(near, mode="RGBA"))[..., 3].tolist() == [[0, 255], [255, 0]]
    assert values(decode_image(near)).tolist()[0] == [[255] * 3, [0x12, 0x56, 0x9A]]
    eight = png(2, 8, 2, [bytes([5, 6, 7, 1, 0, 0])], transparent=struct.pack(">HHH", 5, 6, 7))
    assert values(decode_image(eight)).tolist() == [[[255, 255, 255], [1, 0, 0]]]
    grey_alpha = png(2, 16, 4, [struct.pack(">HHHH", 257 * 9, 65535, 257 * 9, 0)])
    assert values(decode_image(grey_alpha)).tolist() == [[[9, 9, 9], [255, 255, 255]]]
    indexed = png(2, 8, 3, [bytes([0, 1])], palette=bytes([9, 8, 7, 1, 2, 3]), transparent=b"\xff\0")
    assert values(decode_image(indexed)).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_the_kinds_of_files():
    for kind in ("PNG", "GIF", "BMP"):
        assert values(decode_image(encoded(COLOURS.convert("L"), kind)))[3, 5].std() == 0
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    for kind in ("JPEG", "WEBP"):
        assert np.abs(values(decode_image(encoded(red, kind))) - [200, 30, 30]).max() < 5
    cmyk = encoded(red.convert("CMYK"), "JPEG")  # inverted, as Photoshop writes them
    assert b"Adobe" in cmyk
    assert np.abs(values(decode_image(cmyk)) - [200, 30, 30]).max() < 5
    assert np.abs(values(decode_image(cmyk, side=4)) - [200, 30, 30]).max() < 5


def test_the_first_frame_is_the_picture():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert np.abs(values(decode_image(moving))[4, 4] - [255, 0, 0]).max() <= 1
    fallback = encoded(frames[2], save_all=True, append_images=frames[:2], duration=50, default_image=True)
    assert values(decode_image(fallback))[4, 4].tolist() == [255, 0, 0]  # what plays, not what stands in for it
    phone = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(values(decode_image(phone))[4, 4] - [254, 0, 0]).max() <= 1
    with pytest.raises(ValueError, match="not a readable picture"):
        decode_image(b"GIF89a\x08\0\x08\0\0\0\0;")  # no frame


def test_what_the_first_frame_of_a_gif_leaves_open_is_white():
    gif = bytearray(encoded(Image.new("P", (2, 2), 1), "GIF"))
    at = gif.index(b"\x2c\0\0\0\0\2\0\2\0")
    gif[6:10] = struct.pack("<HH", 6, 4)
    gif[at + 1 : at + 5] = struct.pack("<HH", 3, 1)
    seen = decode_image(bytes(gif), mode="RGBA")
    alpha = np.zeros((4, 6), int)
    alpha[1:3, 3:5] = 255
    assert values(seen)[..., 3].tolist() == alpha.tolist()
    assert values(decode_image(bytes(gif)))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [None, 16])
def test_pictures_stand_upright(orientation, side):
    pattern = np.full((96, 160, 3), 255, np.uint8)
    pattern[:48, :80], pattern[:48, 80:] = (200, 0, 0), (0, 0, 200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_image(encoded(Image.fromarray(pattern), "JPEG", exif=exif, quality=95, subsampling=0), side=side)
    stored = Image.fromarray(pattern)
    stored.info["exif"] = exif.tobytes()
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(stored, exif=exif))))
    assert (turned.width > turned.height) == (expected.width > expected.height)
    difference = values(pixels(turned, 16).permute(1, 2, 0).numpy()) - values(
        pixels(expected, 16).permute(1, 2, 0).numpy()
    )
    assert np.abs(difference).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_no_picture():
    jpeg = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode_image(jpeg).size == (8, 8)


def test_reduced_decoding_stays_near_the_whole():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).resize((1024, 768))
    jpeg = encoded(smooth, "JPEG", quality=90)
    reduced = decode_image(jpeg, side=64)
    assert reduced.size == (256, 192)  # an eighth would be less than twice the side
    assert decode_image(jpeg, side=400).size == decode_image(jpeg).size == (1024, 768)
    whole = ImageOps.fit(decode_image(jpeg), (64, 64), Image.Resampling.LANCZOS)
    for image in (reduced, decode_image(jpeg)):
        difference = np.abs(values(pixels(image, 64).permute(1, 2, 0).numpy()) - values(whole))
        assert difference.mean() < 0.7
        assert difference.max() < 16


def test_odd_shapes_and_limits():
    assert pixels(Image.new("RGB", (1, 5000), "red"), 8).unique().tolist() == [0, 255]
    assert pixels(decode_image(encoded(Image.new("RGB", (1, 1), "red"), "JPEG"), side=8), 8).shape == (3, 8, 8)
    for data in (b"", b"\xff\xd8\xff", encoded(COLOURS, "JPEG")[:300]):
        with pytest.raises(ValueError, match="not a readable picture"):
            decode_image(data)
    with pytest.raises(ValueError, match="no PNG, JPEG, WEBP, GIF or BMP"):
        decode_image(encoded(COLOURS, "TIFF"))
    with pytest.raises(TooLarge, match="expected at most 10 bytes"):
        decode_image(bytes(11), max_bytes=10)
    with pytest.raises(TooLarge, match="expected at most 100 pixels, got 16 x 16"):
        decode_image(encoded(COLOURS), max_pixels=100)
