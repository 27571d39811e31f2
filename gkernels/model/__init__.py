"""The model side: configuration, weights and tokenizer of Hugging Face checkpoints, and the Llama-style model that runs on the kernels."""

from importlib import import_module


def optional(name):
    """Imports a module of the `model` extra, or says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"gkernels.model needs the package {name.partition('.')[0]}: pip install 'gkernels[model]'") from error
