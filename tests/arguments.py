"""Arguments of `calibrate.py` that most tests share."""

from methods import SETTINGS_OF


def fast(*more, epochs: int = 1) -> list[str]:
    """`more` behind the method, the paper's unless `more` names one, and `epochs` where it trains."""
    method = more[more.index("--method") + 1] if "--method" in more else "starquant"
    trained = ["--set", f"epochs={epochs}"] if method in SETTINGS_OF["epochs"] else []
    return ["--method", method, "--problems", "0", "--device", "cpu", *trained, *more]
