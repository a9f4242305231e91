"""What conservtl relies on in private names of torch and Accelerate, on the installed versions."""

import copy
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint

from conservtl import compat

A = [torch.tensor([1.0, -2.0]), torch.tensor([[4.0]])]
B = [torch.tensor([3.0, 5.0]), torch.tensor([[-2.0]])]
INPLACE = {
    "foreach_abs_": (lambda t: compat.foreach_abs_(t), [[1.0, 2.0], [[4.0]]]),
    "foreach_add_": (lambda t: compat.foreach_add_(t, B, alpha=0.5), [[2.5, 0.5], [[3.0]]]),
    "foreach_addcmul_": (lambda t: compat.foreach_addcmul_(t, B, B, value=2.0), [[19.0, 48.0], [[12.0]]]),
    "foreach_addcmul_ by each": (
        lambda t: compat.foreach_addcmul_(t, B, [torch.tensor([2.0, 0.0]), torch.tensor([[1.0]])], value=-1),
        [[-5.0, -2.0], [[6.0]]],
    ),
    "foreach_clamp_max_": (lambda t: compat.foreach_clamp_max_(t, 1), [[1.0, -2.0], [[1.0]]]),
    "foreach_clamp_min_": (lambda t: compat.foreach_clamp_min_(t, 0.0), [[1.0, 0.0], [[4.0]]]),
    "foreach_copy_": (lambda t: compat.foreach_copy_(t, B, non_blocking=True), [[3.0, 5.0], [[-2.0]]]),
    "foreach_lerp_": (
        lambda t: compat.foreach_lerp_(t, B, [torch.tensor(0.5), torch.tensor(0.25)]),
        [[2.0, 1.5], [[2.5]]],
    ),
    "foreach_mul_ by a number": (lambda t: compat.foreach_mul_(t, 3), [[3.0, -6.0], [[12.0]]]),
    "foreach_mul_ by tensors": (lambda t: compat.foreach_mul_(t, B), [[3.0, -10.0], [[-8.0]]]),
    "foreach_reciprocal_": (lambda t: compat.foreach_reciprocal_(t), [[1.0, -0.5], [[0.25]]]),
}
VALUES = {
    "foreach_div": (lambda: compat.foreach_div(B, A), [[3.0, -2.5], [[-0.5]]]),
    "foreach_mul by a number": (lambda: compat.foreach_mul(A, 2.0), [[2.0, -4.0], [[8.0]]]),
    "foreach_mul by tensors": (lambda: compat.foreach_mul(A, B), [[3.0, -10.0], [[-8.0]]]),
    "foreach_norm": (lambda: compat.foreach_norm(B), [34**0.5, 2.0]),
    "foreach_sub": (lambda: compat.foreach_sub(A, B), [[-2.0, -7.0], [[6.0]]]),
}


@pytest.mark.parametrize(("act", "expected"), INPLACE.values(), ids=INPLACE)
def test_foreach_in_place(act, expected):
    tensors = [tensor.clone() for tensor in A]
    act(tensors)
    for tensor, value in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, torch.tensor(value), rtol=0, atol=0)


@pytest.mark.parametrize(("values", "expected"), VALUES.values(), ids=VALUES)
def test_foreach(values, expected):
    for tensor, value in zip(values(), expected, strict=True):
        torch.testing.assert_close(tensor, torch.tensor(value))


def test_foreach_names_are_torchs_own():
    """A wrapper would cost time in every step."""
    names = [name for name in compat.__all__ if name.startswith("foreach")]
    assert names
    for name in names:
        assert getattr(compat, name) is getattr(torch, f"_{name}"), name


NORMS = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
INSTANCE_NORMS = [nn.InstanceNorm1d(2), nn.InstanceNorm2d(2), nn.InstanceNorm3d(2)]
CONVOLUTIONS = [kind(1, 1, 1) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)]
OTHERS = [nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.LSTM(1, 1), nn.Embedding(2, 2)]


