"""One CUDA graph for the denoising step.

Every step of masked diffusion runs the same kernels on tensors of the same shapes; only the ids change. Recorded once
and replayed, the blocks cost one launch instead of some thousands, which matters most for small batches, where Python
takes longer to launch a kernel than the GPU to run it. The head stays outside: which positions it serves may change.
"""

import warnings
from functools import cache

import torch


@cache
def _side(device: torch.device):
    """One stream for all warm-ups of a device: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream(device)


class GraphedModel:
    """A model whose `hidden` is a replayed CUDA graph; everything else, and every attribute, is the model's own.

    It holds one graph, for the last shapes of ids and attention mask; others record a new one. Away from CUDA `hidden`
    is simply the model's. The hidden states are overwritten by the next call. Weights must stay where they are while it
    lives (no `unpack_weights`, no `.to`), so make a new one for each generation.
    """

    def __init__(self, model):
        self.model, self.inputs, self.graph, self.recordable = model, [], None, True

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        return type(self.model).forward(self, *args, **kwargs)  # the model's forward, over our `hidden`

    def hidden(self, ids, attention_mask=None):
        """Hidden states after the final norm, (B, L, D)."""
        if ids.is_cuda and self.recordable:
            with torch.cuda.device(ids.device):  # the model's, which need not be the current one
                given = [ids]
                if attention_mask is not None:  # read here: whether anything is masked decides what is launched
                    rope, mask = self.model.context(ids, attention_mask)
                    given += [] if mask is None else [*rope, mask]
                if self.graph is None or [t.shape for t in given] != [t.shape for t in self.inputs]:
                    self._record(given)
                if self.recordable:
                    for ours, theirs in zip(self.inputs, given, strict=True):
                        ours.copy_(theirs)
                    self.graph.replay()
                    return self.output
        return self.model.hidden(ids, attention_mask)

    def _hidden(self):
        """The hidden states of `inputs`, whose places in memory the graph keeps."""
        ids, *rest = self.inputs
        return self.model.hidden(ids, context=(rest[:2], rest[2]) if rest else None)

    @torch.no_grad()
    def _record(self, given):
        self.graph = self.output = None  # frees the old graph's memory first
        self.inputs = [t.clone() for t in given]
        side = _side(given[0].device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up off the main stream: kernels compile, cuBLAS picks its algorithms
            for _ in range(2):
                self._hidden()
        torch.cuda.current_stream().wait_stream(side)
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self.output = self._hidden()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(main)  # a recording that fails may leave its own stream
            self.recordable = False
            warnings.warn(f"The denoising step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); it "
                          f"runs without (slower).", stacklevel=2)
