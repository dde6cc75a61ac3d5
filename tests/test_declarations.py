"""Declarations of own models: what the mechanism cannot carry is refused in one line, and the rest is left alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from jointopt import Block, Branch, Family, JointoptError, Layer, Part, SearchSpace, SkipBranch, Supernet, Width
from search_spaces.clones import structural_clone
from search_spaces.llama import declare as declare_llama
from tests.zoo import make

INPUTS = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
Declare = Callable[[nn.Module], Family]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.down(torch.relu(self.up(input)))


class Looped(nn.Module):
    """Runs through lists of blocks by these names."""

    def __init__(self, *lists: str, blocks: int = 4) -> None:
        super().__init__()
        self.lists = lists
        for name in lists:
            self.add_module(name, nn.ModuleList(Residual() for _ in range(blocks)))

    def forward(self, input: Tensor) -> Tensor:
        for name in self.lists:
            for block in self.get_submodule(name):
                input = block(input)
        return input


class Named(nn.Module):
    """Keeps its blocks in a dict, and runs through it or asks for each."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name, self.blocks = by_name, nn.ModuleDict({name: Residual() for name in ("first", "second", "third")})

    def forward(self, input: Tensor) -> Tensor:
        names = ("first", "second", "third") if self.by_name else self.blocks
        for name in names:
            input = self.blocks[name](input)
        return input


class Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = Residual(), Residual(), nn.Linear(32, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(self.second(self.first(input)))


def declaring(paths: Sequence[str], **block: Any) -> Declare:
    """Blocks at these paths, each with an elastic width and two layers that can be quantized."""

    def declare(model: nn.Module) -> Family:
        blocks, widths, layers = [], [], []
        for index, path in enumerate(paths):
            name = f"block{index}"
            blocks.append(Block(name, path, **block))
            widths.append(Width(f"{name}.mlp", "mlp", 48, (Part(f"{path}.up"),), (Part(f"{path}.down"),), block=name))
            layers += [Layer(f"{name}.{each}", f"{path}.{each}", f"{name}.{each}", name) for each in ("up", "down")]
        return Family("own", tuple(blocks), tuple(widths), tuple(layers))

    return declare


def with_changes(declare: Declare, **entries: Callable[[Any], Any]) -> Declare:
    """The declaration with a function applied to all entries of a kind."""

    def changed(model: nn.Module) -> Family:
        family = declare(model)
        return replace(family, **{name: tuple(map(to, getattr(family, name))) for name, to in entries.items()})

    return changed


def calibrated(model: nn.Module, declare: Declare, **architecture: Any) -> Supernet:
    model.eval()
    space = SearchSpace.for_model(model, ["none", "W8A8"], family=declare, **{"mlp": [24, 48], **architecture})
    supernet = Supernet(model, space, family=declare)
    supernet.calibrate([{"input": INPUTS}])
    return supernet


def refusal(model: nn.Module, declare: Declare, **architecture: Any) -> str:
    with pytest.raises(JointoptError) as caught:
        calibrated(model, declare, **architecture)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def products(model: nn.Module) -> int:
    return sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))


