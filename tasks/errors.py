"""The one kind of error that a tool shows without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake: the message names the culprit, the rule and the way out; the tools exit with code 2."""
