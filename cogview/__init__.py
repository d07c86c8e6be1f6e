"""A thin CogView: a text-to-image GPT over VQ-VAE tokens, its tokenizers, data and trainer."""

import importlib.util

_missing = [
    name
    for name in ("matplotlib", "numpy", "PIL", "rich", "safetensors", "sentencepiece", "tyro")
    if importlib.util.find_spec(name) is None
]
if _missing:
    raise ImportError(
        f"cogview needs {', '.join(_missing)} on top of cogview_ops: "
        "`pip install '.[cogview]'` in the folder of its sources installs what is missing"
    )