LEFT_ALONE: Mapping[str, tuple[Callable[[], nn.Module], Sequence[str]]] = {
    "a list of which some are declared": (lambda: Looped("blocks"), [f"blocks.{index}" for index in range(3)]),
    "another order": (lambda: Looped("blocks"), [f"blocks.{index}" for index in (2, 0, 3, 1)]),
    "two lists": (lambda: Looped("a", "b", blocks=2), ["a.0", "a.1", "b.0", "b.1"]),
    "attributes": (Attributes, ["first", "second"]),
    "a dict, asked by name": (lambda: Named(True), [f"blocks.{name}" for name in ("first", "second", "third")]),
    "the model itself": (lambda: nn.Sequential(nn.Linear(32, 32), Residual(), Residual()), ["1", "2"]),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_holds_the_blocks_stays_as_it_is_where_none_of_them_leaves(case):
    made, paths = LEFT_ALONE[case]
    model = made()
    supernet = calibrated(model, declaring(paths))
    with torch.no_grad():
        torch.testing.assert_close(supernet.extract(supernet.space.largest)(INPUTS), model(INPUTS))
    for genome in (supernet.space.largest, supernet.space.smallest):
        assert supernet.costs(genome)["macs"] == products(supernet.extract(genome))


@pytest.mark.parametrize("architecture", [{"depth": [1, 3]}, {"keep": True}])
def test_a_list_that_blocks_leave_holds_declared_blocks_alone(architecture):
    found = refusal(Looped("blocks"), declaring(["blocks.0", "blocks.1", "blocks.2"]), **architecture)
    assert found.startswith("own: blocks that depth counts may leave blocks, whose 3 it does not count; allowed: ")
    assert "removable=False" in found


def test_a_block_that_never_leaves_is_declared_as_one_and_stays():
    paths = [f"blocks.{index}" for index in range(4)]
    last_stays = with_changes(declaring(paths), blocks=lambda block: replace(block, removable=block.name != "block3"))
    model = Looped("blocks")
    supernet = calibrated(model, last_stays, depth=[1, 4])
    (block,) = supernet.extract(supernet.space.smallest).blocks
    assert torch.equal(block.down.bias, model.blocks[3].down.bias)


def test_blocks_that_leave_the_model_itself_are_refused():
    found = refusal(Attributes(), declaring(["first", "second"]), depth=[1, 2])
    assert "may leave the model itself, whose out it does not count" in found


def test_blocks_that_leave_are_declared_in_the_order_of_their_list():
    found = refusal(Looped("blocks"), declaring([f"blocks.{index}" for index in (0, 2, 1, 3)]), depth=[2, 4])
    assert "are declared as 0, 2, 1, 3; allowed: in its order, 0, 1, 2, 3" in found


def test_one_depth_gene_counts_the_blocks_of_one_list():
    paths = ["a.0", "a.1", "b.0", "b.1"]
    found = refusal(Looped("a", "b", blocks=2), declaring(paths), depth=[2, 4])
    assert found.endswith("may leave a, and it counts b.0 too; allowed: a Block(stage=) for each list")


def test_two_lists_with_a_depth_gene_each_lose_blocks_of_their_own():
    by_list = with_changes(
        declaring(["a.0", "a.1", "b.0", "b.1"]), blocks=lambda block: replace(block, stage=f"{block.path[0]}.depth")
    )
    supernet = calibrated(Looped("a", "b", blocks=2), by_list, depth=[1, 2])
    for genome in supernet.space.sample(8, seed=0):
        extracted, chosen = supernet.extract(genome), supernet.space.decode(genome)
        assert (len(extracted.a), len(extracted.b)) == (chosen["a.depth"], chosen["b.depth"])
        assert supernet.costs(genome)["macs"] == products(extracted)


def test_blocks_of_a_dict_keep_their_names_where_others_leave():
    paths = [f"blocks.{name}" for name in ("first", "second", "third")]
    supernet = calibrated(Named(by_name=False), declaring(paths), depth=[2, 3])
    extracted = supernet.extract(supernet.space.smallest)
    assert len(extracted.blocks) == 2 and set(extracted.blocks) < {"first", "second", "third"}
    assert all(extracted.get_submodule(each["name"]) for each in supernet.layout(supernet.space.smallest))


def test_blocks_that_the_forward_pass_asks_for_by_name_cannot_leave():
    paths = [f"blocks.{name}" for name in ("first", "second", "third")]
    found = refusal(Named(by_name=True), declaring(paths), depth=[2, 3])
    assert "the smallest sub-network does not run: KeyError" in found and "none by its index or name" in found


def test_a_block_that_leaves_shares_no_tensor_with_what_stays():
    model = Looped("blocks", blocks=3)
    model.blocks[2].down.bias = model.blocks[0].down.bias

    def without_widths(model: nn.Module) -> Family:
        return replace(declaring([f"blocks.{index}" for index in range(3)])(model), widths=())

    found = refusal(model, without_widths, mlp=None, depth=[2, 3])
    assert found.startswith("own: blocks.0.down.bias is also that of blocks.2.down, which stays where block0 leaves")


@pytest.mark.parametrize("shared", ["up", "down"])
def test_a_width_of_layers_that_share_a_weight_with_others_is_refused(shared):
    model = Looped("blocks", blocks=3)
    model.blocks[2].get_submodule(shared).weight = model.blocks[0].get_submodule(shared).weight
    found = refusal(model, declaring(["blocks.0", "blocks.1"]))
    assert f"blocks.0.{shared}, which width 'block0.mlp' names" in found
    assert f"shares a tensor with blocks.2.{shared}" in found and "leave the width out" in found


def test_two_blocks_have_two_names_and_two_paths():
    declare = declaring(["blocks.0", "blocks.1"])
    found = refusal(Looped("blocks"), with_changes(declare, blocks=lambda block: replace(block, name="one")))
    assert found == "own: found two blocks of the name 'one'; allowed: one"
    found = refusal(Looped("blocks"), with_changes(declare, blocks=lambda block: replace(block, path="blocks.0")))
    assert found == "own: found two blocks of the path 'blocks.0'; allowed: one"


@pytest.mark.parametrize(("kind", "named"), [("layers", "layer 'blocks.0.up'"), ("widths", "width 'block0.mlp'")])
def test_a_block_that_is_not_declared_is_named_with_what_lives_in_it(kind, named):
    declare = with_changes(declaring(["blocks.0"]), **{kind: lambda each: replace(each, block="blokc0")})
    found = refusal(Looped("blocks"), declare)
    assert found.startswith(f"own: {named} is declared to live in block 'blokc0', which is not declared; did you mean")


def test_a_branch_stands_for_what_the_model_has():
    branch = Branch("mlp", {"blocks.0.mpl": SkipBranch})
    found = refusal(Looped("blocks"), declaring(["blocks.0"], branches=(branch,)))
    assert found == "own: the declaration names 'blocks.0.mpl', which the model lacks"


def test_a_declaration_is_of_tuples_since_it_is_read_more_than_once():
    def declare(model: nn.Module) -> Family:
        family = declaring(["blocks.0"])(model)
        return replace(family, layers=(layer for layer in family.layers))

    assert refusal(Looped("blocks"), declare) == "own: layers: found a generator; allowed: a tuple of Layers"


def test_entries_of_another_kind_and_no_declaration_at_all_are_refused():
    swapped = with_changes(declaring(["blocks.0"]), widths=lambda width: Layer("up", "blocks.0.up", "up"))
    assert refusal(Looped("blocks"), swapped) == "own: widths: found a Layer; allowed: a tuple of Widths"
    assert "family: found None; allowed: a function that returns a Family" in refusal(
        Looped("blocks"), lambda model: None
    )


def test_a_width_through_a_depthwise_convolution_counts_its_groups():
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.each, self.down = nn.Conv2d(1, 20, 1), nn.Conv2d(20, 20, 3, groups=20), nn.Conv2d(20, 5, 1)

        def forward(self, input: Tensor) -> Tensor:
            return self.down(self.each(self.up(input.view(-1, 1, 4, 8))))

    def declare(model: nn.Module) -> Family:
        width = Width("hidden", "mlp", 20, (Part("up"), Part("each")), (Part("down"),))
        return Family("own", (), (width,), tuple(Layer(name, name, name) for name in ("up", "each", "down")))

    assert "allowed: Width(..., attributes=(('each', 'groups', 1),))" in refusal(Depthwise(), declare, mlp=[10, 20])


class Gated(nn.Module):
    """The gate's rows follow all of the hidden channels' in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 96), nn.Linear(48, 32)

    def forward(self, input: Tensor) -> Tensor:
        hidden, gate = self.up(input).chunk(2, -1)
        return self.down(hidden * torch.sigmoid(gate))


def test_a_width_whose_sorting_changes_the_function_is_refused():
    def declare(model: nn.Module) -> Family:
        width = Width("hidden", "mlp", 48, (Part("up", 2),), (Part("down"),))
        return Family("own", (), (width,), (Layer("up", "up", "up"), Layer("down", "down", "down")))

    found = refusal(Gated(), declare)
    assert found.startswith("own: with its widths sorted by importance the whole model computes something else")


def test_a_configure_that_changes_the_whole_model_is_refused():
    def halved(model: Any, kept: Sequence[Block]) -> None:
        model.lists = ("a",)

    declare = declaring(["a.0", "a.1"])
    found = refusal(Looped("a", "b", blocks=2), lambda model: replace(declare(model), configure=halved))
    assert "a configure that changes nothing where all blocks stay" in found


def counting(model: Looped) -> Looped:
    """With blocks that each know the number of their cache."""
    for index, block in enumerate(model.get_submodule("blocks")):
        block.layer_idx = index
    return model


def cache_numbers(supernet: Supernet) -> list[int]:
    return [block.layer_idx for block in supernet.extract(supernet.space.smallest).blocks]


@pytest.mark.parametrize("declared", [(1, 2, 3), (2, 0, 3, 1)])
def test_caches_are_numbered_as_they_were_where_no_block_leaves(declared):
    declare = declaring([f"blocks.{index}" for index in declared])
    assert cache_numbers(calibrated(counting(Looped("blocks")), declare)) == [0, 1, 2, 3]


def test_caches_are_numbered_anew_where_blocks_leave():
    declare = declaring([f"blocks.{index}" for index in range(4)])
    assert cache_numbers(calibrated(counting(Looped("blocks")), declare, depth=[2, 4])) == [0, 1]


def test_a_cache_s_window_is_of_one_token_or_more():
    blind = with_changes(declare_llama, caches=lambda cache: replace(cache, window=0))
    with pytest.raises(JointoptError, match=r"cache 'block0\.cache': window: found 0; allowed: a whole number from 1"):
        SearchSpace.for_model(make("llama_tied"), schemes=["none"], family=blind)


class OfSixteen(Looped):
    def forward(self, input: Tensor) -> Tensor:
        assert len(input) == 16
        return super().forward(input)


def test_a_model_that_asserts_how_many_samples_it_takes_is_calibrated():
    assert calibrated(OfSixteen("blocks"), declaring(["blocks.0", "blocks.1"])).calibrated


class Ends(NamedTuple):
    first: nn.Module
    last: nn.Module


class Keeping(Residual):
    """A block that runs its layers by what it keeps of them."""

    def __init__(self, keep: Callable[[Any], Any]) -> None:
        super().__init__()
        self.steps = keep(self)

    def widened(self, input: Tensor) -> Tensor:
        return torch.relu(self.up(input))

    def forward(self, input: Tensor) -> Tensor:
        hidden = input
        for step in self.steps.values() if isinstance(self.steps, dict) else self.steps:
            hidden = step(hidden)
        return input + hidden


KEPT: Mapping[str, Callable[[Any], Any]] = {
    "a list": lambda block: [block.up, torch.relu, block.down],
    "a tuple": lambda block: (block.up, torch.relu, block.down),
    "a deque": lambda block: deque([block.up, torch.relu, block.down]),
    "a dict": lambda block: {"up": block.up, "act": torch.relu, "down": block.down},
    "methods": lambda block: [block.widened, block.down.__call__],
    "partials": lambda block: [partial(Keeping.widened, block), partial(block.down)],
}


class Ordered(nn.Module):
    """Runs through a list of its blocks beside that in which they are registered."""

    def __init__(self, keep: Callable[[Any], Any], order: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Keeping(keep) for _ in range(4))
        self.order, self.ends = order(self), [Ends(nn.Linear(32, 32), nn.Linear(32, 3))]
        self.first, self.last = self.ends[0]

    def forward(self, input: Tensor) -> Tensor:
        input = self.ends[0].first(input)
        for group in self.order:
            for block in group:
                input = block(input)
        return self.ends[0].last(input)


class Plain(nn.Module):
    """The same, without."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(4))
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, input: Tensor) -> Tensor:
        input = self.first(input)
        for block in self.blocks:
            input = block(input)
        return self.last(input)


