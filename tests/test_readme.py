"""The README's examples run as they stand, but for the device and the checkpoint's path; its files exist, and its figures are the files'."""

import json
import re
from pathlib import Path

import pytest

from gkernels.model.config import LlamaConfig
from gkernels.model.load import load_weights, views

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHECKPOINT = ROOT / "gkernels" / "model" / "assets" / "shakespeare"
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("i", range(3))
def test_example(device, capsys, i):
    names = {"path/to/a/llama": str(CHECKPOINT), '"cuda"': repr(device.type), "[1, 15043]": "[1, 150]", "max_tokens=32": "max_tokens=3", "4096": "64"}
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


def check_filled(text):
    assert "@@" not in text, "a placeholder is left in the README"


def check_files(text):
    """Words in backticks with a slash or the ending of a file are files or folders of the repository."""
    words = re.findall(r"`([\w./-]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    paths = [word for word in words if "/" in word or word.endswith((".py", ".md", ".json", ".toml", ".txt"))]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert paths and not missing, f"not in the repository: {missing}"


def check_figures(text):
    """Losses as training.json has them, and the number of distinct weights."""
    training = json.loads((CHECKPOINT / "training.json").read_text())
    nats, bits = re.search(r"Held-out loss: ([\d.]+) nats a token, ([\d.]+) bits a byte", text).groups()
    assert (nats, bits) == (f"{training['held_out_nats_per_token']:.2f}", f"{training['held_out_bits_per_byte']:.2f}"), "another loss"
    config = LlamaConfig.from_dir(CHECKPOINT)
    weights = load_weights(CHECKPOINT, config, "cpu")
    distinct = {view.data_ptr(): view.numel() for view in views(weights, config).values()}        # tied tables count once
    assert re.search(r"a Llama of ([\d.]+) M parameters", text)[1] == f"{sum(distinct.values()) / 1e6:.1f}", "another number of parameters"


@pytest.mark.parametrize("check", [check_filled, check_files, check_figures])
def test_readme(check):
    check(README)


@pytest.mark.parametrize("check, there, instead, words", [
    (check_filled, "## Layout", "@@LAYOUT@@", "a placeholder is left"),
    (check_files, "`gkernels/kernels`", "`gkernels/kernel`", r"not in the repository: \['gkernels/kernel'\]"),
    (check_files, "`CONTRIBUTING.md`", "`CONTRIBUTE.md`", r"not in the repository: \['CONTRIBUTE.md'\]"),
    (check_figures, " nats a token", "1 nats a token", "another loss"),
    (check_figures, " M parameters", "1 M parameters", "another number of parameters"),
])
def test_a_wrong_readme_is_caught(check, there, instead, words):
    assert there in README
    with pytest.raises(AssertionError, match=words):
        check(README.replace(there, instead))
