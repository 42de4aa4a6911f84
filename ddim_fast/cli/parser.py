"""The argument parser of the commands: one-line errors, exit codes, argument types."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..diffusion.step import SIGMA_HAT
from ..io.files import cache_folder, one_line
from ..io.locks import release_all
from ..io.stopping import Stopped, signals
from .missing import describe_missing

__all__ = [
    "CommandParser",
    "list_integers",
    "parse_eta",
    "parse_guidance",
    "parse_integers",
    "parse_positive",
    "parse_seed",
    "parse_spacing",
    "run_command",
]


# Library parameters whose option has another name.
_OTHERWISE_CALLED = {"clip_sample_range": "clip"}


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are one line on stderr and exit code 2.

    Attributes:
        hint: the end of each usage error.
    """

    hint = "--help shows the options"

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"python -m ddim_fast.{command}",
            description=f"{description}\n\nexamples:\n{examples}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        self.register("type", int, _whole)  # Python's own errors name types
        self.register("type", float, _number)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; an unknown option is an error that names the most similar one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first, shown = unknown[0].partition("=")[0], [a for a in self._actions if a.help != argparse.SUPPRESS]
            options = [option for action in shown for option in action.option_strings]
            close = difflib.get_close_matches(first, options, n=1, cutoff=0.75) if first.startswith("-") else []
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {close[0]}?" if close else ""))
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse, in the same words in all versions of Python, with the most similar choice."""
        if action.choices is None or value in action.choices:
            return
        close = difflib.get_close_matches(str(value), action.choices, n=1)
        there = f"did you mean {close[0]!r}? There" if close else "there"
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {there} are {', '.join(action.choices)}")

    def format_help(self) -> str:
        # The options are listed below; in the usage line they would fill a screen.
        required = [action for action in self._actions if action.option_strings and action.required]
        words = [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" for action in required]
        arguments = [str(action.metavar) for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s", *words, "[OPTIONS]", *(f"{word} ..." for word in arguments)])
        return super().format_help()

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The group of options that --help shows under ``title``; one group per title."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} ({self.hint})\n")

    def add_former_name(self, former: str, option: argparse.Action, values: dict[str, str] | None = None) -> None:
        """Accept an option's name of the version before, with a warning; --help does not show it.

        Args:
            values: the former names of its values, and the present ones.
        """
        kind: Any = option.type if values is None else None
        self.add_argument(
            former,
            dest=option.dest,
            action=_FormerName,
            option=option,
            values=values,
            type=kind,
            choices=None if values is None else list(values),
            help=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
        )

    @contextlib.contextmanager
    def usage_errors(self) -> Iterator[None]:
        """Inside, a ValueError or a missing file is a usage error. A message that begins with a parameter of the library, as
        "steps must be ...", names the option instead."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            message = one_line(error)
            name, _, rest = message.partition(" ")
            option = f"--{_OTHERWISE_CALLED.get(name, name).replace('_', '-')}"
            self.error(f"{option} {rest}" if option in self._option_string_actions else message)


class _FormerName(argparse.Action):
    """The action of an option that :meth:`CommandParser.add_former_name` adds."""

    def __init__(self, *place: Any, option: argparse.Action, values: dict[str, str] | None, **settings: Any) -> None:
        super().__init__(*place, **settings)
        self._now, self._values = option.option_strings[0], values

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, former: Any = None) -> None:
        if self._values is None:
            print(f"warning: {former} is now {self._now}", file=sys.stderr)
        else:
            print(f"warning: {former} {value} is now {self._now} {self._values[value]}", file=sys.stderr)
            value = self._values[value]
        setattr(namespace, self.dest, value)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Do not show defaults that mean "nothing"; the help text names them where it matters."""
        shows_nothing = action.default is None or action.default is False or action.default == []
        return action.help if shows_nothing else super()._get_help_string(action)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's ``main``. An error outside of its options is one line on stderr and exit code 1; a warning of this
    package is one line. A signal ends it as :mod:`ddim_fast.io.stopping` says, with 128 plus its number as exit code."""
    warnings.formatwarning = _format_warning
    # torch.compile's default is a temporary folder, which does not last.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    try:
        with signals:
            main()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError, MemoryError) as error:
        if os.environ.get("DDIM_FAST_TRACEBACK"):
            raise
        print(f"error: {' '.join(_described(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        sys.exit(stop.exit_code if isinstance(stop, Stopped) else 130)
    finally:
        release_all()
    sys.exit(0)


# Remedies for errors of the operating system.
_REMEDIES = {
    errno.EACCES: "name a place that you may read and write",
    errno.EPERM: "name a place that you may read and write",
    errno.EROFS: "name a place on another disk",
    errno.ENOSPC: "free some space, or name a place on another disk",
}


def _described(error: Exception) -> str:
    """The error in one line, with its remedy where there is one."""
    if isinstance(error, ModuleNotFoundError):
        return describe_missing(error)
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}: ask for fewer images, or a smaller --batch-size"
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename!r}" if error.filename else ""
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        return f"{error.strerror}{place}{remedy}"
    return str(error)


_format_others = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    return f"warning: {message}\n" if ours else _format_others(message, category, filename, lineno, line)


# A range such as 0-9999999999 is a slip, and would fill the memory. A list of numbers takes 40 bytes for each.
_MOST, _LONGEST = 100_000_000, 10_000_000


def parse_integers(text: str) -> list[int]:
    """``"0-3,8"`` -> [0, 1, 2, 3, 8].

    Raises:
        argparse.ArgumentTypeError: the text is not such a list, or has too many numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers and ranges such as 0-63 or 1,5,7-9")
        if dash and _digits(last) < _digits(first):
            raise argparse.ArgumentTypeError(f"the range {part.strip()!r} runs backwards")
        part_numbers = range(_digits(first), _digits(last or first) + 1)
        if part_numbers.stop - part_numbers.start > _LONGEST - len(numbers):
            raise argparse.ArgumentTypeError(f"up to {part.strip()!r} there are more than {_LONGEST:,} numbers; name fewer")
        numbers += part_numbers
    return numbers


def list_integers(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 3, 8] -> "0-3,8", the inverse of :func:`parse_integers`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    if not text.isdecimal() or _digits(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    if _digits(text) > _MOST:
        raise argparse.ArgumentTypeError(f"{text} is more than {_MOST:,}")
    return int(text)


def parse_count(text: str) -> int:
    """A whole number of at least 0.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return 0 if _digits(text) == 0 else parse_positive(text)


def parse_seed(text: str) -> int:
    """The seed of a random number generator.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    if text.isdecimal() and _digits(text) < 2**63:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")


def _digits(text: str) -> int:
    """The number of a text of digits; of more digits than a 64-bit number has, one that is too large for anything."""
    return int(text) if len(text) < 25 else 10**25


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def parse_spacing(text: str) -> str | list[int]:
    """The name of a spacing, or ``"999,500,0"`` -> [999, 500, 0]."""
    return [int(t) for t in text.split(",")] if all(t.strip().isdecimal() for t in text.split(",")) else text


def parse_guidance(text: str) -> float | list[float]:
    """The scale of guidance, or ``"1,3,3,1"`` -> [1.0, 3.0, 3.0, 1.0], of each step.

    Raises:
        argparse.ArgumentTypeError: a part is no number.
    """
    scales = [_number(part) for part in text.split(",")]
    return scales if len(scales) > 1 else scales[0]


def parse_eta(text: str) -> float | str:
    """A number, or ``sigma-hat``.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text == SIGMA_HAT:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number in [0, 1] nor {SIGMA_HAT!r}") from None
