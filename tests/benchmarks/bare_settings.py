"""``Config`` also where pydantic is not installed: the settings with their defaults then, and without any check.

For ``tests.gpu_day`` and what it uses, which must run on machines that have torch and transformers and nothing else of ours. To
be imported before anything of ``cmcgns``.
"""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Unchecked:
    """A section of settings: class attributes are the defaults."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def model_construct(cls, **values: Any) -> Any:
        """Settings with ``values`` in place of defaults."""
        return cls(**values)

    @classmethod
    def model_validate(cls, sections: dict[str, dict[str, Any]]) -> Any:
        """Settings with ``sections`` on top of the defaults."""
        kinds = {name: type(getattr(cls, name)) for name in sections} | {"objective": Settings}
        return cls(**{name: kinds[name](**values) for name, values in ({"objective": {}} | sections).items()})


def _field(default: Any = None, **bounds: Any) -> Any:
    return default


def _validator(*fields: str, mode: str = "after") -> Callable[[Any], Any]:
    return lambda method: method


def _stand_in() -> ModuleType:
    """As much of pydantic as ``cmcgns.config`` names."""
    module = ModuleType("pydantic")
    names = {"BaseModel": _Unchecked, "ConfigDict": dict, "Field": _field, "PositiveInt": int}
    names |= {"SerializeAsAny": list, "ValidationInfo": Any, "field_validator": _validator, "BeforeValidator": _field}
    vars(module).update(names, model_validator=_validator)
    return module


checked = importlib.util.find_spec("pydantic") is not None
if not checked:
    sys.modules["pydantic"] = _stand_in()

from cmcgns.config import Config  # noqa: E402
from cmcgns.methods.cm_cgns.settings import Settings  # noqa: E402

if not checked:
    del sys.modules["pydantic"]  # transformers must not take it for the real one

__all__ = ["Config"]
