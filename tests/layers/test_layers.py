"""The layers found in well-known models, and the laws that hold for every model."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from conservtl.errors import SelectorError, SpecError
from conservtl.layers import Layer, ParameterInfo, canonical, find_layers, matches, named_parameters, select, unwrap


def names(model, example=None, layers=None):
    return [layer.name for layer in find_layers(model, example, layers)]


def in_layers(found):
    return Counter(info.name for layer in found for info in layer.parameters)


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Block(nn.Module):
    def __init__(self, width, inner=None):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.inner = inner
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.down(self.up(self.norm(x)).relu())
        return x + (y if self.inner is None else self.inner(y))


class MoE(nn.Module):
    """Experts hold most of a block's weights, and stand in a list."""

    def __init__(self, width, count=4):
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(count)
        )

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class Head(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))

    def forward(self, x):
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x)


class GPTBlock(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.proj = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.proj(torch.cat([head(self.ln(x)) for head in self.heads], -1))


class GPT(nn.Module):
    def __init__(self, depth=3, width=8, vocabulary=11, *, tied=True):
        super().__init__()
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(16, width)
        self.h = nn.ModuleList(GPTBlock(width) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        if tied:
            self.wte.weight = self.lm_head.weight

    def forward(self, tokens, targets=None):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Recurrent(nn.Module):
    def __init__(self, levels=2, *, packed=False):
        super().__init__()
        self.packed = packed
        self.lstm = nn.LSTM(5, 6, levels, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(12, 3)

    def forward(self, x, lengths=None):
        if self.packed:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.lstm(x)
        return self.fc(pad_packed_sequence(y, batch_first=True)[0] if self.packed else y)


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, affine=False)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.head(self.drop(self.bn(self.conv(x))).mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()

    def forward(self, x):
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


class CifarResNet(nn.Module):
    def __init__(self, depth=3, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(width) for _ in range(depth))) for _ in range(3)
        )
        self.linear = nn.Linear(width, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


IMAGE = torch.zeros(1, 3, 224, 224)


class TestWellKnownModels:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", 10),  # stem, 8 blocks, fc
            ("vgg11_bn", 11),  # 8 convolutions with their norms, 3 linear
            ("mobilenet_v3_small", 15),  # stem, 11 inverted residuals, last convolution, 2 linear
            ("efficientnet_b0", 19),  # stem, 16 MBConv, last convolution, classifier
            ("convnext_tiny", 23),  # stem, 18 blocks, 3 downsamplings, classifier
            ("vit_b_16", 14),  # stem, 12 blocks, head
            ("swin_t", 17),  # patches, 12 blocks, 3 mergings, head
        ],
    )
    def test_torchvision(self, name, expected):
        model = on_meta(getattr(torchvision.models, name))
        found = find_layers(model, IMAGE)
        assert len(found) == expected
        assert found == find_layers(model)  # registered in the order of use
        assert in_layers(found) == Counter(named_parameters(model).keys())

    def test_resnet_names(self):
        found = find_layers(on_meta(torchvision.models.resnet18), IMAGE)
        blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
        assert [layer.name for layer in found] == ["conv1", *blocks, "fc"]
        assert found[0].modules == ("conv1", "bn1")
        assert found[0].parameters[0] == ParameterInfo("conv1.weight", (64, 3, 7, 7), "weight")
        assert [info.kind for info in found[0].parameters] == ["weight", "norm", "norm"]
        assert [info.kind for info in found[-1].parameters] == ["weight", "bias"]
        assert found[1].modules == ("layer1.0",)

    def test_vit_tokens_join_the_stem_and_the_last_norm_the_head(self):
        stem, *blocks, head = find_layers(on_meta(torchvision.models.vit_b_16), IMAGE)
        assert (stem.name, stem.modules) == ("conv_proj", ("conv_proj",))
        assert {"class_token", "encoder.pos_embedding"} < {info.name for info in stem.parameters}
        assert [block.name for block in blocks] == [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
        assert (head.name, head.modules) == ("heads", ("encoder.ln", "heads"))

    def test_stages_are_opened_and_blocks_kept(self):
        assert names(on_meta(torchvision.models.convnext_tiny))[:6] == [
            "features.0",
            "features.1.0",
            "features.1.1",
            "features.1.2",
            "features.2",
            "features.3.0",
        ]
        assert names(on_meta(torchvision.models.efficientnet_b0))[-2:] == ["features.8", "classifier"]

    def test_conformer(self):
        torchaudio = pytest.importorskip("torchaudio")
        model = torchaudio.models.Conformer(8, 2, 16, 3, 5)
        example = (torch.zeros(2, 20, 8), torch.tensor([20, 12]))
        assert names(model, example) == [f"conformer_layers.{i}" for i in range(3)]

    def test_wav2letter(self):
        torchaudio = pytest.importorskip("torchaudio")
        model = on_meta(torchaudio.models.Wav2Letter)
        rest = [f"acoustic_model.1.{i}" for i in range(0, 22, 2)]
        assert names(model, torch.zeros(1, 1, 4000)) == ["acoustic_model.0", *rest]

    def test_wav2vec2(self):
        torchaudio = pytest.importorskip("torchaudio")
        model = torchaudio.models.wav2vec2_model(
            extractor_mode="group_norm",
            extractor_conv_layer_config=None,
            extractor_conv_bias=False,
            encoder_embed_dim=32,
            encoder_projection_dropout=0.1,
            encoder_pos_conv_kernel=8,
            encoder_pos_conv_groups=2,
            encoder_num_layers=3,
            encoder_num_heads=2,
            encoder_attention_dropout=0.1,
            encoder_ff_interm_features=64,
            encoder_ff_interm_dropout=0.1,
            encoder_dropout=0.1,
            encoder_layer_norm_first=False,
            encoder_layer_drop=0.1,
            aux_num_out=5,
        )
        expected = [
            *(f"feature_extractor.conv_layers.{i}" for i in range(7)),
            "encoder.feature_projection",
            "encoder.transformer.pos_conv_embed",
            *(f"encoder.transformer.layers.{i}" for i in range(3)),
            "aux",
        ]
        found = find_layers(model, torch.zeros(1, 4000))
        assert [layer.name for layer in found] == expected
        # The norm after the positional convolution is its own; weight_norm's tensors count as parameters.
        assert found[8].modules == ("encoder.transformer.pos_conv_embed", "encoder.transformer.layer_norm")
        assert any("parametrizations.weight.original0" in info.name for info in found[8].parameters)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", 10),
            ("swin_tiny_patch4_window7_224", 17),
            ("convnext_tiny", 23),
            ("densenet121", 63),  # stem, 58 dense layers, 3 transitions, classifier
            ("regnety_002", 15),  # stem, 13 blocks held as attributes of their stages, head
        ],
    )
    def test_timm(self, name, expected):
        timm = pytest.importorskip("timm")
        assert len(find_layers(on_meta(timm.create_model, name))) == expected

    def test_cifar_resnet(self):
        blocks = [f"layer{stage}.{block}" for stage in range(1, 4) for block in range(3)]
        assert names(CifarResNet(), torch.zeros(1, 3, 8, 8)) == ["conv1", *blocks, "linear"]

    def test_speed(self):
        model = torchvision.models.vit_b_16(num_classes=2)
        find_layers(model, IMAGE)
        start = time.process_time()
        find_layers(model)
        middle = time.process_time()
        find_layers(model, IMAGE)
        # Wide margins: a few milliseconds and a tenth of a second on one idle core.
        assert middle - start < 0.3
        assert time.process_time() - middle < 1.2


