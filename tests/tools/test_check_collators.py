"""Other people's collators, as they are: right ones are left alone, and the famous trap is seen."""

from __future__ import annotations

import pytest
import torch

from tests.tools.setups import BOS, EOS, FACTS, PAD, PAD_IS_EOS, features, only, told
from tests.tools.small_tokenizer import write_tokenizer
from varlen_sft.integrations import Collator
from varlen_sft.tools.check_setup import inspect_batch

transformers = pytest.importorskip("transformers")

SAMPLES = features([5, 7, 4])
PLAIN = [{key: value.tolist() for key, value in sample.items()} for sample in SAMPLES]


def tokenizer(folder, pad: str):
    write_tokenizer(folder)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token=pad
    )


@pytest.mark.parametrize("tail", [{}, {"pad_multiple": 16}, {"pad_to": 40}])
def test_ours(tail):
    batch = Collator(**tail, pad_id=PAD)(PLAIN)
    assert inspect_batch(batch, FACTS, SAMPLES) == inspect_batch(batch, FACTS) == []


@pytest.mark.parametrize("flash", [False, True])
def test_flattening(flash):
    make = transformers.DataCollatorWithFlattening(
        return_position_ids=True, return_flash_attn_kwargs=flash
    )
    batch = make([dict(feature) for feature in PLAIN])
    assert inspect_batch(batch, FACTS, SAMPLES) == inspect_batch(batch, FACTS) == []


def test_padding(tmp_path):
    make = transformers.DataCollatorForSeq2Seq(tokenizer(tmp_path, "<pad>"))
    batch = make([dict(feature) for feature in PLAIN])
    assert inspect_batch(batch, FACTS, SAMPLES) == inspect_batch(batch, FACTS) == []


def test_language_modelling_with_a_pad_token_that_is_the_stop_token(tmp_path):
    """It masks labels where they equal the pad token."""
    make = transformers.DataCollatorForLanguageModeling(
        tokenizer(tmp_path, "<|im_end|>"), mlm=False
    )
    whole = [{"input_ids": sample["input_ids"].tolist()} for sample in SAMPLES]
    batch = make(whole)
    assert batch["input_ids"][0, 4:].tolist() == [EOS, EOS, EOS]
    mistake = only(inspect_batch(batch, PAD_IS_EOS))
    assert told(mistake) == ("pad = eos is masked by value", 0, 4, True)
    trained = [{"input_ids": s["input_ids"], "labels": s["input_ids"]} for s in SAMPLES]
    assert told(only(inspect_batch(batch, PAD_IS_EOS, trained))) == told(mistake)
    own = transformers.DataCollatorForLanguageModeling(tokenizer(tmp_path, "<pad>"), mlm=False)
    assert inspect_batch(own(whole), FACTS) == []


def test_trl_padding_free(tmp_path):
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    make = trl.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    batch = make([dict(feature) for feature in PLAIN])
    assert inspect_batch(batch, FACTS, SAMPLES) == inspect_batch(batch, FACTS) == []
    padded = trl.DataCollatorForLanguageModeling(
        pad_token_id=PAD, padding_free=True, pad_to_multiple_of=32
    )
    batch = padded([dict(feature) for feature in PLAIN])
    assert batch["input_ids"].shape == (1, 32) and int(batch["input_ids"][0, 0]) == BOS
    mistake = only(inspect_batch(batch, FACTS, SAMPLES))
    assert told(mistake) == ("zero-padded position ids", 0, 16, True)
    assert torch.equal(batch["position_ids"][0, 16:], torch.zeros(16).long())
