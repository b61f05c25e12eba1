"""What probes read of a model: hidden states and log-probabilities of texts that are cut into windows, against transformers'."""

from pathlib import Path

import given_model
import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, RobertaForMaskedLM

from fastkd.data.assembly import SpecialIds
from fastkd.models import hf
from fastkd.probes import packs
from fastkd.probes.packs import Packs, hidden_states, log_probabilities

LENGTHS = np.array([3, 14, 1, 30, 6])
WINDOWS = [3, 10, 4, 1, 10, 10, 10, 6]  # of at most 12 tokens


@pytest.mark.parametrize("cls", [BertForMaskedLM, RobertaForMaskedLM])
def test_states_are_those_of_transformers(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = given_model.write(tmp_path / "model", cls)
    loaded, theirs = hf.load(folder), cls.from_pretrained(folder).eval()
    special = SpecialIds.of(loaded.tokenizer)
    ids = np.random.default_rng(0).integers(10, 200, LENGTHS.sum())
    rows = np.array(
        [0, 2, 3, 12, 13, 14, 17, 20, 40, 47, 53]
    )  # none in the windows of 18 to 27: no batch is made of them
    monkeypatch.setattr(packs, "BATCH_TOKENS", 14)
    packed = Packs.of(ids, LENGTHS, special, 12)
    assert np.diff(packed.begin).tolist() == [size + 2 for size in WINDOWS]
    ours = hidden_states(loaded.encoder, packed, rows)
    logs = log_probabilities(loaded.encoder, packed, rows, ids[rows])
    begin = np.cumsum([0, *WINDOWS])
    for number, row in enumerate(rows):
        window = int(np.searchsorted(begin, row, side="right")) - 1
        text = [special.cls, *ids[begin[window] : begin[window + 1]], special.sep]
        with torch.no_grad():
            out = theirs(torch.tensor([text]), output_hidden_states=True)
        at = row - begin[window] + 1
        for layer, states in enumerate(out.hidden_states):
            torch.testing.assert_close(ours[layer][number], states[0, at], rtol=0, atol=2e-5)
        assert logs[number] == pytest.approx(float(out.logits[0, at].log_softmax(0)[ids[row]]), abs=1e-4)


def test_what_is_read_does_not_depend_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = hf.load(given_model.write(tmp_path / "model"))
    ids, rows = np.arange(10, 10 + LENGTHS.sum()), np.arange(LENGTHS.sum())
    packed = Packs.of(ids, LENGTHS, SpecialIds.of(loaded.tokenizer), 64)
    whole = hidden_states(loaded.encoder, packed, rows)
    monkeypatch.setattr(packs, "BATCH_TOKENS", 1)  # a window is never cut
    for one, other in zip(whole, hidden_states(loaded.encoder, packed, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