class TestWhatALayerIs:
    def test_brackets(self):
        def bracket(i, o):
            return nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, 3), nn.ReLU())

        model = nn.Sequential(bracket(3, 4), bracket(4, 4), bracket(4, 4), nn.Flatten(), nn.Linear(4, 2))
        assert names(model) == ["0", "1", "2", "4"]

    def test_one_weight_makes_one_layer(self):
        def bracket(i, o):
            return nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU())

        assert names(nn.Sequential(bracket(3, 4), bracket(4, 5))) == ["0", "1"]

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_wrappers_swallow_nothing(self, length):
        backbone = CifarResNet(depth=length)
        inside = names(backbone)
        assert names(nn.Sequential(backbone, nn.Linear(10, 2))) == [*(f"0.{n}" for n in inside), "1"]
        assert names(nn.ModuleDict({"backbone": backbone})) == [f"backbone.{n}" for n in inside]

    def test_two_towers_are_opened(self):
        towers = nn.ModuleDict({"query": CifarResNet(depth=2), "document": CifarResNet(depth=2)})
        assert len(find_layers(towers)) == 2 * 8
        plain = [nn.Sequential(*(nn.Conv1d(4, 4, 3) for _ in range(5))) for _ in range(2)]
        assert len(find_layers(nn.ModuleList(plain))) == 2 * 5

    @pytest.mark.parametrize("make", [lambda: Block(8, MoE(8)), lambda: GPTBlock(8)])
    def test_experts_and_heads_do_not_split_a_block(self, make):
        model = nn.Sequential(nn.Linear(3, 8), *(make() for _ in range(3)), nn.LayerNorm(8), nn.Linear(8, 2))
        found = find_layers(model, torch.zeros(1, 4, 3))
        assert [layer.name for layer in found] == ["0", "1", "2", "3", "5"]
        assert found[-1].modules == ("4", "5")

    def test_a_lone_block_is_a_block(self):
        assert names(nn.ModuleDict({"h": nn.ModuleList([Block(4)]), "head": nn.Linear(4, 2)})) == [
            "h.0",
            "head",
        ]

    def test_an_odd_one_beside_blocks_is_a_block(self):
        class Last(Block):
            pass

        model = nn.ModuleDict({"h": nn.Sequential(Block(4), Block(4), Last(4)), "head": nn.Linear(4, 2)})
        assert names(model) == ["h.0", "h.1", "h.2", "head"]

    def test_torch_transformer(self):
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            2,
            nn.LayerNorm(8),
            enable_nested_tensor=False,
        )
        model = nn.Sequential(nn.Linear(3, 8), encoder, nn.Linear(8, 2))
        found = find_layers(model, torch.zeros(1, 4, 3))
        assert [layer.name for layer in found] == ["0", "1.layers.0", "1.layers.1", "2"]
        assert found[-1].modules == ("1.norm", "2")

    def test_pairs_of_attention_and_feed_forward(self):
        class Attention(Block):
            pass

        pairs = nn.ModuleList(nn.ModuleList([Attention(4), Block(4)]) for _ in range(3))
        assert names(nn.ModuleDict({"layers": pairs, "head": nn.Linear(4, 2)})) == [
            *(f"layers.{i}" for i in range(3)),
            "head",
        ]

    def test_a_norm_in_a_fresh_head_stays_with_the_head(self):
        body = nn.Sequential(*(nn.Conv1d(4, 4, 1) for _ in range(4)))
        head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))
        found = find_layers(nn.Sequential(body, head))
        assert [layer.modules for layer in found[-2:]] == [("1.0", "1.1", "1.3"), ("1.4",)]

    def test_recurrent_levels(self):
        found = find_layers(Recurrent(), torch.zeros(2, 7, 5))
        assert [(layer.name, layer.modules) for layer in found] == [
            ("lstm.0", ("lstm",)),
            ("lstm.1", ("lstm",)),
            ("fc", ("fc",)),
        ]
        assert {info.name.split("_l")[1] for info in found[1].parameters} == {"1", "1_reverse"}
        assert names(Recurrent(levels=1)) == ["lstm", "fc"]

    def test_embeddings_side_by_side_are_one_layer(self):
        found = find_layers(GPT(tied=False), torch.zeros(1, 4, dtype=torch.long))
        assert [layer.name for layer in found] == ["wte", "h.0", "h.1", "h.2", "lm_head"]
        assert found[0].modules == ("wte", "wpe")
        assert found[-1].modules == ("lm_head", "ln_f")

    def test_loose_parameters(self):
        class Loose(nn.Module):
            def __init__(self):
                super().__init__()
                self.token = nn.Parameter(torch.zeros(1, 1, 4))
                self.proj = nn.Linear(4, 4)
                self.scale = nn.Parameter(torch.zeros(4))

        (layer,) = find_layers(Loose())
        assert (layer.name, layer.modules, len(layer.parameters)) == ("proj", ("proj",), 4)

    def test_a_model_that_is_one_leaf(self):
        assert find_layers(nn.Linear(2, 3)) == (
            Layer(
                "Linear",
                (ParameterInfo("weight", (3, 2), "weight"), ParameterInfo("bias", (3,), "bias")),
                ("",),
            ),
        )
        assert names(nn.LayerNorm(3)) == ["LayerNorm"]
        assert names(nn.LSTM(2, 2, 2)) == ["LSTM.0", "LSTM.1"]

    def test_a_batch_norm_without_parameters_is_a_module_of_its_layer(self):
        assert find_layers(HeadFirst())[1].modules == ("conv", "bn")

    def test_no_parameters(self):
        for model in (nn.ReLU(), nn.BatchNorm1d(3, affine=False)):
            with pytest.raises(SpecError, match="must have parameters"):
                find_layers(model)

    def test_lazy_parameters(self):
        model = nn.Sequential(nn.LazyLinear(3))
        with pytest.raises(SpecError, match=r"'0\.weight' is lazy\. Call the model once"):
            find_layers(model)


