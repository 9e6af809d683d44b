"""The exception that a user is meant to read, and how tools end with it."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's, told in one line that names the thing and the mend; what breaks a line becomes an escape.

    Entry points print it and exit with code 2; any other exception is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def did_you_mean(name: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """The end of an error about an unknown `name`: the nearest `known` ones after `prefix`, or `otherwise`."""
    lowered, name = {one.lower(): one for one in known}, name.lower()
    near = [one for one in lowered if name and one.startswith(name)][:2]
    near = near or difflib.get_close_matches(name, lowered, n=2)
    return f"did you mean {' or '.join(prefix + lowered[one] for one in near)}?" if near else otherwise


def run_tool(main: Callable[[list[str]], int]) -> NoReturn:
    """Exit with the code of a tool's `main`, or 2 and one line: a UserError, or what the system refuses about a file."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        if error.filename is None:
            raise
        print(UserError(f"{error.filename}: {error.strerror}"), file=sys.stderr)
    sys.exit(2)


def at_least(low: int) -> Callable[[str], int]:
    """`type` of a whole number from `low` on."""

    def number(text: str) -> int:
        value = int(text)
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {low} on")
        return value

    return number
