"""What each mixer can do: the literal that test_contract.py verifies and docs/mixers.md shows.

Run it to print that table: ``python tests/matrix.py``.
"""

from __future__ import annotations

YES, NO = "✓", "–"

# name in _TABLE -> heading in docs/mixers.md
CAPABILITIES = {
    "rope": "RoPE",
    "bias": "position bias",
    "length": "any length",
    "batch": "batch-invariant",
    "1-D": "1-D",
    "2-D": "2-D",
    "3-D": "3-D",
    "prefix": "prefix tokens",
    "float64": "float64",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "auto-bf16": "autocast bfloat16",
    "auto-fp16": "autocast float16",
    "compile": "`torch.compile`",
    "export": "`torch.export`",
}

# fmt: off
_TABLE = """
mixer              rope bias length batch 1-D 2-D 3-D prefix float64 bfloat16 float16 auto-bf16 auto-fp16 compile export
agent               ✓    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
circulant           –    –     ✓      ✓    ✓   ✓   ✓    –       ✓       ✓        ✓        ✓         ✓        ✓      ✓
conv                –    –     ✓      ✓    ✓   ✓   ✓    –       ✓       ✓        ✓        ✓         ✓        ✓      ✓
efficient           –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
external            –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
fourier             –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
gfnet               –    –     –      ✓    ✓   ✓   ✓    –       ✓       ✓        ✓        ✓         ✓        ✓      ✓
gmlp                –    –     –      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
inline              –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
linear              –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
linformer           ✓    –     –      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
linformer-pytorch   –    –     –      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
lite_mla            –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
mala                –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
mhla                –    –     –      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
mlp                 –    –     –      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
nystrom             ✓    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
nystrom-attention   –    –     ✓      –    ✓   ✓   ✓    ✓       ✓       –        –        ✓         ✓        ✓      ✓
performer           ✓    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
performer-pytorch   –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        –        ✓         –        ✓      ✓
rala                –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
softmax             ✓    ✓     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
softmax_eager       ✓    ✓     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
talking_heads       ✓    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
ttt                 –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
xca                 –    –     ✓      ✓    ✓   ✓   ✓    ✓       ✓       ✓        ✓        ✓         ✓        ✓      ✓
"""  # noqa: E501
# fmt: on


def _parse(table: str) -> dict[str, dict[str, bool]]:
    (_, *capabilities), *rows = (line.split() for line in table.strip().splitlines())
    if capabilities != list(CAPABILITIES):
        raise ValueError(f"the table's columns {capabilities} are not {list(CAPABILITIES)}")
    return {
        name: {c: {YES: True, NO: False}[m] for c, m in zip(capabilities, marks, strict=True)}
        for name, *marks in rows
    }


MATRIX = _parse(_TABLE)
# those that leave class and register tokens unchanged: a class token would learn nothing
PATCHES_ONLY = {name for name, row in MATRIX.items() if not row["prefix"]}
BIASED = [name for name, row in MATRIX.items() if row["bias"]]
# those that store a map, so that their memory grows quadratically
QUADRATIC = ("softmax_eager", "talking_heads")


def markdown() -> str:
    """The table of docs/mixers.md."""
    lines = [
        ["mixer", *CAPABILITIES.values()],
        ["---", *(":-:" for _ in CAPABILITIES)],
        *(
            [f"`{name}`", *(YES if can else NO for can in row.values())]
            for name, row in MATRIX.items()
        ),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown())
