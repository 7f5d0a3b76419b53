"""Mitigations, one file a method: a :class:`~memorization.mitigations.case.Case` in, a ``Remedy`` out."""
