"""``fit`` in one process or many: torchrun --nproc_per_node 2 many_processes.py."""

import os

from problem import CLIP, EPOCHS, RATE, STRATEGIES, accuracy, examples, network, source

import conservtl as ctl


def main(device: str = "cpu") -> ctl.Adaptation:
    adaptation = ctl.adapt(network(), source(), STRATEGIES)
    size = 8 // int(os.environ.get("WORLD_SIZE", "1"))  # eight examples a step, of all processes together
    training = ctl.Training(epochs=EPOCHS, lr=RATE, clip=CLIP, batch_norm="eval", batch_size=size, device=device)
    ctl.fit(adaptation, examples(32, angle=0.6, seed=1), training=training, seed=0)
    if os.environ.get("RANK", "0") == "0":
        model = adaptation.model
        print(f"target {accuracy(model, 0.6):.0f} %, source {accuracy(model, 0.0):.0f} %, drift {adaptation.drift()}")
    return adaptation


if __name__ == "__main__":
    main()