def declare_ordered(model: nn.Module) -> Family:
    family = declaring([f"blocks.{index}" for index in range(4)])(model)
    ends = tuple(Layer(name, name, name) for name in ("first", "last"))
    blocks = (replace(each, branches=(Branch("mlp", {f"{each.path}.down": SkipBranch}),)) for each in family.blocks)
    return replace(family, blocks=tuple(blocks), layers=family.layers + ends)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("order", ["modules", "methods"])
def test_modules_that_attributes_keep_in_plain_containers_are_the_sub_network_s(kept, order):
    orders = {
        "modules": lambda model: [tuple(model.blocks[:2]), list(model.blocks[2:])],
        "methods": lambda model: [[block.__call__ for block in model.blocks]],
    }
    model, plain = Ordered(KEPT[kept], orders[order]), Plain()
    plain.load_state_dict(model.state_dict())
    found, expected = (calibrated(each, declare_ordered, depth=[1, 2, 4], mlp_keep=True) for each in (model, plain))
    space = found.space
    for genome in (space.largest, space.smallest, *space.sample(8, seed=0)):
        extracted, wanted = found.extract(genome), expected.extract(genome)
        with torch.no_grad(), found.active(genome) as view:
            assert torch.equal(view(INPUTS), wanted(INPUTS)) and torch.equal(extracted(INPUTS), wanted(INPUTS))
        assert torch.equal(*(each.training_view(genome, True)(INPUTS) for each in (found, expected)))


