"""From a command line to settings: `--config FILE.yaml`, `--section.key=value`, `--help`, `--print-config`.

Tried instead: pydantic-settings 2.16 answers a misspelt key with its whole usage and a wrong value with pydantic's own text;
tyro 1.0 renames keys to hyphens. Neither knows a section whose keys depend on another setting (`objective`).
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cmcgns.config import METHODS, MethodConfig, RunConfig, Section, foreign_modules, method_settings
from cmcgns.errors import UserError
from cmcgns.plugins import absolute_plugin
from cmcgns.user_folders import user_variables

STATUS_FAILED, STATUS_WRONG_INPUT, STATUS_INTERRUPTED, STATUS_TERMINATED = 1, 2, 130, 143
STRING_KEYS = (
    "run.name", "run.resume", "run.storage", "method.name", "data.uri", "clustering.start_from", "embed.run", "embed.uri",
    "evaluate.run", "prepare.out", "prepare.pseudonymise_key_file", "sweep.resume",
    *(f"search.{key}" for key in ("run", "uri", "index", "film", "text", "report", "json", "page", "host")),
)  # fmt: skip
"""Keys whose values are always strings, even if they look like 2024-01-01 or 007."""
RESUME_KEYS = ("run.resume", "sweep.resume")
"""Keys that name a run to resume; the job then starts from that run's settings."""
COMMAND = "cmcgns"
"""The console script; it puts itself and the job in front of the arguments: see ``commands``."""
FLAGS = ("--print-config", "--dry-run")
"""Arguments without a value."""
Settings = TypeVar("Settings", bound=Section)
"""The settings of one job: a section whose fields are sections."""


def run_job(
    main: Callable[[Settings], int],
    kind: type[Settings],
    default_config: Path | None,
    argv: Sequence[str] | None = None,
    plan: Callable[[Settings], int] | None = None,
) -> int:
    """Exit status of ``main`` with the settings from ``argv``; on wrong input prints one message and returns 2.

    With ``--dry-run`` it calls ``plan`` instead, if the job has one.
    """
    try:
        os.environ.update(user_variables())  # before Ray is imported, which asks for the home
        arguments = list(sys.argv[1:] if argv is None else argv)
        if "--help" in arguments or "-h" in arguments:
            method = next((word.partition("=")[2] for word in arguments if word.startswith("--method.name=")), None)
            print(
                help_text(kind, default_config, "" if plan is None else " [--dry-run]", method or MethodConfig().name)
            )
            return 0
        flags = {word for word in arguments if word in FLAGS}
        config = load_config([word for word in arguments if word not in flags], kind, default_config)
        if "--print-config" in flags:
            print(to_yaml(config), end="")
            return 0
        if "--dry-run" not in flags:
            return main(config)
        if plan is None:
            raise UserError("--dry-run is not available for this job, only for jobs/pretrain.py; remove it")
        return plan(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return STATUS_WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted before the job started", file=sys.stderr)
        return STATUS_INTERRUPTED


def load_config(arguments: Sequence[str], kind: type[Settings], default_config: Path | None) -> Settings:
    """Settings from the YAML file in ``--config`` (default ``default_config``), overridden by the command line.

    ``--run.resume=NAME`` or ``--sweep.resume=NAME`` without ``--config`` uses the settings that the run was started with.
    """
    path, overrides = None, {}
    words = iter(arguments)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"'{word}' is not a setting; write --section.key=value (see --help)")
        if not equals:
            following = next(words, None)
            if following is None:
                raise UserError(f"--{key} has no value; write --{key}=value (see --help)")
            value = following
        if key == "config":
            path = value
        else:
            overrides[key] = _parse_value(key, value)
    source = path or (default_config and str(default_config))
    settings = read_yaml(source) if source else {}
    resumed = next((key for key in RESUME_KEYS if key in overrides), None)
    if path is None and resumed:
        storage = overrides.get("run.storage") or settings.get("run", {}).get("storage") or RunConfig().storage
        settings = read_run(str(storage), str(overrides[resumed]), resumed)
        if resumed == "run.resume" and isinstance(settings.get("run"), dict):
            settings["run"].pop("name", None)  # the folder may have been renamed
        for key, name in foreign_modules(settings).items():
            if absolute_plugin(str(overrides.get(key))) != name:
                raise UserError(
                    f"{resumed} {overrides[resumed]}: its settings name the module {name}, which would be executed here; if you "
                    f"trust it, repeat --{key}={name}"
                )
    return resolve(settings, overrides, kind)


