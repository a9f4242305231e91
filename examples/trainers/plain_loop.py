"""A loop of one's own, in which three lines are conservtl's."""

import torch
from problem import CLIP, EPOCHS, RATE, STRATEGIES, batches, examples, network, source
from torch.nn.functional import cross_entropy

import conservtl as ctl


def main() -> ctl.Adaptation:
    model = network()
    adaptation = ctl.adapt(model, source(), STRATEGIES)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9)
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in batches():
            cross_entropy(model(inputs), labels).backward()
            adaptation.pull()  # clipped with the gradients
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    held_out = {"target": examples(1000, angle=0.6, seed=2), "source": examples(1000, angle=0.0, seed=2)}
    print(ctl.evaluate(adaptation, held_out))
    return adaptation


if __name__ == "__main__":
    main()
