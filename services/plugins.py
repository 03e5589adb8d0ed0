"""Plug-ins: `module:name` becomes a function or a class, with checked parameters of its own. Built-in ones too.

A reference is a built-in name (`gigpo`), a module and a name in it (`my_package.advantages:mine`), or a file and a name
in it (`./mine.py:mine`). The configuration holds files as absolute paths, and the folders in which modules that are not
installed are found (`make_importable`), so every process of a run loads the same code (`services.config.references`).

A plug-in takes parameters of its own by an argument called `params`. Where it is annotated with a pydantic model, the
parameters are validated and arrive as that model, otherwise as the mapping that was given. Without such an argument
parameters are an error.

Invariants
- Nothing here knows what a plug-in is for: each room declares its own built-in names, signature and first use.
- Every way in which loading can fail is a `PluginError`, one line for each mistake: the configuration's key, the value,
  what is wrong. `sys.exit` in a plug-in is one of them: it ends no process of a run.
- Folders are searched after everything that is installed: a file called `json.py` beside a recipe replaces nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from services.config import mistakes
from services.errors import AnchorageError, did_you_mean, first_line

PARAMS = "params"
"""The argument by which a plug-in takes parameters of its own."""


class PluginError(AnchorageError):
    """A plug-in cannot be loaded, or does not do what its place asks of it; one line for each mistake."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A loaded plug-in.

    Attributes:
        key: of the configuration, as in `algorithm`.
        reference: the value of that key.
        target: the function or class.
        params: what `target` gets as `params`: a model, a mapping, or None where it takes none.
    """

    key: str
    reference: str
    target: Callable[..., Any]
    params: BaseModel | Mapping[str, object] | None = None

    @property
    def label(self) -> str:
        """For messages: `algorithm=./mine.py:mine`."""
        return f"{self.key}={self.reference}"

    def bound(self) -> Callable[..., Any]:
        """The target with its parameters filled in."""
        return self.target if self.params is None else partial(self.target, **{PARAMS: self.params})

    def call(self, *arguments: object) -> Any:
        """Call it. Raises PluginError where it raises, with the line of the plug-in that did; ours go through."""
        try:
            return self.bound()(*arguments)
        except AnchorageError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.label}: {raised(error)}") from error


def load(
    key: str,
    reference: str,
    *,
    built_in: Mapping[str, str],
    arguments: Sequence[str],
    of_class: Sequence[str] | None = None,
    params: Mapping[str, object] | None = None,
    params_key: str = "",
) -> Plugin:
    """The plug-in that `reference` names.

    Args:
        key: of the configuration, for messages.
        built_in: name to reference of those that come with the project.
        arguments: names of the positional arguments that it will be called with, besides `params`.
        of_class: the same for a class, where one may stand in the function's place.
        params: its parameters, as the configuration at `params_key` gives them.

    Raises:
        PluginError: no such module, file or name; an exception at its import; it cannot be called with `arguments`; its
            parameters are invalid.

    Example: `load("algorithm", "./mine.py:mine", built_in={}, arguments=("rows", "config")).bound()` is the function
    `mine` of that file.
    """
    target = _named(key, reference, built_in)
    wanted = of_class if of_class is not None and inspect.isclass(target) else arguments
    takes = _require_signature(f"{key}={reference}", target, wanted)
    given = dict(params or {})
    if not takes:
        if given:
            raise PluginError(
                f"{params_key}.{min(given)}: {key}={reference} takes no parameters (it has no argument `{PARAMS}`)"
            )
        return Plugin(key, reference, target)
    return Plugin(key, reference, target, _parameters(f"{key}={reference}", target, given, params_key))


def make_importable(folders: Iterable[Path]) -> None:
    """Let this process find modules in these folders, after all that is installed."""
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.append(folder)


def raised(error: BaseException) -> str:
    """What an exception of a plug-in says in one line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({Path(error.filename).name}:{error.lineno})"
        return f"{type(error).__name__}: {error.msg}{where}"
    return f"{type(error).__name__}: {first_line(error)}{where}"


def _named(key: str, reference: str, built_in: Mapping[str, str]) -> Callable[..., Any]:
    place, colon, name = built_in.get(reference, reference).rpartition(":")
    label = f"{key}={reference}"
    if not colon:
        known = ", ".join(built_in)
        raise PluginError(f"{label}: must be one of {known}, or module:name{did_you_mean(reference, built_in)}")
    module = _file(label, Path(place)) if place.endswith(".py") else _module(label, place)
    try:
        found = getattr(module, name)
    except AttributeError:
        hint = did_you_mean(name, [one for one in vars(module) if not one.startswith("_")])
        raise PluginError(f"{label}: {place} has no {name!r}{hint}") from None
    if not callable(found):
        raise PluginError(f"{label}: {name} is a {type(found).__name__}, not a function or class")
    target: Callable[..., Any] = found
    return target


