"""Which shapes `torch._int_mm` takes on a GPU and gets right: python tests/tools/probe_int_mm.py

A shape that it does not take may end the GPU's context, so this runs in a process of its own.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import kernels


def probe_int_mm(device) -> dict:
    """Which M, K and N `torch._int_mm` takes and gets right, by the layout of its second operand."""
    def good(layout, M=128, K=128, N=256):
        a = torch.randint(-128, 128, (M, K), dtype=torch.int8, device=device)
        w = torch.randint(-128, 128, (N, K), dtype=torch.int8, device=device)
        b = w.t() if layout == "column-major" else w.t().contiguous()
        try:
            return torch.equal(torch._int_mm(a, b), kernels.float_mm(a, w))
        except RuntimeError:
            return False

    many = (1, 8, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 100, 1000, 1024)
    few = (8, 16, 24, 32, 40, 64)
    return {layout: {"M": [M for M in many if good(layout, M=M)], "K": [K for K in few if good(layout, K=K)],
                     "N": [N for N in few if good(layout, N=N)]} for layout in ("column-major", "row-major")}


if __name__ == "__main__":
    print(json.dumps(probe_int_mm(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
