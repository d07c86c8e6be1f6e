"""`cogview info`."""

from dataclasses import dataclass

import torch

from cogview.recipes import RECIPES


@dataclass(frozen=True)
class Info:
    """Versions, the operators that run here, and the presets."""

    def run(self) -> None:
        from cogview_ops import info

        info.main()
        print(f"\n{'preset':<24}{'layers':>8}{'hidden':>8}{'heads':>8}{'tokens':>8}{'parameters':>16}  attention")
        for name, recipe in RECIPES.items():
            for preset_name, (c, _) in recipe.presets.items():
                with torch.device("meta"):
                    count = sum(p.numel() for p in recipe(c).model().parameters())
                sizes = f"{c.num_layers:>8}{c.hidden_size:>8}{c.num_heads:>8}{c.max_positions - 1:>8}"
                title = f"{name} {preset_name}"
                print(f"{title:<24}{sizes}{count:>16,}  {getattr(c, 'attention', name)}")
