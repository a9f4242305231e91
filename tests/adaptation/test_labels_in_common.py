"""A head whose labels overlap the source's: rows are copied by label, and only these are pulled."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl

SOURCE = ("a", "b", "c")
TARGET = ("c", "new", "a", "b")
LABELS = (TARGET, SOURCE)
KNOWN, NUMBERS, NEW = [0, 2, 3], [2, 0, 1], [1]


def network(classes):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes))


class Apart(nn.Module):
    """The same function with the copied and the new rows of the head as two modules: the reference."""

    def __init__(self, model):
        super().__init__()
        self.body = copy.deepcopy(model[:2])
        self.known, self.new = nn.Linear(5, len(KNOWN)), nn.Linear(5, len(NEW))
        with torch.no_grad():
            for part, rows in ((self.known, KNOWN), (self.new, NEW)):
                part.weight.copy_(model[2].weight[rows])
                part.bias.copy_(model[2].bias[rows])

    def forward(self, x):
        features = self.body(x)
        outputs = torch.empty(len(x), len(TARGET))
        outputs = outputs.index_copy(1, torch.tensor(KNOWN), self.known(features))
        return outputs.index_copy(1, torch.tensor(NEW), self.new(features))

    def state(self):
        rows = {"weight": torch.empty(len(TARGET), 5), "bias": torch.empty(len(TARGET))}
        for name, value in rows.items():
            value[KNOWN], value[NEW] = getattr(self.known, name).detach(), getattr(self.new, name).detach()
        return {f"0.{name}": one for name, one in self.body[0].state_dict().items()} | {
            f"2.{name}": value for name, value in rows.items()
        }


def pair():
    """A model with its source, and the reference with the same weights."""
    torch.manual_seed(0)
    source, model = network(3), network(4)
    apart = Apart(model)
    theirs = {f"body.{name}": value for name, value in source[:2].state_dict().items()}
    theirs |= {f"known.{name}": getattr(source[2], name).detach()[NUMBERS] for name in ("weight", "bias")}
    return source, model, theirs, apart


def train(adaptation, model, steps=5, cls=torch.optim.SGD, **options):
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 4, generator=generator), torch.arange(8) % 4) for _ in range(steps)]
    if adaptation.outstanding():
        adaptation.measure(batches)
    optimizer = adaptation.optimizer(cls, **options)
    for inputs, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def test_rows_are_copied_by_label_and_the_others_are_the_models():
    source, model, _, _ = pair()
    before = copy.deepcopy(model[2].state_dict())
    adaptation = ctl.adapt(model, source, labels=LABELS)
    for name, value in source[2].state_dict().items():
        assert torch.equal(model[2].state_dict()[name][KNOWN], value[NUMBERS])
        assert torch.equal(model[2].state_dict()[name][NEW], before[name][NEW])
    printed = str(adaptation.plan)
    assert "rows copied by label  2: 3 of 4" in printed
    assert "source, part fresh" in printed
    assert "source  labels new: new" in printed
    assert "43 copied from the source, 6 fresh" in printed  # 4 × 5 + 5 of the body, 3 rows of 5 + 1; one row of 5 + 1
    assert ctl.Plan(**adaptation.plan.model_dump(mode="json")) == adaptation.plan
    assert adaptation.drift() == {"0": 0, "2": 0}


STRATEGIES = {
    "none": [],
    "l2_sp": [ctl.L2SP(alpha=0.5, beta=0.3)],
    "l2_sp on all": [ctl.L2SP(alpha=0.5, beta=0.3, on="all")],
    "l2_sp decoupled": [ctl.L2SP(alpha=2.0, beta=0.3, mode="decoupled", on="all")],
    "l2_sp per parameter": [ctl.L2SP(alpha=20.0, beta=3.0, normalize="per_parameter", on="all")],
    "fisher_sp": [ctl.FisherSP(alpha=0.5, on="all")],
    "fisher_sp decoupled": [ctl.FisherSP(alpha=2.0, mode="decoupled", floor=0.1)],
    "l1_sp": [ctl.L1SP(alpha=0.2, on="all")],
    "group_lasso_sp": [ctl.GroupLassoSP(alpha=0.1, on="all")],
    "projection": [ctl.Projection(radius=0.02)],
    "projection of rows": [ctl.Projection(radius=0.02, by="row", norm="mars", on="all")],
    "projection to the source": [ctl.Projection(radius=0.0)],
    "selective_decay": [ctl.SelectiveDecay(strength=1.5, on="all")],
    "interpolation": [ctl.L2SP(alpha=0.1), ctl.WeightInterpolation(t=0.3)],
    "rates": [ctl.DiscriminativeLR(source=0.01, fresh=0.2), ctl.L2SP(alpha=0.5)],
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_copied_rows_are_pulled_and_new_ones_are_not(name, cls):
    """Reference: the same head as two modules, of which one comes from the source and one is fresh."""
    if name == "rates":  # one parameter has one rate: the reference's known rows take the new ones' too
        strategies = [
            ctl.DiscriminativeLR(groups={"known": 0.2, "new": 0.2, "body": 0.01}, lr=0.1),
            STRATEGIES[name][1],
        ]
    else:
        strategies = STRATEGIES[name]
    source, model, theirs, apart = pair()
    adaptation = ctl.adapt(model, source, STRATEGIES[name], labels=LABELS)
    reference = ctl.adapt(apart, theirs, strategies)
    for one, trained in ((adaptation, model), (reference, apart)):
        train(one, trained, cls=cls, lr=0.1)
    assert adaptation.penalty().item() == pytest.approx(reference.penalty().item(), rel=1e-4, abs=1e-7)
    for one in (adaptation, reference):
        one.finish()
    for key, value in apart.state().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-6, msg=key)
    drift, apart_drift = adaptation.drift(), reference.drift()
    assert drift["0"] == pytest.approx(apart_drift["body"], rel=1e-4)
    assert drift["2"] == pytest.approx(apart_drift["known"], rel=1e-4)


@pytest.mark.parametrize("anchors", ["fp32", "bf16", "cpu"])
def test_anchors_in_any_storage_follow_new_rows_exactly(anchors):
    source, model, _, _ = pair()
    adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=1.0, beta=0.0, anchors=anchors)], labels=LABELS)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        model[2].weight.add_(1.2345)
    before = model[2].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[2].weight[NEW], before[NEW])
    torch.testing.assert_close(model[2].weight[KNOWN], before[KNOWN] - 0.1 * 1.2345, rtol=0, atol=1e-2)


def test_mixout_mixes_the_copied_rows_alone():
    """At p near 1 the copied rows of a forward pass are almost all the source's; new rows and their gradients plain."""
    source, model, _, _ = pair()
    adaptation = ctl.adapt(model, source, [ctl.Mixout(p=0.9)], labels=LABELS)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    plain = model[2].weight.detach().clone()
    for _ in range(2):  # accumulated
        model(torch.randn(3, 4))
        assert torch.equal(model[2].weight[NEW], plain[NEW])
        assert (model[2].weight[KNOWN] == source[2].weight[NUMBERS]).float().mean() > 0.5
    gradient = torch.randn(4, 5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[2].weight.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(model[2].weight[NEW], plain[NEW] - 0.1 * gradient[NEW])


def test_a_radius_is_learned_for_the_copied_rows():
    source, model, _, _ = pair()
    adaptation = ctl.adapt(model, source, [ctl.Projection(radius="learn", steps=1)], labels=LABELS)
    train(adaptation, model, lr=0.1)
    trained = model[2].weight.detach().clone()
    adaptation.finish(valid=[(torch.randn(8, 4), torch.arange(8) % 4)])
    assert torch.equal(model[2].weight[NEW], trained[NEW])
    assert not torch.equal(model[2].weight[KNOWN], trained[KNOWN])


@pytest.mark.parametrize(("weight", "form"), [(1.0, None), (0.5, "sigmoid"), (2.0, "squared")])
def test_outputs_are_compared_on_the_labels_that_both_know(weight, form):
    """Reference: the divergence of the outputs of a, b and c, in one order."""
    source, model, _, _ = pair()
    strategy = ctl.OutputConservation(weight=weight, form=form, temperature=1.0)
    adaptation = ctl.adapt(model, source, [strategy], labels=LABELS)
    with torch.no_grad():
        model[0].weight.add_(0.3)
    x = torch.randn(6, 4)
    outputs = model(x)
    task = F.cross_entropy(outputs, torch.arange(6) % 4)
    ours, theirs = outputs[:, KNOWN], source(x)[:, NUMBERS].detach()
    if form == "squared":
        expected = (ours - theirs).square().mean()
    elif form == "sigmoid":
        expected = F.binary_cross_entropy_with_logits(ours, theirs.sigmoid()) - F.binary_cross_entropy_with_logits(
            theirs, theirs.sigmoid()
        )
    else:
        expected = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean")
    term = adaptation.loss(task, outputs, x) - task
    assert term.item() == pytest.approx(weight * expected.item(), rel=1e-4)


def test_fit_compares_outputs_from_its_cache():
    source, model, _, _ = pair()
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation()], labels=LABELS)
    data = (torch.randn(8, 4), torch.arange(8) % 4)
    result = ctl.fit(adaptation, data, {"target": data}, ctl.Training(epochs=2, lr=0.1))
    assert len(result.history) == 2


