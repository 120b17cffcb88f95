"""Arguments of `calibrate.py`, settings of methods, token ids and a linear's inputs that many tests share."""

import torch

from methods import QuantConfig, settings_of
from methods.rtn import Inputs


def fast(*more, epochs: int = 1) -> list[str]:
    """`more` behind the method, the paper's unless `more` names one, and `epochs` where it trains."""
    method = more[more.index("--method") + 1] if "--method" in more else "starquant"
    trained = ["--set", f"epochs={epochs}"] if "epochs" in settings_of(method) else []
    return ["--method", method, "--problems", "0", "--device", "cpu", *trained, *more]


def quick(method: str = "starquant", epochs: int = 1, **values):
    """A method's settings, with few epochs where it trains."""
    training = {"epochs": epochs} if "epochs" in settings_of(method) else {}
    return QuantConfig(method, **training, **values)


def ids(n=3, length=24, seed=0):
    """Token ids (n, length) of which half are the embedded model's [MASK]."""
    g = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(n, length, generator=g) < 0.5, 1023, torch.randint(1000, (n, length), generator=g))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_inputs(d=32, C=24, segments=8, length=16, seed=0, outlier=8.0):
    """(weight, Inputs) of one linear: correlated inputs with an outlier channel, 16-bit targets."""
    g = generator(seed)
    x = torch.randn(segments, length, d, generator=g) @ torch.randn(d, d, generator=g) / d**0.5
    x[..., 3] *= outlier
    weight = torch.randn(C, d, generator=g) / d**0.5
    state = torch.rand(segments, length, generator=g) < 0.5
    confidence = torch.rand(segments, length, generator=g)
    return weight, Inputs(x, x @ weight.T, state, confidence, 1 + 0.3 * torch.randn(d, generator=g))
