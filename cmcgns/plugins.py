"""Loads the module named by a setting: a built-in by its short name, an importable `package.module`, or a Python file."""

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from cmcgns.errors import UserError, first_line


@cache
def _file_module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # not added to sys.modules: Ray then pickles its classes by value, since other nodes do not have the file
    spec.loader.exec_module(module)
    return module


def load_plugin(key: str, name: str, known: Mapping[str, str]) -> ModuleType:
    """The module ``name``, the value of setting ``key``; ``known`` maps short names to modules of this package.

    Raises:
        UserError: there is no such module or file, or it fails to import.
    """
    options = f"known: {', '.join(known)}; or give package.module, or the path of a .py file"
    try:
        if name.endswith(".py"):
            path = Path(name).expanduser().absolute()
            if not path.is_file():
                raise UserError(f"{key} {name}: no such file; {options}")
            digest = hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
            return _file_module(path, f"cmcgns_plugin_{path.stem}_{digest}")
        return importlib.import_module(known.get(name, name))
    except ModuleNotFoundError as error:
        if error.name is not None and (known.get(name, name) + ".").startswith(error.name + "."):
            raise UserError(f"{key} '{name}': no such module; {options}") from None
        raise UserError(f"{key} {name} cannot be imported: {first_line(error)}") from error
    except UserError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise UserError(f"{key} {name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def is_plugin(name: str) -> bool:
    """True if ``name`` is a Python file or a dotted module, not a folder or hub name."""
    return name.endswith(".py") or ("." in name and "/" not in name and not Path(name).exists())


def absolute_plugin(name: str) -> str:
    """``name``, as an absolute path if it is a file: workers run in other folders than the driver."""
    return str(Path(name).expanduser().absolute()) if name.endswith(".py") else name
