"""One optimisation step, the optimiser it takes, and an epoch of steps."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split
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


def lr_factor(config: TrainConfig, progress: float) -> float:
    """Return the share of the learning rate at `progress` (0 at the first step, 1 after the last) of the run."""
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0


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


class Steps:
    """The steps of an epoch, one after another."""

    def __init__(self, network: Network, optimizer: Optimizer, train: Split, config: TrainConfig):
        self.network, self.optimizer, self.train, self.config = network, optimizer, train, config
        self.n_steps = math.ceil(len(train) / config.batch_size)

    def feed(self, train: Split) -> None:
        """Take the images of the next epochs from this split, as long as the one before."""
        self.train = train

    def epoch(self, number: int, order: Tensor, tick: Callable[[int], object]) -> tuple[Tensor, Tensor]:
        """Take the steps of epoch `number` over the images in this order (N,); return their losses and the count of right answers.

        `tick` is told the number of images after each step. Nothing here waits for the device.
        """
        losses = torch.zeros(self.n_steps, device=order.device)
        n_right = torch.zeros((), dtype=torch.long, device=order.device)
        for index, picked in enumerate(torch.split(order, self.config.batch_size)):
            losses[index], right = self.take(picked, self.factor(number, index))
            n_right += right
            tick(len(picked))
        return losses, n_right

    def factor(self, number: int, index: int) -> float:
        """Return the share of the learning rate in a step of an epoch."""
        return lr_factor(self.config, ((number - 1) * self.n_steps + index) / (self.config.epochs * self.n_steps))

    def take(self, picked: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Take one step on the images picked (B,); return loss and count of right answers."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self._step(picked)

    def _step(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        images = self.train.images.index_select(0, picked).float().div_(255)
        return step(self.network, self.optimizer, images, self.train.labels.index_select(0, picked), self.config.precision)
