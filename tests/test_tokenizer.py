"""Tokenizer: encoding, streaming detokenisation of any ids, and chat templates."""

import importlib.util
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

import gkernels
from gkernels.model.tokenizer import TextStream, Tokenizer

SHIPPED = Path(gkernels.__file__).parent / "model" / "assets" / "shakespeare"
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
hard = ["naïve café", "日本語 🙂🙃 text", " a  b ", "\u0301\u200d\U0001f469\u200d\U0001f467"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(hard)


def byte_level():
    """256 bytes, some merged pairs that cut characters in two, and one special token."""
    backend = Backend.from_file(str(SHIPPED / "tokenizer.json"))
    return Tokenizer(backend, {}, None, "byte level")


def sentencepiece():
    """Pieces as Llama 2 has them: a mark for the space, single bytes for what has no piece, and a decoder that strips one leading space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefgh", "▁a", "▁b", "ab", "▁ab", "cd", "▁▁"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab"), ("c", "d"), ("▁", "▁")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    return Tokenizer(backend, {}, None, "sentencepiece")


def check_stream(tokenizer, stream, ids):
    pieces = [stream.push(i) for i in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces), pieces
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    return pieces


@given(texts)
def test_text_survives_the_round_trip(text):
    for tokenizer in (byte_level(), sentencepiece()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
def test_stream_joins_to_the_text(text):
    for tokenizer in (byte_level(), sentencepiece()):
        pieces = check_stream(tokenizer, tokenizer.stream(), tokenizer.encode(text)) if not text.endswith("\ufffd") else []
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 1023), max_size=40))
def test_stream_of_any_bytes_joins_to_their_text(ids):
    tokenizer = byte_level()
    check_stream(tokenizer, tokenizer.stream(), ids)


@given(st.lists(st.integers(259, 273) | st.integers(0, 2) | st.integers(3 + 32, 3 + 126), max_size=20))
def test_stream_of_any_pieces_keeps_every_space(ids):
    tokenizer = sentencepiece()
    check_stream(tokenizer, tokenizer.stream(), ids)


def test_stream_shows_a_character_with_its_last_byte():
    tokenizer = sentencepiece()
    ids = [3 + byte for byte in "é🙂".encode()]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "", "🙂"]
    assert stream.flush() == ""


def test_the_stream_check_catches_decoding_each_token_alone():
    class EachAlone(TextStream):
        def push(self, token_id):
            return self._decode([token_id])
    space, half = sentencepiece(), byte_level()
    with pytest.raises(AssertionError):
        check_stream(space, EachAlone(space.decode), space.encode("a b"))
    with pytest.raises(AssertionError):
        check_stream(half, EachAlone(half.decode), half.encode("é🙂"))


def write(path, config=None, template=None, tokens=("<|im_start|>", "<|im_end|>", "<s>")):
    backend = Backend.from_file(str(SHIPPED / "tokenizer.json"))
    backend.add_special_tokens(list(tokens))
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


MESSAGES = [{"role": "user", "content": "Hi <b>'ü'</b>"}]
RENDERED = "<|im_start|>user\nHi <b>'ü'</b><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("config, template", [
    ({"chat_template": CHATML}, None), (None, CHATML), ({"chat_template": "old"}, CHATML),
    ({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]}, None)],
    ids=["config", "file", "file before config", "list"])
def test_template_is_found_wherever_it_lies(tmp_path, config, template):
    tokenizer = Tokenizer.from_dir(write(tmp_path, config, template))
    assert tokenizer.render_chat(MESSAGES) == RENDERED
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt=False) == RENDERED.removesuffix("<|im_start|>assistant\n")
    ids = tokenizer.apply_chat_template(MESSAGES)
    assert ids[0] == 1024 and ids.count(1024) == 2, "the template's own special tokens, and none before them"
    assert tokenizer.encode(RENDERED) == [0, *ids]


@pytest.mark.parametrize("template, want", [
    ("{{ bos_token }}{{ eos_token }}{{ messages[0].role }}", "<s></s>user"),
    ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <b>\'ü\'</b>"}]'),
    ("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'),
    ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
    ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ("{% if tools is not none %}tools{% else %}none{% endif %}{{ date_string }}", "none1 Jan"),
])
def test_template_environment(tmp_path, template, want):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    assert Tokenizer.from_dir(write(tmp_path, config, template)).render_chat(MESSAGES, date_string="1 Jan") == want


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('roles must alternate') }}", "the chat template refused these messages: roles must alternate"),
    ("{% if %}", "the chat template refused"),
    ("{{ messages + 1 }}", "the chat template refused"),
    ("{{ messages.append(1) }}", "not safely callable|is not safe|unsafe"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
])
def test_template_failures_are_named(tmp_path, template, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_dir(write(tmp_path, None, template)).render_chat(MESSAGES)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json: no such file; make it where transformers is installed"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not readable by the package tokenizers"):
        Tokenizer.from_dir(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match=r"got no chat template, expected chat_template.jinja"):
        Tokenizer.from_dir(tmp_path).apply_chat_template(MESSAGES)
    for config in ({"chat_template": 3}, {"bos_token": {"text": "x"}}, {"chat_template": [{"name": "default"}]}, {"eos_token": [1]}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"tokenizer_config.json: got .*, expected texts"):
            Tokenizer.from_dir(tmp_path)


def places(value, path=()):
    """The path of every value in a JSON document; of long lists and objects, the first few."""
    yield path
    if isinstance(value, (dict, list)):
        for key in list(value if isinstance(value, dict) else range(len(value)))[:4]:
            yield from places(value[key], (*path, key))


DOCUMENT = json.loads((SHIPPED / "tokenizer.json").read_text())


@given(st.sampled_from([place for place in places(DOCUMENT) if place]),
       st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from([[], {}, [1], {"type": "BPE"}]))
@example(("post_processor", "special_tokens", "<|endoftext|>"), None)
@example(("post_processor", "single", 0, "SpecialToken", "id"), "no such token")
def test_damaged_tokenizers_are_refused_or_work(tmp_path, place, value):
    document = json.loads(json.dumps(DOCUMENT))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    try:
        tokenizer = Tokenizer.from_dir(tmp_path)
    except ValueError as error:
        assert f"{tmp_path / 'tokenizer.json'}: not readable by the package tokenizers" in str(error)
    else:
        assert isinstance(tokenizer.decode(tokenizer.encode("To be")), str)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2", "safetensors"])
def test_missing_packages_name_the_pip_line(tmp_path, monkeypatch, package):
    from gkernels.model.config import LlamaConfig
    from gkernels.model.load import load_weights
    write(tmp_path, None, CHATML)
    shutil.copy(SHIPPED / "model.safetensors", tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'gkernels\[model\]'"):
        Tokenizer.from_dir(tmp_path).render_chat(MESSAGES)
        load_weights(tmp_path, LlamaConfig.from_dir(SHIPPED), "cpu")


def test_settings_of_a_training_run_are_dropped(tmp_path):
    backend = Backend.from_file(str(SHIPPED / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer.from_dir(SHIPPED)
    assert Tokenizer.from_dir(tmp_path).encode("To be, or not to be") == plain.encode("To be, or not to be")
    assert plain.vocab_size == 1024 and plain.special == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the package transformers")
def test_equals_transformers(tmp_path):
    from transformers import AutoTokenizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    write(tmp_path, config, "{{ bos_token }}" + CHATML + "{{ messages | tojson }}{% if tools is none %}-{% endif %}")
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("ROMEO: naïve 🙂", "", " a  b<s>c"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.render_chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(MESSAGES) == list(theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False))
