"""A LoRA on top of the shared adapter."""

from __future__ import annotations

from training.personalization import Personalization, personalization


@personalization("lora")
class LoraOnTop(Personalization):
    """Train a second LoRA; its A starts as the shared adapter's, its B at zero."""