def resolve(settings: dict[str, Any], overrides: dict[str, Any], kind: type[Settings]) -> Settings:
    """Validated settings: those of a file, overridden by ``section.key`` values."""
    settings = _with_method(settings, overrides, kind)
    method = _method_of(settings)
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        _check_key(section, kind)
        if not dot:
            raise UserError(f"--{key} is a whole section; write --{key}.<key>=value (see --help)")
        _check_key(name, _section_type(kind, section, method), section, method)
        if not isinstance(settings.setdefault(section, {}), dict):
            break  # validate() refuses the section
        settings[section][name] = value
        other = _other_unit(name)
        if other and f"{section}.{other}" not in overrides:
            settings[section].pop(other, None)
    return validate(settings, kind)


def _with_method(settings: dict[str, Any], overrides: dict[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """``settings`` with the method from the command line; keeps only the `objective` keys of the file that it also has."""
    chosen = overrides.get("method.name")
    if chosen is None or "method" not in kind.model_fields or chosen == _method_of(settings):
        return settings
    objective = settings.get("objective")
    kept = {
        name: value
        for name, value in (objective if isinstance(objective, dict) else {}).items()
        if name in method_settings(chosen).model_fields
    }
    dropped = sorted(set(objective if isinstance(objective, dict) else {}) - set(kept))
    if dropped:
        print(
            f"method.name {chosen}: these keys of the file's objective do not apply: {', '.join(dropped)}",
            file=sys.stderr,
        )
    return settings | {"method": {"name": chosen}, "objective": kept}


def _method_of(settings: dict[str, Any]) -> str:
    """The method name in ``settings``, not validated."""
    section = settings.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) else MethodConfig().name


def validate(settings: dict[str, Any], kind: type[Settings]) -> Settings:
    """``settings`` as a ``kind``.

    Raises:
        UserError: names the first wrong key and its value.
    """
    method = _method_of(settings)
    for section, values in settings.items():
        _check_key(section, kind)
        if not isinstance(values, dict):
            raise UserError(f"section '{section}' must contain keys, not {values!r}; see --print-config for the layout")
        for name in values:
            _check_key(name, _section_type(kind, section, method), section, method)
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if len(first["loc"]) < 2:
            raise UserError(reason) from None
        section, name = (str(part) for part in first["loc"][:2])
        info = _section_type(kind, section, method).model_fields[name]
        out_of_range = first["type"].startswith(("greater_than", "less_than"))
        wanted = (range_of(info) if out_of_range else "") or reason.replace("Input should be", "must be")
        meaning = (info.description or "").split("\n\n")[0].split(". ")[0].rstrip(".")
        raise UserError(f"{section}.{name} = {first['input']!r} {wanted} ({' '.join(meaning.split())})") from None


def read_yaml(path: str, key: str = "--config", above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings in a YAML file, local or on S3, over those that it extends; not validated.

    ``key`` is the setting that names the file, ``above`` the files that extend it.
    """
    try:
        settings = yaml.safe_load(_read_text(path, key))
    except OSError as error:
        near = difflib.get_close_matches(Path(path).stem, recipe_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "check the path. Our configs are in jobs/configs/"
        raise UserError(f"{key} {path}: {error.strerror}; {hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{key} {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(settings or {}, dict):
        raise UserError(f"{key} {path} has no sections; see --print-config for the layout")
    base = (settings or {}).pop("extends", None)
    if base is None:
        return settings or {}
    if not isinstance(base, str):
        raise UserError(f"{key} {path}: extends: {base!r} is no name; give a config that we ship, or a .yaml file")
    if base.endswith(".yaml") and not base.startswith(("/", "s3://")):  # relative to this file
        folder = path.rpartition("/")[0]
        base = f"{folder}/{base}" if folder.startswith("s3://") else os.path.normpath(Path(folder) / base)
    chain = (*above, path)
    if base in chain:
        raise UserError(f"{key} {path}: extends: these extend each other: {' -> '.join((*chain, base))}; remove one")
    return extended(read_yaml(base, f"{key} {path}: extends", chain), settings)


def extended(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``settings`` on top; without its `objective` if that belongs to another method."""
    same_method = _method_of(base | settings) == _method_of(base)
    whole = {section: values for section, values in base.items() if same_method or section != "objective"}
    for section, values in settings.items():
        below = whole.get(section)
        if isinstance(values, dict) and isinstance(below, dict):
            replaced = {_other_unit(name) for name in values}
            values = {name: value for name, value in below.items() if name not in replaced} | values
        whole[section] = values
    return whole


def recipe_names() -> list[str]:
    """Names of the configs that we ship."""
    files = resources.files("cmcgns.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _read_text(path: str, key: str) -> str:
    if not path.startswith("s3://"):
        recipe = resources.files("cmcgns.recipes") / f"{path}.yaml"
        if "/" not in path and not Path(path).exists() and recipe.is_file():
            return recipe.read_text(encoding="utf-8")
        return Path(path).read_text(encoding="utf-8")
    from cmcgns.storage import MissingFileError, read_bytes

    try:
        return read_bytes(path).decode("utf-8")
    except MissingFileError:
        raise UserError(f"{key} {path}: no such file; check the path") from None


def read_run(storage: str, name: str, key: str) -> dict[str, Any]:
    """The settings that run ``name`` under ``storage`` was started with, not validated; ``key`` is the setting that names it."""
    from cmcgns.storage import MissingFileError, join, read_bytes

    try:
        settings: dict[str, Any] = yaml.safe_load(read_bytes(join(storage, f"{name}/config.yaml")))
    except MissingFileError:
        raise UserError(f"{key} {name}: there is no run of that name in {storage}; check run.storage") from None
    return settings


def invocation(script: str | None = None) -> list[str]:
    """The words that start this job: `cmcgns NAME` or `python jobs/NAME.py`; or those that start ``script`` in the same way."""
    if sys.argv[0].startswith(f"{COMMAND} "):
        return [COMMAND, script or sys.argv[0].partition(" ")[2]]
    return ["python", f"jobs/{script}.py" if script else sys.argv[0]]


def to_yaml(config: Section) -> str:
    """The resolved settings as YAML; they can be passed to --config."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120))


def help_text(
    kind: type[Section], default_config: Path | None, flags: str = "", method: str = MethodConfig().name
) -> str:
    """Text of --help: usage with the job's ``flags``, then each key with type, default and description."""
    lines = [
        f"usage: {' '.join(invocation())} [--config FILE.yaml] [--print-config]{flags} [--section.key=value ...]",
        f"Without --config, the job uses {default_config.name}; the defaults below apply to keys that a file leaves out."
        if default_config
        else "Without --config, the job uses the defaults below.",
    ]
    for section in kind.model_fields:
        lines.append("")
        for name, info in _section_type(kind, section, method).model_fields.items():
            meaning = " ".join((info.description or "").split())
            lines.append(f"  --{section}.{name} ({type_name(info)}, default {info.default!r})\n      {meaning}")
    return "\n".join(lines)


def type_name(info: FieldInfo) -> str:
    annotation = info.annotation
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(str(part) for part in parts)
    if get_origin(annotation) in (tuple, dict):
        return "list" if get_origin(annotation) is tuple else "map"
    if parts:  # optional
        return " or ".join(type_name(FieldInfo(annotation=part)) for part in parts)
    return "nothing" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def range_of(info: FieldInfo) -> str:
    """The range of a key's values, in words; '' if its type has no bounds."""
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    bounds = [
        f"{word} {getattr(bound, sign):g}"
        for bound in info.metadata
        for sign, word in words.items()
        if getattr(bound, sign, None) is not None
    ]
    return f"must be {' and '.join(bounds)}" if bounds else ""


def _section_type(kind: type[Section], section: str, method: str) -> type[Section]:
    """The model of one section; for `objective` the method's ``Settings``."""
    if section == "objective":
        return method_settings(method)
    annotation = kind.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


def _check_key(key: str, section: type[Section], prefix: str = "", method: str = "") -> None:
    """Raise ``UserError`` for a key that ``section`` does not have, with the closest key or the method that has it."""
    if key in section.model_fields:
        return
    dotted = f"{prefix}.{key}" if prefix else key
    owners = [name for name in METHODS if prefix == "objective" and key in method_settings(name).model_fields]
    if owners:
        raise UserError(f"{dotted} is a setting of method {', '.join(owners)}, but method.name is {method}; remove it")
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    hint = f"did you mean {prefix + '.' if prefix else ''}{near[0]}?" if near else "--help lists every key"
    raise UserError(f"there is no setting '{dotted}'; {hint}")


def _parse_value(key: str, text: str) -> Any:
    if key in STRING_KEYS:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    # YAML 1.1 parses 1e-4 as a string
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _other_unit(name: str) -> str | None:
    """The key that gives the same length in the other unit: the command line's replaces the file's."""
    for ours, theirs in (("_steps", "_epochs"), ("_epochs", "_steps")):
        if name.endswith(ours) and name.split("_")[0] in ("stage1", "stage2", "stage3", "warmup"):
            return name.removesuffix(ours) + theirs
    return None
