"""The tiny checkpoints of LLaDA and Dream beside what the official code computes with them (tests/fixtures)."""

import json
from pathlib import Path

from safetensors.torch import load_file

from model import load_model

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = {f: load_model(FIXTURES / f, "cpu") for f in ("llada", "dream")}
PARITY = {f: json.loads((FIXTURES / f / "parity.json").read_text()) for f in MODELS}
STORED = {f: load_file(FIXTURES / f / "parity.safetensors") for f in MODELS}
PROMPT = STORED["dream"]["gen.entropy_24.prompt"]
EOS, EOT = 248, 249
