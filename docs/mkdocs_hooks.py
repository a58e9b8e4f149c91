"""What the site needs beyond mkdocs.yml: pages that stand outside of docs/, folders in the navigation, the reference.

A README.md is read where it stands in the repository, so there it stays. For the site each gets the place that
`extra.outside` in mkdocs.yml names, and every link is rewritten to match: one text, two readers.
The pages of the reference are made of the public names of a package, in the order of the rooms.
"""

from __future__ import annotations

import ast
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])|(?<=src=\")([^\"]+)(?=\")")
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)
TITLES = {
    "api": "Verbs",
    "pipeline": "Verbs that train",
    "images": "Images",
    "datasets": "Data sets",
    "preparation": "Plans and preprocessing",
    "training": "Training",
    "inference": "Prediction",
    "evaluation": "Scores and reports",
    "interchange": "Models and results of other programs",
    "nets": "Networks",
    "losses": "Losses",
    "ops": "Operators",
    "lab": "Comparing and measuring",
    "errors": "Errors",
}


def repository_paths(outside: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (path in the repository, path in the site) of every file outside of docs/ that the site shows."""
    for source, place in outside.items():
        if not source.endswith("/"):
            yield source, place
            continue
        for path in sorted((ROOT / source).rglob("*")):
            if path.is_file() and path.suffix in (".md", ".csv", ".json", ".yaml", ".py", ".png", ".svg"):
                yield path.relative_to(ROOT).as_posix(), place + path.relative_to(ROOT / source).as_posix()


def public_names(package: str) -> dict[str, str]:
    """The public names and the place of each, `module` or `module:name there`, read from its `__init__.py`."""
    source = ROOT / "src" / package.replace(".", "/") / "__init__.py"
    assigned: dict[str, Any] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in ("_PUBLIC", "__all__"):
            try:
                assigned[target.id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except ValueError:  # an __all__ that is computed from _PUBLIC
                continue
    return assigned.get("_PUBLIC") or dict.fromkeys(assigned["__all__"], package)


def reference(package: str, title: str, introduction: str) -> str:
    """The page of a package: each public name under the room that it comes from."""
    lines = [f"# {title}", "", introduction]
    by_room: dict[str, list[tuple[str, str]]] = {}
    for name, place in public_names(package).items():
        module, _, attribute = place.partition(":")
        room = "" if module == package else module.split(".")[1]
        by_room.setdefault(room, []).append((name, f"{module}.{attribute or name}"))
    order = list(TITLES)
    for room in sorted(by_room, key=lambda room: order.index(room) if room in order else -1):
        if room:
            lines += ["", f"## {TITLES.get(room, room.capitalize())}"]
        for name, path in by_room[room]:
            heading = f"{package}.{name}"
            lines += ["", f"::: {path}", "    options:", f"      heading: {heading}"]
            lines += [f"      toc_label: {name}"]
    return "\n".join(lines) + "\n"


def reference_pages() -> dict[str, str]:
    """The pages of the reference by their place in the site."""
    return {
        "reference/lightm.md": reference(
            "lightm",
            "Python: `lightm`",
            "Every name of `import lightm`. A verb of the command line is the function of that name.",
        ),
        "reference/ops.md": reference(
            "lightm.ops", "Python: `lightm.ops`", "What they compute and at what cost: [operators](../operators.md)."
        ),
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace every entry of the navigation that ends in "/" by the pages of that folder."""
    moved = [place for _, place in repository_paths(config.extra["outside"])]
    inside = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]

    def pages(folder: str) -> list[str]:
        found = [path for path in inside + moved if path.startswith(folder) and path.endswith(".md")]
        return sorted(found, key=lambda path: (path != f"{folder}README.md", path))

    def expand(entry: Any) -> Any:
        if isinstance(entry, list):
            return [expand(each) for each in entry]
        if isinstance(entry, dict):
            return {key: expand(value) for key, value in entry.items()}
        return pages(entry) if entry.endswith("/") else entry

    config.nav = expand(config.nav)
    config.watch += [str(ROOT / "src"), str(ROOT / "README.md")]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside of docs/ and the pages of the reference."""
    for source, place in repository_paths(config.extra["outside"]):
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for place, text in reference_pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right in the repository into links that are right in the site."""
    places = dict(repository_paths(config.extra["outside"]))
    sources = {place: source for source, place in places.items()}
    here = page.file.src_uri
    source = PurePosixPath(sources.get(here, f"docs/{here}"))

    def moved(match: re.Match[str]) -> str:
        link = match.group(0)
        if re.match(r"[a-z]+:", link) or here.startswith("reference/"):
            return link
        target = posixpath.normpath((source.parent / link).as_posix())
        for path in (target, f"{target}/README.md"):
            place = places.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
            if place and files.get_file_from_path(place):
                return posixpath.relpath(place, posixpath.dirname(here) or ".")
        return link  # not in the site: the strict build stops there

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


# what lists the fields of an options model: the model itself where it is public, else the verb that takes them
OPTIONS = {
    "api.plan": "api.PlanOptions",
    "api.convert": "api.ConvertOptions",
    "api.bench": "api.BenchOptions",
    "api.import_released": "api.ImportOptions",
    "training.config.TrainConfig": "training.config.TrainConfig",
    "pipeline.resume": "training.config.ResumeOptions",
    "inference.record.PredictOptions": "inference.record.PredictOptions",
    "evaluation.folder.EvaluateOptions": "evaluation.folder.EvaluateOptions",
}


def fields(model: griffe.Class) -> Iterator[str]:
    """Yield a line per field of a pydantic model, inherited ones first: name, type and description."""
    for owner in reversed([model, *model.mro()]):
        for name, attribute in owner.attributes.items():
            if isinstance(attribute.value, griffe.ExprCall) and str(attribute.value.function) == "Field":
                given = {a.name: str(a.value) for a in attribute.value.arguments if isinstance(a, griffe.ExprKeyword)}
                kind = re.sub(r"Annotated\[(.+), \w+\(\w+\)\]", r"\1", str(attribute.annotation))
                yield f"- `{name}` (`{kind}`): {ast.literal_eval(given['description'])}"


class OptionFields(griffe.Extension):
    """List the options of every verb, which are the fields of its model."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for place, model in OPTIONS.items() if pkg.path == "lightm" else ():
            documented = pkg[place]
            documented.docstring.value += "\n\nOptions:\n\n" + "\n".join(fields(pkg[model]))


class Doctests(griffe.Extension):
    """Fence the examples of docstrings, which Markdown would take for quotations."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            example = re.compile(r"(?:^|(?<=\n))[ ]*>>> .*?(?=\n[ ]*\n|\Z)", re.S)
            obj.docstring.value = example.sub(
                lambda match: f"\n```pycon\n{textwrap.dedent(match.group(0))}\n```\n", obj.docstring.value
            )
