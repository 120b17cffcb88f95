"""Settings of Temporal Attention Compensation (TAC, Section 3.3 and Appendix C), and a paired variant of its fit.

The paper's fit is `starquant.tac_fit` (Eq. 18). `calibrate.py` collects what both are fitted on.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange

from methods.settings import Settings, between
from starquant import block_statistics, damp, tac_block_size


@dataclass(frozen=True)
class Compensated(Settings):
    """Settings of methods that may correct the attention output by TAC; each adds `tac`, which names the fit."""

    tac_block: int = between(16, 1, 10**4, "g, channels per block of TAC (App. C, Table 3)")
    damping: float = between(3e-4, 0, 10, "ρ of TAC (App. C)")
    tac_samples: int = between(64, 1, 10**6, "calibration segments for TAC, or for "
                               "DLLMQuant's scale of V (kv_bits < 16), at most (App. C)")

    @property
    def compensated(self) -> bool:
        return self.tac != "none"


def tac_ridge(z_fp, z_q, block_size: int = 16, damping: float = 3e-4):
    """The paired least-squares map, which is not in the paper: z_fp, z_q (N, d) -> M (B, g, g) and bias (B, g).

    Eq. 18 matches the two distributions and ignores which rows belong together. Here
    M_b = C_fp,q (Σ_q + λI)⁻¹ minimizes E ‖z_fp − M z_q − bias‖² in each block.
    """
    g = tac_block_size(z_fp.shape[-1], block_size)
    mu_fp, _ = block_statistics(z_fp, g)
    mu_q, cov_q = block_statistics(z_q, g)
    centred_fp, centred_q = (rearrange(z.double(), "n (b g) -> b n g", g=g) - mu[:, None]
                             for z, mu in ((z_fp, mu_fp), (z_q, mu_q)))
    cross = centred_fp.mT @ centred_q / len(z_fp)  # (B, g, g)
    M = torch.linalg.solve(damp(cov_q, damping), cross.mT).mT
    return M, mu_fp - einsum(M, mu_q, "b h g, b g -> b h")