def test_maps_with_a_convolution_of_size_one_as_their_head():
    """Rows of an (N, classes, H, W) head are output channels; outputs are compared on the class axis."""
    torch.manual_seed(0)
    source, model = (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, k, 1)) for k in (3, 4))
    adaptation = ctl.adapt(
        model, source, [ctl.L2SP(alpha=1.0, beta=0.0), ctl.OutputConservation(weight=1.0)], labels=LABELS
    )
    assert torch.equal(model[2].weight[KNOWN], source[2].weight[NUMBERS])
    x, labels = torch.randn(2, 1, 6, 6), torch.randint(0, 4, (2, 4, 4))
    task = F.cross_entropy(model(x), labels)
    assert adaptation.loss(task, model(x), x).item() == pytest.approx(task.item(), rel=1e-5)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    assert adaptation.penalty().item() == pytest.approx(0.5 * 3 * 3)


@pytest.mark.parametrize(
    ("target", "source_labels", "copied", "text"),
    [
        (("c", "a", "b"), SOURCE, 3, "3 of 3"),
        (("b", "a"), SOURCE, 2, r"2 of 2 (1 of the source's 3 not used)"),
        (("b", "x", "y"), SOURCE, 1, r"1 of 3 (2 of the source's 3 not used)"),
        ((7, 0, 2), (0, 1, 2), 2, r"2 of 3 (1 of the source's 3 not used)"),
        (torch.tensor([7, 0, 2]), [0, 1, 2], 2, r"2 of 3 (1 of the source's 3 not used)"),
    ],
)
def test_other_orders_fewer_labels_and_some_in_common(target, source_labels, copied, text):
    torch.manual_seed(0)
    source, model = network(3), network(len(target))
    before = model[2].weight.detach().clone()
    adaptation = ctl.adapt(model, source, [ctl.L2SP()], labels=(target, source_labels))
    for place, label in enumerate(target):
        value = source[2].weight[source_labels.index(label)] if label in source_labels else before[place]
        assert torch.equal(model[2].weight[place], value)
    assert f"rows copied by label  2: {text}" in str(adaptation.plan)
    assert sum(one is not None for one in adaptation.plan["2.weight"].source_rows) == copied
    assert (adaptation.plan["2.weight"].decay is None) == (copied == len(target))


