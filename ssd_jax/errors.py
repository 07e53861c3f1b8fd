"""Errors a user can act on.

Every error names the cause and the remedy in one line. The command lines print that line
and leave with status 2; a library caller may catch :class:`SsdError`, or the built-in type
that the class also derives from.
"""


class SsdError(Exception):
    """Base of all errors raised on purpose by this package."""


class CheckpointError(SsdError, ValueError):
    """A model, tokenizer or n-gram file is missing, damaged or of the wrong shape."""


class ConfigError(SsdError, ValueError):
    """A model or training configuration asks for something impossible or unsupported."""


class VocabularyMismatchError(SsdError, ValueError):
    """Two stages of one stack do not share a vocabulary."""


class PromptError(SsdError, ValueError):
    """The prompt cannot be decoded: too long, out of range, or of the wrong type."""


class SamplingError(SsdError, ValueError):
    """A sampling or length option lies outside its range."""


class PlanError(SsdError, ValueError):
    """A speculation plan is inconsistent or does not fit the stack."""


class DataError(SsdError, ValueError):
    """Training or benchmark input cannot be used."""


class InsufficientMemoryError(SsdError, MemoryError):
    """Models, caches or a pass need more memory than the device has left."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the host or, as a ``JaxRuntimeError``, a device says that memory did not suffice."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
