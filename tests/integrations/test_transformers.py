"""Models of Hugging Face's transformers, with batches as its collators make them. Built from a config: no download."""

import pytest
import torch
import transformers
from torch.nn import functional

import asga
from asga.training import count_batches

VOCABULARY, LENGTH = 20, 6


@pytest.fixture
def config():
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )


def batches(count: int, *, tokens: bool = False) -> list:
    """Whether a 1 comes in a sentence, or which of its tokens are one; padded, in BatchEncodings."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (8, LENGTH), generator=generator)
        ids[::2, 1] = 1
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        labels = torch.where(mask == 1, (ids == 1).long(), -100) if tokens else (ids == 1).any(1).long()
        found.append(transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return found


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("method", ["asga", "sgd"])
def test_sentences(config, method):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    data = batches(8)
    searched = asga.PolicySearcher(model, budget=asga.Budget(bitops="w4a4"), epochs=2, method=method).fit(data)
    # Per sentence: of the six layers of a block, the query's is LENGTH x 16 x 16; the classifier sees one position.
    macs = {name.rpartition(".")[2]: profile.macs for name, profile in searched.profiles.items()}
    assert (macs["query"], macs["classifier"]) == (LENGTH * 16 * 16, 2 * 16)
    assert max(searched.cost_shares(searched.policy).values()) <= 1
    quantized = asga.quantize(model, searched.policy)
    result = asga.TransferTrainer(quantized, epochs=6, lr=0.1, method=method).fit(data, data)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.evaluation.images == 8 * count_batches(data)


def test_tokens(config):
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config)
    data = batches(4, tokens=True)
    options = {"loss_fn": token_loss}
    searched = asga.PolicySearcher(model, budget=asga.Budget(bitops="w4a4"), epochs=1, **options).fit(data)
    quantized = asga.quantize(model, searched.policy)
    result = asga.TransferTrainer(quantized, epochs=6, lr=0.1, **options).fit(data, data)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert 0.5 < result.evaluation.top1 <= 1
    with pytest.raises(asga.TrainingError, match=r"labels are torch.int64 \[8, 6\]; torch.int64 \[batch\] is needed"):
        asga.evaluate(quantized, data)
