"""Templates are versioned: found by name, hashed, their placeholders checked, what is wrong named with what is near."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rewards.judges.readouts import LabelReadout
from rewards.judges.rubrics import Dimension, RubricReadout
from rewards.judges.templates import FOLDER, load_template, parse_template, template_names
from rewards.names import nearest

# A text that changes is another judge: give it a new version, and leave the old one for whoever reported numbers.
PUBLISHED = {
    "edit_consistency.v1": "203652ef99800e1886d717710da127f6e4263ca3fe1c462c71300a7aa43ee385",
    "edit_following.v1": "308cb5e0459004ca3fcabd24386383bf0eab09bcac7095ec6dc0d660c20bf3f8",
    "imgedit.v1": "edbd395430fc632750d2386c33589cb1a0736ee042eff07258e11f474f0d0ec7",
    "pairwise_edit.v1": "da189ddfca4c9d1164cf9ae87cfdb5f1124afb2c485793ea99183a62c899aad7",
    "pairwise_t2i.v1": "7487b49a712b755ba75bbd041f53cafa1dfc89ac87e31a261479c8f8ed8589c3",
    "perceptual_quality.v1": "960290e44ea1b8fdf0af465666df519e4fa29d9eb6c405f8660740619803dc33",
    "t2i_following.v1": "5a54fc4ecaa1eb01997b97c3f5ae902ad6dfa53bce8aa9fd71a89273d41973fb",
    "viescore_pq.v1": "e9556631ba58804e54a482cdac09186a7354836f2392a81ea790651025bdd6eb",
    "viescore_sc.v1": "c2d09779f139bdb2f2d77b5b5fa03954628561690c004cd1b6f8a089f0fc771f",
    "yes_no.v1": "ab812b6d6cee78569ed46d7f056090274f132926b451c1dc5e32364bf8adf40a",
}
DIGITS = "readout: digits\nlabels: 0 1 2 3 4 5\n---\n"


def test_a_published_text_never_changes() -> None:
    assert {name: load_template(name).sha256 for name in template_names()} == PUBLISHED


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_template_asks_for_what_its_readout_reads(name: str) -> None:
    template, text = load_template(name), (FOLDER / f"{name}.txt").read_text("utf-8")
    question = text.partition("\n---\n")[2]
    if isinstance(template.readout, LabelReadout):
        assert all(label in question for label in template.readout.labels)
        assert "and nothing else" in question
    else:
        assert all(f'"{dimension.name}"' in question for dimension in template.readout.dimensions)
        assert "JSON alone" in question
    assert ("source" in template.placeholders) == ("edit" in name or "sc" in name.split(".")[0].split("_"))
    assert max(map(len, text.splitlines())) <= 122


def test_the_hash_is_that_of_the_text(tmp_path: Path) -> None:
    text = DIGITS + "Größe? {prompt} {image}"
    path = tmp_path / "mine.v3.txt"
    path.write_text(text, "utf-8")
    template = load_template(path)
    assert template.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert template.name == "mine.v3"
    assert load_template(str(path)) == template


def test_parts_are_in_order_and_braces_of_json_stay() -> None:
    template = parse_template(
        "readout: rubric\ndimensions: a 0-10, b 1-5\nrule: mean\n---\n"
        '{source} As {"a": 1, "b": {}}: {prompt} for {metadata.requirement} {image}\n',
        "mine",
    )
    assert template.readout == RubricReadout((Dimension("a", 0, 10), Dimension("b", 1, 5)), "mean")
    assert template.placeholders == ("source", "prompt", "metadata.requirement", "image")
    assert template.parts[:3] == (("", "source"), (' As {"a": 1, "b": {}}: ', ""), ("", "prompt"))
    assert template.parts[-1] == ("", "image")


def test_defaults_of_labels() -> None:
    readouts = [parse_template(f"readout: {kind}\n---\n{{image}}", kind).readout for kind in ("digits", "yes_no")]
    assert [readout.labels for readout in readouts if isinstance(readout, LabelReadout)] == [
        ("0", "1", "2", "3", "4", "5"),
        ("yes", "no"),
    ]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"got 'edit_folowing'; the nearest is 'edit_following\.v1'"):
        load_template("edit_folowing")
    with pytest.raises(ValueError, match="expected a path or one of edit_consistency"):
        load_template(Path("nowhere/t2i_following.v1.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("readout: digits\nQuestion {image}", "a line of ---"),
        ("readout digits\n---\n{image}", "got 'readout digits'"),
        ("readout: digits\nlabel: 1 2\n---\n{image}", "got 'label: 1 2'; the nearest key is 'labels'"),
        ("readout: digit\n---\n{image}", "got 'digit'; the nearest is 'digits'"),
        ("labels: 1 2\n---\n{image}", "readout: expected one of digits, yes_no, pairwise, rubric, got ''"),
        ("readout: digits\nrule: min\n---\n{image}", "rule: not for the readout digits"),
        ("readout: rubric\ndimensions: a 0-1\nlabels: 1 2\n---\n{image}", "labels: not for the readout rubric"),
        ("readout: rubric\n---\n{image}", "dimensions: expected such as"),
        ("readout: rubric\ndimensions: a 0-1, b\n---\n{image}", "dimensions: expected such as"),
        ("readout: rubric\ndimensions: a 5-1\n---\n{image}", "expected low < high"),
        ("readout: rubric\ndimensions: a 0-1\nrule: max\n---\n{image}", "rule: expected one of"),
        ("readout: digits\nlabels: one two\n---\n{image}", "template mine: labels: expected digits"),
        (DIGITS + "{promt} {image}", r"unknown placeholder \{promt\}.*nearest is \{prompt\}"),
        (DIGITS + "{metadata.} {image}", "unknown placeholder"),
        (DIGITS + "{prompt}", r"expected \{image\} once each .* got none"),
        (DIGITS + "{image} {image}", "got image, image"),
        (DIGITS + "{image} {prompt}", "at the very end"),
        (DIGITS + "{image} Grade it.", "at the very end"),
        (DIGITS + "{first} {second}", r"expected \{image\} once"),
        ("readout: pairwise\n---\n{second} {first}", r"\{first\} and \{second\} once each and in this order"),
        ("readout: pairwise\n---\n{image}", "got image"),
        (DIGITS, "got none"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_template(text, "mine")
    assert "template mine" in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        load_template(tmp_path / "bad.txt")


def test_nearest_of_nothing() -> None:
    assert nearest("a", []) == ""
