"""Is an fp8 product of 4-bit codes exact? On a GPU: python tests/tools/fp8_exact.py

With scales of one `products.fp8_product` must equal the integers, rounded to bf16 once. With real scales it may
differ where the order of the two scales decides a rounding. Both are counted over 16.8 million outputs a width.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime import products

DEVICE = torch.device("cuda", 0)
counts = {}
for K in (4096, 12288, 18944):
    g = torch.Generator(DEVICE).manual_seed(0)
    a = torch.randint(-15, 16, (4096, K), generator=g, device=DEVICE).float()
    w = torch.randint(-8, 8, (4096, K), generator=g, device=DEVICE).float()
    s, t = torch.rand(2, 4096, generator=g, device=DEVICE) + 0.5
    want = a @ w.t()  # integers below 2^24: exact in fp32
    assert torch.equal(want[:64].double(), a[:64].double() @ w.double().t())
    y = torch.empty(4096, 4096, dtype=torch.bfloat16, device=DEVICE)
    codes, weight, one = a.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), torch.ones_like(s)
    products.fp8_product(codes, weight, one, one, y)
    counts[K] = {"unit scales": int((y != want.bfloat16()).sum())}
    products.fp8_product(codes, weight, s, t, y)
    counts[K]["real scales"] = int((y != (want * s[:, None] * t).bfloat16()).sum())
    counts[K]["real scales, multiplied first"] = int((y != (want * (s[:, None] * t)).bfloat16()).sum())
print(json.dumps(counts))