@pytest.mark.parametrize(
    ("base", "members"),
    [
        (compat.NormBase, [*NORMS, *INSTANCE_NORMS]),
        (compat.BatchNormBase, NORMS),
        (compat.InstanceNormBase, INSTANCE_NORMS),
        (compat.ConvBase, CONVOLUTIONS),
    ],
)
def test_bases_cover_their_modules_only(base, members):
    every = [*NORMS, *INSTANCE_NORMS, *CONVOLUTIONS, *OTHERS]
    assert [module for module in every if isinstance(module, base)] == members


class Doubling:
    def __call__(self, _module, _args, output):
        return output * 2


class Adding:
    def __call__(self, _module, args, kwargs=None):
        return (args[0] + 1,) if kwargs is None else ((args[0] + 1,), kwargs)


def is_ours(hook):
    return isinstance(hook, (Doubling, Adding))


@pytest.mark.parametrize("with_kwargs", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_hooks_are_listed_and_removed(copied, with_kwargs):
    """Also in a copy, which the original's handles do not reach."""
    module = nn.Identity()
    module.register_forward_hook(Doubling(), always_call=True)
    module.register_forward_pre_hook(Adding(), with_kwargs=with_kwargs)
    module.register_forward_hook(keep := (lambda *_: None))
    module = copy.deepcopy(module) if copied else module
    assert module(torch.tensor(1.0)) == 4
    assert [type(hook) for hook in compat.forward_hooks(module)] == [Doubling, type(keep)]
    assert [type(hook) for hook in compat.forward_hook_table(module).values()] == [Doubling, type(keep)]
    assert [type(hook) for hook in compat.forward_pre_hooks(module)] == [Adding]
    compat.remove_forward_hooks(module, is_ours)
    compat.remove_forward_pre_hooks(module, is_ours)
    assert module(torch.tensor(1.0)) == 1
    assert [type(hook) for hook in compat.forward_hooks(module)] == [type(keep)]
    assert not compat.forward_pre_hooks(module)
    left = [name for name, value in vars(module).items() if "forward" in name and name != "_forward_hooks" and value]
    assert not left


def test_a_copy_leaves_out_the_hooks_of_a_replaced_table():
    module = nn.Identity()
    module.register_forward_hook(Doubling())
    clone = copy.deepcopy(module, {id(compat.forward_hook_table(module)): {}})
    assert not compat.forward_hooks(clone)
    assert len(compat.forward_hooks(module)) == 1


def test_a_child_is_registered_first():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    compat.register_first(model, "before", nn.Linear(2, 2, bias=False))
    assert [name for name, _ in model.named_children()] == ["before", "0", "1"]
    assert list(model.state_dict()) == ["before.weight", "0.weight", "0.bias"]
    assert model.get_submodule("before") is model[0]


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.MultiheadAttention(2, 1), nn.LSTM(2, 2)])
def test_reset_method_initialises(module):
    reset = compat.reset_method(module)
    assert reset is not None
    before = {name: parameter.clone() for name, parameter in module.named_parameters() if parameter.ndim > 1}
    reset()
    changed = {name for name, parameter in module.named_parameters() if parameter.ndim > 1}
    assert {name for name in changed if not torch.equal(module.get_parameter(name), before[name])}


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Sequential(nn.Linear(1, 1))])
def test_reset_method_is_none_without_one(module):
    assert compat.reset_method(module) is None


def test_scaler_state_says_whether_gradients_are_unscaled():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    states = [compat.scaler_state(scaler, optimizer)]
    assert states[0]["stage"].name == "READY"
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    assert compat.scaler_state(scaler, optimizer) is states[0]
    assert states[0]["stage"].name == "UNSCALED"
    scaler.step(optimizer)
    assert states[0]["stage"].name == "STEPPED"
    scaler.update()
    assert compat.scaler_state(scaler, optimizer) is not states[0]


@pytest.fixture
def states():
    """The states Accelerate shares in a process, restored afterwards."""
    found = [dict(state) for state in compat.accelerate_states(process=True)]
    yield
    for state, before in zip(compat.accelerate_states(process=True), found, strict=True):
        state.clear()
        state.update(before)


