"""Pictures of what goes into operators that have no pattern, and out of them."""

from .drawing import Drawing
from .pictures import picture


def step(d: Drawing, norm: str) -> None:
    d.flow(10, 60, "branch", "from attention or MLP")
    d.arrow(210, 80, 240, 80)
    d.flow(240, 60, f"{norm} post", "weight, dropout, scale")
    d.arrow(440, 80, 480, 80)
    d.circle(494, 80, "+")
    d.flow(394, 6, "residual", "", wide=200)
    d.arrow(494, 46, 494, 66)
    d.arrow(494, 94, 494, 124)
    d.flow(394, 124, f"{norm} pre", "weight", wide=200)
    d.arrow(508, 80, 610, 80)
    d.text(618, 85, "h", align="start", code=True)
    d.arrow(594, 144, 610, 144)
    d.text(618, 149, "x", align="start", code=True)
    d.box(226, 52, 376, 120, dashed=True)
    d.text(236, 160, "one kernel", align="start")


STEP = "branch through a norm, added to the residual, the sum h through the next norm"
picture("rms-step", STEP)(lambda d: step(d, "RMSNorm"))
picture("layer-step", STEP)(lambda d: step(d, "LayerNorm"))


@picture("pb-relax", "Scores divided by alpha stay in float16's range; the softmax multiplies alpha back")
def pb_relax(d: Drawing) -> None:
    d.flow(10, 20, "q / (alpha sqrt(d))", "small before the product")
    d.arrow(210, 40, 240, 40)
    d.flow(240, 20, "scores = q k^T", "within ±65504")
    d.arrow(440, 40, 470, 40)
    d.flow(470, 20, "alpha (s - max s)", "at most 0, in float32")
    d.arrow(570, 60, 570, 84)
    d.flow(470, 84, "exp, sum, divide", "")
    d.box(460, 8, 220, 124, dashed=True)
    d.text(450, 112, "pb_relax_softmax", align="end", code=True)


@picture("linear-decode", "A weight whose rows are read once, front to end, for few rows of x")
def linear(d: Drawing) -> None:
    d.text(90, 20, "weight [out, in]")
    for row in range(8):
        for column in range(10):
            d.cell(10 + column * 16, 30 + row * 16, 16, "window" if row < 5 else "nothing")
    d.arrow(10, 118, 170, 118)
    d.text(280, 20, "x [rows, in]")
    for row in range(2):
        for column in range(10):
            d.cell(200 + column * 16, 30 + row * 16, 16, "text")
    d.legend(200, 92, {"window": "read, once, for all rows of x", "nothing": "asked for next"})
