"""Token states along the model's own denoising trajectory, for calibration (`--states rollout`).

The paper is silent on where token states come from. By default each segment is a masked copy: a share t of its tokens
is replaced by [MASK] (the forward process). Here the model continues the first half of each segment, one token a step,
and the sequence is taken when a share t of the other half is still masked.
"""

import torch
import torch.nn.functional as F

from metrics import batches
from sampling import denoise


def rollout(model, tokens, ratios, rows: int = 16):
    """Segments (S, L) and the share t in (0, 1] of each, (S,) -> (S, L): prompt, what the model wrote, and [MASK].

    `rows` segments run at once, L/2 steps.
    """
    length = tokens.shape[1] // 2
    left, out = (ratios * length).ceil().clamp(1, length).to(model.device), []
    for r in batches(len(tokens), rows):
        prompt = tokens[r, : tokens.shape[1] - length].to(model.device)
        states, taken = F.pad(prompt, (0, length), value=model.mask_id), left[r] == length
        for step in denoise(model, prompt, length, length):
            now = ((step.ids == model.mask_id).sum(-1) <= left[r]) & ~taken
            states, taken = torch.where(now[:, None], step.ids, states), taken | now
            if taken.all():
                break
        out.append(states.cpu())
    return torch.cat(out)
