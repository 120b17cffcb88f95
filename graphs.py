"""One CUDA graph for the denoising step.

Every step of masked diffusion runs the same kernels on tensors of the same shapes; only the ids change. Recorded once
and replayed, the blocks cost one launch instead of some thousands, which matters most for small batches, where Python
takes longer to launch a kernel than the GPU to run it. The head stays outside: which positions it serves may change.
"""

import torch


class GraphedModel:
    """A model whose `hidden` is a replayed CUDA graph; everything else, and every attribute, is the model's own.

    It holds one graph, for the last shape of ids; another shape records a new one. With an attention mask, or away
    from CUDA, `hidden` is simply the model's. The hidden states are overwritten by the next call. Weights must stay
    where they are while it lives (no `unpack_weights`, no `.to`), so make a new one for each generation.
    """

    def __init__(self, model):
        self.model, self.shape, self.graph = model, None, None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        return type(self.model).forward(self, *args, **kwargs)  # the model's forward, over our `hidden`

    def hidden(self, ids, attention_mask=None):
        """Hidden states after the final norm, (B, L, D)."""
        if attention_mask is not None or not ids.is_cuda:
            return self.model.hidden(ids, attention_mask)
        if ids.shape != self.shape:
            self._record(ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.output

    @torch.no_grad()
    def _record(self, ids):
        self.graph = self.output = self.shape = None  # frees the old graph's memory first
        self.ids = ids.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up off the main stream: kernels compile, cuBLAS picks its algorithms
            for _ in range(2):
                self.model.hidden(self.ids)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.model.hidden(self.ids)
        self.shape = ids.shape
