"""From a command line to settings: `--config FILE.yaml`, `--section.key=value`, `--help`, `--print-config`."""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cmcgns.config import METHODS, MethodConfig, RunConfig, Section, method_settings
from cmcgns.errors import UserError

STATUS_FAILED, STATUS_WRONG_INPUT, STATUS_INTERRUPTED = 1, 2, 130
WORDS = (
    "run.name", "run.resume", "run.storage", "method.name", "data.uri", "clustering.start_from", "embed.run", "embed.uri",
    "evaluate.run", "prepare.out", "prepare.pseudonymise_key_file", "sweep.resume",
)  # fmt: skip
"""Keys whose values stay words, also those like 2024-01-01 or 007."""
RESUME_KEYS = ("run.resume", "sweep.resume")
"""Keys that name a run to go on with; each begins from the settings of that run."""
FLAGS = ("--print-config", "--dry-run")
"""Words without a value."""
Settings = TypeVar("Settings", bound=Section)
"""The settings of one job: a section whose fields are sections."""


def run_job(
    main: Callable[[Settings], int],
    kind: type[Settings],
    default_config: Path | None,
    argv: Sequence[str] | None = None,
    plan: Callable[[Settings], int] | None = None,
) -> int:
    """Exit status of ``main`` under the settings that ``argv`` asks for; wrong input gives 2 and one message.

    With ``--dry-run`` ``plan`` is called instead, where the job has one.
    """
    try:
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
            raise UserError("--dry-run: this job makes no plan beforehand; jobs/pretrain.py does")
        return plan(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return STATUS_WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted before the work began", file=sys.stderr)
        return STATUS_INTERRUPTED


def load_config(arguments: Sequence[str], kind: type[Settings], default_config: Path | None) -> Settings:
    """Settings from the YAML file named by ``--config`` (else ``default_config``) with the command line on top.

    ``--run.resume=NAME`` or ``--sweep.resume=NAME`` without ``--config`` begins from the settings that the run was started with.
    """
    path, overrides = None, {}
    words = iter(arguments)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"'{word}' is no setting; write --section.key=value (see --help)")
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
    return resolve(settings, overrides, kind)


def resolve(settings: dict[str, Any], overrides: dict[str, Any], kind: type[Settings]) -> Settings:
    """Checked settings: those of a file, with ``section.key`` overrides on top."""
    settings = _for_method(settings, overrides, kind)
    method = _method_of(settings)
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        _known(section, kind)
        if not dot:
            raise UserError(f"--{key} names a whole section; write --{key}.<key>=value (see --help)")
        _known(name, _section_type(kind, section, method), section, method)
        if not isinstance(settings.setdefault(section, {}), dict):
            break  # refused by name below
        settings[section][name] = value
        twin = _twin(name)
        if twin and f"{section}.{twin}" not in overrides:
            settings[section].pop(twin, None)
    return validate(settings, kind)