class TestOrder:
    def test_head_registered_first(self):
        model = HeadFirst()
        assert names(model) == ["head", "conv"]
        assert names(model, torch.zeros(2, 3, 5, 5)) == ["conv", "head"]
        assert find_layers(model, torch.zeros(2, 3, 5, 5))[0].modules == ("conv", "bn")

    @settings(max_examples=30, deadline=None)
    @given(st.permutations(range(5)))
    def test_order_is_that_of_use_not_of_registration(self, order):
        class Chain(nn.Module):
            def __init__(self):
                super().__init__()
                for index in order:
                    self.add_module(f"step{index}", nn.Linear(3, 3))

            def forward(self, x):
                for index in range(5):
                    x = getattr(self, f"step{index}")(x)
                return x

        assert names(Chain(), torch.zeros(1, 3)) == [f"step{i}" for i in range(5)]

    def test_tied_weights_come_once_where_first_used(self):
        found = find_layers(GPT(), torch.zeros(1, 4, dtype=torch.long))
        assert found[0].name == "lm_head"
        assert in_layers(found)["lm_head.weight"] == 1
        info = next(info for info in found[0].parameters if info.name == "lm_head.weight")
        assert info.aliases == ("wte.weight",)

    def test_shared_blocks_are_one_layer(self):
        block = Block(4)
        assert names(nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[block] * 6), nn.Linear(4, 2))) == [
            "0",
            "1.0",
            "2",
        ]

    def test_unused_units_stay_behind_their_predecessor(self):
        class Auxiliary(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(2, 2)
                self.first = nn.Linear(2, 2)
                self.unused = nn.Linear(2, 2)

            def forward(self, x):
                return self.out(self.first(x))

        assert names(Auxiliary(), torch.zeros(1, 2)) == ["first", "unused", "out"]

    def test_questions_about_a_parameter_are_no_use_of_it(self):
        class Asks(HeadFirst):
            def forward(self, x):
                return super().forward(x.to(self.head.weight.dtype).reshape(-1, 3, *x.shape[2:]))

        assert names(Asks(), torch.zeros(2, 3, 5, 5)) == ["conv", "head"]

    @pytest.mark.parametrize(
        "example",
        [
            torch.zeros(2, 3, 5, 5),
            (torch.zeros(2, 3, 5, 5),),
            [torch.zeros(2, 3, 5, 5), torch.tensor([0, 1])],
            {"x": torch.zeros(2, 3, 5, 5)},
        ],
        ids=["tensor", "arguments", "inputs and labels", "keywords"],
    )
    def test_calling_conventions(self, example):
        assert names(HeadFirst(), example) == ["conv", "head"]

    def test_packed_sequences(self):
        example = (torch.zeros(2, 7, 5), torch.tensor([7, 3]))
        assert names(Recurrent(packed=True), example) == ["lstm.0", "lstm.1", "fc"]

    def test_a_model_that_looks_at_its_values(self):
        class Looks(HeadFirst):
            def forward(self, x):
                return super().forward(x + 1 if x.sum().item() == 0 else x)

        assert names(Looks(), torch.zeros(2, 3, 5, 5)) == ["conv", "head"]

    def test_parametrized(self):
        model = HeadFirst()
        nn.utils.parametrizations.weight_norm(model.conv)
        nn.utils.parametrizations.spectral_norm(model.head)
        assert names(model, torch.zeros(2, 3, 5, 5)) == ["conv", "head"]

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_old_weight_norm_after_a_training_step(self):
        model = HeadFirst()
        nn.utils.weight_norm(model.conv)
        model(torch.zeros(2, 3, 5, 5)).sum().backward()
        assert names(model, torch.zeros(2, 3, 5, 5)) == ["conv", "head"]

    def test_an_example_that_does_not_fit(self):
        with pytest.raises(SpecError, match=r"example: the model must accept it; received Tensor.*RuntimeError: "):
            find_layers(HeadFirst(), torch.zeros(2, 4, 5, 5))


class TestWrappers:
    def test_unwrap_nested(self):
        model = HeadFirst()
        wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
        assert unwrap(wrapped) is model
        assert unwrap(torch.compile(wrapped, backend="eager")) is model
        assert unwrap(model) is model

    def test_averages_of_models_are_wrappers_by_their_class_and_their_child(self):
        model = HeadFirst()

        class EMA(nn.Module):
            def __init__(self, **children):
                super().__init__()
                for name, child in children.items():
                    self.add_module(name, child)

        average = torch.optim.swa_utils.AveragedModel(model)
        assert unwrap(average) is average.module
        assert unwrap(EMA(module=model)) is model
        assert unwrap(EMA(ema_model=model, online_model=HeadFirst())) is model
        other = EMA(encoder=model)
        assert unwrap(other) is other

    def test_an_attribute_called_module_is_kept(self):
        model = nn.ModuleDict({"module": nn.Linear(2, 2)})
        assert unwrap(model) is model
        assert list(named_parameters(nn.DataParallel(model))) == ["module.weight", "module.bias"]

    def test_layers_do_not_depend_on_wrappers(self):
        example = torch.zeros(2, 3, 8, 8)
        expected = find_layers(CifarResNet(), example)
        assert find_layers(nn.DataParallel(CifarResNet()), example) == expected
        assert find_layers(torch.compile(CifarResNet(), backend="eager"), example) == expected

    def test_wrappers_inside(self):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model = CifarResNet()
        expected = find_layers(model)
        model.layer1 = torch.compile(model.layer1, backend="eager")
        model.layer2 = nn.Sequential(*(checkpoint_wrapper(block) for block in model.layer2))
        assert find_layers(model) == expected
        assert find_layers(model, torch.zeros(2, 3, 8, 8)) == expected

    def test_canonical(self):
        assert canonical("a._fsdp_wrapped_module.b._checkpoint_wrapped_module._orig_mod.c") == "a.b.c"
        assert canonical("module.a") == "module.a"


class TestModelLeftAsFound:
    @pytest.mark.parametrize("real", [False, True], ids=["on meta", "real copy"])
    def test_nothing_changes(self, real):
        class Noisy(HeadFirst):
            def forward(self, x):
                random.random()
                noise = torch.rand_like(x)
                x += 1
                self.conv.bias.add_(1)  # even a forward that writes to its parameters
                if real:
                    x.sum().item()
                return super().forward(x + noise)

        model = Noisy().train()
        model.bn.eval()
        calls = []
        model.conv.register_forward_hook(lambda *args: calls.append(args))
        before, flags = snapshot(model), [module.training for module in model.modules()]
        states = torch.get_rng_state(), random.getstate()

        example = torch.zeros(2, 3, 5, 5)
        assert names(model, example) == ["conv", "head"]

        assert not example.any()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert flags == [module.training for module in model.modules()]
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert not calls


class TestOwnCut:
    def test_each_glob_is_a_layer(self):
        found = find_layers(CifarResNet(), layers=["[cb]*1", "layer[12]", "layer3", "linear"])
        assert [layer.name for layer in found] == ["[cb]*1", "layer[12]", "layer3", "linear"]
        assert [layer.modules for layer in found] == [
            ("conv1", "bn1"),
            ("layer1", "layer2"),
            ("layer3",),
            ("linear",),
        ]

    def test_the_order_is_the_users(self):
        assert names(HeadFirst(), layers=["conv", "head"]) == ["conv", "head"]

    def test_a_batch_norm_without_parameters_follows_its_predecessor(self):
        first, second = find_layers(HeadFirst(), layers=["conv", "head"])
        assert first.modules == ("conv", "bn")
        assert second.modules == ("head",)
        assert find_layers(HeadFirst(), layers=["conv", "[bh]*"])[1].modules == ("head", "bn")

    def test_two_globs_may_not_match_one_parameter(self):
        with pytest.raises(SelectorError, match=r"\['layer\*', 'layer1'\] match 'layer1\.0\.conv1\.weight'"):
            find_layers(CifarResNet(), layers=["conv1", "bn1", "layer*", "layer1", "linear"])

    def test_the_same_glob_twice(self):
        with pytest.raises(SelectorError, match=r"\['conv', 'conv'\]"):
            find_layers(HeadFirst(), layers=["conv", "conv", "head"])

    def test_every_parameter_must_be_matched(self):
        with pytest.raises(SelectorError, match=r"matches head\.weight, head\.bias"):
            find_layers(HeadFirst(), layers=["conv"])

    def test_every_glob_must_match(self):
        with pytest.raises(SelectorError, match=r"'hed'.*Did you mean 'head'"):
            find_layers(HeadFirst(), layers=["conv", "hed"])

    def test_a_string_is_no_list(self):
        with pytest.raises(SelectorError, match=r"Write layers=\['conv'\]"):
            find_layers(HeadFirst(), layers="conv")


class TestSelect:
    def test_a_modules_name_selects_what_is_in_it(self):
        assert matches("layer1", "layer1.0.conv1.weight")
        assert matches("layer1", "layer1")
        assert not matches("layer1", "layer10.0.conv1.weight")
        assert matches("*.bias", "a.b.bias")
        assert not matches("Layer1", "layer1")

    def test_select(self):
        everything = ["a.weight", "a.bias", "b.weight"]
        assert select(["*.weight", "a"], everything) == {
            "*.weight": ("a.weight", "b.weight"),
            "a": ("a.weight", "a.bias"),
        }
        assert select([], everything) == {}

    def test_nothing_matched_names_the_nearest(self):
        everything = list(named_parameters(CifarResNet()))
        with pytest.raises(SelectorError, match=r"'layr2\.\*': must match at least one layer.*Did you mean 'layer2'"):
            select(["layr2.*"], everything, what="layer")
        with pytest.raises(SelectorError, match="There are none"):
            select(["x"], [])


def leaves():
    return st.sampled_from(
        [
            lambda: nn.Linear(4, 4),
            lambda: nn.LayerNorm(4),
            lambda: nn.BatchNorm1d(4, affine=False),
            lambda: nn.PReLU(),
            lambda: nn.ReLU(),
            lambda: Block(4),
            lambda: Block(4, MoE(4, count=2)),
        ]
    )


def nested(parts):
    """Makers of nested models on (n, 4), such as Sequential(Linear, Wrapper(LayerNorm, Block))."""

    class Wrapper(nn.Sequential):
        def __init__(self, *modules):
            super().__init__(*modules)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return super().forward(x) * self.scale

    containers = st.sampled_from([nn.Sequential, Wrapper])
    return st.builds(
        lambda make, makers: lambda: make(*(maker() for maker in makers)),
        containers,
        st.lists(parts, min_size=1, max_size=4),
    )


@settings(max_examples=60, deadline=None)
@given(st.recursive(leaves(), nested, max_leaves=12))
def test_laws_for_any_model(make):
    """Every parameter is in one layer, every batch norm too, names are unique, wrappers change nothing."""
    model = nn.Sequential(nn.Linear(4, 4), make())
    found = find_layers(model)
    assert in_layers(found) == Counter(named_parameters(model).keys())
    assert all(layer.parameters and layer.modules for layer in found)
    assert len({layer.name for layer in found}) == len(found)
    listed = Counter(module for layer in found for module in layer.modules)
    assert max(listed.values()) == 1
    assert all(
        any(matches(name, norm) for name in listed)
        for norm, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d)
    )
    assert find_layers(nn.DataParallel(model)) == found
    used = find_layers(model, torch.zeros(2, 4))
    assert in_layers(used) == in_layers(found)
    assert {layer.name for layer in used} == {layer.name for layer in found}


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 4), st.booleans())
def test_own_cut_by_the_names_found_is_the_cut_found(depth, tied):
    model = GPT(depth, tied=tied)
    found = find_layers(model)
    globs = [module for layer in found for module in layer.modules]
    cut = find_layers(model, layers=globs)
    assert in_layers(cut) == in_layers(found)
    assert [layer.modules for layer in cut] == [(name,) for name in globs]


