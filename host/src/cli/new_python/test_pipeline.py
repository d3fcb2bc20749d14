"""Runs without a host: `python -m pytest`."""

import pytest
from pydantic import ValidationError

from pipeline import Input, Pipeline


def test_each_input_has_its_output():
    outputs = Pipeline("data").predict([Input(text="one"), Input(text="2 two")])
    assert [(output.text, output.letters) for output in outputs] == [("ONE", 3), ("2 TWO", 3)]


def test_settings_of_the_entry_are_arguments():
    assert Pipeline("data", shout=False).predict([Input(text="one")])[0].text == "one"


def test_what_is_no_input_is_refused():
    with pytest.raises(ValidationError):
        Input(text="")
