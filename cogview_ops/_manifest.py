"""The operators: the one list that info and the tests read. The tests say what a new line lacks: its function, torch
operators, kernels, cases, benchmarks, place among the tests, mention in the README."""

from typing import Literal, NamedTuple


class Operator(NamedTuple):
    name: str  # of the public function
    made_of: Literal["kernels", "operators", "torch"]  # its own kernels, other operators, plain torch
    cuda: bool = False  # kernels in CUDA C++ too
    triton: bool = True  # and in Triton

    @property
    def differentiable(self) -> bool:
        return not self.name.endswith("_decode")

    @property
    def forward(self) -> str:
        """The torch operator of its kernels, by which implementations are chosen; `<name>_bwd` is the derivative."""
        return f"{self.name}_fwd" if self.differentiable else self.name

    @property
    def registered(self) -> tuple[str, ...]:
        """All torch operators of its kernels."""
        if self.made_of != "kernels":
            return ()
        return (self.forward, f"{self.name}_bwd") if self.differentiable else (self.forward,)


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("cogview2_attention", "operators"),
        Operator("dalle_attention", "operators"),
        Operator("dalle_attention_decode", "operators"),
        Operator("layer_norm", "kernels", cuda=True),
        Operator("linear_decode", "kernels", triton=False),
        Operator("local_attention_2d", "kernels", cuda=True),
        Operator("local_attention_2d_decode", "kernels"),
        Operator("merge_attentions", "torch"),
        Operator("pb_relax_attention", "operators"),
        Operator("pb_relax_softmax", "kernels", cuda=True),
        Operator("rms_norm", "kernels", cuda=True),
        Operator("sample_pivots", "torch"),
        Operator("sandwich_layer_norm", "kernels", cuda=True),
        Operator("sandwich_rms_norm", "kernels", cuda=True),
        Operator("three_region_attention", "kernels", cuda=True),
        Operator("three_region_attention_decode", "kernels"),
        Operator("three_region_attention_varlen", "kernels", cuda=True),
    )
}
KERNELS = tuple(operator for operator in OPERATORS.values() if operator.made_of == "kernels")
