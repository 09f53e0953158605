"""Log options, which are checked before a model is looked up."""

from __future__ import annotations

import pytest

from lm_eval_bh import DataError, ParameterError
from lm_eval_bh.harness.model import BHLM


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("log_routing=all", "log_routing='all' is unknown"),
        ("log_routing=samples,log_dir=x,log_samples=-1", "log_samples=-1 is negative"),
        ("log_routing=samples,log_dir=x,log_samples=2.5", "give an integer"),
        ("log_logits=True", "log_logits=True needs log_routing=full"),
        ("log_logits=True,log_routing=samples,log_dir=x", "needs log_routing=full"),
        ("log_routing=samples", "needs a folder to write to: give log_dir"),
        ("log_routing=full", "needs a folder to write to: give log_dir"),
        ("log_dir=somewhere", "has no effect with log_routing=summary"),
        ("log_samples=50", "has no effect with log_routing=summary"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_looked_for(arguments, sentence):
    with pytest.raises(ParameterError) as caught:
        BHLM.create_from_arg_string(f"pretrained=no/such-model,{arguments}")
    assert sentence in str(caught.value)


def test_a_folder_that_cannot_be_written_is_said_before_a_model_is_looked_for(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="give a log_dir that can be written to"):
        BHLM.create_from_arg_string(
            f"pretrained=no/such-model,log_routing=full,log_dir={tmp_path / 'file'}"
        )
