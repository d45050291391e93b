"""A model of timm trained with forward gradients in a plain loop. Needs pip install timm."""

import timm
import torch
import torch.nn.functional as F

import fgtrain

torch.manual_seed(0)
labels = torch.arange(16) % 2
images = torch.randn(16, 3, 32, 32) + labels.view(-1, 1, 1, 1)  # one class is brighter
model = timm.create_model("resnet10t", num_classes=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
estimator = fgtrain.ActivityPerturbation(num_tangents=1, exact_head=True)
for step in range(11):
    estimate = estimator(model, lambda net: F.cross_entropy(net(images), labels, reduction="none"))
    fgtrain.write_grads(model, estimate.grads)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step}: loss {estimate.loss:.3f}")
