"""Reads recipes: YAML with line numbers, `extends`, `--set`, and messages that name the line.

Sections of a recipe merge with those of the recipe it extends. A map of levels (weights, bins) or
a list replaces the inherited one entirely, because {res5: 1.0} means "only res5". After that,
`--set a.b.c=value` sets a single key, even inside a map.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dupr_cli.errors import UsageError
from dupr_cli.parsing import (
    MAX_RECIPE_BYTES,
    FastSafeLoader,
    ParseError,
    as_text,
    read_limited,
    require_modest_yaml,
    yaml_problem,
)
from dupr_cli.recipe.base import Section
from dupr_cli.recipe.evaluate import EvaluateRecipe
from dupr_cli.recipe.export import ExportRecipe
from dupr_cli.recipe.prepare import PrepareRecipe
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.recipe.probe import ProbeRecipe
from dupr_cli.recipe.study import StudyRecipe

Recipe = PrepareRecipe | PretrainRecipe | ExportRecipe | EvaluateRecipe | ProbeRecipe | StudyRecipe

RECIPE_MODELS: dict[str, type[Section]] = {
    "prepare": PrepareRecipe,
    "pretrain": PretrainRecipe,
    "export": ExportRecipe,
    "evaluate": EvaluateRecipe,
    "probe": ProbeRecipe,
    "study": StudyRecipe,
}

Path_ = tuple[str, ...]
# A key at the start of a line or of a file in braces.
_OUTER_KEY = re.compile(r"^(?:\{\s*)?[\"']?(\w+)[\"']?\s*:", re.MULTILINE)
R = typing.TypeVar("R", bound=Section)


class RecipeError(UsageError):
    """A recipe cannot be used; the message lists every problem with its place."""


@dataclass(frozen=True)
class Origin:
    """Where a key was set: a file and a line, or a command-line option."""

    file: str
    line: int | None

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else self.file


@dataclass
class _Document:
    """One recipe file: plain values, and the origin of every key in it."""

    values: dict[str, object]
    origins: dict[Path_, Origin]
    name: str


class _Loader(yaml.SafeLoader):
    """YAML's core schema: `1e-4` is a number; `on`, `no` and `2024-01-31` are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":bool", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


class _FastLoader(FastSafeLoader):
    """Reads the same values."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _parse(text: str, name: str) -> _Document:
    """Values and key origins of one YAML text. Raises RecipeError if it is not a mapping."""
    try:
        require_modest_yaml(text)
    except ParseError as error:
        raise RecipeError(f"{name}: {error}.") from error
    try:
        return _document(_FastLoader, text, name)
    except yaml.YAMLError:
        pass  # the plain loader's message is better
    try:
        return _document(_Loader, text, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{line}: not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {yaml_problem(error)}.") from error


def _document(kind: type[yaml.SafeLoader], text: str, name: str) -> _Document:
    loader = kind(text)
    try:
        root = loader.get_single_node()
        origins: dict[Path_, Origin] = {}
        if root is None:
            return _Document({}, origins, name)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{name}, line 1: a recipe is a mapping of keys to values.")
        values = _construct(loader, root, (), name, origins)
    finally:
        loader.dispose()
    assert isinstance(values, dict)
    return _Document(values, origins, name)


def _construct(
    loader: yaml.SafeLoader, node: yaml.Node, at: Path_, name: str, origins: dict[Path_, Origin]
) -> object:
    if isinstance(node, yaml.MappingNode):
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = str(_value(loader, key_node, name))
            place = Origin(name, key_node.start_mark.line + 1)
            if key in result:
                first = origins[(*at, key)].line
                raise RecipeError(
                    f"{place}: {'.'.join((*at, key))} is given twice, first in line {first}."
                )
            origins[(*at, key)] = place
            result[key] = _construct(loader, value_node, (*at, key), name, origins)
        return result
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*at, str(index))] = Origin(name, item.start_mark.line + 1)
        return [
            _construct(loader, item, (*at, str(index)), name, origins)
            for index, item in enumerate(node.value)
        ]
    return _value(loader, node, name)


def _value(loader: yaml.SafeLoader, node: yaml.Node, name: str) -> object:
    """The value of a node. Raises RecipeError if it is not of the type that a tag gives it."""
    try:
        value: object = loader.construct_object(node, deep=True)
    # Constructors fail in many ways: !!int x, !!bool x, !!timestamp x, a number of 5000 digits.
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        place = Origin(name, node.start_mark.line + 1)
        kind = node.tag.rpartition(":")[2]
        raise RecipeError(f"{place}: a value cannot be read as YAML's type {kind}.") from error
    if not isinstance(value, str | int | float | list | dict | None):
        place = Origin(name, node.start_mark.line + 1)
        raise RecipeError(
            f"{place}: a value has the type {type(value).__name__}, which no key of a recipe takes."
        )
    return value


def _shipped_root() -> Path:
    """Folder of the shipped recipes, inside the wheel or in the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes(stage: str | None = None) -> dict[str, Path]:
    """Names and files of the shipped recipes, of one stage or of all."""
    pattern = f"{stage or '*'}/*.yaml"
    return {path.stem: path for path in sorted(_shipped_root().glob(pattern))}