def _for_method(settings: dict[str, Any], overrides: dict[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """``settings`` with the command line's method; of the file's `objective` it keeps the keys that both methods have."""
    chosen = overrides.get("method.name")
    if chosen is None or "method" not in kind.model_fields or chosen == _method_of(settings):
        return settings
    objective = settings.get("objective")
    kept = {
        name: value
        for name, value in (objective if isinstance(objective, dict) else {}).items()
        if name in method_settings(chosen).model_fields
    }
    return settings | {"method": {"name": chosen}, "objective": kept}


def _method_of(settings: dict[str, Any]) -> str:
    """The method that ``settings`` name, unchecked."""
    section = settings.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) else MethodConfig().name


def validate(settings: dict[str, Any], kind: type[Settings]) -> Settings:
    """``settings`` as a ``kind``, or one ``UserError`` that names the first wrong key and its value."""
    method = _method_of(settings)
    for section, values in settings.items():
        _known(section, kind)
        if not isinstance(values, dict):
            raise UserError(f"section '{section}' must hold keys, not {values!r}")
        for name in values:
            _known(name, _section_type(kind, section, method), section, method)
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
        wanted = (_range(info) if out_of_range else "") or reason.replace("Input should be", "must be")
        meaning = (info.description or "").split("\n\n")[0].split(". ")[0].rstrip(".")
        raise UserError(f"{section}.{name} = {first['input']!r} {wanted} ({' '.join(meaning.split())})") from None


def read_yaml(path: str, key: str = "--config") -> dict[str, Any]:
    """The settings in a YAML file, local or on S3, which ``key`` names, unchecked."""
    try:
        settings = yaml.safe_load(_read_text(path, key))
    except OSError as error:
        raise UserError(f"{key} {path}: {error.strerror}; the ones we ship lie in jobs/configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{key} {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(settings or {}, dict):
        raise UserError(f"{key} {path} holds no sections; see --print-config for the layout")
    return settings or {}


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
        raise UserError(f"{key} {path}: there is no such file") from None


def read_run(storage: str, name: str, key: str) -> dict[str, Any]:
    """The settings that a run under ``storage``, which the setting ``key`` names, was started with, unchecked."""
    from cmcgns.storage import MissingFileError, join, read_bytes

    try:
        settings: dict[str, Any] = yaml.safe_load(read_bytes(join(storage, f"{name}/config.yaml")))
    except MissingFileError:
        raise UserError(f"{key} {name}: there is no run of that name in {storage}; look at run.storage") from None
    return settings


def to_yaml(config: Section) -> str:
    """The resolved settings as YAML, enough to run them again."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120))


def help_text(
    kind: type[Section], default_config: Path | None, flags: str = "", method: str = MethodConfig().name
) -> str:
    """Every key with type, default and meaning, after a line of use with ``flags`` of the job's own."""
    lines = [
        f"usage: python {sys.argv[0]} [--config FILE.yaml] [--print-config]{flags} [--section.key=value ...]",
        f"Without --config the settings of {default_config.name} apply; defaults below are those of an empty file."
        if default_config
        else "Without --config the defaults below apply.",
    ]
    for section in kind.model_fields:
        lines.append("")
        for name, info in _section_type(kind, section, method).model_fields.items():
            meaning = " ".join((info.description or "").split())
            lines.append(f"  --{section}.{name} ({_type_name(info)}, default {info.default!r})\n      {meaning}")
    return "\n".join(lines)


def _type_name(info: FieldInfo) -> str:
    annotation = info.annotation
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(str(part) for part in parts)
    if get_origin(annotation) in (tuple, dict):
        return "list" if get_origin(annotation) is tuple else "map"
    if parts:  # optional
        return " or ".join(_type_name(FieldInfo(annotation=part)) for part in parts)
    return "nothing" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def _range(info: FieldInfo) -> str:
    """The numbers that a key takes, in words; '' where its type does not bound them."""
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    bounds = [
        f"{word} {getattr(bound, sign):g}"
        for bound in info.metadata
        for sign, word in words.items()
        if getattr(bound, sign, None) is not None
    ]
    return f"must be {' and '.join(bounds)}" if bounds else ""


def _section_type(kind: type[Section], section: str, method: str) -> type[Section]:
    """The model of one section; that of `objective` is the method's."""
    if section == "objective":
        return method_settings(method)
    annotation = kind.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


def _known(key: str, section: type[Section], prefix: str = "", method: str = "") -> None:
    """Refuse a key that ``section`` does not have, with the likeliest one, or the method that has it."""
    if key in section.model_fields:
        return
    dotted = f"{prefix}.{key}" if prefix else key
    owner = next(
        (name for name in METHODS if prefix == "objective" and key in method_settings(name).model_fields), None
    )
    if owner is not None:
        raise UserError(f"{dotted} is a setting of the method {owner}, and method.name is {method}; leave it out")
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    hint = f"did you mean {prefix + '.' if prefix else ''}{near[0]}?" if near else "--help lists every key"
    raise UserError(f"there is no setting '{dotted}'; {hint}")


def _parse_value(key: str, text: str) -> Any:
    if key in WORDS:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    # YAML 1.1 reads 1e-4 as a word
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _twin(name: str) -> str | None:
    """The other way to give the same length: the command line's choice replaces the file's."""
    for ours, theirs in (("_steps", "_epochs"), ("_epochs", "_steps")):
        if name.endswith(ours) and name.split("_")[0] in ("stage1", "stage2", "warmup"):
            return name.removesuffix(ours) + theirs
    return None
