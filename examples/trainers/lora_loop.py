"""A LoRA on the network, trained in a loop of one's own: the pull acts on the merged weights."""

import peft
import torch
from problem import EPOCHS, accuracy, batches, source
from torch import nn
from torch.nn.functional import cross_entropy

import conservtl as ctl
from conservtl.integrations.peft import AdapterAdaptation, adapt


def adapter() -> nn.Module:
    """Return the source with an adapter on two of its weights."""
    torch.manual_seed(1)
    return peft.get_peft_model(source(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["3", "5"]))


def main() -> AdapterAdaptation:
    model = adapter()
    adaptation = adapt(model, [ctl.L2SP(alpha=0.1), ctl.OutputConservation(weight=0.2)])
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.02)
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in batches():
            outputs = model(inputs)
            loss = adaptation.loss(cross_entropy(outputs, labels), outputs, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    plain = adaptation.export()  # merged, without peft and conservtl
    print(f"target {accuracy(plain, 0.6):.0f} %, source {accuracy(plain, 0.0):.0f} %, drift {adaptation.drift()}")
    return adaptation


if __name__ == "__main__":
    main()
