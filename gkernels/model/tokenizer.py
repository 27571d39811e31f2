"""Tokenizer: the tokenizer.json of a checkpoint folder (package `tokenizers`), streaming detokenisation, and its chat template (jinja2).

A chat template comes with the checkpoint and is a program: it runs in jinja2's immutable sandbox. Does not know transformers' slow
tokenizers (tokenizer.model), `{% generation %}` blocks, or templates in additional_chat_templates/.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from . import optional
from .config import read_json

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    def __init__(self, tokenizer, special: dict[str, str], template: str | None, source: str):
        self._tokenizer, self.special, self._template, self._source = tokenizer, special, template, source

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json and, where they are there, tokenizer_config.json and chat_template.jinja."""
        folder = Path(path)
        file, config_file, template_file = (folder / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
        if not file.is_file():
            raise ValueError(f"gkernels.model: {file}: no such file; make it where transformers is installed: python -c \"from "
                             "transformers import AutoTokenizer as A; A.from_pretrained('FOLDER').save_pretrained('FOLDER')\"")
        backend = optional("tokenizers").Tokenizer
        try:
            tokenizer = backend.from_file(str(file))
            tokenizer.encode("")     # a post-processor that names tokens the file lacks fails here, not in mid-service
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:   # the package raises plain Exception, and a Rust panic is a BaseException
            raise ValueError(f"gkernels.model: {file}: not readable by the package tokenizers ({error}); fetch the file again") from error
        tokenizer.no_truncation()    # a file may carry the settings of a training run
        tokenizer.no_padding()
        config = read_json(config_file) if config_file.is_file() else {}
        try:
            tokens = {name: _text(config[name], "content") for name in SPECIAL if config.get(name)}
            template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
            if isinstance(template, list):
                template = {_text(entry, "name"): _text(entry, "template") for entry in template}.get("default")
            return cls(tokenizer, tokens, None if template is None else _text(template, "template"), str(folder))
        except (TypeError, KeyError) as error:
            raise ValueError(f"gkernels.model: {config_file}: got {error!r}, expected texts, or objects with texts, for the special tokens "
                             "and the chat template") from error

    @property
    def vocab_size(self) -> int:
        """The number of ids the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that tokenizer.json adds."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self._tokenizer.decode(ids)

    def stream(self) -> TextStream:
        """A detokeniser of one sequence that is generated token by token."""
        return TextStream(self.decode)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The text of a chat ([{"role": ..., "content": ...}, ...]); `variables` are passed to the template (tools, date_string, ...)."""
        if self._template is None:
            raise ValueError(f"gkernels.model: {self._source}: got no chat template, expected chat_template.jinja or the key chat_template "
                             "in tokenizer_config.json; pass plain text, or use an instruction-tuned checkpoint")
        environment = optional("jinja2.sandbox").ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                                              extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
        values = {"tools": None, "documents": None} | self.special | variables
        try:
            return environment.from_string(self._template).render(values, messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:   # a template fails in as many ways as Python does
            raise ValueError(f"gkernels.model: {self._source}: the chat template refused these messages: {error}") from error

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """Token ids of a chat. No special tokens are added: the template writes them."""
        return self._tokenizer.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False).ids


class TextStream:
    """Turns token ids into text as they come. The pieces of `push`, and `flush` at the end, join to the text of all ids.

    Text that ends in U+FFFD is held back, because the next token may complete the character. Each step decodes the last piece's tokens
    again, so that a decoder which strips the leading space of its input strips it from both sides of the difference.
    """

    def __init__(self, decode):
        self._decode, self._ids, self._shown = decode, [], 0    # the first `_shown` ids have been emitted

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._emit(final=False)

    def flush(self) -> str:
        return self._emit(final=True)

    def _emit(self, final):
        before, after = self._decode(self._ids[:self._shown]), self._decode(self._ids)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._ids, self._shown = self._ids[self._shown:], len(self._ids) - self._shown
        return after[len(before):]


def _text(value, key):
    """A text, or the text that an object holds under `key`."""
    text = value[key] if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} {repr(text)[:100]}")
    return text


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise optional("jinja2").TemplateError(message)