@pytest.mark.usefixtures("states")
def test_accelerators_share_states_that_can_be_set_apart():
    shared = compat.accelerate_states(process=True)
    assert len(shared) == 3
    assert len(compat.accelerate_states(process=False)) == 2
    for state in shared:
        state.clear()
    first = Accelerator(mixed_precision="no", cpu=True)
    assert all(shared)
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    for state, content in zip(shared, before, strict=True):
        state.clear()
        state.update(content)
    assert first.mixed_precision == "no"


@pytest.mark.usefixtures("states")
def test_prepared_objects_are_those_an_accelerator_holds():
    for state in compat.accelerate_states(process=True):
        state.clear()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = nn.Linear(2, 2)
    before = set(vars(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    models, optimizers = compat.prepared_objects(accelerator)
    assert models == [prepared]
    assert optimizers == [wrapped]
    assert prepared is model
    assert set(vars(model)) - before == {"forward", *compat.ACCELERATE_ATTRIBUTES}
    models.clear()
    optimizers.clear()
    assert compat.prepared_objects(accelerator) == [[], []]


def test_tree_map_keeps_types_and_stops_at_leaves():
    class Pair(NamedTuple):
        a: str
        b: dict[str, int]

    tree = {"x": [1, (2, None)], "y": Pair("text", {"z": 3})}
    assert compat.tree_leaves(tree) == [1, 2, None, "text", 3]
    assert compat.tree_leaves(tree, is_leaf=lambda node: isinstance(node, dict) and "z" in node)[-1] == {"z": 3}
    mapped = compat.tree_map(lambda leaf: [leaf], tree, is_leaf=lambda node: isinstance(node, tuple) and 2 in node)
    assert mapped == {"x": [[1], [(2, None)]], "y": Pair(["text"], {"z": [3]})}


def test_no_other_module_uses_private_names():
    root = Path(compat.__file__).parent
    private = re.compile(r"SLF001|\btorch(\.\w+)*\._[a-z]|from (torch|accelerate)[\w.]*(\._[\w.]* import| import \(?_)")
    found = {str(file.relative_to(root)) for file in root.rglob("*.py") if private.search(file.read_text("utf-8"))}
    assert found == {"compat.py", "layers/first_use.py"}  # the latter asks whether torch._dynamo was imported


@pytest.mark.parametrize(
    ("module", "hooked"),
    [
        (nn.Linear(2, 2), False),
        (nn.BatchNorm1d(2), False),
        (nn.InstanceNorm1d(2), False),
        (nn.LSTM(2, 2), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), True),
    ],
)
def test_has_load_hooks(module, hooked):
    assert compat.has_load_hooks(module) is hooked
    module.register_load_state_dict_pre_hook(lambda *_: None)
    assert compat.has_load_hooks(module)


def test_a_class_that_loads_in_its_own_way_has_load_hooks():
    class Own(nn.Linear):
        def _load_from_state_dict(self, *arguments):
            super()._load_from_state_dict(*arguments)

    assert compat.has_load_hooks(Own(2, 2))
    assert compat.has_load_hooks(type("Whole", (nn.Linear,), {"load_state_dict": lambda *_: None})(2, 2))


def test_hook_tables_are_those_that_loading_does_not_read():
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    module.register_state_dict_pre_hook(lambda *_: None)
    module.register_load_state_dict_post_hook(lambda *_: None)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    assert sum(map(len, compat.hook_tables(module))) == 3
    clone = copy.deepcopy(module, {id(table): type(table)() for table in compat.hook_tables(module)})
    assert not any(compat.hook_tables(clone))
    assert compat.has_load_hooks(clone)
    assert sum(map(len, compat.hook_tables(module))) == 3


def test_hooks_after_loading_are_listed_copied_and_removed():
    module = nn.Linear(2, 2)
    calls = []
    module.register_load_state_dict_post_hook(lambda *_: calls.append(1))
    module = copy.deepcopy(module)
    module.load_state_dict(module.state_dict())
    assert len(compat.after_loading(module)) == len(calls) == 1
    compat.after_loading(module).clear()
    module.load_state_dict(module.state_dict())
    assert len(calls) == 1


def test_graphs_are_forgotten():
    """A graph that was made of a frozen parameter gives it no gradient later, but for the one made anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(1, 2)).sum().backward()
    model[0].requires_grad_(True)
    compiled(torch.ones(1, 2)).sum().backward()
    if torch.__version__ < (2, 12):  # later ones look at requires_grad again
        assert model[0].weight.grad is None
    model.zero_grad()
    compat.forget_graphs()
    compiled(torch.ones(1, 2)).sum().backward()
    assert model[0].weight.grad is not None


def test_what_is_outside_graphs_runs_each_time():
    """A graph would hold the first value."""
    values = iter([1.0, 2.0])
    following = compat.outside_graphs(lambda: next(values))
    compiled = torch.compile(lambda x: x + following(), backend="aot_eager")
    assert [compiled(torch.zeros(1)).item() for _ in range(2)] == [1.0, 2.0]


def test_metadata_is_what_load_state_dict_reads():
    state = nn.BatchNorm1d(2).state_dict()
    assert compat.metadata_of(state)[""]["version"] == 2
    assert compat.metadata_of(dict(state)) == {}
    seen = []
    module = nn.BatchNorm1d(2)
    module.register_load_state_dict_pre_hook(lambda _, __, ___, metadata, *____: seen.append(metadata))
    module.load_state_dict(compat.with_metadata(dict(state), {"": {"version": 7}}))
    assert seen == [{"version": 7}]


def test_bundles_of_torchaudio_tell_their_url():
    pipelines = pytest.importorskip("torchaudio.pipelines")
    url = "https://download.pytorch.org/torchaudio/models/wav2vec2_fairseq_base_ls960.pth"
    assert compat.bundle_url(pipelines.WAV2VEC2_BASE) == url
    assert compat.bundle_url(pipelines.MMS_FA).startswith("https://dl.")
    assert compat.bundle_url(pipelines.HDEMUCS_HIGH_MUSDB) is None


def test_the_hooks_before_loading_are_listed():
    module = torch.nn.Linear(2, 2)
    assert compat.load_hook_tables(module) == [{}]
    seen = []
    module.register_load_state_dict_pre_hook(lambda *_: seen.append(1))
    module.load_state_dict(module.state_dict())
    compat.load_hook_tables(module)[0].clear()
    module.load_state_dict(module.state_dict())
    assert seen == [1]


def test_transformers_marks_what_it_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40)).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    new = [name for name, parameter in model.named_parameters() if not compat.filled_by_transformers(parameter)]
    assert new == ["classifier.weight", "classifier.bias"]


def test_a_convolution_takes_another_weight():
    """Padded as the module pads, by more than one mode; the bias is left out."""
    module = nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular")
    weight, inputs = torch.randn(3, 2, 3, 3), torch.randn(1, 2, 6, 6)
    expected = nn.functional.conv2d(nn.functional.pad(inputs, (1, 1, 1, 1), mode="circular"), weight, stride=2)
    torch.testing.assert_close(compat.convolved(module, inputs, weight), expected)


def test_each_name_has_a_test():
    tests = Path(__file__).read_text("utf-8")
    assert [name for name in compat.__all__ if not re.search(rf"\bcompat\.{name}\b", tests)] == []


def test_saved_by_node():
    values = torch.zeros(2, 3, requires_grad=True)
    assert compat.saved_by_node(values.log_softmax(1).grad_fn, "dim") == 1
    transposed = values.transpose(0, 1).grad_fn
    assert (compat.saved_by_node(transposed, "dim0"), compat.saved_by_node(transposed, "dim1")) == (0, 1)
    loss = torch.nn.functional.cross_entropy(values, torch.tensor([0, -7]), ignore_index=-7)
    assert compat.saved_by_node(loss.grad_fn, "ignore_index") % 2**64 == -7 % 2**64


def test_a_scheduler_marks_the_step_of_its_optimizer():
    """Each that is made after its mark was forgotten marks it again."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert not compat.has_scheduler(optimizer)
    for _ in range(2):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        assert compat.has_scheduler(optimizer)
        compat.forget_schedulers(optimizer)
        assert not compat.has_scheduler(optimizer)


def test_accumulates_tells_backward_from_grad():
    weight = nn.Parameter(torch.ones(2))
    found = []

    def squares():
        value = weight.square().sum()
        value.register_hook(lambda _: found.append(compat.accumulates(weight)))
        return value

    squares().backward()
    torch.autograd.grad(squares(), weight)
    squares().backward(inputs=[weight])
    assert found == [True, False, True]


def test_hooks_are_guarded():
    """Two models of a class share a graph, whatever their hooks, until graphs are guarded by them."""
    import torch._dynamo

    class Own(nn.Linear):
        pass

    torch._dynamo.config.skip_nnmodule_hook_guards = True
    assert not compat.hooks_are_guarded()
    compat.guard_hooks()
    assert compat.hooks_are_guarded()
    calls = []
    plain, hooked = Own(2, 2), Own(2, 2)
    hooked.register_forward_hook(lambda *_: calls.append(1))
    plain.compile(backend="eager")
    hooked.compile(backend="eager")
    plain(torch.ones(1, 2))
    hooked(torch.ones(1, 2))
    assert calls


def test_without_graphs():
    """No graph is made of what runs inside."""
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph

    compiled = torch.compile(nn.Linear(2, 2), backend=backend)
    with compat.without_graphs():
        compiled(torch.ones(1, 2))
    assert not made
    compiled(torch.ones(1, 2))
    assert made


def test_tf32_is_read_and_set_in_either_way():
    before = [get() for get, _ in compat.tf32_settings()]
    for _, put in compat.tf32_settings():
        put(True)
    assert [get() for get, _ in compat.tf32_settings()] == [True, True]
    assert torch.backends.cuda.matmul.allow_tf32
    for (_, put), value in zip(compat.tf32_settings(), before, strict=True):
        put(value)
    assert [get() for get, _ in compat.tf32_settings()] == before


def test_a_sharded_module_is_plain_again(tmp_path):
    """No hook, class or state of FSDP2 is left once its parameters are whole."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inputs = torch.ones(1, 2)
    expected = model(inputs)
    before = {name: {key: repr(value) for key, value in vars(one).items()} for name, one in model.named_modules()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compat.default_store().set("key", "value")
        assert compat.default_store().get("key") == b"value"
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(inputs).sum().backward()
        model.state_dict()
        model.load_state_dict(model.state_dict())
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(parameter.detach().full_tensor()))
        for module in model.modules():
            compat.plain_again(module)
    finally:
        dist.destroy_process_group()
    assert [type(module) for module in model.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
    after = {name: {key: repr(value) for key, value in vars(one).items()} for name, one in model.named_modules()}
    assert after == before
    torch.testing.assert_close(copy.deepcopy(model)(inputs), expected)


def test_a_tensor_counts_how_often_it_was_written_into():
    weight = torch.ones(2)
    before = compat.version_of(weight)
    weight.mul_(2)
    assert compat.version_of(weight) == before + 1
    with torch.inference_mode():
        assert compat.version_of(torch.ones(2)) == -1


def test_notes_on_an_operation_live_as_long_as_it():
    values = torch.ones(2, requires_grad=True) * 2
    compat.note_of(values.grad_fn)["pass"] = 3
    assert compat.note_of(values.sum().grad_fn.next_functions[0][0]) == {"pass": 3}


def test_a_checkpoint_computes_again_in_the_backward_pass():
    calls = []
    values = torch.ones(2, requires_grad=True)
    again = checkpoint(lambda x: calls.append(compat.in_backward()) or x.exp(), values, use_reentrant=False)
    again.sum().backward()
    assert calls == [False, True]
