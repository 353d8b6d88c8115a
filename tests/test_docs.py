"""The pages for readers: links lead somewhere, commands and options exist, keys are a recipe's."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from frugal_rl.cli import cli
from frugal_rl.config import list_recipes, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "tools" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_take_the_options_that_the_page_gives_them(page: Path) -> None:
    for line in _commands(page, "frugal-rl "):
        words = shlex.split(line, comments=True)[1:]
        command: click.Command = cli
        while isinstance(command, click.Group) and words:
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, line
    for line in _commands(page, "python tools/"):
        words = shlex.split(line, comments=True)
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        for word in words[2:]:
            assert not word.startswith("--") or f'"{word}"' in script, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_settings_are_keys_of_a_recipe(page: Path) -> None:
    recipe = load_recipe("tiny")
    keys = {
        f"{s.name}.{key.name}"
        for s in dataclasses.fields(recipe)
        for key in dataclasses.fields(getattr(recipe, s.name))
    }
    sections = "|".join(section.name for section in dataclasses.fields(recipe))
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(rf"--set ((?:{sections})\.\w+)=", text))
    found |= set(re.findall(rf"`((?:{sections})\.(?!py\b)\w+)[`=]", text))
    assert found
    assert found <= keys


def test_the_recipes_of_the_pages_are_there() -> None:
    for page in PAGES:
        named = re.findall(r"--recipe ([\w.-]+)", page.read_text(encoding="utf-8"))
        assert set(named) <= set(list_recipes())


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, spaces to hyphens, other marks left out."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _commands(page: Path, start: str) -> Iterator[str]:
    """Lines of code blocks, and inline code with its line breaks as spaces, that begin so."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in fenced for line in block.splitlines()] + [
        " ".join(code.split()) for code in inline
    ]
    return (line for line in lines if line.startswith(start))
