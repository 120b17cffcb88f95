"""The model card of a quantized folder: its README.md, which begins with the metadata that the hub reads."""

from pathlib import Path

from calibration.closing import table

WHOSE = {"starquant": "the paper's method", "starquant+": "a method of this implementation, not of the paper"}
CARD = """---
{head}
---

# {name}, {method} {bits}

{name} with {wbits}-bit weights and {abits}-bit activations, {megabytes:.1f} MB. It was quantized by `{method}`
({whose}), in the reference implementation {version} of STaR-Quant
([arXiv 2606.04945](https://arxiv.org/abs/2606.04945)).

## What was quantized

All linears of all blocks are quantized; {kept}.

- Calibration text: {data}, {segments} segments of {length} tokens.
- Settings: {settings}.
- Versions, checksums of the source and losses of every block: `starquant.json`.

## What was measured

{measured}

## How to load it

The repository that wrote this folder reads it; transformers does not.

```python
from model import load_model, write  # in the folder of that repository

model = load_model("FOLDER")  # this folder, or its id on the hub
print(write(model, "TEXT", gen_length=32))
```
"""


def model_card(run: dict, source: Path, size: int, rows=()) -> str:
    """The text of README.md.

    run: `output.run_key`. source: the 16-bit model's folder. size: bytes of the tensors. rows: the closing table.
    """
    from huggingface_hub import ModelCardData

    c, name, bits = run["config"], run["model"], f"W{run['config']['wbits']}A{run['config']['abits']}"
    base = {"base_model": name, "base_model_relation": "quantized"} if "/" in name else {}
    head = ModelCardData(**base, **inherited(source), pipeline_tag="text-generation", library_name="star-quant",
                         tags=["star-quant", "diffusion-language-model", "quantized", c["method"], bits.lower()])
    kept = "embedding, head and norms are as in the source" if c["head_bits"] == 16 else (
        f"the embedding has {c['embed_bits'] or c['head_bits']} bits, the head {c['head_bits']}, and norms are as in "
        f"the source")
    measured = "Nothing was measured after calibration."
    if rows:
        where = f"{rows[0]['segments']} segments of the same text, not calibrated on" if "segments" in rows[0] else (
            "the embedded tasks and texts")
        measured = f"On {where} (± half a 95 % interval):\n\n{table(rows)}"
    return CARD.format(**c | run["text"], head=head.to_yaml().strip(), name=name, bits=bits, megabytes=size / 1e6,
                       whose=WHOSE.get(c["method"], "a method that the paper compares with"), kept=kept,
                       version=run["version"], measured=measured,
                       settings=", ".join(f"{k} {v}" for k, v in c.items() if k != "method"))


def inherited(folder: Path) -> dict:
    """License and language that a model's card names. If it names no license, the file LICENSE decides."""
    from huggingface_hub import ModelCard

    try:
        said = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict()
    except Exception:  # no card, or one that cannot be read: the library has many types for it
        said = {}
    out = {k: said[k] for k in ("license", "license_name", "license_link", "language") if said.get(k)}
    files = sorted(folder.glob("LICENSE*"))
    if files and "license" not in out:
        text = files[0].read_text(encoding="utf-8", errors="replace")[:200]
        out["license"] = "mit" if "MIT License" in text else "apache-2.0" if "Apache License" in text else "other"
    return out