def test_labels_in_the_same_order_share_the_head():
    source, model = network(3), network(3)
    plan = ctl.adapt(model, source, labels=(SOURCE, SOURCE)).plan
    assert plan["2.weight"].source_rows is None
    assert torch.equal(model[2].weight, source[2].weight)


def test_without_a_label_in_common_the_head_is_fresh():
    source, model = network(3), network(3)
    before = model[2].weight.detach().clone()
    plan = ctl.adapt(model, source, [ctl.L2SP()], labels=(("x", "y", "z"), SOURCE)).plan
    assert plan["2.weight"].origin == "fresh"
    assert plan["2.weight"].reason == "its labels differ from the source's"
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("fresh", [["head"], ["2"], ["2.*"]])
def test_a_head_that_is_declared_fresh_copies_no_row(fresh):
    source, model, _, _ = pair()
    before = model[2].weight.detach().clone()
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation()], labels=LABELS, fresh=fresh)
    assert adaptation.plan["2.bias"].origin == "fresh"
    assert torch.equal(model[2].weight, before)
    x = torch.randn(4, 4)  # the source's head on both bodies
    outputs = model(x)
    task = F.cross_entropy(outputs, torch.arange(4))
    expected = -(source(x).softmax(1) * source(x).log_softmax(1)).sum(1).mean()
    assert adaptation.loss(task, outputs, x).item() == pytest.approx((0.9 * task + 0.1 * expected).item(), rel=1e-5)


