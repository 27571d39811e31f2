"""The README's examples run as they stand, but for the device and the checkpoint's path."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("i", range(3))
def test_example(device, capsys, i):
    checkpoint = ROOT / "gkernels" / "model" / "assets" / "shakespeare"
    names = {"path/to/a/llama": str(checkpoint), '"cuda"': repr(device.type), "[1, 15043]": "[1, 150]", "max_tokens=32": "max_tokens=3", "4096": "64"}
    text = EXAMPLES[i]
    for name, here in names.items():
        text = text.replace(name, here)
    scope = {}
    exec(compile(text, f"README example {i + 1}", "exec"), scope)
    said = capsys.readouterr().out
    if i == 0:
        assert scope["out"].shape == (6, 32, 128) and not scope["out"].isnan().any() and scope["lse"].shape == (6, 32)
    elif i == 1:
        assert "no graphs" in said or "nodes" in said
    else:
        assert said.count("\n") == 3 and "length" in said


def test_all_examples_are_run():
    assert len(EXAMPLES) == 3