def test_a_container_that_holds_itself_is_the_sub_network_s_too():
    model = Looped("blocks")
    model.tree = {"blocks": [model.blocks[0], model.blocks[1]]}
    model.tree["itself"] = model.tree
    shell = structural_clone(model)
    assert shell.tree["blocks"][0] is shell.blocks[0] and model.tree["blocks"][0] is model.blocks[0]


def test_a_bound_forward_still_says_what_it_wraps():
    """As accelerate's hooks leave it; what a model takes is read off it."""
    model = Looped("blocks")
    model.forward = update_wrapper(partial(type(model).forward, model), type(model).forward)
    shell = structural_clone(model)
    assert signature(shell.forward) == signature(model.forward) and shell.forward.args == (shell,)


def test_modules_that_are_kept_where_they_cannot_follow_are_refused():
    def hidden(block: Any) -> Any:
        return [lambda input: block.up(input), torch.relu, block.down]

    found = refusal(Ordered(hidden, lambda model: [model.blocks]), declare_ordered)
    assert found.startswith(
        "own: the smallest sub-network does not run its own blocks.0.up, but that of the model from"
    )


def test_of_parameters_that_are_kept_beside_their_modules_is_warned():
    model = Looped("blocks")
    model.weights = [model.blocks[1].up.weight]
    with pytest.warns(UserWarning, match="own: weights keeps a parameter of a layer; where the forward pass reads it"):
        calibrated(model, declaring(["blocks.0", "blocks.1"]))


def test_a_forward_that_holds_its_model_is_refused():
    model = Looped("blocks")
    model.forward = torch.no_grad()(model.forward)
    found = refusal(model, declaring(["blocks.0", "blocks.1"]))
    assert found.startswith("own: forward is a function that holds what it runs")


class Unreached(Residual):
    def forward(self, input: Tensor) -> Tensor:
        return input + self.down.forward(torch.relu(self.up(input)))


def test_a_width_whose_consumer_no_batch_reaches_is_refused():
    found = refusal(nn.Sequential(Unreached(), nn.Linear(32, 3)), declaring(["0"]))
    assert found.startswith("0.down: no calibration batch reaches it, by which width 'block0.mlp' is sorted; allowed: ")
