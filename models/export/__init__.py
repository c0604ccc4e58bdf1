"""Adapters in the layouts of other tools: diffusers (peft) and kohya."""