def _module(label: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hidden = _hidden_package(error)
        if hidden is None and error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise PluginError(
                f"{label}: no module {error.name!r}: it is neither installed nor in the recipe's folder nor in the "
                "working directory"
            ) from None
        raise PluginError(f"{label}: {name} cannot be imported: {hidden or raised(error)}") from error
    except ImportError as error:
        raise PluginError(f"{label}: {name} cannot be imported: {_hidden_package(error) or raised(error)}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{label}: {name} cannot be imported: {raised(error)}") from error


def _hidden_package(error: ImportError) -> str | None:
    """Say that a package of the project has the name of one of ours, where that is why an import failed."""
    package = (error.name or "").partition(".")[0]
    ours = Path(__file__).resolve().parents[1]
    if package not in ("anchorage", "actors", "env_servers", "learner", "services"):
        return None
    for folder in {Path(entry).resolve() for entry in sys.path} - {ours}:
        if (folder / package).is_dir() or (folder / f"{package}.py").is_file():
            return f"its package {package!r} in {folder} has the name of one of Anchorage's; rename it"
    return None


def _file(label: str, path: Path) -> ModuleType:
    """The module of a file, loaded once in a process; other modules in its folder can be imported by it."""
    path = path.expanduser().resolve()
    digest = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    name = f"anchorage_plugin_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise PluginError(f"{label}: no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a name that ends in .py there always is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    make_importable([path.parent])
    sys.modules[name] = module  # dataclasses and pydantic look their module up while it is being imported
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginError(f"{label}: {path.name} cannot be imported: {raised(error)}") from error
    return module


def _require_signature(label: str, target: Callable[..., Any], arguments: Sequence[str]) -> bool:
    """Whether the target takes `params`. Raises PluginError where it cannot be called with the arguments."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # of something written in C; its first use will tell
        return False
    takes = PARAMS in signature.parameters
    try:
        signature.bind(*arguments, **({PARAMS: None} if takes else {}))
    except TypeError as error:
        wanted = ", ".join([*arguments, *([PARAMS] if takes else [])])
        raise PluginError(f"{label}: must take ({wanted}), but {error}: it takes {_names(signature)}") from None
    return takes


def _names(signature: inspect.Signature) -> str:
    """The names alone, as in `(rows, config)`."""
    return f"({', '.join(signature.parameters)})"


def _parameters(
    label: str, target: Callable[..., Any], given: dict[str, object], key: str
) -> BaseModel | Mapping[str, object]:
    model = _parameter_model(label, target)
    return given if model is None else validated(label, model, given, key)


def validated(label: str, model: type[BaseModel], given: Mapping[str, object], key: str) -> BaseModel:
    """Parameters as the model that a plug-in declares.

    Args:
        label: of the plug-in, for messages: `algorithm=./mine.py:mine`.
        given: the parameters, as the configuration at `key` gives them.

    Raises:
        PluginError: one line for each unknown parameter, and for each invalid value.
    """
    fields = {name: field.alias or name for name, field in model.model_fields.items()}
    known = {*fields, *fields.values()}
    open_ended = model.model_config.get("extra") == "allow"
    unknown = {name: did_you_mean(name, known) for name in given if not open_ended and name not in known}
    lines = [f"{key}.{name}: {label} has no such parameter{hint}" for name, hint in unknown.items()]
    try:
        found = model.model_validate({name: value for name, value in given.items() if name not in unknown})
    except ValidationError as error:
        wrong = mistakes.lines(error, model)
        # A misspelt parameter is told once, not also as one that is missing.
        misspelt = {f"{name}: missing value" for name in known if f", did you mean {name}?" in unknown.values()}
        lines += [f"{key}.{line}" for line in wrong if line not in misspelt]
        if not lines:
            raise PluginError(f"{key}: {label}: {first_line(error)}") from None
    if lines:
        raise PluginError("\n".join(lines))
    return found


def _parameter_model(label: str, target: Callable[..., Any]) -> type[BaseModel] | None:
    """The pydantic model that the target's argument `params` is annotated with."""
    function = target.__init__ if inspect.isclass(target) else target
    annotation = inspect.signature(target).parameters[PARAMS].annotation
    if isinstance(annotation, str):
        function = inspect.unwrap(function)
        try:
            annotation = eval(annotation, getattr(function, "__globals__", {}))
        except Exception as error:
            raise PluginError(
                f"{label}: the annotation of its argument {PARAMS} cannot be resolved ({first_line(error)}); "
                "import what it names at run time too"
            ) from None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
