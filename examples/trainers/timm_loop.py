"""timm: its scheduler keeps the plan's ratios, its average of weights holds no hook of conservtl."""

import torch
from problem import EPOCHS, RATE, STRATEGIES, accuracy, batches, network, source
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy

import conservtl as ctl


def main() -> tuple[ctl.Adaptation, ModelEmaV3]:
    model = network()
    adaptation = ctl.adapt(model, source(), STRATEGIES)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9)
    scheduler = adaptation.scheduler(CosineLRScheduler, t_initial=EPOCHS, lr_min=0.1 * RATE)
    average = ModelEmaV3(model, decay=0.9)
    for epoch in range(EPOCHS):
        model.train()
        for inputs, labels in batches():
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        scheduler.step(epoch + 1)
    print(f"last {accuracy(model, 0.6):.0f} %, average {accuracy(average.module, 0.6):.0f} %")
    return adaptation, average


if __name__ == "__main__":
    main()
