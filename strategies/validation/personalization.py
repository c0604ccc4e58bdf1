"""Rule on the method of personalization, as in `strategies.validation.rules`."""

from __future__ import annotations

from strategies.validation.combination import Combination
from strategies.validation.wording import aggregations, listed
from training.personalization import Personalization


def personalization(chosen: Combination) -> str | None:
    """Refuse a method that takes part in rounds where its values can't enter them, or where they lose their meaning."""
    name, method = chosen.personalization
    key = f"personalization={name}"
    if method.in_rounds and chosen.of_examples:
        return (
            f"{key}: values fitted to pictures enter the training of the shared adapter without noise, and "
            f"privacy={chosen.level} promises a bound for each picture; use personalization=lora"
        )
    if method.in_rounds and "split" in chosen.trained_parts:
        return (
            f"{key}: with aggregation={chosen.aggregation.name} devices keep their own B already; use aggregation=fedit"
        )
    if method.last_round_steps is not None and (reason := _last_round_conflict(chosen, method)):
        return f"{key}: {reason}"
    if not method.elementwise:
        return None
    rule = chosen.aggregation.declared
    if not chosen.stable_factors or chosen.trained_parts != {"both"} or rule.mixed_ranks:
        fits = aggregations(lambda rule: rule.stable_factors and not rule.mixed_ranks and rule.trains(1) == "both")
        return (
            f"{key}: its directions are averaged number by number, and {chosen.aggregation.name} mixes them; use {fits}"
        )
    if chosen.scaffold or chosen.overlapping:
        other = "drift_correction=scaffold" if chosen.scaffold else f"round_loop={chosen.timing.name}"
        return f"{key}: can't be combined with {other}; remove one of them"
    return None


def _last_round_conflict(chosen: Combination, method: Personalization) -> str | None:
    """Refuse settings under which the server has no single updates of B in the last round, or can't use them."""
    use = "use personalization=lora"
    if chosen.of_devices:
        return f"its last round needs the update of each device, and privacy={chosen.level} uses a noised sum; {use}"
    if chosen.of_examples:
        return (
            f"its last round has {method.last_round_steps} steps, which are not among those that ε of "
            f"privacy={chosen.level} is solved for; {use}"
        )
    if not chosen.trained_parts <= {"both", "a", "b"}:
        return f"devices have no B on a common A with aggregation={chosen.aggregation.name}; use aggregation=fedit"
    if rules := [name for name, rule in chosen.robust if not hasattr(rule, "check")]:
        return f"its last round uses every update, and robust={listed(rules)} would leave some out; use robust=[]"
    if hasattr(chosen.optimizer.declared, "step"):
        return "a step of the server would scale the directions; use server_optimizer=none"
    if chosen.scaffold or chosen.overlapping:
        other = "drift_correction=scaffold" if chosen.scaffold else f"round_loop={chosen.timing.name}"
        return f"can't be combined with {other}; remove one of them"
    devices, number = chosen.cohort_size or chosen.devices, getattr(method, "number", 0)
    if devices is not None and devices <= number:
        return f"{number} directions need more than {devices} devices in the last round; lower number, or add devices"
    return None
