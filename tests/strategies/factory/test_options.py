"""Options of components are those of their constructors; wrong values are refused in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from common.errors import AntherError
from common.plugins import Registry
from conf import compose as hydra
from conf.groups import choices, group_options
from strategies.declarations import create
from strategies.factory.combination import check_configuration
from strategies.registry import AGGREGATIONS, OPTIMIZERS, ROBUST_RULES, SELECTIONS
from tests.helpers.configs import compose
from training.personalization import PERSONALIZATIONS

REGISTRIES = {
    "aggregation": AGGREGATIONS,
    "selection": SELECTIONS,
    "server_optimizer": OPTIMIZERS,
    "robust": ROBUST_RULES,
    "personalization": PERSONALIZATIONS,
}
ELSEWHERE = {"rank", "seed", "size", "rng", "rate", "deadline", "sites", "purpose", "yogi", "reward"}
"""Parameters that are no options: their values are elsewhere in the configuration, or fixed by the name."""
COMPONENTS = [(group, name) for group, registry in REGISTRIES.items() for name in registry]
CONF = Path(__file__).parents[3] / "conf"
GROUPS = ("compression", "fleet", "planning", "preset", "privacy", "round_loop")
NEEDS = {
    "selection=deadline": "planning.deadline=9",
    "round_loop=async": "fleet=week",
    "privacy=device": "aggregation=fedit",
    "privacy=both": "aggregation=fedit",
    "personalization=directions": "aggregation=fedit",
}
"""Settings without which an option is refused."""
SHIPPED = [f"{group}={file.stem}" for group in (*REGISTRIES, *GROUPS) for file in sorted((CONF / group).glob("*.yaml"))]

CHECKED = {
    "aggregation.max_rank=0": "must be 1 or more, or null",
    "aggregation.max_rank=7": "must be at least adapter.shared.rank=8, or null",
    "aggregation.max_rank=many": "must be a whole number, or null",
    "aggregation.energy_fraction=1.5": "must be over 0 and at most 1, or null",
    "aggregation.weighting=all": "must be one of: device, rank_slice",
    "server_optimizer=fedavgm server_optimizer.lr=0.0": "must be over 0",
    "server_optimizer=fedavgm server_optimizer.lr=null": "must be a number",
    "server_optimizer=fedadam server_optimizer.momentum=1.0": "must be 0 or more, and under 1",
    "server_optimizer=fedyogi server_optimizer.beta2=-0.1": "must be 0 or more, and under 1",
    "server_optimizer=fedyogi server_optimizer.tau=0.0": "must be over 0",
    "robust=[krum] robust.krum.outlier_fraction=0.5": "must be 0 or more, and under 0.5",
    "robust=[trimmed_mean] robust.trimmed_mean.outlier_fraction=0.5": "must be 0 or more, and under 0.5",
    "robust=[norm_bound] robust.norm_bound.bound=0.0": "must be over 0, or null",
    "robust=[norm_bound] robust.norm_bound.factor=0.0": "must be over 0",
    "robust=[norm_bound] robust.norm_bound.bound=3 robust.norm_bound.factor=0.5": "only used while bound is null; "
    "remove it",
    "robust=[afa] robust.afa.xi=0.0": "must be over 0",
    "robust=[replay] robust.replay.threshold=1.0": "must be over 0 and under 1",
    "cohort.size=3 selection=oort selection.alpha=-1.0": "must be 0 or more",
    "cohort.size=3 selection=oort selection.cutoff=0.0": "must be over 0 and at most 1",
    "cohort.size=3 selection=eafl selection.pacer_window=0": "must be 1 or more",
    "cohort.size=3 selection=eafl selection.max_selections=0": "must be 1 or more, or null",
    "cohort.size=3 selection=eafl selection.utility_weight=2.0": "must be 0 to 1",
    "cohort.size=3 selection=energy_delay selection.candidate_factor=0.5": "must be 1 or more",
    "personalization=prior personalization.pictures=0": "must be 1 or more",
    "personalization=prior personalization.weight=0.0": "must be over 0",
    "personalization=fedalt personalization.rank=0": "must be 1 or more",
    "personalization=fedalt personalization.steps=0": "must be 1 or more",
    "personalization=fedalt personalization.lr=0.0": "must be over 0",
    "personalization=population personalization.number=0": "must be 1 or more",
    "personalization=population personalization.round_steps=0": "must be 1 or more",
}
"""Wrong values, each the last word, and the requirement on them."""


def parameters(component: Any) -> Iterator[tuple[str, Any]]:
    """Yield the options of a constructor, with their defaults."""
    hints = get_type_hints(component.__init__)
    for name, parameter in inspect.signature(component).parameters.items():
        if is_dataclass(hints.get(name)):
            yield from ((field.name, field.default) for field in fields(hints[name]))
        elif name not in ELSEWHERE or component in PERSONALIZATIONS.values():
            yield name, parameter.default


@pytest.mark.parametrize(("group", "name"), COMPONENTS)
def test_yaml_has_the_options_of_the_class(group: str, name: str) -> None:
    component = REGISTRIES[group][name]
    if hasattr(component, "chosen_by"):  # by another key than its group
        assert name not in choices(group)
        return
    values = {key: option.value for key, option in group_options(group, name).items()}
    limit = {"max_rank": 16} if name == "exact" else {}
    assert values == dict(parameters(component)) | limit
    assert choices(group)[name].meaning.endswith(".")
    assert all(len(option.meaning) > 1 for option in group_options(group, name).values())


@pytest.mark.integration
@pytest.mark.parametrize("words", SHIPPED)
def test_shipped_options_are_accepted(words: str) -> None:
    size = "cohort.size=2" if words.startswith("selection") else ""
    check_configuration(compose(f"{words} {size} {NEEDS.get(words, '')}"))


@pytest.mark.integration
@pytest.mark.parametrize("words", CHECKED)
def test_wrong_value_is_refused(words: str) -> None:
    with pytest.raises(AntherError) as refused:
        check_configuration(compose(words))
    assert str(refused.value) == f"{words.rpartition(' ')[2]}: {CHECKED[words]}"


def test_whole_number_is_a_number() -> None:
    check_configuration(compose("server_optimizer=fedavgm server_optimizer.lr=1"))


def test_appended_option_is_refused() -> None:
    """Hydra's `+` adds any key."""
    with pytest.raises(AntherError, match=r"^aggregation\.length: no option of fedit, which has none$"):
        check_configuration(hydra.compose("aggregation=fedit +aggregation.length=1"))


