"""Values of a round's settings are checked."""

from typing import Any

import pytest

from conf.schemas.rounds import CompressionConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upload": "int2"}, "compression.upload=int2: must be one of: fp32, fp16, int8, int4"),
        ({"upload": "int4", "keep_fraction": 0.0}, "compression.keep_fraction=0.0: must be over 0 and at most 1"),
        ({"keep_fraction": 0.5}, "compression.keep_fraction=0.5: requires compression.upload=int4, int8 or fp16"),
    ],
)
def test_compression_values_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**changes)
