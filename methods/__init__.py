"""Every method by name: the settings it has and the function that fits one linear.

A new method is one file in this folder and one line in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

from methods import awq, dllmquant, flat, gptq, plus, quarot, rtn, sgat
from methods.settings import Settings
from runtime.processes import Refused


class Method(NamedTuple):
    """fit(weight (C, d), bias (C,) or None, rtn.Inputs, settings, generator, progress) -> (QuantLinear, record).

    The record is what `starquant.json` says about the linear. progress is called with the loss after every epoch.
    stored(settings, d, behind_norm) names what such a QuantLinear of width d stores besides weight, scales and bias, as
    fields of `checkpoint.storage.Linear`. behind_norm: a norm makes its input.
    """

    settings: type[Settings]
    fit: Callable
    stored: Callable = lambda config, d, behind_norm: {}


METHODS = {
    "starquant": Method(sgat.StarQuant, sgat.fit_starquant, sgat.stored_starquant),
    "starquant+": Method(plus.StarQuantPlus, plus.fit_starquant_plus, plus.stored_starquant_plus),
    "rtn": Method(rtn.RTN, rtn.fit_rtn),
    "gptq": Method(gptq.GPTQ, gptq.fit_gptq),
    "awq": Method(Settings, awq.fit_awq, awq.stored_awq),
    "quarot": Method(quarot.QuaRot, quarot.fit_quarot, quarot.stored_quarot),
    "dllmquant+": Method(dllmquant.DLLMQuant, dllmquant.fit_dllmquant, awq.stored_awq),
    "dllmquant++": Method(dllmquant.DLLMQuantRotated, dllmquant.fit_dllmquant, quarot.stored_quarot),
    "flatquant": Method(sgat.Trained, flat.fit_flat, flat.stored_flat),
    "freeact": Method(sgat.Gated, flat.fit_flat, flat.stored_flat),
}
FLAGS = ("method", "wbits", "abits", "seed", "inputs", "states")  # settings that are flags of `calibrate.py`


def settings_of(method: str) -> dict:
    """The fields of a method's settings by name."""
    return {f.name: f for f in fields(METHODS[method].settings)}


def QuantConfig(method: str = "starquant", **values) -> Settings:
    """The settings of a method, with `values` in place of defaults.

    Refused for an unknown method, a setting of other methods, and a value that is out of range.
    """
    if method not in METHODS:
        raise Refused(f"method {method!r} is not one of {', '.join(METHODS)}.")
    for name in values:
        *some, last = [m for m in METHODS if name in settings_of(m)] or [method]
        if method not in (*some, last):
            raise Refused(f"{name} is for {', '.join(some) + ' and ' * bool(some) + last}, not for {method}.")
    unknown = values.keys() - settings_of(method).keys()
    if unknown:
        raise Refused(f"{min(unknown)} is no setting of {method}, which has {', '.join(settings_of(method))}.")
    return METHODS[method].settings(method=method, **values)


def config_from(args) -> Settings:
    """The settings that the flags of `calibrate.py` ask for."""
    values = {name: getattr(args, name) for name in FLAGS}
    kinds = {name: type(f.default) for m in METHODS for name, f in settings_of(m).items() if name not in FLAGS}
    for item in args.set:
        name, equals, value = item.partition("=")
        if name in FLAGS:
            raise Refused(f"--set {item!r}: give --{name} instead.")
        if not equals or name not in kinds:
            raise Refused(f"--set {item!r}: expected NAME=VALUE; the names are {', '.join(kinds)}.")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise Refused(f"--set {item!r}: {value!r} is not {'an' if kinds[name] is int else 'a'} "
                          f"{kinds[name].__name__}.") from None
    return QuantConfig(**values)


def settings_help() -> str:
    """What --set takes, for --help: every setting under the methods that have it."""
    owners, groups = {}, {}
    for method in METHODS:
        for name, f in settings_of(method).items():
            if name not in FLAGS:
                takes = ", ".join(map(str, f.metadata.get("choices", ()))) or "{} to {}".format(*f.metadata["range"])
                owners.setdefault(f"    {name}={f.default} ({takes}): {f.metadata['text']}", []).append(method)
    for line, methods in owners.items():
        groups.setdefault("every method" if len(methods) == len(METHODS) else ", ".join(methods), []).append(line)
    lines = ["settings of --set NAME=VALUE, by the methods that have them:"]
    for methods, group in groups.items():
        lines += [f"  {methods}", *group]
    return "\n".join(lines)