def find_recipe(name_or_file: str, stage: str | None = None) -> Path:
    """The file of a recipe, given its path or the name of a shipped recipe.

    Raises RecipeError, naming the nearest shipped recipe, when it is neither.
    """
    path = Path(name_or_file)
    if path.is_file():
        return path
    named = shipped_recipes(stage)
    if name_or_file in named:
        return named[name_or_file]
    elsewhere = shipped_recipes()
    if stage and name_or_file in elsewhere:
        other = elsewhere[name_or_file].parent.name
        raise RecipeError(f"{name_or_file} is a recipe for dupr {other}, not for dupr {stage}.")
    if path.suffix in (".yaml", ".yml") or "/" in name_or_file:
        raise RecipeError(f"{name_or_file}: the recipe file does not exist.")
    near = difflib.get_close_matches(name_or_file, named, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"{name_or_file} is neither a file nor a shipped recipe.{hint} "
        f"`dupr recipe list` shows the shipped recipes."
    )


def _read_chain(path: Path, stage: str | None, seen: tuple[Path, ...] = ()) -> Iterator[_Document]:
    """The documents that make up a recipe: first the root of `extends`, last the file itself."""
    resolved = path.resolve()
    if resolved in seen:
        loop = " extends ".join(p.name for p in (*seen[seen.index(resolved) :], resolved))
        raise RecipeError(f"{path}: recipes extend one another in a circle: {loop}.")
    document = _parse_extended(path) if seen else _parse(_read(path), str(path))
    parent = document.values.pop("extends", None)
    if parent is not None:
        place = document.origins[("extends",)]
        if not isinstance(parent, str):
            raise RecipeError(f"{place}: extends is {parent!r}, but it must name a recipe or file.")
        beside = path.parent / parent
        try:
            target = beside if beside.is_file() else find_recipe(parent, stage)
        except RecipeError as error:
            raise RecipeError(f"{place}: extends: {error}") from error
        except OSError as error:  # a name that no file can have
            raise RecipeError(f"{place}: extends: {error.strerror}.") from error
        yield from _read_chain(target, stage, (*seen, resolved))
    yield document


