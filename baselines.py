"""Other methods as ways to fit a QuantLinear: one function per method, all with the signature of `fit_rtn`."""

from starquant import QuantLinear


def fit_rtn(weight, bias, x, y, state, config, generator, progress):
    """Round to nearest, no transform (Eqs. 2-5)."""
    return QuantLinear.fold(weight, abits=config.abits, wbits=config.wbits, bias=bias), {}


METHODS = {"rtn": fit_rtn}
