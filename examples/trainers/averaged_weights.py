"""torch's stochastic weight averaging: the mean of the last epochs' weights, at a constant rate for each layer."""

import torch
from problem import EPOCHS, RATE, STRATEGIES, accuracy, batches, network, source
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

import conservtl as ctl


def main() -> tuple[ctl.Adaptation, AveragedModel]:
    model = network()
    adaptation = ctl.adapt(model, source(), STRATEGIES)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9)
    average = AveragedModel(model)
    scheduler = adaptation.scheduler(SWALR, swa_lr=0.5 * RATE, anneal_epochs=EPOCHS // 2)
    for epoch in range(EPOCHS):
        model.train()
        for inputs, labels in batches():
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        if epoch >= EPOCHS // 2:
            average.update_parameters(model)
    update_bn(batches(), average)  # held norms keep the source's statistics
    print(f"last {accuracy(model, 0.6):.0f} %, average {accuracy(average, 0.6):.0f} %")
    return adaptation, average


if __name__ == "__main__":
    main()