class TestAdapters:
    """An adapter of PEFT belongs to the weight that it changes, and a head's trained copy to the head."""

    def test_one_layer_a_weight(self):
        peft = pytest.importorskip("peft")
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        config = peft.LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["3"])
        found = find_layers(peft.get_peft_model(model, config))
        assert [layer.name for layer in found] == [f"base_model.model.{place}" for place in (0, 1, 3)]
        assert [info.name.rpartition("model.1.")[2] for info in found[1].parameters] == [
            "base_layer.weight",
            "base_layer.bias",
            "lora_A.default.weight",
            "lora_B.default.weight",
        ]


class Rescaled(nn.Module):
    """Divides the weights of its blocks in place before it embeds, as RWKV does."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, ids):
        with torch.no_grad():
            self.block.weight.div_(1)
        return self.out(self.block(self.embed(ids)))


def test_a_weight_changed_in_place_is_not_used_by_that():
    assert names(Rescaled(), torch.zeros(1, 2, dtype=torch.long)) == ["embed", "block", "out"]


def test_an_unused_token_stays_with_its_encoder():
    """`weights` is used late; the token that training alone uses is of the encoder behind it."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.first, self.second = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4), nn.Linear(4, 4)

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.encoder, self.head = nn.Parameter(torch.ones(4)), Encoder(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.encoder.second(self.encoder.first(x)) * self.weights)

    held = {layer.name: [i.name for i in layer.parameters] for layer in find_layers(Summed(), torch.zeros(1, 4))}
    assert held["encoder.first"] == ["encoder.token", "encoder.first.weight", "encoder.first.bias"]


def test_the_message_is_that_of_the_likeliest_call():
    class Two(nn.Linear):
        def forward(self, x, lengths):
            raise RuntimeError("lengths must be positive")

    with pytest.raises(SpecError, match="lengths must be positive"):
        find_layers(Two(2, 2), (torch.zeros(1, 2), torch.zeros(1)))
