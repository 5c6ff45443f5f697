"""Exceptions and warnings of the package.

All errors derive from `LosslessLowRankError`, which is a `ValueError`: code that guards a call to Transformers with
`except ValueError` keeps working.
"""


class LosslessLowRankError(ValueError):
    """Base class of every error that the package raises on purpose."""


class ConfigurationError(LosslessLowRankError):
    """A configuration value is unknown, out of range, or contradicts another one."""


class TargetError(LosslessLowRankError):
    """The model, or a module selected in it, cannot be factorized."""


class DataError(LosslessLowRankError):
    """A calibration or held-out set cannot be used."""


class CertificateError(LosslessLowRankError):
    """A comparison cannot be certified on the data that was given for it."""


class NumericalError(LosslessLowRankError):
    """A loss, a gradient or a decomposition is not finite."""


class CheckpointError(LosslessLowRankError):
    """A saved checkpoint and its manifest of factorized modules disagree."""


class NumericalWarning(UserWarning):
    """A numerical problem that was worked around; the result says how."""