@pytest.fixture
def registry() -> Registry[Any]:
    return Registry("example", key="example", modules=__name__)


class Required:
    def __init__(self, *, rank: int, length: float, limit: int | None = 2) -> None:
        self.values = (rank, length, limit)


def test_required_option(registry: Registry[Any]) -> None:
    registry.register("required")(Required)
    made = create(registry, "required", {"length": 3, "limit": None}, key="example", known={"rank": 4, "seed": 1})
    assert made.values == (4, 3.0, None)
    with pytest.raises(AntherError, match=r"^example\.length: required needs a value$"):
        create(registry, "required", {}, key="example", known={"rank": 4})
    with pytest.raises(AntherError, match=r"^example\.rank: no option of required, which has length, limit$"):
        create(registry, "required", {"rank": 3, "length": 1}, key="example", known={"rank": 4})


def test_function_makes_a_component(registry: Registry[Any]) -> None:
    def make(length: int = 1) -> Required:
        return Required(rank=0, length=length)

    registry.register("made")(make)
    assert create(registry, "made", {"length": 2}, key="example").values == (0, 2, 2)


def test_refusal_of_another_value(registry: Registry[Any]) -> None:
    """A message that doesn't begin with an option follows the group."""

    def refuse(*, message: str) -> None:
        raise ValueError(message)

    makers: dict[str, Callable[..., None]] = {"refusing": refuse}
    registry.update(makers)
    for message, shown in (
        ("rank=3: too low", "example: rank=3: too low"),
        ("message=x: odd", "example.message=x: odd"),
    ):
        with pytest.raises(AntherError) as refused:
            create(registry, "refusing", {"message": message}, key="example")
        assert str(refused.value) == shown
