"""The page of architectures is in step with the code."""

from __future__ import annotations

import re

import pytest
import survey
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from actpipe.models.families import all_families

PAGE = survey.PAGE.read_text()
MADE_HERE = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in PAGE, reason="the page was made with another transformers"
)
SAMPLE = ["gpt2", "bart", "helium", "mamba", "xlm"]


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip().splitlines()[2:]


def types(lines):
    return {re.match(r"\| `([^`]+)`", line).group(1) for line in lines}


@MADE_HERE
def test_every_type_is_on_the_page_once_for_each_of_its_configurations():
    lines = [line for title in ("Entries", "By structure", "Refused") for line in section(title)]

    assert types(lines) == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *all_families()}
    assert len(lines) == len(survey.subjects())


def test_the_entries_of_the_page_are_those_of_the_code():
    listed = types(section("Entries"))  # one type, gpt-sw3, is another's name in transformers

    assert {transformers.CONFIG_MAPPING[name].model_type for name in listed} == set(all_families())


def test_every_entry_is_proven_and_structure_gives_no_other_values():
    assert [line for line in section("Entries") if line.split(" | ")[4] != "nothing" or "other values" in line] == []


@MADE_HERE
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_tried_again_gives_its_line(model_type):
    again = [survey.survey(subject) for subject in survey.subjects() if subject.model_type == model_type]

    assert [survey.families_page.line(finding) for finding in again] == [
        line for line in PAGE.splitlines() if line.startswith(f"| `{model_type}` ")
    ]


def test_a_type_that_fails_is_a_line_and_not_the_end():
    finding = survey.in_own_process(survey.Subject("no_such_type"))

    assert finding.route == "none"
    assert "its default configuration is refused" in finding.reason


@MADE_HERE
@pytest.mark.slow
def test_the_page_made_again_is_the_same():
    found = [survey.in_own_process(subject) for subject in survey.subjects()]

    assert survey.families_page.page(found, transformers.__version__) == PAGE
