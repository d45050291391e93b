"""A Hugging Face Trainer with forward gradients, in one changed method. Needs pip install transformers accelerate.

The model is a tiny BERT made from its configuration, without a download. Accumulation, clipping and schedules stay
those of the Trainer.
"""

import torch
import torch.nn.functional as F
import transformers

import fgtrain


class ForwardTrainer(transformers.Trainer):
    """Takes its gradients from an estimator."""

    estimator: fgtrain.GradientEstimator = fgtrain.ActivityPerturbation(num_tangents=16)

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
        labels = inputs["labels"]
        estimate = self.estimator(model, lambda net: F.cross_entropy(net(**inputs).logits, labels, reduction="none"))
        share = 1 / self.args.gradient_accumulation_steps
        fgtrain.write_grads(model, {name: share * g for name, g in estimate.grads.items()}, accumulate=True)
        return share * estimate.loss


transformers.set_seed(0)
labels = torch.arange(64) % 2
words = torch.randint(8, (64, 4)) + 8 * labels[:, None]  # each class has its own eight words
data = [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]
config = transformers.BertConfig(
    vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
model = transformers.BertForSequenceClassification(config)
options = transformers.TrainingArguments(
    "runs/hugging_face", max_steps=60, learning_rate=2e-2, save_strategy="no", report_to="none"
)
trainer = ForwardTrainer(model, options, train_dataset=data, eval_dataset=data)
before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
print(f"loss {before['eval_loss']:.3f} -> {after['eval_loss']:.3f}")
