"""The last resort for errors that nobody has foreseen: one line for the user, and a log with the rest."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

from perpetune._version import __version__
from perpetune.errors import out_of_memory


def unforeseen(error: BaseException) -> str:
    """One line about an error: what it is, where it arose, and the file that holds its traceback.

    The file lies in the system's folder for temporary files, because a state folder holds nothing but the state.
    """
    memory = out_of_memory(error) if isinstance(error, RuntimeError) else ""
    if memory:
        return memory
    own = [step for step in traceback.extract_tb(error.__traceback__) if f"{os.sep}perpetune{os.sep}" in step.filename]
    at = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    what = " ".join(str(error).split())
    said = f"{type(error).__name__}{f': {what[:300]}' if what else ''}"
    try:
        number, name = tempfile.mkstemp(prefix="perpetune-error-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"perpetune {__version__}, Python {sys.version}\n{sys.argv}\n")
            file.write("".join(traceback.format_exception(error)))
        log = f"the full log is {name}: please report this error with it"
    except OSError as reason:
        log = f"no log could be written ({reason.strerror}); `perpetune --debug …` shows the traceback"
    return f"an error that perpetune did not foresee{at}: {said}; {log}"