def test_a_strategy_makes_the_head_fresh_as_a_whole():
    """A linear probe begins with a new head; another order does not pass for the source's outputs."""
    torch.manual_seed(0)
    source, model = network(3), network(3)
    strategies = [ctl.FeatureExtraction(), ctl.OutputConservation()]
    adaptation = ctl.adapt(model, source, strategies, labels=(("b", "c", "a"), SOURCE))
    assert adaptation.plan["2.weight"].origin == "fresh"
    assert adaptation.plan["2.weight"].source_rows is None
    assert adaptation.origin.heads == ("2",)


def test_a_copy_of_the_source_gets_new_values_in_its_new_row():
    source = network(3)
    model = copy.deepcopy(source)
    ctl.adapt(model, source, labels=(("a", "z", "c"), SOURCE))
    assert torch.equal(model[2].weight[[0, 2]], source[2].weight[[0, 2]])
    assert not torch.equal(model[2].weight[1], source[2].weight[1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((("a", "b", "b", "c"), SOURCE), r"each of the target's must be listed once.*'b' twice"),
        ((TARGET, ("a", "b", "a")), r"each of the source's must be listed once.*'a' twice"),
        ((TARGET, ()), r"the source's must be listed once.*received none"),
        ((TARGET[:3], SOURCE), r"a row for each of the target's 3 labels; '2\.weight' has shape \(4, 5\)"),
        (
            (TARGET, SOURCE[:2]),
            r"source's head must have a row for each of its 2 labels; '2\.weight' has shape \(3, 5\)",
        ),
        ((TARGET,), r"two lists, \(target, source\)"),
        ("abcd", r"two lists, \(target, source\)"),
        (("abcd", SOURCE), r"two lists, \(target, source\)"),
        ((dict(enumerate(TARGET)), SOURCE), r"in the order of the outputs; received a dict.*id2label"),
        ((TARGET, set(SOURCE)), r"in the order of the outputs; received a set"),
    ],
)
def test_lists_that_are_not_of_the_outputs_are_refused(labels, message):
    source, model, _, _ = pair()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ctl.SpecError, match=message):
        ctl.adapt(model, source, labels=labels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_new_rows_that_nothing_trains_are_refused():
    source, model, _, _ = pair()
    with pytest.raises(ctl.SpecError, match=r"'2\.weight' has 1 and is frozen by LayerTransfer"):
        ctl.adapt(model, source, [ctl.LayerTransfer(side="output", layers=1)], labels=LABELS)
    model[2].requires_grad_(False)
    with pytest.raises(ctl.SpecError, match=r"'2\.weight' has 1 and is frozen by requires_grad=False"):
        ctl.adapt(model, source, labels=LABELS)


def test_one_label_in_common_cannot_be_compared_by_softmax():
    source, model, _, _ = pair()
    labels = (("x", "a", "y", "z"), SOURCE)
    with pytest.raises(ctl.SpecError, match=r"the softmax of 1 label is always 1"):
        ctl.adapt(model, source, [ctl.OutputConservation()], labels=labels)
    ctl.adapt(model, source, [ctl.OutputConservation(form="sigmoid")], labels=labels)


def test_a_fisher_of_the_source_is_put_in_the_order_of_the_targets_labels():
    """Reference: the squared gradients of the source model, example by example, of the rows in common."""
    source, model, _, _ = pair()
    adaptation = ctl.adapt(model, source, [ctl.FisherSP(data="source", normalize="none")], labels=LABELS)
    inputs, labels = torch.randn(6, 4), torch.arange(6) % 3
    adaptation.measure([(inputs, labels)], on="source")
    expected = torch.zeros(3, 5)
    for x, label in zip(inputs, labels, strict=True):
        loss = F.cross_entropy(source(x[None]), label[None])
        expected += torch.autograd.grad(loss, source[2].weight)[0].square() / 6
    found = adaptation.measured["fisher"]["2.weight"]
    torch.testing.assert_close(found[KNOWN], expected[NUMBERS])
    assert not found[NEW].any()


def test_saving_and_resuming_continue_exactly():
    def begun():
        source, model, _, _ = pair()
        strategies = [ctl.L2SP(alpha=0.5, on="all"), ctl.OutputConservation(weight=0.0)]
        return model, ctl.adapt(model, source, strategies, labels=LABELS)

    def steps(model, adaptation, optimizer, count):
        for number in range(count):
            torch.manual_seed(number)
            x = torch.randn(4, 4)
            optimizer.zero_grad()
            outputs = model(x)
            adaptation.loss(F.cross_entropy(outputs, torch.arange(4)), outputs, x).backward()
            optimizer.step()

    model, adaptation = begun()
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.05)
    steps(model, adaptation, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), adaptation.state_dict(), optimizer.state_dict()))
    steps(model, adaptation, optimizer, 3)
    again, resumed = begun()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    fresh = resumed.optimizer(torch.optim.AdamW, lr=0.05)
    fresh.load_state_dict(saved[2])
    steps(again, resumed, fresh, 3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert resumed.drift() == adaptation.drift()
    copied = copy.deepcopy(adaptation)
    assert copied.penalty().item() == pytest.approx(adaptation.penalty().item())
    other = ctl.adapt(network(4), network(3), labels=(("a", "b", "c", "new"), SOURCE))
    with pytest.raises(ctl.PlanError, match=r"belongs to another plan: '2\.weight' differs"):
        other.load_state_dict(ctl.adapt(network(4), network(3), labels=LABELS).state_dict())


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_heads_of_double_and_complex_values():
    for dtype in (torch.float64, torch.complex64):
        source, model = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, k)).to(dtype) for k in (3, 4))
        adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=1.0, beta=0.0)], labels=LABELS)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.5)
        with torch.no_grad():
            model[1].weight.add_(1.0)
        before = model[1].weight.detach().clone()
        optimizer.step()
        assert torch.equal(model[1].weight[NEW], before[NEW])
        assert not torch.equal(model[1].weight[KNOWN], before[KNOWN])