def _read(path: Path) -> str:
    """The text of a recipe file. Raises RecipeError."""
    try:
        return as_text(read_limited(path, MAX_RECIPE_BYTES))
    except (OSError, ParseError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{path}: the recipe cannot be read: {reason}.") from error


def _parse_extended(path: Path) -> _Document:
    """Like `_parse`, for a file that another recipe extends.

    Recipes are shared, and `extends` may name any file of the machine that reads them. Messages
    quote a recipe; of a file that is none they must show nothing.
    """
    text = _read(path)
    known = {key for model in RECIPE_MODELS.values() for key in model.model_fields} | {"extends"}
    keys = _OUTER_KEY.findall(text)
    # A mistyped key among others leaves it a recipe, whose message then names that key.
    if path.suffix in (".yaml", ".yml") and 2 * sum(key in known for key in keys) >= len(keys) > 0:
        return _parse(text, str(path))
    raise RecipeError(
        f"{path}: the file that is extended is not a recipe, which is a .yaml file with keys such "
        f"as stage and description."
    )


def _section_at(model: type[BaseModel], at: Path_) -> type[BaseModel] | None:
    """The section at a path of keys, or None if the path leads to a value."""
    section: type[BaseModel] = model
    for key in at:
        field = section.model_fields.get(key)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def _merge(
    model: type[BaseModel], base: dict[str, object], over: dict[str, object], at: Path_ = ()
) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        is_section = _section_at(model, (*at, key)) is not None
        if is_section and isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(model, old, value, (*at, key))
        else:
            merged[key] = value
    return merged


@dataclass(frozen=True)
class Override:
    """A key that is set from outside the files. source: how it was given, for messages."""

    key: str
    value: object
    source: str = ""

    @classmethod
    def parse(cls, option: str, source: str = "") -> Override:
        """Parse `key=value` as given to --set; the value is YAML. Raises RecipeError.

        source: another option that stands for the key, for messages.
        """
        key, separator, text = option.partition("=")
        key, source = key.strip(), source or f"--set {option}"
        if not separator or not key:
            raise RecipeError(f"--set {option}: write it as key=value, for example seed=1.")
        try:
            require_modest_yaml(text)
            loader = _Loader(text)
            try:
                return cls(key, loader.get_single_data(), source)
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise RecipeError(f"{source}: the value is not valid YAML.") from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise RecipeError(f"{source}: the value cannot be read ({error}).") from error

    def apply(self, values: dict[str, object], origins: dict[Path_, Origin]) -> None:
        parts = tuple(self.key.split("."))
        target = values
        for part in parts[:-1]:
            inner = target.get(part)
            # Copied, so that the parsed documents do not change.
            target[part] = dict(inner) if isinstance(inner, dict) else {}
            target = typing.cast(dict[str, object], target[part])
        target[parts[-1]] = self.value
        for below in [at for at in origins if at[: len(parts)] == parts]:
            del origins[below]  # entries of the value that is replaced
        origins[parts] = Origin(self.source or f"overrides, {self.key}", None)


def _with_defaults_for_maps(model: type[BaseModel], values: dict[str, object], key: str) -> None:
    """Fill in the default of a map if an override sets an entry, to keep its other entries."""
    section: type[BaseModel] | None = model
    target = values
    for part in key.split(".")[:-1]:
        field = section.model_fields.get(part) if section else None
        if field is None or not isinstance(target, dict):
            return
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        if not is_section and part not in target and isinstance(field.default, dict):
            target[part] = dict(field.default)
        target = typing.cast(dict[str, object], target.setdefault(part, {}))
        section = typing.cast(type[BaseModel], inner) if is_section else None


def recipe_description(path: Path, stage: str) -> str:
    """The description of a recipe file, its own or inherited, without checking the other keys.

    Raises RecipeError when the file, or one that it extends, cannot be read.
    """
    texts = (document.values.get("description") for document in _read_chain(path, stage))
    return str(next((text for text in reversed(list(texts)) if text), ""))


def load_recipe(
    model: type[R], name_or_file: str | Path | None, overrides: Sequence[Override | str] = ()
) -> R:
    """Read, merge, override and validate one recipe of the stage that `model` belongs to.

    name_or_file: a YAML file, the name of a shipped recipe, or None for the defaults.
    overrides: applied in order after the files; strings have the form `key=value`.
    Raises RecipeError with one line per problem.
    """
    stage = str(model.model_fields["stage"].default)
    documents: list[_Document] = []
    if name_or_file is not None:
        documents = list(_read_chain(find_recipe(str(name_or_file), stage), stage))
    values: dict[str, object] = {}
    origins: dict[Path_, Origin] = {}
    for document in documents:
        found = document.values.get("stage", stage)
        if found != stage:
            raise RecipeError(
                f"{document.origins[('stage',)]}: stage is {found!r}, but a recipe for "
                f"dupr {stage} is needed here."
            )
        values = _merge(model, values, document.values)
        origins.update(document.origins)
    default = documents[-1].name if documents else f"the {stage} recipe"
    return _validated(model, values, origins, overrides, default)


def apply_overrides(recipe: R, overrides: Sequence[Override | str]) -> R:
    """A recipe with further keys set. Raises RecipeError like `load_recipe`."""
    values = recipe.model_dump(mode="json")
    return _validated(type(recipe), values, {}, overrides, f"the {values['stage']} recipe")


def _validated(
    model: type[R],
    values: dict[str, object],
    origins: dict[Path_, Origin],
    overrides: Sequence[Override | str],
    default: str,
) -> R:
    """Apply the overrides and validate. default: the place of keys that are set nowhere."""
    for given in overrides:
        override = Override.parse(given) if isinstance(given, str) else given
        _with_defaults_for_maps(model, values, override.key)
        override.apply(values, origins)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [
            _explain(model, details, origins, Origin(default, None))
            for details in error.errors()
            if not _is_union_echo(details)
        ]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from error


def _is_union_echo(details: ErrorDetails) -> bool:
    # A union also reports its None branch; the message of the other branch names the problem.
    return details["type"] == "none_required"


def _explain(
    model: type[BaseModel], details: ErrorDetails, origins: dict[Path_, Origin], default: Origin
) -> str:
    """One line with place, key, value found, value expected, and the nearest valid key."""
    context = details.get("ctx", {})
    at = _key_path(model, details["loc"])
    if details["type"] == "dupr_check":
        at = (*at, *filter(None, str(context["key"]).split(".")))
        place = _origin_of(at, origins, default)
        message = f"{place}: {'.'.join(at)} is {context['message']}"
        return message if message.endswith(".") else message + "."
    key = ".".join(at)
    place = _origin_of(at, origins, default)
    if details["type"] == "extra_forbidden":
        return f"{place}: {key} is not a key of this recipe.{_nearest_key(model, at)}"
    if details["type"] == "missing":
        return f"{place}: {key} is missing; it has no default."
    found = json.dumps(details["input"], default=str)
    if details["type"] == "dupr_expected":
        verb = "has the name" if "[key]" in map(str, details["loc"]) else "is"
        return f"{place}: {key} {verb} {found}, but {details['msg']}."
    if "[key]" in map(str, details["loc"]):
        valid = str(context.get("expected", ""))
        near = difflib.get_close_matches(at[-1], re.findall(r"'(\w+)'", valid), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{place}: {key} is not a key here; use one of {valid}.{hint}"
    hint = ""
    if details["type"] == "literal_error":
        options = re.findall(r"'([^']+)'", str(context.get("expected", "")))
        near = difflib.get_close_matches(str(details["input"]), options, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
    expected = details["msg"][0].lower() + details["msg"][1:]
    return f"{place}: {key} is {found}, but {expected.replace('input', 'it')}.{hint}"


def _key_path(model: type[BaseModel], location: tuple[int | str, ...]) -> Path_:
    """Recipe keys in the location of a pydantic error, without the names of union branches."""
    keys: list[str] = []
    section: type[BaseModel] | None = model
    inside_value = False
    for place, part in enumerate(location):
        text = str(part)
        if text == "[key]":
            continue
        if location[place + 1 : place + 2] == ("[key]",):
            keys.append(text)
            continue
        if inside_value and not isinstance(part, int) and not re.fullmatch(r"\w+", text):
            continue
        if inside_value and text in {"int", "float", "str", "bool"}:
            continue
        keys.append(text)
        if section is not None:
            section = _section_at(section, (text,))
            inside_value = section is None
    return tuple(keys)


def _origin_of(at: Path_, origins: dict[Path_, Origin], default: Origin) -> Origin:
    for length in range(len(at), 0, -1):
        if at[:length] in origins:
            return origins[at[:length]]
    return default


def _all_keys(model: type[BaseModel], at: Path_ = ()) -> Iterator[Path_]:
    for name in model.model_fields:
        yield (*at, name)
        section = _section_at(model, (name,))
        if section is not None:
            yield from _all_keys(section, (*at, name))


def _nearest_key(model: type[BaseModel], at: Path_) -> str:
    section = _section_at(model, at[:-1])
    siblings = list(section.model_fields) if section else []
    near = difflib.get_close_matches(at[-1], siblings, n=1, cutoff=0.7)
    if near:
        return f" Did you mean {'.'.join((*at[:-1], near[0]))}?"
    elsewhere = [path for path in _all_keys(model) if path[-1] == at[-1]]
    if elsewhere:
        return f" Did you mean {'.'.join(elsewhere[0])}?"
    every = {path[-1]: path for path in _all_keys(model)}
    near = difflib.get_close_matches(at[-1], every, n=1, cutoff=0.7)
    if near:
        return f" Did you mean {'.'.join(every[near[0]])}?"
    where = ".".join(at[:-1])
    return f" Keys {f'of {where}' if where else 'here'}: {', '.join(siblings)}."


def recipe_yaml(recipe: Section) -> str:
    """The resolved recipe as YAML with every key."""
    values = recipe.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=88)


def recipe_keys(values: object, at: str = "") -> dict[str, object]:
    """Dotted keys and values of a recipe, to compare two recipes.

    values: plain values, as from YAML or `model_dump(mode="json")`.
    """
    if not isinstance(values, dict):
        return {at: values}
    keys: dict[str, object] = {}
    for name, inner in values.items():
        keys |= recipe_keys(inner, f"{at}.{name}" if at else str(name))
    return keys


def recipe_value(value: object) -> str:
    """A plain value as people write it in a recipe: null and true, not None and True."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def recipe_digest(recipe: Section) -> str:
    """sha256 of the resolved recipe, which depends on its values but not on their order or file."""
    values = recipe.model_dump(mode="json", exclude={"description"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def recipe_schema(stage: str) -> dict[str, object]:
    """JSON Schema of one stage's recipe files, for editors.

    No key is required, since a file may inherit any of them through `extends`.
    """
    schema = RECIPE_MODELS[stage].model_json_schema()
    for definition in (schema, *schema.get("$defs", {}).values()):
        definition.pop("required", None)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"dupr {stage} recipe"
    schema["properties"] = {
        "extends": {
            "type": "string",
            "description": "Start from another recipe: a shipped name, or a file beside this one.",
        },
        **schema["properties"],
    }
    return schema


def recipe_stage(name_or_file: str) -> str:
    """The stage of a recipe, from its `stage` key or that of a recipe it extends.

    Raises RecipeError when none of them has the key.
    """
    path = find_recipe(name_or_file)
    for document in reversed(list(_read_chain(path, None))):
        stage = document.values.get("stage")
        if stage in RECIPE_MODELS:
            return str(stage)
        if stage is not None:
            raise RecipeError(
                f"{document.origins[('stage',)]}: stage is {stage!r}, but it must be one of "
                f"{', '.join(RECIPE_MODELS)}."
            )
    raise RecipeError(f"{path}: stage is missing; give one of {', '.join(RECIPE_MODELS)}.")
