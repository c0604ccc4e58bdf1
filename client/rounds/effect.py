"""Check after training that an adapter does something: its product is not zero, and it changes the output.

An adapter that changes nothing looks like a success: its loss is as good as before, and it stays. Usual causes are too
few pictures for any step to help the validation pictures, a learning rate that is too low for the base's precision, and
layers that the output doesn't depend on.
"""

from __future__ import annotations

from collections.abc import Generator

from models.lora.adapter import Adapter, concatenate
from models.lora.norm_bound import is_zero
from training.jobs import Examples, Job, MeasureJob, Result, expect

ZERO = (
    "its product is zero at every layer, since no step helped the validation pictures, or the rate is too low: "
    "add pictures, or set a higher learning rate"
)
UNCHANGED = "the output with it equals the output without it: set a higher learning rate, or other layers"


def missing_effect(trained: Adapter, shared: Adapter, examples: Examples) -> Generator[Job, Result, str | None]:
    """Return the reason why a trained adapter does nothing, or None if it has an effect.

    The loss of one example is measured with and without it, whatever its product is, so that the amount of work
    doesn't depend on the pictures.

    Args:
        trained: the personal adapter.
        shared: the shared adapter under it.
        examples: encoded pictures; the first is used.
    """
    one = Examples(examples.latents[:1], examples.context[:1])
    with_it = expect(float, (yield MeasureJob(examples=one, adapter=concatenate([shared, trained]))))
    without = expect(float, (yield MeasureJob(examples=one, adapter=shared)))
    if is_zero(trained):
        return ZERO
    return UNCHANGED if with_it == without else None
