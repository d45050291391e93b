"""The examples beside other libraries, where those are installed."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from fgtrain import Backprop

EXAMPLES = Path(__file__).resolve().parents[1] / "scripts" / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # those libraries have warnings of their own


def run(name):
    """The names that an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def losses(text):
    return [float(value) for value in re.findall(r"(?:loss|->) (\d\.\d+)", text)]


def test_hugging_face_trainer(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers", reason="pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="pip install transformers accelerate")
    monkeypatch.chdir(tmp_path)
    names = run("hugging_face_trainer")
    first, last = losses(capsys.readouterr().out)
    assert last < 0.9 * first

    weights = []
    for trainer in (transformers.Trainer, names["ForwardTrainer"]):
        trainer.estimator = Backprop()  # then nothing but the source of the gradients differs
        transformers.set_seed(1)
        config = transformers.BertConfig(16, 16, 1, 2, 32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.BertForSequenceClassification(config)
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, gradient_accumulation_steps=2, save_strategy="no", report_to="none"
        )
        trainer(model, options, train_dataset=names["data"]).train()
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_timm_loop(capsys):
    pytest.importorskip("timm", reason="pip install timm")
    run("timm_loop")
    found = losses(capsys.readouterr().out)
    assert found[-1] < 0.5 * found[0]
