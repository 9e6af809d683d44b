"""The one exception that a user is meant to read."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in the user's input, told in one line that names the thing and the mend.

    Entry points (`vlmkd.train.run.main`, every script) print the message alone and exit with code 2; any other
    exception is a defect of ours and keeps its traceback. Line breaks and control characters, which may come with a
    quoted name or text, are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown `name`: the nearest of the `known` ones, or `otherwise` without one."""
    near = difflib.get_close_matches(name, list(known), n=2)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def run_tool(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a tool's `main` with the command line and exit with its code.

    A UserError is one line and exit code 2; so is what the system refuses about a file, such as a missing permission.
    """
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
    """`type` of a command-line option that is a whole number from `low` on."""

    def number(text: str) -> int:
        value = int(text)
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {low} on")
        return value

    return number