@pytest.mark.parametrize("dim", [0, 1, None])
def test_rows_of_a_weight_norm_are_copied_if_each_has_a_norm_of_its_own(dim):
    norm = nn.utils.parametrizations.weight_norm
    source, model = (nn.Sequential(nn.Linear(4, 5), norm(nn.Linear(5, k), dim=dim)) for k in (3, 4))
    if dim == 0:
        ctl.adapt(model, source, [ctl.L2SP()], labels=LABELS)
        torch.testing.assert_close(model[1].weight[KNOWN], source[1].weight[NUMBERS])
    else:
        with pytest.raises(ctl.SpecError, match=r"labels: (rows of the head must not depend|the head must have a row)"):
            ctl.adapt(model, source, labels=LABELS)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_rows_that_a_spectral_norm_ties_together_are_refused(norm):
    source, model = (nn.Sequential(nn.Linear(4, 5), norm(nn.Linear(5, k))) for k in (3, 4))
    with pytest.raises(ctl.SpecError, match=r"must not depend on each other.*is of (a spectral norm|SpectralNorm)"):
        ctl.adapt(model, source, labels=LABELS)
    ctl.adapt(model, source, labels=LABELS, fresh=["head"])


def test_outputs_on_another_axis_are_refused():
    source, model = (nn.Sequential(nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)) for _ in range(2))
    with pytest.raises(ctl.SpecError, match=r"shape \(4, 4, 1\), with the outputs on another axis"):
        ctl.adapt(model, source, labels=(("c", "new", "a", "b"), ("a", "b", "c", "d")))


def test_a_tied_embedding_gets_a_token():
    """The head of a language model is its embedding: rows by token, in both places."""

    class Tied(nn.Module):
        def __init__(self, tokens):
            super().__init__()
            self.embedding, self.body = nn.Embedding(tokens, 5), nn.Linear(5, 5)
            self.out = nn.Linear(5, tokens, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x):
            return self.out(self.body(self.embedding(x)))

    source, model = Tied(3), Tied(4)
    ctl.adapt(model, source, [ctl.L2SP()], example=torch.tensor([[0, 1]]), labels=LABELS, head=["out"])
    assert model.out.weight is model.embedding.weight
    assert torch.equal(model.out.weight[KNOWN], source.out.weight[NUMBERS])
