"""In what a judge differs from the one that a benchmark's published numbers are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewards.judges.templates import Template


@dataclass(frozen=True)
class PublishedJudge:
    """What judged the published numbers.

    Attributes:
        name: for the reader.
        models: what servers call it, in lower case and without an owner.
        texts: whose questions it was asked, as in "VIEScore's".
    """

    name: str
    models: tuple[str, ...]
    texts: str


def judge_deviations(model: str, templates: Sequence[Template], published: PublishedJudge) -> tuple[str, ...]:
    """The model where it is another one; the questions in any case.

    This library ships no text of others, so it cannot tell whether a template of the user's has the published one: of
    those that it ships it is known that they have not.
    """
    names = ", ".join(template.name for template in templates)
    if all(_ships(template) for template in templates):
        text = f"the judge's questions ({names}) are this library's own text and not {published.texts}"
    else:
        text = f"the text of the judge's questions ({names}) is not known to be {published.texts}"
    is_published = model.rpartition("/")[2].lower() in published.models
    return (text,) if is_published else (f"judge {model} in place of {published.name}", text)


def _ships(template: Template) -> bool:
    from rewards.judges.templates import FOLDER, load_template

    return (FOLDER / f"{template.name}.txt").is_file() and load_template(template.name).sha256 == template.sha256
