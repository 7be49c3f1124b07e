"""One optimisation step, and the optimiser it takes."""

import math

import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from stn_pipeline.config import TrainConfig
from stn_pipeline.model import Network
from stn_pipeline.training.device import autocast


def make_optimizer(network: Network, config: TrainConfig) -> Optimizer:
    """Return the optimiser, with the localiser's parameters in a group of their own and slower by loc_lr_multiplier."""
    groups = [{"params": list(network.classifier.parameters()), "lr": config.lr}]
    if network.transformer is not None:
        groups.append({"params": list(network.transformer.parameters()), "lr": config.lr * config.loc_lr_multiplier})
    kind = {"adam": Adam, "adamw": AdamW, "sgd": SGD}[config.optimizer]
    optimizer: Optimizer = kind(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: Optimizer, config: TrainConfig, progress: float) -> None:
    """Set each group's learning rate at `progress` (0 at the first step, 1 after the last) of the run."""
    factor = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def step(network: Network, optimizer: Optimizer, images: Tensor, labels: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Take one step on images (B, C, H, W) in [0, 1] and labels (B,); return the mean loss and the count of right answers.

    Both stay on the device: reading them would wait for it.
    """
    with autocast(precision, images.device):
        logits = network(images).float()
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()
